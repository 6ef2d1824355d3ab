"""Any torch CNN as a checkpoint: exported, lowered op by op, and compared with the module before it is returned."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from manidp import reference
from manidp.data.preprocessing import Preprocessing
from manidp.errors import FrontendError, some
from manidp.formats.checkpoint import Checkpoint
from manidp.torch.lowering import BATCH_SIZE, KEPT_WHOLE, TORCH, Lowered, lower

TOLERANCE = 1e-10  # largest difference from the module, in float64, relative to its largest logit,
MOST = 1e-6  # or so many ROUNDINGS where a deep network makes more of one, up to this
ROUNDINGS = 16  # times what the module's own logits change by when its image and weights change by one rounding
_ENDINGS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "": lambda logits: logits,
    "softmax": lambda logits: torch.softmax(torch.from_numpy(logits), 1).numpy(),
    "log_softmax": lambda logits: torch.log_softmax(torch.from_numpy(logits), 1).numpy(),
}


def from_torch(
    module: nn.Module,
    example: Tensor,
    *,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
) -> Checkpoint:
    """The module, in evaluation mode, as a checkpoint: for the engine, gates, training and files.

    example: what the module takes, float (B, 3, H, W); the checkpoint reads images of this height and width.
    preprocessing: what turns pixels into the module's input; by default pixels in 0..1 as they are (mean 0, std 1).
    classes: names, one for each logit; by default "class 0", "class 1", ...

    The module itself is not changed. It is traced by ``torch.export``, so its ``forward`` must do the same for every
    image. A softmax at its end, or the logarithm of one, is left out: a checkpoint makes logits. What comes out is
    compared with the module in float64, on the example, on random images and with other weights of the same shapes.

    ``provenance["imported"]["names"]`` says which parameter is which of the module's ``state_dict``, for
    ``to_state_dict``; a parameter that the module uses twice is two here. Buffers, and numbers that only its
    ``forward`` knows, are constants, which training leaves as they are. What is made of several numbers of its
    parameters (weights that it normalises, the matrix of a convolution over channels) is trained, but then does not go
    back.

    Raises FrontendError: for ops that no op of a graph stands for, all of them listed with module and source line; for
    a module that takes decisions from data, has several outputs, or does not run on the example; for one that differs.
    """
    _check_example(module, example)
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    images = example.detach().to(device)
    images = torch.cat([images] * BATCH_SIZE)[:BATCH_SIZE] if len(images) < BATCH_SIZE else images[:BATCH_SIZE]
    with _evaluating(module):
        _check_output(module, images)
        exported = _export(module, images)
        state = _state(module)
        lowered = lower(exported, state, tuple(images.shape[1:]))
        chance = torch.Generator().manual_seed(0)
        noise = torch.randn(images.shape, generator=chance, dtype=torch.float64)
        _compare(module, state, lowered, torch.cat([images[:1].cpu().double(), noise[:1]]), own=True)
        other = _other_weights(state, {name for name, _ in module.named_parameters(remove_duplicate=False)}, chance)
        _compare(module, other, lower(exported, other, tuple(images.shape[1:])), noise[1:], own=False)
    weights = {name: value.numpy().astype(np.float32) for name, value in lowered.weights.items()}
    return Checkpoint(
        lowered.graph,
        weights,
        preprocessing or Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (images.shape[2], images.shape[3])),
        tuple(classes) if classes is not None else tuple(f"class {k}" for k in range(lowered.graph.num_classes)),
        {
            "imported": {
                "module": f"{type(module).__module__}.{type(module).__qualname__}",
                "torch": torch.__version__,
                "names": dict(lowered.names),
                "fixed": {name: _digest(value) for name, value in weights.items() if name not in lowered.names},
            }
        },
    )


def random_images(channels: int, height: int, width: int) -> Tensor:
    """An example when there is none: one image (1, channels, height, width) of N(0, 1), always the same."""
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def to_state_dict(checkpoint: Checkpoint, module: nn.Module) -> dict[str, Tensor]:
    """The module's ``state_dict`` with the weights of a checkpoint that was imported from such a module.

    Gates have no place in the module and are left out. Raises FrontendError if the checkpoint was not imported, if a
    name or shape does not fit, if copies of a parameter that the module uses twice are no longer equal, or if what is
    made of several of its numbers was trained.
    """
    imported = checkpoint.provenance.get("imported")
    names = imported.get("names") if isinstance(imported, Mapping) else None
    fixed = imported.get("fixed") if isinstance(imported, Mapping) else None
    if not isinstance(names, Mapping) or not isinstance(fixed, Mapping):
        raise FrontendError("this checkpoint was not imported by from_torch: it does not say whose weights it has")
    state = module.state_dict()
    given: dict[str, NDArray[np.float32]] = {}
    for ours, theirs in names.items():
        value = checkpoint.weights.get(ours)
        if value is None or theirs not in state or state[theirs].numel() != value.size:
            raise FrontendError(f"'{ours}' of the checkpoint does not fit '{theirs}' of the module")
        if theirs in given and not np.array_equal(given[theirs].ravel(), value.ravel()):
            raise FrontendError(f"'{theirs}' is used more than once, and training has made its copies different")
        given[theirs] = value
    changed = [name for name, digest in fixed.items() if _digest(checkpoint.weights.get(name)) != digest]
    if changed:
        raise FrontendError(
            f"the module's state_dict cannot hold what was trained and is no parameter of it: {some(changed)}"
        )
    alias = {value.data_ptr(): given[name] for name, value in state.items() if name in given}
    return {
        name: value if (new := given.get(name, alias.get(value.data_ptr()) if value.numel() else None)) is None
        else torch.from_numpy(np.array(new)).reshape(value.shape).to(value)
        for name, value in state.items()
    }  # fmt: skip


def _digest(value: NDArray[np.float32] | None) -> str:
    return "" if value is None else hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def _check_example(module: object, example: object) -> None:
    if not isinstance(module, nn.Module):
        raise FrontendError(f"from_torch takes a torch.nn.Module; got {type(module).__name__}")
    if not isinstance(example, Tensor) or not example.is_floating_point():
        kind = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise FrontendError(f"the example is a float tensor (B, 3, H, W), what the module takes; got {kind}")
    if example.dim() != 4 or example.shape[1] != 3 or min(example.shape) < 1:
        raise FrontendError(f"the example is a batch of RGB images (B, 3, H, W); got {tuple(example.shape)}")


def _check_output(module: nn.Module, images: Tensor) -> None:
    """Whether the module runs on the images, and makes one tensor of logits."""
    made = _run(module, images)
    parts = _outputs(made)
    if len(parts) != 1:
        raise FrontendError(
            f"the module has {len(parts)} outputs; a network has one, its logits: wrap it to return them"
        )
    (logits,) = parts
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        raise FrontendError(
            f"the module's output is its logits, (B, classes), here ({len(images)}, classes); got {shape}"
        )


def _outputs(made: Any) -> list[Any]:
    """What a module makes, one after the other."""
    if isinstance(made, Mapping):
        return list(made.values())
    return list(made) if isinstance(made, (tuple, list)) else [made]


def _run(module: Callable[[Tensor], Any], images: Tensor) -> Any:
    try:
        return module(images)
    except FrontendError:  # of a module that is a file's network
        raise
    except Exception as error:
        raise FrontendError(f"the module does not run on images {tuple(images.shape)}: {_told(error)}") from error


def _export(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The module as functional ATen ops: writes in place are written out, what we know is not taken apart."""
    try:
        with _quiet():
            exported: torch.export.ExportedProgram = torch.export.export(module, (images,), strict=False)
            table = torch.export.default_decompositions()
            for op in KEPT_WHOLE:
                if op in table:
                    table.pop(op)  # type: ignore[no-untyped-call]
            exported = exported.run_decompositions(table)
    except Exception as error:
        raise FrontendError(_why_not(error)) from error
    if len(exported.graph_signature.user_outputs) != 1 or len(exported.graph_signature.user_inputs) != 1:
        raise FrontendError("a network has one input, the image, and one output, its logits")
    if exported.graph_signature.buffers_to_mutate:
        changed = some(exported.graph_signature.buffers_to_mutate.values())
        raise FrontendError(f"the module writes to its own buffers in evaluation mode: {changed}")
    return exported


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch warns of, logs and prints while it traces: what matters of it is told by an error of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _why_not(error: Exception) -> str:
    text = str(error)
    if "data-dependent" in text or "data dependent" in text:
        return f"the module's forward decides by what is in its data, which no graph can hold{_where(error)}"
    return f"the module cannot be traced: {_told(error)}"


