"""The paper's claims C1-C7 as conditions on measured numbers, and what the miniature says of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.paper_runs import GENEVAL, REWARDS, Score, Setting, Studies, contrast, merged, shared_seeds
from callbacks.comparison import Gap

SWAPPED = (42, 43, 44)
"""Seeds of the retention, swap and enhancer studies; GenEval's comparison has more."""
FACTORS = ("0.5", "1", "2")
"""Of the learning rates, in the search; 1x is that of the comparison."""
SEARCHED = (42,)
"""Seed of the learning rates' search."""
TOLERANCE = 0.02
"""How much better another learning rate may be by chance: 192 prompts, one seed."""
LEAST_SEEDS = 3
"""From fewer nothing is concluded."""
HOLDS, HERE, OPEN, FAILS = "holds", "holds for these scenes", "not decided", "does not hold"
"""From best to worst; a claim is as good as its worst part."""
EXPLANATION = (
    "A part **holds** if its interval lies on the claim's side, drawn over other seeds and other scenes; it **holds "
    "for these scenes** if only the interval over other seeds, noise and prompts for the test's own scenes does; it "
    "**does not hold** if the latter lies on the other side. A claim is as good as its worst part; fewer than three "
    "seeds, or a part that is not measured, decide nothing. The brackets are of both kinds, other scenes last."
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


def above(what: str, *terms: tuple[float, Score]) -> Condition | None:
    """That a contrast is positive; None if a score was not measured, or no seed has all of them."""
    scores = [score for _, score in terms]
    trained = [score for score in scores if score.setting.fits]
    seeds = shared_seeds(*scores)
    if not all(score.there for score in scores) or (trained and not seeds):
        return None
    here, elsewhere = contrast(*terms), contrast(*terms, scenes=True)
    number = f"{here.value:+.3f} {_ends(here)} {_ends(elsewhere)}, {len(seeds)} seeds"
    return Condition(what, number, verdict(here, elsewhere, len(seeds)))


def verdict(here: Gap, elsewhere: Gap, seeds: int) -> str:
    """Of a contrast that is to be positive.

    Args:
        here: with its interval over seeds, and prompts for the test's own scenes.
        elsewhere: over seeds and other scenes.
        seeds: how many there are.
    """
    if seeds < LEAST_SEEDS:
        return OPEN
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


@dataclass(frozen=True)
class Comparison:
    """Three modes and the untrained models by one reward.

    Attributes:
        name: of the claims' rows.
        reward: its set of prompts, and name of its study.
        benchmark: that scores it.
        joint, flow, prompt, base: what was trained.
    """

    name: str
    reward: str
    benchmark: str
    joint: Setting
    flow: Setting
    prompt: Setting
    base: Setting

    def score(self, setting: Setting, mode: str, name: str | None = None) -> Score:
        """On the canonical wording, or another set."""
        return Score(setting, name or self.reward, mode, self.benchmark)


def comparisons(studies: Studies) -> list[Comparison]:
    """One for each reward."""
    names = {"geneval": "GenEval", "ocr": "OCR", "preference": "preference"}
    found = []
    for reward, benchmark in {"geneval": GENEVAL, **REWARDS}.items():
        prefix = "" if reward == "geneval" else f"{reward}_"
        joint, flow, prompt = (studies[reward][f"{prefix}{stem}"] for stem in ("promptrl", "flow_only", "prompt_only"))
        base = studies["base" if reward == "geneval" else "base_words"][f"{prefix}promptrl"]
        found.append(Comparison(names[reward], reward, benchmark, joint, flow, prompt, base))
    return found


def _claims(studies: Studies) -> dict[str, list[Condition | None]]:
    claims: dict[str, list[Condition | None]] = {}
    every = comparisons(studies)
    for one in every:
        best = one.score(one.joint, "with_pe")
        claims[f"C1, {one.name}: flow-only's ceiling with less than half the rollouts, and higher in the end"] = [
            ratio(one),
            above("PromptRL with PE - flow-only", (1, best), (-1, one.score(one.flow, "without_pe"))),
            above("PromptRL with PE - prompt-only with PE", (1, best), (-1, one.score(one.prompt, "with_pe"))),
            searched(studies, one),
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
    joint, flow = geneval.joint.only(SWAPPED), geneval.flow.only(SWAPPED)
    own = geneval.score(joint, "with_pe")
    claims["C3: rewrites lower the similarity within a group"] = [_similarity(geneval.joint)]
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


def searches(studies: Studies, one: Comparison) -> dict[str, dict[str, float]]:
    """Mode -> factor of its learning rates -> last validation score of the search's seed."""
    prefix, found = "" if one.reward == "geneval" else f"{one.reward}_", {}
    for label, stem, setting, mode in (
        ("flow-only", "flow_only", one.flow, "without_pe"),
        ("prompt-only", "prompt_only", one.prompt, "with_pe"),
        ("PromptRL", "promptrl", one.joint, "with_pe"),
    ):
        tried = {factor: studies[f"search_{one.reward}"][f"{prefix}{stem}-lr{factor}"] for factor in FACTORS}
        found[label] = {
            factor: float(series.iloc[-1])
            for factor, each in (tried | {"1": setting.only(SEARCHED)}).items()
            for series in each.curves(f"val/{one.reward}/{mode}").values()
        }
    return found


def searched(studies: Studies, one: Comparison) -> Condition | None:
    """That no mode's learning rates hold it back: 1x is each one's best of those tried, but for `TOLERANCE`."""
    notes = []
    for label, finals in searches(studies, one).items():
        if len(finals) < len(FACTORS):
            return None
        best = max(finals, key=finals.__getitem__)
        if finals[best] > finals["1"] + TOLERANCE:
            notes.append(f"{label} does better at {best}x ({finals[best]:.2f} against {finals['1']:.2f})")
    said = "; ".join(notes) or "1x is best, or nearly, of 0.5x, 1x, 2x for each mode"
    return Condition("learning rates", said, OPEN if notes else HOLDS)


def ratio(one: Comparison) -> Condition | None:
    """Rollouts to the best of flow-only's mean curve, over its own; with draws of the seeds that both have."""
    columns = {mode: f"val/{one.reward}/{mode}" for mode in ("without_pe", "with_pe")}
    flow, joint = one.flow.curves(columns["without_pe"]), one.joint.curves(columns["with_pe"])
    seeds = [seed for seed in flow if seed in joint]
    if not seeds:
        return None
    x = flow[seeds[0]].index.to_numpy(dtype=float)
    ours = np.stack([joint[seed].to_numpy(dtype=float) for seed in seeds])
    theirs = np.stack([flow[seed].to_numpy(dtype=float) for seed in seeds])

    def share(chosen: Sequence[int]) -> float:
        mine, reference = ours[list(chosen)].mean(0), theirs[list(chosen)].mean(0)
        needed, reached = x[int(reference.argmax())], np.flatnonzero(mine >= reference.max())
        if needed == 0 or not len(reached):  # flow-only never rises; or its best is never reached
            return math.inf
        i = int(reached[0])
        if i == 0:
            return 0.0
        part = (reference.max() - mine[i - 1]) / (mine[i] - mine[i - 1])
        return float((x[i - 1] + part * (x[i] - x[i - 1])) / needed)

    value = share(range(len(seeds)))
    drawn = np.array([share(chosen) for chosen in itertools.product(range(len(seeds)), repeat=len(seeds))])
    low, high = np.quantile(drawn, (0.025, 0.975), method="nearest")
    found = OPEN if len(seeds) < LEAST_SEEDS else HOLDS if high < 0.5 else FAILS if low > 0.5 else OPEN
    number = f"{_share(value)} [{_share(low)}, {_share(high)}], {len(seeds)} seeds"
    return Condition("share of flow-only's rollouts to its best", number, found)


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
