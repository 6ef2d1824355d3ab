"""Training and inference with PyTorch; everything that imports torch is in here."""

from manidp.errors import MissingExtraError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError("this needs PyTorch; install it with: pip install 'manidp[torch]'") from error
