"""How to train, as data; read from a TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from manidp.errors import TrainingError
from manidp.files import open_regular
from manidp.graph import Graph


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Rates are per step, weights per loss term; defaults are those of a plain dense training.

    ``keep_rate`` (share of channels, 0..1) or ``macs_budget`` (mean multiply-adds an image) is the target of gated
    training, reached at ``reach`` x ``epochs`` and held from there on; a graph with gates needs exactly one of them.
    ``ema`` averages weights and statistics over steps (0: off). ``distillation`` is the share of the loss that
    follows the teachers. ``augment`` flips and crops at random; what a crop takes from beyond the border is black
    (``padding_mode`` "constant") or the image mirrored there ("reflect"). The gates' learning rate is the network's;
    weight decay spares them. ``compiled`` runs network and teachers through torch.compile: about 1.4 times the images a
    second on a CPU, but it needs a C++ compiler.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    ema: float = 0.0
    distillation: float = 0.0
    temperature: float = 4.0
    keep_rate: float | None = None
    macs_budget: float | None = None
    reach: float = 0.65
    lambda_sparsity: float = 5e-3
    lambda_similarity: float = 1.0
    augment: bool = True
    padding_mode: Literal["constant", "reflect"] = "constant"
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    compiled: bool = False
    seed: int = 0

    def check(self, graph: Graph) -> None:
        """Raises TrainingError for a recipe that cannot be followed with this graph."""
        limits = {
            "epochs": (1, 1e6), "batch_size": (1, 1e6), "learning_rate": (0, 1e3), "warmup_epochs": (0, 1e6),
            "momentum": (0, 1), "weight_decay": (0, 1e3), "label_smoothing": (0, 1), "ema": (0, 1),
            "distillation": (0, 1), "temperature": (1e-3, 1e3), "reach": (0, 1), "lambda_sparsity": (0, 1e6),
            "lambda_similarity": (0, 1e6), "keep_rate": (0, 1), "macs_budget": (1, 1e15),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise TrainingError(f"recipe: {name} must lie between {low} and {high:g}; got {value}")
        choices = {"padding_mode": ("constant", "reflect"), "precision": ("bfloat16", "float32")}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise TrainingError(f"recipe: {name} must be {' or '.join(allowed)}; got {value!r}")
        targets = sum(target is not None for target in (self.keep_rate, self.macs_budget))
        if graph.gates and targets != 1:
            raise TrainingError("recipe: a network with gates needs a target, keep_rate or macs_budget, not both")
        if not graph.gates and targets:
            raise TrainingError("recipe: keep_rate and macs_budget are for a network with gates; this one has none")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe file's settings: any of the fields of Recipe, by name. Raises TrainingError for anything else in it."""
    try:
        with open_regular(path) as file:
            settings = tomllib.load(file)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: not TOML: {error}") from error
    return checked_settings(settings, str(path))


def parse_setting(text: str) -> dict[str, Any]:
    """ "epochs=20" -> {"epochs": 20}; the value is read as TOML, or else is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise TrainingError(f"a setting is NAME=VALUE, for example epochs=20; got {text!r}")
    try:
        return tomllib.loads(f"{name} = {value}")
    except tomllib.TOMLDecodeError:
        return {name.strip(): value.strip()}


def checked_settings(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The same settings if every name and type is a field of Recipe, else TrainingError."""
    kinds = {"int": (int,), "float": (int, float), "float | None": (int, float), "bool": (bool,)}
    known = {field.name: kinds.get(str(field.type), (str,)) for field in fields(Recipe)}
    for name, value in settings.items():
        if name not in known:
            raise TrainingError(f"{where}: unknown setting {name!r}; known are {', '.join(known)}")
        if not isinstance(value, known[name]) or (isinstance(value, bool) and bool not in known[name]):
            expected = " or ".join(kind.__name__ for kind in known[name])
            raise TrainingError(f"{where}: {name} must be {expected}; got {value!r}")
    return settings
