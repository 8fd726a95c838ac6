"""Numbers that compare curves, against answers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbacks.runs.comparison import Gap, area, ceiling_ratio, compare, gap_difference, rollouts_to, seed_gap
from callbacks.runs.curves import at, band

RISING = pd.Series([0.4, 0.5, 0.7], index=[0, 100, 200])


def curve(**points: float) -> pd.Series:
    """`curve(r0=0.4, r100=0.5)`."""
    return pd.Series(list(points.values()), index=[int(name[1:]) for name in points])


@pytest.mark.parametrize(
    ("threshold", "straight", "evaluated"),
    [(0.6, 150, 200), (0.5, 100, 100), (0.4, 0, 0), (0.3, 0, 0), (0.7, 200, 200), (0.71, math.nan, math.nan)],
)
def test_rollouts_to(threshold: float, straight: float, evaluated: float) -> None:
    assert rollouts_to(RISING, threshold) == pytest.approx(straight, nan_ok=True)
    assert rollouts_to(RISING, threshold, interpolate=False) == pytest.approx(evaluated, nan_ok=True)


def test_the_first_crossing_counts() -> None:
    """The score is lost again and comes back."""
    assert rollouts_to(curve(r0=0.4, r100=0.6, r200=0.5, r300=0.7), 0.55) == pytest.approx(75)


def test_nothing_reaches_anything() -> None:
    assert math.isnan(rollouts_to(pd.Series(dtype=float), 0.1))
    assert math.isnan(area(pd.Series(dtype=float))) and math.isnan(area(curve(r0=0.5)))


def test_ceiling_ratio() -> None:
    """The reference is best, .55, after 200 rollouts."""
    reference = curve(r0=0.4, r100=0.5, r200=0.55, r300=0.5)
    assert ceiling_ratio(RISING, reference) == pytest.approx(125 / 200)
    assert ceiling_ratio(RISING, reference, interpolate=False) == 1
    assert ceiling_ratio(curve(r0=0.4, r100=0.6), reference) == pytest.approx(75 / 200)
    assert ceiling_ratio(reference, reference) == 1
    assert math.isnan(ceiling_ratio(reference, RISING))
    assert math.isnan(ceiling_ratio(RISING, curve(r0=0.5, r100=0.4))), "a reference that never rises has no ceiling"


def test_area() -> None:
    assert area(RISING) == pytest.approx((0.45 * 100 + 0.6 * 100) / 200)
    assert area(RISING, upto=150) == pytest.approx((0.45 * 100 + 0.55 * 50) / 150)
    assert area(RISING, upto=100) == pytest.approx(0.45)
    assert math.isnan(area(RISING, upto=300)), "nobody knows how it goes on"


def test_band() -> None:
    """The second seed was not evaluated at 100, where it is between .5 and .9; the first ends there."""
    table = band({42: curve(r0=0.4, r100=0.6), 43: curve(r0=0.5, r200=0.9)})
    assert table.index.tolist() == [0, 100, 200]
    wanted = {"mean": [0.45, 0.65, 0.9], "low": [0.4, 0.6, 0.9], "high": [0.5, 0.7, 0.9], "seeds": [2, 2, 1]}
    for name, values in wanted.items():
        assert table[name].tolist() == pytest.approx(values), name
    assert table["std"].tolist() == pytest.approx([math.sqrt(0.005)] * 2 + [math.nan], nan_ok=True)
    assert table["sem"].tolist() == pytest.approx([0.05, 0.05, math.nan], nan_ok=True)


def test_seed_gap_of_pairs() -> None:
    """Differences .1, .2, .15: standard deviation .05, and t is 4.3027 with two degrees of freedom."""
    gap = seed_gap({42: 0.6, 43: 0.7, 44: 0.65, 46: 9.0}, {44: 0.5, 43: 0.5, 42: 0.5, 45: 0.0})
    half = 4.3027 * 0.05 / math.sqrt(3)
    assert (gap.value, gap.low, gap.high, gap.num) == pytest.approx((0.15, 0.15 - half, 0.15 + half, 3), abs=1e-5)
    same = seed_gap({1: 0.65, 2: 0.5, 3: 0.3}, {1: 0.5, 2: 0.35, 3: 0.15})
    assert (same.value, same.low, same.high) == pytest.approx((0.15, 0.15, 0.15))


def test_seed_gap_without_pairs() -> None:
    """Both have a standard deviation of .05; t is 2.7764 with four degrees of freedom."""
    gap = seed_gap({1: 0.6, 2: 0.7, 3: 0.65}, {4: 0.5, 5: 0.4, 6: 0.45})
    half = 2.7764 * 0.05 * math.sqrt(2 / 3)
    assert (gap.value, gap.low, gap.high, gap.num) == pytest.approx((0.2, 0.2 - half, 0.2 + half, 0), abs=1e-5)


def test_too_few_seeds_for_an_interval() -> None:
    gap = seed_gap({42: 0.6, 43: 0.8}, {42: 0.5, 43: 0.5})
    assert gap.value == pytest.approx(0.2) and math.isnan(gap.low) and math.isnan(gap.high)
    assert gap.num == 2 and isinstance(gap, Gap)


def test_difference_of_gaps_measured_apart() -> None:
    """.5 [.2, .6] less half of .4 [.2, 1.2]: below by 3-4-5 of .3 and .4, above by sqrt(.01 + .01)."""
    found = gap_difference(Gap(0.5, 0.2, 0.6, 9), Gap(0.4, 0.2, 1.2, 7), 0.5)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, -0.2, 0.3 + math.sqrt(0.02)))
    assert found.num == 7


def test_ratio_to_a_share_of_the_gain() -> None:
    """A plateau from 100 on, best by .01 at 400; 95 % of its gain of .2 is .59, which both reach close to 100."""
    reference = pd.Series([0.4, 0.6, 0.6, 0.6, 0.61], [0, 100, 200, 300, 400])
    other = pd.Series([0.4, 0.61, 0.61, 0.61, 0.61], [0, 100, 200, 300, 400])
    assert ceiling_ratio(other, reference) == pytest.approx(0.25)
    needed = (0.95 * 0.21 / 0.2, 0.95)
    assert ceiling_ratio(other, reference, share=0.95) == pytest.approx(needed[1] / needed[0])
    assert math.isnan(ceiling_ratio(reference, pd.Series([0.5, 0.4], [0, 100]), share=0.5)), "it never rises"
    steep = pd.Series([0.21991682253415565, 0.49376122707744], [0, 100])
    assert ceiling_ratio(steep, steep) == 1, "its best, not one rounding above it"


def test_compare() -> None:
    """Joint training passes the baseline's best mean, .5 at 200, on the way from .4 at 0 to .6 at 100."""
    settings = {
        "flow-only": {42: curve(r0=0.4, r100=0.5, r200=0.55), 43: curve(r0=0.4, r100=0.4, r200=0.45)},
        "joint": {42: curve(r0=0.4, r100=0.6, r200=0.7, r300=0.9), 43: curve(r0=0.4, r100=0.6, r200=0.6)},
    }
    table = compare(settings, "flow-only")
    joint, baseline = table.loc["joint"], table.loc["flow-only"]
    assert (table["at"] == 200).all() and table["seeds"].tolist() == [2, 2]
    assert (baseline.final, baseline.low, baseline.high) == pytest.approx((0.5, 0.45, 0.55))
    assert (joint.final, joint.low, joint.high) == pytest.approx((0.65, 0.6, 0.7))
    assert joint.area == pytest.approx(((0.5 + 0.65) / 2 + (0.5 + 0.6) / 2) / 2)
    # 300 is one seed's alone.
    assert (joint.best, joint.to_best) == pytest.approx((0.65, 200))
    assert (joint.to_reference, joint.ratio) == pytest.approx((50, 0.25))
    assert (baseline.to_reference, baseline.ratio) == pytest.approx((200, 1))
    assert joint.gap == pytest.approx(0.15) and math.isnan(joint.gap_low) and math.isnan(baseline.gap)


