"""The paper's claims C1-C7 as conditions on measured numbers, and what the miniature says of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

from benchmarks.paper_modes import Comparison, comparisons
from benchmarks.paper_runs import GENEVAL, REWARDS, Score, Setting, Studies, contrast, merged, shared_seeds
from callbacks.comparison import Gap, ceiling_ratio

SWAPPED = (42, 43, 44)
"""Seeds of the retention, swap and enhancer studies; GenEval's comparison has more."""
LEAST_SEEDS = 3
"""From fewer nothing is concluded."""
C1_SEEDS = 5
"""Of the main claim."""
HOLDS, HERE, OPEN, FAILS = "holds", "holds for these scenes", "not decided", "does not hold"
"""From best to worst; a claim is as good as its worst part."""
EXPLANATION = (
    "A part **holds** if its interval lies on the claim's side, drawn over other seeds and other scenes; it **holds "
    "for these scenes** if only the interval over other seeds, noise and prompts for the test's own scenes does; it "
    "**does not hold** if the latter lies on the other side. A claim is as good as its worst part; fewer than three "
    "seeds (C1: five), or a part that is not measured, decide nothing. C1, C2 and C4 compare each mode at its best "
    "learning rates, where these were run. The brackets are of both kinds, other scenes last."
)


@dataclass(frozen=True)
class Condition:
    """One measurable part of a claim.

    Attributes:
        what: in words.
        number: as it is shown.
        verdict: one of the four.
    """

    what: str
    number: str
    verdict: str


def above(what: str, *terms: tuple[float, Score], least: int = LEAST_SEEDS) -> Condition | None:
    """That a contrast is positive; None if a score was not measured, or no seed has all of them.

    Args:
        what: in words.
        terms: weighted scores.
        least: fewer seeds decide nothing.
    """
    scores = [score for _, score in terms]
    trained = [score for score in scores if score.setting.fits]
    seeds = shared_seeds(*scores)
    if not all(score.there for score in scores) or (trained and not seeds):
        return None
    here, elsewhere = contrast(*terms), contrast(*terms, scenes=True)
    number = f"{here.value:+.3f} {_ends(here)} {_ends(elsewhere)}, {len(seeds)} seeds"
    return Condition(what, number, verdict(here, elsewhere) if len(seeds) >= least else OPEN)


def verdict(here: Gap, elsewhere: Gap) -> str:
    """Of a contrast that is to be positive.

    Args:
        here: with its interval over seeds, and prompts for the test's own scenes.
        elsewhere: over seeds and other scenes.
    """
    return FAILS if here.high < 0 else HOLDS if min(here.low, elsewhere.low) > 0 else HERE if here.low > 0 else OPEN


def _ends(gap: Gap) -> str:
    return f"[{gap.low:+.3f}, {gap.high:+.3f}]"


def verdict_of(conditions: Sequence[Condition | None]) -> str:
    """The worst of a claim's parts; None is a part that was not measured."""
    order = (HOLDS, HERE, OPEN, FAILS)
    return max((OPEN if condition is None else condition.verdict for condition in conditions), key=order.index)


def verdicts(studies: Studies) -> str:
    """All claims that something was measured for, as a Markdown table."""
    lines = ["| claim | verdict | what it rests on |", "|---|---|---|"]
    for claim, conditions in _claims(studies).items():
        known = [condition for condition in conditions if condition is not None]
        if known:
            parts = "; ".join(f"{one.what}: {one.number} ({one.verdict})" for one in known)
            parts += "" if len(known) == len(conditions) else "; the rest is not measured yet"
            lines.append(f"| {claim} | **{verdict_of(conditions)}** | {parts} |")
    return "\n".join([*lines, "", EXPLANATION])


