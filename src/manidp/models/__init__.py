"""Networks by name, as graphs without weights; one file for each family."""

from manidp.models.cifar_resnet import resnet
from manidp.models.imagenet_resnet import imagenet_resnet

__all__ = ["imagenet_resnet", "resnet"]
