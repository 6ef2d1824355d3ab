"""Inference and fine-tuning with MindSpore; everything that imports MindSpore is in here."""

import os

from manidp.errors import MissingExtraError

# With AVX-512, MindSpore 2.10's oneDNN has no fast convolution for its layout: AVX2 is some 30 times as fast.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
try:
    import mindspore as _mindspore  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "this needs MindSpore, and MindSpore needs numpy < 2; in an environment of its own (python -m venv), install "
        "them with: pip install 'manidp[mindspore]' 'numpy<2'"
    ) from error
