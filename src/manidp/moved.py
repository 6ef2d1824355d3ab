"""Import paths of version 0.1: each leads to the module that is there now, with a warning that names it."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from importlib.abc import Loader  # not imported at run time: that takes as long as all else in here

# What was one module and is now several: the names of all of them, of a name in two the first.
MOVED = {
    "manidp.images": "manidp.data.images manidp.data.pictures manidp.data.folders manidp.data.preprocessing",
    "manidp.cifar10": "manidp.data.cifar10",
    "manidp.checkpoint": "manidp.formats.checkpoint",
    "manidp.ckpt": "manidp.formats.ckpt",
    "manidp.conversion": "manidp.formats.conversion",
    "manidp.macs": "manidp.graph.macs",
    "manidp.find": "manidp.hub.find",
    "manidp.card": "manidp.hub.card",
    "manidp.publish": "manidp.hub.publish",
    "manidp.bundle": "manidp.hub.bundle",
    "manidp.download": "manidp.fetch.download",
    "manidp.archive": "manidp.fetch.archive",
    "manidp.settings": "manidp.training.settings",
    "manidp.torch.recipe": "manidp.training.recipe",
    "manidp.torch.schedule": "manidp.training.schedule",
    "manidp.torch.job": "manidp.training.job",
    "manidp.torch.state": "manidp.training.state",
    "manidp.runtime.engine": "manidp.engine.engine",
    "manidp.runtime.reference": "manidp.reference",
}
_RUNTIME = "manidp.runtime"  # a package that is no more: two of its modules have moved


class _Moved:
    """Found last, so never in the way of a module that is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MOVED and name != _RUNTIME:
            return None
        return ModuleSpec(name, cast("Loader", self), is_package=name == _RUNTIME)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == _RUNTIME:
            return
        now = MOVED[module.__name__].split()
        warnings.warn(f"{module.__name__} has moved: import {' or '.join(now)}", DeprecationWarning, stacklevel=2)
        modules = [importlib.import_module(name) for name in now]
        if len(modules) == 1:
            sys.modules[module.__name__] = modules[0]
        for found in reversed(modules):  # of several, a name is taken from the first that has it
            vars(module).update((name, value) for name, value in vars(found).items() if not name.startswith("__"))


def keep_old_paths() -> None:
    """Make them importable; once is enough."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