def _claims(studies: Studies) -> dict[str, list[Condition | None]]:
    claims: dict[str, list[Condition | None]] = {}
    every = comparisons(studies)
    for one in every:
        best, alone, refiner = (
            one.score(setting, mode)
            for setting, mode in ((one.joint, "with_pe"), (one.flow, "without_pe"), (one.prompt, "with_pe"))
        )
        claims[f"C1, {one.name}: flow-only's ceiling with less than half the rollouts, and higher in the end"] = [
            ratio(one),
            above("PromptRL with PE - flow-only", (1, best), (-1, alone), least=C1_SEEDS),
            above("PromptRL with PE - prompt-only with PE", (1, best), (-1, refiner), least=C1_SEEDS),
            searched(one),
        ]
    for one in every:
        lost, plain, refined, unrefined = (
            ((sign, one.score(setting, mode)), (-sign, one.score(setting, mode, "unseen")))
            for sign, setting, mode in (
                (1, one.flow, "without_pe"),
                (-1, one.base, "without_pe"),
                (-1, one.joint, "with_pe"),
                (-1, one.joint, "without_pe"),
            )
        )
        claims[f"C2, {one.name}: flow-only collapses on other wordings, joint training does not"] = [
            above("what an unseen wording costs flow-only, more than the base", *lost, *plain),
            above("what it costs flow-only, more than PromptRL with PE", *lost, *refined),
            above("what it costs flow-only, more than PromptRL without PE", *lost, *unrefined),
        ]
    geneval = every[0]
    joint, flow = (studies["geneval"][stem].only(SWAPPED) for stem in ("promptrl", "flow_only"))
    own = geneval.score(joint, "with_pe")
    claims["C3: rewrites lower the similarity within a group"] = [_similarity(studies["geneval"]["promptrl"])]
    for one in every:
        without, alone = one.score(one.joint, "without_pe"), one.score(one.flow, "without_pe")
        claims[f"C4, {one.name}: the jointly trained flow model is better even without PE"] = [
            above("PromptRL without PE - flow-only", (1, without), (-1, alone))
        ]
    retained = {m: studies["retention"][f"promptrl-num_retained{m}"] for m in (0, 1)}
    claims["C5: m = 2 retained prompts beat 0 and 1, without PE"] = [
        above(
            f"m = 2 - m = {m}",
            (1, geneval.score(joint, "without_pe")),
            (-1, geneval.score(setting, "without_pe")),
        )
        for m, setting in retained.items()
    ]
    multi, base = studies["multi_reward"]["multi_reward_promptrl"], studies["base_words"]["multi_reward_promptrl"]
    claims["C6: tags train several rewards at once (beside one reward each: see the table)"] = [
        above(
            f"{name}, with PE, above the untrained models {label}",
            (1, Score(multi, name, "with_pe", title)),
            (-1, Score(base, name, mode, title)),
        )
        for name, title in {"geneval": GENEVAL, **REWARDS}.items()
        for mode, label in (("without_pe", "without PE"), ("with_pe", "with PE"))
    ]
    static = geneval.score(joint, "without_pe", "geneval.static_pe")
    swapped = merged(studies["swap"].settings.values())
    claims["C7: an untrained PE does not help an RL-tuned flow model; swapping the LM costs"] = [
        above(
            "flow-only - flow-only behind the untrained PE",
            (1, geneval.score(flow, "without_pe")),
            (-1, geneval.score(flow, "without_pe", "geneval.static_pe")),
        ),
        above("PromptRL with its own refiner - with the untrained one", (1, own), (-1, static)),
        above("PromptRL with its own refiner - with another seed's", (1, own), (-1, geneval.score(swapped, "with_pe"))),
    ]
    return claims


def searched(one: Comparison) -> Condition | None:
    """That no mode's learning rates hold it back: each runs at its best of those tried."""
    if not all(mode.searched for mode in one.modes.values()):
        return None
    doubts = "; ".join(filter(None, (mode.doubt for mode in one.modes.values())))
    return Condition("learning rates", doubts or f"{one.rates}, each mode's best", OPEN if doubts else HOLDS)


def ratio(one: Comparison) -> Condition | None:
    """Rollouts to the best of flow-only's mean curve, over its own; with draws of the seeds that both have."""
    columns = {mode: f"val/{one.reward}/{mode}" for mode in ("without_pe", "with_pe")}
    flow, joint = one.flow.curves(columns["without_pe"]), one.joint.curves(columns["with_pe"])
    seeds = [seed for seed in flow if seed in joint]
    if not seeds:
        return None
    ours, theirs = (pd.DataFrame({seed: curves[seed] for seed in seeds}) for curves in (joint, flow))

    @cache
    def share(chosen: Sequence[int]) -> float:
        reference = theirs.iloc[:, list(chosen)].mean(axis=1)
        value = ceiling_ratio(ours.iloc[:, list(chosen)].mean(axis=1), reference)
        return math.inf if math.isnan(value) and reference.idxmax() > 0 else value  # never reached

    what, value = "share of flow-only's rollouts to its best", share(tuple(range(len(seeds))))
    if math.isnan(value):
        return Condition(what, f"none, as flow-only is best untrained, {len(seeds)} seeds", OPEN)
    drawn = [share(tuple(sorted(chosen))) for chosen in itertools.product(range(len(seeds)), repeat=len(seeds))]
    low, high = np.nanquantile(drawn, (0.025, 0.975), method="nearest")  # without draws in which flow-only never rises
    found = OPEN if len(seeds) < C1_SEEDS else HOLDS if high < 0.5 else FAILS if low > 0.5 else OPEN
    return Condition(what, f"{_share(value)} [{_share(low)}, {_share(high)}], {len(seeds)} seeds", found)


def _share(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f}"


def _similarity(joint: Setting) -> Condition | None:
    """PromptRL's rewrites against one prompt: by each seed's interval over prompts."""
    key = "rewrites - same_prompt"
    results = [test.run.results["diversity_pixels"] for test in joint.tests.values()
               if "diversity_pixels" in test.run.results]  # fmt: skip
    if not results:
        return None
    values = [one["geneval"][key]["image_similarity"] for one in results]
    ends = [one["intervals"]["geneval"][key]["image_similarity"] for one in results]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    found = OPEN if len(results) < LEAST_SEEDS else HOLDS if high < 0 else FAILS if low > 0 else OPEN
    number = (
        f"{sum(values) / len(values):+.2f} (ends of the seeds' intervals {low:+.2f}, {high:+.2f}), {len(values)} seeds"
    )
    return Condition("cosine of two pictures, rewrites - one prompt", number, found)
