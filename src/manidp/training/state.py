"""What a run goes on from after an interruption: one safetensors file, written whole after every epoch.

Tensors: ``network/<parameter>``, ``average/<parameter>`` where weights are averaged, ``momentum/<parameter>`` from the
first epoch on, ``points/<number>/<parameter>`` where the recipe has points. The header's entry ``manidp`` is JSON:
``version``, ``run`` (what tells this run from all others), ``rates``, ``records`` and, where gates keep other shares
than one another, ``shares``. The file is read as one from
outside is: anything else in it is a TrainingError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from manidp.errors import TrainingError
from manidp.files import open_regular, replacing
from manidp.training.settings import brief

VERSION = 3  # 2 knew one operating point; 1 had no version, and a run was graph, recipe and number of images
Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What one epoch did. Losses are means over its images, in nats; macs is the mean over its last images.

    Of a run with operating points, losses and accuracy are those of the largest, macs those of the default; ``points``:
    for each, by name, ``cross_entropy``, ``accuracy`` and ``macs`` over the images that the epoch trained it with.
    """

    epoch: int
    learning_rate: float
    loss: float
    cross_entropy: float
    accuracy: float
    sparsity: float = 0.0
    similarity: float = 0.0
    macs: float = 0.0
    seconds: float = 0.0
    points: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A run so far.

    run: JSON data that identifies it. rates: the points' keep rates. records: the epochs'. shares: what each gate keeps
    where the rate is 1, none where all keep alike.
    """

    run: dict[str, Any]
    rates: Mapping[str, float | None]
    records: tuple[EpochRecord, ...]
    shares: Mapping[str, float] = field(default_factory=dict)


def write_state(path: Path, state: State, tensors: Tensors) -> None:
    """Write the file whole or not at all. Raises OSError."""
    plain = {name: np.asarray(value, order="C") for name, value in tensors.items()}  # it writes memory as it lies
    records = [asdict(record) for record in state.records]
    meta = {"version": VERSION, "run": state.run, "rates": dict(state.rates), "records": records}
    meta |= {"shares": dict(state.shares)} if state.shares else {}
    with replacing(path) as file:
        file.write(serialize(plain, {"manidp": json.dumps(meta)}))


def read_state(path: Path) -> State:
    """All but the tensors. Raises TrainingError if the file is not a whole state of this version."""
    try:
        with open_regular(path), safe_open(path, framework="np") as file:
            text = (file.metadata() or {})["manidp"]
        meta = json.loads(text, parse_constant=_refuse)
        if "version" not in meta and "run" in meta:
            raise TrainingError(
                f"{path}: of a run that an older manidp began, before a run's pictures, classes and models were "
                f"recorded; finish it with that version or begin anew in another folder"
            )
        if meta["version"] != VERSION:
            raise TrainingError(f"{path}: expected a state of version {VERSION}; got {brief(meta['version'])}")
        if not isinstance(meta["run"], dict) or not isinstance(meta["records"], list):
            raise ValueError("'run' or 'records' is something else")
        records = tuple(_record(index, record) for index, record in enumerate(meta["records"]))
        rates = {name: None if rate is None else _number("rate", rate, 0, 2) for name, rate in meta["rates"].items()}
        shares = {gate: _number("share", share, 0, 2) for gate, share in meta.get("shares", {}).items()}
        return State(meta["run"], rates, records, shares)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _foreign(path, error) from error


def read_tensors(path: Path, expected: Tensors) -> dict[str, NDArray[np.float32]]:
    """The file's tensors. Raises TrainingError unless names and shapes are the expected ones, all float32, finite."""
    try:
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            if wrong := sorted(names ^ expected.keys()):
                raise ValueError(
                    f"tensors missing or unknown: {', '.join(map(brief, wrong[:3]))} ({len(wrong)} in all)"
                )
            for name, like in expected.items():
                part = file.get_slice(name)
                if part.get_shape() != list(like.shape) or part.get_dtype() != "F32":
                    came = f"{part.get_dtype()} {part.get_shape()}"
                    raise ValueError(f"'{name}' must be F32 {list(like.shape)}; got {came}")
            tensors = {name: file.get_tensor(name) for name in expected}
        if bad := not_finite(tensors):
            raise ValueError(f"'{bad}' holds NaN or infinity")
        return tensors
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise _foreign(path, error) from error


def not_finite(tensors: Tensors) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    return next((name for name, value in tensors.items() if not np.isfinite(value).all()), None)


def _foreign(path: Path, error: Exception) -> TrainingError:
    reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return TrainingError(
        f"{path}: damaged, or not the state of a run: {reason}; no run can go on from it: begin anew in another folder"
    )


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}")


def _record(index: int, record: object) -> EpochRecord:
    names = [one.name for one in fields(EpochRecord)]
    if not isinstance(record, dict) or record.keys() != set(names) or type(record["epoch"]) is not int:
        raise ValueError(f"record {index} must hold {', '.join(names)}")
    if record["epoch"] != index:
        raise ValueError(f"record {index} is of epoch {brief(record['epoch'])}")
    points = {
        point: {name: _number(name, value) for name, value in seen.items()} for point, seen in record["points"].items()
    }
    numbers = {name: _number(name, record[name]) for name in names if name not in ("epoch", "points")}
    return EpochRecord(epoch=index, points=points, **numbers)


def _number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    if type(value) not in (int, float) or not (low <= value <= high and -1e300 < value < 1e300):  # type: ignore[operator]
        raise ValueError(f"{name} is {brief(value)}")
    return float(value)  # type: ignore[arg-type]
