"""What a network may ask for, decided before anything is allocated or compiled; the one place for such limits.

Each is well above what real networks need (ImageNet at 512 x 512, DPN-92, 2,000 layers, 138 million weights), and the
environment sets another: ``MANIDP_MAX_NODES=50000 manidp info large.safetensors``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from manidp.errors import GraphError, ManiDPError

FLOAT32_TINY, FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # least and largest normal float32
NAME_LENGTH = 255  # characters in the name of a node

_SAYS = {
    "nodes": "has {} nodes",
    "channels": "has {} channels or features",
    "side": "is {} pixels high or wide",
    "window": "has a kernel, stride or padding of {}",
    "elements": "makes {} numbers of one image",
    "live_bytes": "needs {} bytes at one time for the maps of one image",
    "map_bytes": "makes maps of {} bytes of one image",
    "weights": "has {} weights",
    "macs": "takes {} multiply-adds for one image",
    "code": "takes {} characters of generated code",
    "workspace_bytes": "needs {} bytes at one time to compute an image",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest numbers that a network may have, and that the engine may spend on it; bytes are of float32.

    ``MANIDP_MAX_NAME=N`` in the environment, NAME a field's name in capitals, takes the place of a default.
    """

    nodes: int = 40_000
    channels: int = 2**20
    side: int = 2**15
    window: int = 128
    elements: int = 2**26
    live_bytes: int = 2**30
    map_bytes: int = 2**33
    weights: int = 2**30
    macs: int = 10**12
    code: int = 16 * 2**20  # LLVM IR: 2,000 gated layers; LLVM takes about a second for each million
    workspace_bytes: int = 2**31

    @classmethod
    def from_environment(cls) -> Limits:
        """The limits that hold now. Raises GraphError for a setting that is no positive whole number."""
        chosen = {}
        for field in fields(cls):
            text = os.environ.get(f"MANIDP_MAX_{field.name.upper()}")
            if text is not None:
                if not (text.isascii() and text.isdigit() and 0 < len(text) < 20):
                    raise GraphError(f"MANIDP_MAX_{field.name.upper()} must be a positive whole number; got {text!r}")
                chosen[field.name] = int(text)
        return cls(**chosen)

    def check(self, name: str, value: int, what: object, error: type[ManiDPError] = GraphError) -> None:
        """Raises ``error`` if ``value`` exceeds the limit ``name``; ``what`` has it."""
        limit = getattr(self, name)
        if value > limit:
            came = f"{value:,}" if value < 10**18 else "more than 10^18"
            raise error(
                f"{what} {_SAYS[name].format(came)}; the limit is {limit:,}, "
                f"which MANIDP_MAX_{name.upper()} in the environment raises"
            )
