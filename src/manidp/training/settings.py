"""Settings of a training: which types and values each may have; one rule for the recipes of every framework."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from manidp.errors import TrainingError

# Least and greatest value of every number; what stands in POSITIVE must also be above its least value, 0.
_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 1_000_000), "batch_size": (1, 1_000_000), "seed": (0, 2**32 - 1), "learning_rate": (0, 1_000),
    "warmup_epochs": (0, 1_000_000), "momentum": (0, 1), "weight_decay": (0, 1_000), "label_smoothing": (0, 1),
    "ema": (0, 1), "distillation": (0, 1), "temperature": (0.001, 1_000), "reach": (0, 1),
    "clip_norm": (0, 1_000_000), "lambda_sparsity": (0, 1_000_000), "lambda_similarity": (0, 1_000_000),
    "keep_rate": (0, 1), "macs_budget": (0, 1e15),
}  # fmt: skip
_POSITIVE = ("learning_rate", "keep_rate", "macs_budget")


def check_settings(settings: Mapping[str, Any], recipe: type, where: str) -> None:
    """Raises TrainingError, naming ``where`` they stand, unless all settings are fields of ``recipe`` with its types.

    An int stands for a float too, but no bool for a number. Numbers must lie in their ranges, texts among the choices
    of a ``Literal``; a text where a field takes numbers and texts is not looked into.
    """
    hints = get_type_hints(recipe)
    for name, value in settings.items():
        if name not in hints:
            raise TrainingError(f"{where}: unknown setting {brief(name)}; known are {', '.join(hints)}")
        hint = hints[name]
        if get_origin(hint) is Literal:
            if value not in (choices := get_args(hint)):
                raise TrainingError(f"{where}: {name} must be {' or '.join(choices)}; got {brief(value)}")
            continue
        if get_origin(hint) is tuple:
            kinds = get_args(get_args(hint)[0])
            if not isinstance(value, (list, tuple)) or not all(type(part) in (int, *kinds) for part in value):
                raise TrainingError(f"{where}: {name} must be a list of numbers or texts; got {brief(value)}")
            continue
        kinds = get_args(hint) or (hint,)
        if not isinstance(value, (*kinds, int) if float in kinds else kinds) or (
            isinstance(value, bool) and bool not in kinds
        ):
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            raise TrainingError(f"{where}: {name} must be {expected}; got {brief(value)}")
        if isinstance(value, (int, float)) and name in _RANGES:
            low, high = _RANGES[name]
            above = name in _POSITIVE
            if not low <= value <= high or (above and value == low):
                least = "must lie above" if above else "must lie between"
                raise TrainingError(
                    f"{where}: {name} {least} {low:g} and {'at most ' if above else ''}{high:g}; got {brief(value)}"
                )


def brief(value: object) -> str:
    """A value for a message: its repr, cut to a readable length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # numbers of thousands of digits, lists in lists
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