def _told(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:300]}{_where(error)}"


def _where(error: Exception) -> str:
    """The author's line that an error came from."""
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((TORCH, __file__))
    ]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode and without gradients; afterwards as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


class _InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every op in float64, whatever the module's tensors are and whatever it casts to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(part: Any) -> Any:
            low = (torch.float32, torch.float16, torch.bfloat16)
            if isinstance(part, Tensor):
                return part.double() if part.dtype in low else part
            return torch.float64 if part in low else part

        args, kwargs = torch.utils._pytree.tree_map(widened, (args, kwargs or {}))
        return torch.utils._pytree.tree_map(widened, func(*args, **kwargs))


def _state(module: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {name: value.detach() for name, value in (*parameters, *buffers)}


def _other_weights(
    state: Mapping[str, Tensor], parameters: Collection[str], chance: torch.Generator
) -> dict[str, Tensor]:
    """Weights like these, no two alike and none zero: where a fresh network's hide a mistake, these do not."""
    other: dict[int, Tensor] = {}  # what is used twice stays one
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=chance, dtype=torch.float64).to(value.device) / 4
        new = value
        if value.is_floating_point() and name.endswith("running_var"):
            new = value.double() * noise.exp()
        elif value.is_floating_point() and (name in parameters or name.endswith("running_mean")):
            new = value.double() + noise * value.double().square().mean().sqrt().clamp(min=0.1)
        other.setdefault(value.data_ptr(), new)
    return {name: other[value.data_ptr()] if value.numel() else value for name, value in state.items()}


