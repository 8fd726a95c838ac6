"""The paper's claims C1-C7 as conditions on measured numbers, and the miniature's verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd

from benchmarks.paper.modes import FLOW, JOINT, PLAIN, PROMPT, Comparison, comparisons
from benchmarks.paper.runs import (
    GENEVAL,
    LEAST_SEEDS,
    REWARDS,
    VARIED,
    Score,
    Setting,
    Studies,
    contrast,
    fewest_scenes,
    merged,
    shared_seeds,
)
from callbacks.runs.comparison import Gap, ceiling_ratio, gap_difference
from callbacks.scores.bootstrap import other_runs

C1_SEEDS = 5
"""Number of seeds that the main claim, C1, needs."""
LEAST_SCENES = 5
"""Number of scenes that every tag needs; from fewer nothing is concluded for other scenes."""
GAIN_SHARES = (0.9, 0.95, 1.0)
"""Shares of flow-only's gain at which rollouts are compared; the second one's comparison gives the verdict."""
MARGIN = 0.02
"""Difference of scores that counts as none."""
KEPT = 0.8
"""Share of a single reward's gain that training by tags has to bring."""
DRAWS = 1000
"""Number of resampled sets of seeds for the intervals of rollouts."""
HOLDS, HERE, OPEN, FAILS = "holds", "holds for these scenes", "not decided", "does not hold"
"""Verdicts from best to worst; a claim is as good as its worst part."""
EXPLANATION = (
    "A part **holds** if its interval for other seeds and other scenes lies on the claim's side; it **holds for these "
    "scenes** if only the one for other seeds, noise and prompts of the test's own scenes does (or a tag has fewer "
    "than five scenes); it **does not hold** if the latter lies on the other side. The brackets are of both kinds, "
    "other scenes last; what other seeds would give is taken from Student's distribution. Shares of rollouts are of "
    "validation scores, with an interval for other seeds alone; C3's is the widest of the seeds' own. A claim is as "
    "good as its worst part; fewer than three seeds (C1: five) or a part that is not measured decide nothing. What "
    "stands beside a claim does not count."
)


