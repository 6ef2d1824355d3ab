"""The rules of the dial, without a server: which points it has, when it goes down, when it comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from manidp.errors import ManiDPError
from manidp.formats.checkpoint import OperatingPoint
from manidp.serve.dial import BURST, BUSY, DOWN, FULL, HOLD, MOST, UP, Costs, Dial, Overload, Rate, ladder, within
from serve.served import small_model

TARGET = 0.05


def names(*points: tuple[str, float | None, float | None], floor: float | None = None) -> list[str]:
    model = small_model()
    own = [OperatingPoint(name, {}, macs, accuracy) for name, macs, accuracy in points]
    measured = {"mean_macs": 100, "correct": 90, "total": 100}
    made = replace(model, points=tuple(own), provenance={"measured": measured})
    return [one.name for one in ladder(made, floor=floor)]


def test_the_ladder_goes_down_to_the_floor_without_points_that_a_cheaper_one_equals() -> None:
    points = ("a", 80.0, 0.899), ("b", 70.0, 0.895), ("c", 60.0, 0.895), ("d", 50.0, 0.85), ("e", 40.0, 0.7)
    assert names(*points) == ["default", "a", "c"]  # the floor is one point of accuracy below the best
    assert names(*points, floor=0.85) == ["default", "a", "c", "d"]
    assert names(*points, floor=0.9) == ["default"]
    assert names(("dearer", 120.0, 0.95), ("unknown", 50.0, None), ("free", None, 0.9)) == ["default"]


def test_a_floor_above_the_best_point_is_refused() -> None:
    with pytest.raises(ManiDPError, match=r"which is 90.00%; got 95.00%"):
        names(floor=0.95)
    with pytest.raises(ManiDPError, match="was not measured"):
        ladder(replace(small_model(), provenance={}), floor=0.5)


def test_it_goes_down_step_by_step_and_never_below_the_last() -> None:
    dial = Dial(3, TARGET)
    levels = [dial.update(0.0, lambda _: 0.9 * TARGET, lambda _: 2.0) for _ in range(5)]
    assert levels == [1, 2, 2, 2, 2]


def test_it_goes_down_only_beyond_its_mark() -> None:
    dial = Dial(2, TARGET)
    assert dial.update(0.0, lambda _: DOWN * TARGET, lambda _: 0.5) == 0
    assert dial.update(0.0, lambda _: DOWN * TARGET * 1.001, lambda _: 0.5) == 1


@pytest.mark.parametrize(("wait", "busy"), [(UP * TARGET * 1.01, 0.1), (0.0, BUSY * 1.01)])
def test_it_stays_down_while_the_better_point_would_not_carry_the_load(wait: float, busy: float) -> None:
    dial = Dial(2, TARGET, level=1)
    for tenths in range(100):
        assert dial.update(tenths / 10, lambda _: wait, lambda _: busy) == 1


def test_it_comes_back_one_step_for_each_time_of_calm_and_a_burst_begins_it_anew() -> None:
    dial = Dial(3, TARGET, level=2)

    def calm(now: float) -> int:
        return dial.update(now, lambda _: 0.0, lambda _: 0.1)

    assert calm(0.0) == 2
    assert calm(0.9 * HOLD) == 2
    dial.update(0.95 * HOLD, lambda _: 0.2 * TARGET, lambda _: 0.1)  # no calm, though no reason to go down
    assert calm(HOLD) == 2
    assert calm(1.9 * HOLD) == 2
    assert [calm(2 * HOLD), calm(2.9 * HOLD), calm(3 * HOLD)] == [1, 1, 0]
    assert calm(9 * HOLD) == 0


def test_under_steady_load_between_two_points_it_does_not_swing() -> None:
    """A load that the better point cannot carry and the cheaper one can: the dial goes down once and stays."""
    costs = Costs(0.0, {"best": 0.001, "cheap": 0.0005}, threads=1)
    dial, rate, queue, now, changes = Dial(2, TARGET), Rate(), 0.0, 0.0, 0
    point = ["best", "cheap"]

    def wait(level: int) -> float:
        return queue * costs.image(point[level])

    def busy(level: int) -> float:
        return rate.at(now) * costs.image(point[level])

    for step in range(20_000):  # milliseconds; 1,200 images a second
        now = step / 1000
        rate.add(1.2, now)
        before = dial.level
        dial.update(now, wait, busy)
        changes += dial.level != before
        queue = max(0.0, queue + 1.2 - 0.001 / costs.image(point[dial.level]))
    assert (dial.level, changes, queue) == (1, 1, 0.0)


def test_costs_learn_of_all_points_from_one() -> None:
    costs = Costs(fixed=0.001, each={"a": 0.002, "b": 0.001}, threads=2)
    assert costs.batch(5, "a") == pytest.approx(0.001 + 3 * 0.002)
    assert costs.batch(0, "a") == 0
    for _ in range(100):
        costs.learn(5, "a", 2 * 0.007)
    assert costs.image("b") == pytest.approx(2 * 0.001 / 2, rel=1e-3)
    costs.learn(1, "a", 1e9)  # one number that cannot be does not spoil it
    assert costs.slowness < 5


def test_a_rate_is_that_of_the_last_second_or_so() -> None:
    rate = Rate()
    for step in range(1000):
        rate.add(5, step / 100)
    assert rate.at(10.0) == pytest.approx(500, rel=0.01)
    assert rate.at(11.0) == pytest.approx(500 / 2.718, rel=0.01)


def test_the_slack_decides_for_the_first_point_that_fits_else_the_last() -> None:
    seconds = {"a": 3.0, "b": 2.0, "c": 1.0}
    assert [within(slack, seconds, seconds.__getitem__) for slack in (9.0, 3.0, 2.5, 1.0, 0.1)] == list("aabcc")


def test_a_burst_is_taken_and_load_that_stays_is_refused() -> None:
    overload, late = Overload(TARGET), 1.5 * FULL * TARGET
    assert not overload.refuses(0.0, late)
    assert not overload.refuses(BURST * TARGET, late)  # for so long it may be a burst
    assert overload.refuses(1.01 * BURST * TARGET, late)
    assert not overload.refuses(1.02 * BURST * TARGET, FULL * TARGET)  # in time
    now = 1.01 * BURST * TARGET
    for _ in range(20):  # the queue shrinks while requests are refused: that is no end of it
        now += 0.9 * HOLD
        assert overload.refuses(now, late)
    assert not overload.refuses(now + 1.01 * HOLD, late)  # another burst


def test_what_would_take_too_long_is_refused_in_a_burst_as_well() -> None:
    assert not Overload(TARGET).refuses(0.0, MOST * TARGET)
    assert Overload(TARGET).refuses(0.0, 1.01 * MOST * TARGET)