def test_compare_refuses() -> None:
    with pytest.raises(ValueError, match=r"no setting is base: there are a; name one"):
        compare({"a": {42: RISING}}, "base")
    with pytest.raises(ValueError, match=r"a, seed 43, has no score yet: leave this run out"):
        compare({"a": {42: RISING, 43: pd.Series(dtype=float)}}, "a")


@st.composite
def drawn_curves(draw: st.DrawFn) -> pd.Series:
    places = sorted(draw(st.sets(st.integers(0, 10_000), min_size=2, max_size=12)))
    scores = st.floats(0, 1, allow_nan=False).map(lambda value: round(value, 6))
    return pd.Series([draw(scores) for _ in places], index=places, dtype=float)


@given(drawn_curves(), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_score_is_reached_later(series: pd.Series, one: float, other: float) -> None:
    low, high = sorted((one, other))
    first, second = rollouts_to(series, low), rollouts_to(series, high)
    if not math.isnan(second):
        assert first <= second + 1e-9 and second <= rollouts_to(series, high, interpolate=False) + 1e-9
        assert at(series, second) >= high - 1e-6


@given(drawn_curves(), st.floats(0, 1))
def test_an_evaluation_on_the_line_changes_no_area(series: pd.Series, share: float) -> None:
    place = series.index[0] + share * (series.index[-1] - series.index[0])
    more = pd.Series(
        np.append(series.to_numpy(), at(series, place)), index=np.append(series.index.to_numpy(dtype=float), place)
    ).sort_index()
    assert area(more) == pytest.approx(area(series))
    assert series.min() - 1e-9 <= area(series) <= series.max() + 1e-9
