"""How to train, as data; read from a TOML file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from manidp.errors import TrainingError
from manidp.files import open_regular
from manidp.formats.checkpoint import MAX_POINTS
from manidp.graph import Graph
from manidp.graph.macs import least_and_most_macs, ungated_macs
from manidp.training.importance import score_biases
from manidp.training.settings import brief, check_settings

MAX_BYTES = 2**20  # of a recipe file
PRUNING: Mapping[str, Any] = MappingProxyType({
    "epochs": 60, "learning_rate": 0.02, "ema": 0.998, "reach": 0.5, "lambda_similarity": 0.1, "distillation": 0.5,
    "temperature": 3.0, "clip_norm": 5.0,
})  # fmt: skip
"""How a trained network is pruned, taught by itself, if nothing else is said; the other settings are the defaults."""
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Rates are per step, weights per loss term; defaults are those of a plain dense training.

    ``keep_rate`` or ``macs_budget`` is the target of gated training, reached at ``reach`` x ``epochs`` and held from
    there on; a graph with gates needs exactly one of them. ``macs_budget`` is the mean number of multiply-adds that an
    image may take, gates included: 18.6e6, "18.6M" (also k and G), or "54%" of what the network takes without its
    gates. ``keep_rate`` is a share of channels, 0.6 or "60%": each gate's threshold is set by the paper's rule for it.
    ``points`` are more budgets that the same weights shall run at, each with its own thresholds and batch statistics.
    Every step then trains the largest budget, the smallest, and one drawn from those between (the sandwich rule, Yu &
    Huang 2019); the loss is the mean of the three. The largest follows labels and teachers, the others the teachers and
    the largest, as one more teacher. With ``reach`` 0 gates that have been trained meet their budgets from the start.
    ``shares`` "even" lets every gate keep the same share of its channels, as the paper does; "taylor" spends the budget
    where it is worth most, by the channels' Taylor importance (Molchanov et al. 2019) in each epoch until the budget is
    reached, and orders the scores of fresh gates by it. "auto" is "taylor" for a ``macs_budget`` without ``points``
    where every gate scales its channels, else "even".
    ``clip_norm`` bounds the length of a step's gradient, weight decay aside (0: it does not).
    ``ema`` averages weights and statistics over steps (0: off). ``distillation`` is the share of the loss that
    follows the teachers. ``augment`` flips and crops at random; what a crop takes from beyond the border is black
    (``padding_mode`` "constant") or the image mirrored there ("reflect"). The gates' learning rate is the network's;
    weight decay spares them. ``precision`` "auto" is bfloat16 where the processor computes it and float32 elsewhere,
    decided when a run begins. ``compiled`` runs network and teachers through torch.compile: about 1.4 times the images
    a second on a CPU, but it needs a C++ compiler.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    distillation: float = 0.0
    temperature: float = 4.0
    keep_rate: float | str | None = None
    macs_budget: float | str | None = None
    points: tuple[float | str, ...] = ()
    reach: float = 0.65
    lambda_sparsity: float = 5e-3
    lambda_similarity: float = 1.0
    shares: Literal["auto", "even", "taylor"] = "auto"
    augment: bool = True
    padding_mode: Literal["constant", "reflect"] = "constant"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    compiled: bool = False
    seed: int = 0

    def resolved(self, graph: Graph) -> Recipe:
        """The same recipe, its target a number. Raises TrainingError if it cannot be followed with this graph."""
        if fixed := [gate.name for gate in graph.gates if gate.rule != "threshold"]:
            raise TrainingError(f"only gates with thresholds can be trained; those of '{fixed[0]}' are a constant mask")
        if graph.gates and (self.keep_rate is None) == (self.macs_budget is None):
            raise TrainingError("recipe: a network with gates needs a target, keep_rate or macs_budget, not both")
        if not graph.gates and not self.keep_rate is self.macs_budget is None:
            raise TrainingError("recipe: keep_rate and macs_budget are for a network with gates; this one has none")
        recipe = self
        if isinstance(self.keep_rate, str):
            recipe = replace(recipe, keep_rate=_number("keep_rate", self.keep_rate, {"": 1.0, "%": 0.01}))
        units = _PREFIXES | {"%": ungated_macs(graph) / 100}
        if isinstance(self.macs_budget, str):
            recipe = replace(recipe, macs_budget=_number("macs_budget", self.macs_budget, units))
        check_settings(vars(recipe), Recipe, "recipe")
        points = [_number("points", one, units) if isinstance(one, str) else float(one) for one in self.points]
        if points and recipe.macs_budget is None:
            raise TrainingError("recipe: points are budgets beside macs_budget, which is missing")
        for budget in points if recipe.macs_budget is None else [float(recipe.macs_budget), *points]:
            _check_budget(graph, budget)
        recipe = replace(recipe, shares=_shares(self.shares, graph, recipe.macs_budget is not None and not points))
        names = [point_name(graph, budget) for budget in points]
        if len(set(names)) < len(names) or len(names) > MAX_POINTS or recipe.macs_budget in points:
            raise TrainingError(
                f"recipe: points must be at most {MAX_POINTS} different budgets, other than macs_budget; got {names}"
            )
        return replace(recipe, points=tuple(points))


def _shares(asked: str, graph: Graph, one_budget: bool) -> Literal["even", "taylor"]:
    able = score_biases(graph)
    unable = [gate.name for gate in graph.gates if gate.name not in able]
    if asked == "taylor" and not one_budget:
        raise TrainingError("recipe: shares 'taylor' are for one macs_budget; with keep_rate or points set 'even'")
    if asked == "taylor" and unable:
        raise TrainingError(
            f"recipe: with shares 'taylor' a gate must scale channels by a score with a bias of its own; "
            f"'{unable[0]}' does not: set shares to 'even'"
        )
    return "even" if asked == "even" or unable or not one_budget else "taylor"


def point_name(graph: Graph, budget: float) -> str:
    """The name of an operating point of so many multiply-adds, unless it is given one: their share, "35%"."""
    return f"{100 * budget / ungated_macs(graph):.4g}%"


def _check_budget(graph: Graph, budget: float) -> None:
    least, most = least_and_most_macs(graph)
    if not least <= budget <= most:
        dense = ungated_macs(graph)
        raise TrainingError(
            f"recipe: a budget is in multiply-adds an image, and this network can take {least / 1e6:.4g}M (all "
            f"gates closed) to {most / 1e6:.4g}M (all open; {dense / 1e6:.4g}M without gates); got {budget:g}; "
            f"write for example macs_budget={(least + most) / 2e6:.3g}M or macs_budget=60%"
        )


def _number(name: str, text: str, units: dict[str, float]) -> float:
    """ "18.6M" -> 18.6e6."""
    found = re.fullmatch(r"\s*([0-9]{0,20}\.?[0-9]{1,20}(?:[eE][+-]?[0-9]{1,2})?)\s*([kMG%]?)\s*", text)
    if found is None or found[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise TrainingError(f"recipe: {name} must be a number, perhaps followed by {known}; got {brief(text)}")
    return float(found[1]) * units[found[2]]


def budget_of(amount: float | str) -> float | str:
    """What ``macs_budget`` is for "50%", "18.6M" or a number: up to 1 a share of the network's, else multiply-adds."""
    number = _number("budget", amount, _PREFIXES | {"%": 0.01}) if isinstance(amount, str) else amount
    return f"{100 * number:.10g}%" if number <= 1 else number


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe file's settings: any of the fields of Recipe, by name. Raises TrainingError for anything else in it."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise TrainingError(f"{path}: not a recipe: more than {MAX_BYTES:,} bytes")
        settings = tomllib.loads(content.decode())
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        raise TrainingError(f"{path}: not TOML: {error}") from error
    check_settings(settings, Recipe, str(path))
    return settings


def parse_setting(text: str) -> dict[str, Any]:
    """ "epochs=20" -> {"epochs": 20}; the value is read as TOML, or else is a string. Raises TrainingError."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name.isidentifier():
        raise TrainingError(f"a setting is NAME=VALUE, for example epochs=20; got {brief(text)}")
    try:
        setting = {name: tomllib.loads(f"value = {value}")["value"]}
    except (ValueError, RecursionError):
        setting = {name: value}
    check_settings(setting, Recipe, "--set")
    return setting