def _compare(module: nn.Module, state: Mapping[str, Tensor], lowered: Lowered, images: Tensor, own: bool) -> None:
    """Whether graph and module make the same logits; those of weights not the module's ``own`` only if finite."""
    meant = _logits(module, state, images)
    if not np.isfinite(meant).all():
        if not own:
            return
        raise FrontendError("the module's logits are not finite: nothing can be compared with them")
    weights = {name: value.numpy() for name, value in lowered.weights.items()}
    came = _ENDINGS[lowered.ending](reference.run(lowered.graph, weights, images.numpy()).logits)
    largest = max(float(np.abs(meant).max()), 1e-300)
    difference, limit = float(np.abs(came - meant).max()) / largest, TOLERANCE
    if not difference <= limit:
        limit = max(limit, min(ROUNDINGS * _rounding(module, state, images, meant) / largest, MOST))
    if not difference <= limit:
        raise FrontendError(
            f"the imported network differs from the module by {difference:.1e} of its largest logit (at most "
            f"{limit:.0e}); either forward depends on more than image and weights (random numbers, the size of the "
            "batch, state), or the import is at fault"
        )


def _logits(module: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> NDArray[np.float64]:
    """(B, classes), in float64."""
    device = next(iter(state.values())).device if state else images.device
    with _InFloat64():  # type: ignore[no-untyped-call]
        wide = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
        made = _run(functools.partial(torch.func.functional_call, module, wide, tie_weights=False), images.to(device))
    logits: NDArray[np.float64] = _outputs(made)[0].cpu().numpy()
    return logits


def _rounding(module: nn.Module, state: Mapping[str, Tensor], images: Tensor, meant: NDArray[np.float64]) -> float:
    """What becomes of the module's logits when each number of images and weights is one rounding off, up or down."""
    chance = torch.Generator().manual_seed(1)

    def rounded(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        up = torch.rand(value.shape, generator=chance, dtype=torch.float64).round().to(value.device)
        return value.double() * (1 + (2 * up - 1) * 2.0**-52)

    def once() -> float:
        off = {name: rounded(value) for name, value in state.items()}
        return float(np.abs(_logits(module, off, rounded(images)) - meant).max())

    return max(once() for _ in range(3))