@dataclass(frozen=True)
class Condition:
    """One measurable part of a claim.

    Attributes:
        what: the condition in words.
        number: the measured number as it is shown.
        verdict: `HOLDS`, `HERE`, `OPEN` or `FAILS`.
    """

    what: str
    number: str
    verdict: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        parts: conditions, all of which must hold; None is one that was not measured.
        beside: numbers that explain the claim and do not count.
        rates: learning rates at which the modes are compared.
    """

    parts: Sequence[Condition | None]
    beside: Sequence[Condition | None] = field(default_factory=list)
    rates: str = ""

    @property
    def verdict(self) -> str:
        """Verdict of the worst part."""
        return verdict_of(self.parts)

    def __str__(self) -> str:
        text = "; ".join(f"{one.what}: {one.number} ({one.verdict})" for one in self.parts if one is not None)
        text += "; the rest is not measured yet" if None in self.parts else ""
        text += f". Learning rates: {self.rates}" if self.rates else ""
        beside = "; ".join(f"{one.what}: {one.number}" for one in self.beside if one is not None)
        return f"{text}. Beside it: {beside}" if beside else text


def above(what: str, *terms: tuple[float, Score], least: int = LEAST_SEEDS, margin: float = 0.0) -> Condition | None:
    """Makes the condition that a contrast of scores is positive.

    Args:
        what: the condition in words.
        terms: weights and scores of the contrast.
        least: number of seeds below which nothing is decided.
        margin: how far below zero the contrast may be.

    Returns:
        None if a score was not measured, or no seed has all of them.
    """
    scores = [score for _, score in terms]
    trained = [score for score in scores if score.setting.fits]
    seeds = shared_seeds(*scores)
    if not all(score.there for score in scores) or (trained and not seeds):
        return None
    here, elsewhere = contrast(*terms), contrast(*terms, scenes=True)
    count = len(seeds) if trained else min(len(score.tests) for score in scores)  # tests of exports, one of each seed
    number = _number(here, elsewhere, count)
    return Condition(what, number, _supported(verdict(here, elsewhere, -margin), count, least, scores[0]))


def verdict(here: Gap, elsewhere: Gap, least: float = 0.0) -> str:
    """Judges the condition that a contrast is more than `least`.

    Args:
        here: the contrast with its interval over seeds and over prompts for the test's own scenes.
        elsewhere: the contrast with its interval over seeds and other scenes.
        least: bound of the contrast.
    """
    if here.high < least:
        return FAILS
    return OPEN if not here.low > least else HOLDS if elsewhere.low > least else HERE


def _number(here: Gap, elsewhere: Gap, seeds: int) -> str:
    ends = [f"[{gap.low:+.3f}, {gap.high:+.3f}]" for gap in (here, elsewhere) if not math.isnan(gap.low)]
    return f"{' '.join([f'{here.value:+.3f}', *ends])}, {seeds} seeds"


def verdict_of(conditions: Sequence[Condition | None]) -> str:
    """Returns the worst verdict of some conditions; None is a condition that was not measured, which is `OPEN`."""
    order = (HOLDS, HERE, OPEN, FAILS)
    return max((OPEN if condition is None else condition.verdict for condition in conditions), key=order.index)


def verdicts(studies: Studies) -> str:
    """Writes all claims with a measured part as a Markdown table."""
    lines = ["| claim | verdict | what it rests on |", "|---|---|---|"]
    lines += [
        f"| {name} | **{claim.verdict}** | {claim} |"
        for name, claim in claims(studies).items()
        if any(part is not None for part in claim.parts)
    ]
    return "\n".join([*lines, "", EXPLANATION])


def claims(studies: Studies) -> dict[str, Claim]:
    """Returns the text of each of the paper's claims -> the claim with its measured conditions."""
    every = comparisons(studies)
    found = {}
    for one in every:
        best, alone, refiner = one.score(JOINT), one.score(FLOW), one.score(PROMPT)
        found[f"C1, {one.name}: flow-only's ceiling with less than half the rollouts, and higher in the end"] = Claim(
            [
                ratio(one),
                above("PromptRL with PE - flow-only", (1, best), (-1, alone), least=C1_SEEDS),
                above("PromptRL with PE - prompt-only with PE", (1, best), (-1, refiner), least=C1_SEEDS),
            ],
            rates=one.rates((JOINT, FLOW, PROMPT)),
        )
    for one in every:
        lost, plain, refined = (_cost(partial(one.score, label)) for label in (FLOW, PLAIN, JOINT))
        base = _cost(partial(one.untrained, "without_pe"))
        found[f"C2, {one.name}: flow-only collapses on other wordings, joint training does not"] = Claim(
            [
                above("what an unseen wording costs flow-only, more than the base", *lost, *_less(base)),
                above("what it costs flow-only, more than PromptRL without PE", *lost, *_less(plain)),
            ],
            [
                above(
                    "in the unseen wording PromptRL with PE - flow-only",
                    (1, one.score(JOINT, "unseen")),
                    (-1, one.score(FLOW, "unseen")),
                ),
                above("what it costs PromptRL with PE", *refined),
                above("what it costs flow-only, more than that", *lost, *_less(refined)),
            ],
        )
    probes = probed(studies)
    found["C3: rewrites lower the similarity within a group"] = Claim([_similarity(probes[JOINT])])
    for one in every:
        found[f"C4, {one.name}: the jointly trained flow model is better even without PE"] = Claim(
            [above("PromptRL without PE - flow-only", (1, one.score(PLAIN)), (-1, one.score(FLOW)))]
        )
    without = Score(studies["geneval"]["promptrl"].only(VARIED), "geneval", "without_pe")
    retained = {m: studies["retention"][f"promptrl-num_retained{m}"] for m in (0, 1)}
    found["C5: m = 2 retained prompts beat 0 and 1, without PE"] = Claim(
        [
            above(f"m = 2 - m = {m}", (1, without), (-1, Score(setting, "geneval", "without_pe")))
            for m, setting in retained.items()
        ]
    )
    found["C6: tags train several rewards at once, each nearly as well as alone"] = Claim(
        [part for name, title in {"geneval": GENEVAL, **REWARDS}.items() for part in _tagged(studies, name, title)]
    )
    own, alone = Score(probes[JOINT], "geneval", "with_pe"), Score(probes[FLOW], "geneval", "without_pe")
    swapped = merged(studies["swap"].settings.values())
    static = {label: Score(probes[label], "geneval.static_pe", "without_pe") for label in (JOINT, FLOW)}
    found["C7: an untrained PE does not help an RL-tuned flow model; swapping the LM costs"] = Claim(
        [
            above(
                f"flow-only - flow-only behind the untrained PE, at least -{MARGIN}",
                (1, alone),
                (-1, static[FLOW]),
                margin=MARGIN,
            ),
            above("PromptRL with its own refiner - with the untrained one", (1, own), (-1, static[JOINT])),
        ],
        [
            above(
                "PromptRL with its own refiner - with another seed's",
                (1, own),
                (-1, Score(swapped, "geneval", "with_pe")),
            )
        ],
    )
    return found


