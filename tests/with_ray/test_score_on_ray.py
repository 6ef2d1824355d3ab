"""`manidp score --ray`: two workers on this machine give the rows of one process, and a killed one loses nothing."""

import io
import os
import signal
import sys
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from manidp.errors import ScoreError
from manidp.hub.find import find_model
from manidp.score.run import Plan, score
from manidp.score.scorer import Scorer
from manidp.score.sources import ROWS, Unit, open_source

if find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'manidp[score,ray]'", allow_module_level=True)
if os.environ.get("MANIDP_TEST_RAY") != "1":
    pytest.skip("slow; make test-ray runs it", allow_module_level=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own files and processes
]
COUNT = ROWS + 50


def test_an_address_where_nobody_listens_is_told_at_once(tmp_path: Path) -> None:
    from manidp.data.folders import save_folder
    from manidp.data.images import load_sample
    from manidp.score.cluster import on_ray

    save_folder(load_sample(10), tmp_path / "pictures")
    source = open_source(str(tmp_path / "pictures"))
    with pytest.raises(ScoreError, match=r"Ray cannot be had at 127\.0\.0\.1:1: Connection refused"):
        score(find_model("manidp-res20"), source, tmp_path / "out", way=on_ray("127.0.0.1:1"))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of two parts each, and a broken picture."""
    folder = tmp_path_factory.mktemp("shards")
    chance = np.random.default_rng(0)
    pictures = []
    for _ in range(20):
        file = io.BytesIO()
        Image.fromarray(chance.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "png")
        pictures.append(file.getvalue())
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(COUNT):
                content = b"broken" if number == 7 else pictures[(number + shard) % 20]
                member = tarfile.TarInfo(f"{number:05d}.png")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(folder)


@pytest.fixture(scope="module")
def wanted(shards: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    score(find_model("manidp-res20"), open_source(shards), out)
    return rows(out)


def rows(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return sorted(pq.read_table(out).to_pylist(), key=lambda row: str(row["key"]))


def test_two_workers_give_the_rows_of_one_process(
    ray: Any, shards: str, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    from manidp.score.cluster import on_ray

    seen: list[tuple[int, int | None]] = []
    told = score(
        find_model("manidp-res20"), open_source(shards), tmp_path / "out", way=on_ray(workers=2),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert rows(tmp_path / "out") == wanted
    assert (told.images, told.errors, told.before) == (3 * COUNT, 3, 0)
    assert told.engine > 0
    assert seen[-1][0] == seen[-1][1]


class Dying(Scorer):
    """Kills its process when the first part of the second shard is written: as often as there are ``lives`` to lose."""

    lives: Path

    def score(self, unit: Unit, parts: int) -> Iterator[int]:
        for done in super().score(unit, parts):
            if unit.number == 1 and any(self._results.folder.glob("000001-*")) and (left := list(self.lives.iterdir())):
                left[0].unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            yield done


class DyingPlan(Plan):
    def scorer(self) -> Scorer:
        scorer = Dying(self.checkpoint, self.results, budget=self.budget)
        scorer.lives = self.results.folder.parent / "lives"
        return scorer


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_worker_killed_in_the_middle_loses_nothing(
    deaths: int, ray: Any, shards: str, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    from manidp.score import cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    (tmp_path / "lives").mkdir()
    for number in range(deaths):
        (tmp_path / "lives" / str(number)).touch()
    spread = cluster.on_ray(workers=2)

    def way(plan: Plan, *rest: Any) -> Any:
        return spread(DyingPlan(plan.checkpoint, plan.results, plan.budget, 1, plan.precision), *rest)

    model, source = find_model("manidp-res20"), open_source(shards)
    if deaths < cluster.DEATHS:
        score(model, source, tmp_path / "out", way=way)
    else:
        with pytest.raises(ScoreError, match="unit 1 of the source ended 3 workers, one after the other"):
            score(model, source, tmp_path / "out", way=way)
        assert score(model, source, tmp_path / "out").before >= ROWS
    assert not list((tmp_path / "lives").iterdir())
    assert rows(tmp_path / "out") == wanted
