"""A torch module that a user names on the command line: a Python file of theirs, and what in it makes the module."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

from torch import nn

from manidp.errors import FrontendError


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