def probed(studies: Studies) -> dict[str, Setting]:
    """Returns mode -> all tests of the exported agents in other wordings and behind other refiners."""
    found: dict[str, list[Setting]] = {FLOW: [], JOINT: []}
    for name, setting in studies["probes_promptrl"].settings.items():  # both plans of exports share its folder
        found[FLOW if name.startswith("flow_only") else JOINT].append(setting)
    return {label: merged(settings) for label, settings in found.items()}


def _tagged(studies: Studies, reward: str, benchmark: str) -> list[Condition | None]:
    """Makes the conditions that training by tags raises a reward, and by most of what training by it alone does.

    GenEval alone was trained from other base models, so that it has the first condition only.
    """
    base = studies["base"]
    tagged = [
        (1, Score(studies["multi_reward"]["multi_reward_promptrl"], reward, "with_pe", benchmark)),
        (-1, Score(base["multi_reward_promptrl"], reward, "without_pe", benchmark)),
    ]
    gain = above(f"{reward}, with PE, above the untrained models without PE", *tagged)
    if benchmark == GENEVAL:
        return [gain]
    single = [
        (1, Score(studies[reward][f"{reward}_promptrl"], reward, "with_pe", benchmark)),
        (-1, Score(base[f"{reward}_promptrl"], reward, "without_pe", benchmark)),
    ]
    if gain is None or above("", *single) is None:
        return [gain, None]
    # Other prompts and noise, so the two gains are not paired.
    here, elsewhere = (
        gap_difference(contrast(*tagged, scenes=scenes), contrast(*single, scenes=scenes), KEPT)
        for scenes in (False, True)
    )
    seeds = min(len(shared_seeds(*(score for _, score in terms))) for terms in (tagged, single))
    number = _number(here, elsewhere, seeds)
    found = _supported(verdict(here, elsewhere), seeds, LEAST_SEEDS, tagged[0][1])
    return [gain, Condition(f"that gain - {KEPT} of the one from this reward alone", number, found)]


def _supported(found: str, seeds: int, least: int, score: Score) -> str:
    """Weakens a verdict for which there are too few seeds or scenes."""
    if seeds < least:
        return OPEN
    return HERE if found == HOLDS and fewest_scenes(score) < LEAST_SCENES else found


def _cost(score: Callable[[str | None], Score]) -> list[tuple[float, Score]]:
    """Returns the terms of the score that an unseen wording costs."""
    return [(1, score(None)), (-1, score("unseen"))]


def _less(terms: Sequence[tuple[float, Score]]) -> list[tuple[float, Score]]:
    return [(-sign, score) for sign, score in terms]


def ratio(one: Comparison) -> Condition | None:
    """Makes the condition on PromptRL's share of flow-only's rollouts, by mean curves of the seeds that both have."""
    flow, joint = one.curves(FLOW), one.curves(JOINT)
    seeds = [seed for seed in flow if seed in joint]
    if not seeds:
        return None
    theirs, ours = (np.stack([curves[seed].to_numpy(dtype=float) for seed in seeds]) for curves in (flow, joint))
    rollouts = flow[seeds[0]].index

    def needed(weights: np.ndarray, share: float) -> float:
        mine, reference = (pd.Series(weights @ curves / len(seeds), rollouts) for curves in (ours, theirs))
        value = ceiling_ratio(mine, reference, share=share)
        return math.inf if math.isnan(value) and reference.idxmax() > 0 else value  # never reached

    what, mean = "share of the rollouts that flow-only takes to its gain", theirs.mean(0)
    if mean.argmax() == 0:
        return Condition(what, f"none, as flow-only is best untrained, {len(seeds)} seeds", OPEN)
    draws = other_runs(len(seeds), DRAWS).numpy()
    numbers, ends = [], {}
    for share in GAIN_SHARES:
        # Without draws in which flow-only never rises.
        low, high = np.nanquantile([needed(weights, share) for weights in draws], (0.025, 0.975), method="nearest")
        ends[share] = low, high
        value = _share(needed(np.ones(len(seeds)), share))
        numbers.append(f"{value} [{_share(low)}, {_share(high)}] to {100 * share:.0f} % of it")
    rising = ", where flow-only still rises" if mean.argmax() == len(mean) - 1 else ""
    low, high = ends[GAIN_SHARES[1]]
    found = OPEN if len(seeds) < C1_SEEDS else HERE if high < 0.5 else FAILS if low > 0.5 else OPEN
    return Condition(what, f"{', '.join(numbers)}{rising}, {len(seeds)} seeds", found)


def _share(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f}"


def _similarity(joint: Setting) -> Condition | None:
    """Makes the condition that rewrites lower the similarity of images, by each seed's interval over prompts."""
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
    return Condition("cosine of two images, rewrites - one prompt", number, found)
