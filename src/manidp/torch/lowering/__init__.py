"""From torch's ATen ops to the ops of a graph, one handler each."""

from manidp.torch.lowering.nodes import BATCH_SIZE
from manidp.torch.lowering.walk import KEPT_WHOLE, TORCH, Lowered, lower

__all__ = ["BATCH_SIZE", "KEPT_WHOLE", "TORCH", "Lowered", "lower"]
