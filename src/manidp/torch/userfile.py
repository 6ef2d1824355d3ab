"""A torch network that a user names on the command line: what in a Python file of theirs makes it, and its weights."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from manidp.data.preprocessing import Preprocessing
from manidp.errors import FrontendError, some
from manidp.files import open_regular
from manidp.formats.checkpoint import Found
from manidp.torch.frontend import from_torch, random_images
from manidp.training.provenance import digest_of

_NESTED = ("state_dict", "model_state_dict", "model", "net", "ema", "weights")  # where training scripts keep weights
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def module_of(where: str) -> nn.Module:
    """The module of "net.py:make": the file is run, and ``make`` is a module or what returns one, called with nothing.

    The file's folder is searched for what it imports. Raises FrontendError: no such file or name, an error in the file
    (its line is told), or something that is no torch.nn.Module.
    """
    name, colon, attribute = where.rpartition(":")
    path = Path(name)
    if not colon or path.suffix != ".py" or not attribute.isidentifier():
        raise FrontendError(f"expected FILE.py:NAME, such as my_net.py:make; got '{where}'")
    if not path.is_file():
        raise FrontendError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"manidp_user_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(found)
        if not hasattr(found, attribute):
            raise FrontendError(f"{path} has no '{attribute}'")
        made = getattr(found, attribute)
        made = made if isinstance(made, nn.Module) else made()
    except FrontendError:
        raise
    except Exception as error:
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = f", line {lines[-1].lineno}" if lines else ""
        raise FrontendError(f"{path}{line}: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise FrontendError(f"'{attribute}' of {path} makes a {type(made).__name__}; a torch.nn.Module is needed")
    return made


def load_weights(module: nn.Module, path: Path) -> None:
    """Give the module the weights of a file: ``.safetensors``, or what ``torch.save`` wrote of a ``state_dict``.

    Such a file is read with ``weights_only=True``: tensors and plain data, no code. The weights may lie in it under a
    key such as "state_dict" or "net", their names below "module.". Raises FrontendError: no such file, another kind of
    file, or names and shapes that are not exactly the module's.
    """
    given = _read(path)
    for key in _NESTED:
        if isinstance(given, Mapping) and isinstance(given.get(key), Mapping):
            given = given[key]
            break
    if not isinstance(given, Mapping) or not given or not all(isinstance(value, Tensor) for value in given.values()):
        raise FrontendError(f"{path}: expected a state_dict, names and tensors; got {_kind(given)}")
    named = {str(name): value for name, value in given.items()}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): value for name, value in named.items()}
    own = module.state_dict()
    there = {own[name].data_ptr() for name in named if name in own}  # of two names of one tensor, one is enough
    missing = [name for name, value in own.items() if name not in named and value.data_ptr() not in there]
    missing = [name for name in missing if not name.endswith(".num_batches_tracked")]
    unknown = [name for name in named if name not in own]
    shapes = [name for name, value in own.items() if name in named and named[name].shape != value.shape]
    found = {"missing": missing, "not the module's": unknown, "of another shape": shapes}
    if wrong := [f"{what}: {some(names)}" for what, names in found.items() if names]:
        raise FrontendError(f"{path}: does not fit the module; {'; '.join(wrong)}")
    module.load_state_dict(named, strict=False)


def _read(path: Path) -> Any:
    try:
        with open_regular(path) as file:
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FrontendError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FrontendError(f"{path}: not a whole safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        raise FrontendError(
            f"{path}: holds more than tensors and plain data, or is no file of torch.save; nothing in it is executed: "
            "write one with torch.save(module.state_dict(), FILE)"
        ) from error
    except Exception as error:  # torch.load meets broken files with errors of any kind
        line = str(error).partition("\n")[0]
        raise FrontendError(f"{path}: not a whole file of torch.save: {type(error).__name__}: {line[:200]}") from error


def _kind(given: object) -> str:
    if isinstance(given, Mapping):
        return f"a dict of {some(map(str, given))}" if given else "an empty dict"
    return f"a {type(given).__name__}"


def imported(network: str, weights: Path | None, preprocessing: Preprocessing, classes: Sequence[str]) -> Found:
    """The module of "net.py:make" with the weights of a file, or an ONNX file, as a model whose classes are these.

    Raises FrontendError: what ``module_of``, ``load_weights``, ``from_torch`` and ``from_onnx`` raise, and another
    number of logits than of classes.
    """
    if network.lower().endswith(".onnx"):
        from manidp.torch.onnx import found_in

        if weights is not None:
            raise FrontendError(f"{network} has its weights in itself; leave --weights {weights} out")
        found = found_in(network, size=preprocessing.size, preprocessing=preprocessing)
    else:
        module = module_of(network)
        if weights is not None:
            load_weights(module, weights)
        own = from_torch(module, random_images(3, *preprocessing.size), preprocessing=preprocessing)
        found = Found(network, Path(network.rpartition(":")[0]), digest_of(own)["sha256"], own)
    count = found.checkpoint.graph.num_classes
    if count != len(classes):
        raise FrontendError(f"{network} makes {count} logits, and the data has {len(classes)} classes: {some(classes)}")
    return replace(found, checkpoint=replace(found.checkpoint, classes=tuple(classes)))
