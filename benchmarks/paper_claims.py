"""The paper's claims C1-C7 as conditions on measured numbers, and what the miniature says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.paper_runs import GENEVAL, REWARDS, Score, Setting, Studies, contrast, merged
from callbacks.comparison import Gap, compare

SWAPPED = (42, 43, 44)
"""Seeds of the retention, swap and enhancer studies; GenEval's comparison has more."""
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"


@dataclass(frozen=True)
class Condition:
    """One measurable part of a claim.

    Attributes:
        what: in words.
        number: as it is shown.
        verdict: `HOLDS`, `FAILS` (the other way round) or `OPEN` (an interval that has both).
    """

    what: str
    number: str
    verdict: str


def above(what: str, *terms: tuple[float, Score], at_least: float = 0.0) -> Condition | None:
    """That a contrast lies above a bound, by its interval over prompts. None if a score was not measured."""
    if not all(score.there for _, score in terms):
        return None
    gap = contrast(*terms)
    return Condition(what, _shown(gap), _verdict(gap, at_least))


def _verdict(gap: Gap, bound: float) -> str:
    return HOLDS if gap.low > bound else FAILS if gap.high < bound else OPEN


def _shown(gap: Gap) -> str:
    return f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def verdict_of(conditions: Sequence[Condition | None]) -> str:
    """A claim holds if all its parts do, and does not if one does not; None is a part that was not measured."""
    found = {OPEN if condition is None else condition.verdict for condition in conditions}
    return FAILS if FAILS in found else OPEN if OPEN in found else HOLDS


def verdicts(studies: Studies) -> str:
    """All claims that something was measured for, as a Markdown table."""
    lines = ["| claim | verdict | what it rests on |", "|---|---|---|"]
    for claim, conditions in _claims(studies).items():
        known = [condition for condition in conditions if condition is not None]
        if known:
            parts = "; ".join(f"{one.what}: {one.number} ({one.verdict})" for one in known)
            parts += "" if len(known) == len(conditions) else "; the rest is not measured yet"
            lines.append(f"| {claim} | **{verdict_of(conditions)}** | {parts} |")
    return "\n".join(lines)


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
        best, alone = one.score(one.joint, "with_pe"), one.score(one.flow, "without_pe")
        claims[f"C1, {one.name}: flow-only's ceiling with less than half the rollouts, and higher in the end"] = [
            _ratio(one),
            above("PromptRL with PE - flow-only", (1, best), (-1, alone)),
            above("PromptRL with PE - prompt-only with PE", (1, best), (-1, one.score(one.prompt, "with_pe"))),
        ]
    for one in every:
        best, alone = one.score(one.joint, "with_pe"), one.score(one.flow, "without_pe")
        lost = (1, alone), (-1, one.score(one.flow, "without_pe", "unseen"))
        plain = (-1, one.score(one.base, "without_pe")), (1, one.score(one.base, "without_pe", "unseen"))
        refined = (-1, best), (1, one.score(one.joint, "with_pe", "unseen"))
        claims[f"C2, {one.name}: flow-only collapses on other wordings, joint training does not"] = [
            above("what an unseen wording costs flow-only, more than the base", *lost, *plain),
            above("what it costs flow-only, more than PromptRL with PE", *lost, *refined),
        ]
    geneval = every[0]
    joint, flow = geneval.joint, geneval.flow
    alone = geneval.score(flow, "without_pe")
    claims["C3: rewrites lower the similarity within a group"] = [_similarity(studies)]
    for one in every:
        claims[f"C4, {one.name}: the jointly trained flow model is better even without PE"] = [
            above(
                "PromptRL without PE - flow-only",
                (1, one.score(one.joint, "without_pe")),
                (-1, one.score(one.flow, "without_pe")),
            )
        ]
    three = joint.only(SWAPPED)
    kept = Score(three, "geneval", "without_pe")
    claims["C5: m = 2 retained prompts beat 0 and 1, without PE"] = [
        above(
            f"m = 2 - m = {m}",
            (1, kept),
            (-1, Score(studies["retention"][f"promptrl-num_retained{m}"], "geneval", "without_pe")),
        )
        for m in (0, 1)
    ]
    claims["C6: tags train several rewards at once (each above its base; single rewards are in the table)"] = [
        above(
            name,
            (1, Score(studies["multi_reward"]["multi_reward_promptrl"], name, "with_pe", title)),
            (-1, Score(studies["base_words"]["multi_reward_promptrl"], name, "with_pe", title)),
        )
        for name, title in {"geneval": GENEVAL, **REWARDS}.items()
    ]
    swapped = merged(studies["swap"].settings.values())
    claims["C7: an untrained PE does not help an RL-tuned flow model; swapping the LM costs"] = [
        _not_above(
            "untrained PE in front of flow-only",
            (1, Score(flow.only(SWAPPED), "geneval.static_pe", "without_pe")),
            (-1, Score(flow.only(SWAPPED), "geneval", "without_pe")),
        ),
        above(
            "its own refiner - the untrained one",
            (1, Score(three, "geneval", "with_pe")),
            (-1, Score(three, "geneval.static_pe", "without_pe")),
        ),
        above(
            "its own refiner - another seed's",
            (1, Score(three, "geneval", "with_pe")),
            (-1, Score(swapped, "geneval", "with_pe")),
        ),
    ]
    return claims


def _not_above(what: str, *terms: tuple[float, Score]) -> Condition | None:
    """That a contrast is no clear gain."""
    if not all(score.there for _, score in terms):
        return None
    gap = contrast(*terms)
    return Condition(what, _shown(gap), FAILS if gap.low > 0 else HOLDS)


def _ratio(one: Comparison) -> Condition | None:
    """Rollouts to flow-only's best, as a share of flow-only's own; by mean curves, without an interval."""
    if not one.flow.fits or not one.joint.fits:
        return None
    curves = {
        "flow": one.flow.curves(f"val/{one.reward}/without_pe"),
        "joint": one.joint.curves(f"val/{one.reward}/with_pe"),
    }
    ratio = float(compare(curves, "flow").loc["joint", "ratio"])
    said = "never reached" if ratio != ratio else f"{ratio:.2f}"
    what = f"share of flow-only's rollouts to its best ({len(one.joint.fits)} seeds)"
    return Condition(what, said, HOLDS if ratio < 0.5 else FAILS)


def _similarity(studies: Studies) -> Condition | None:
    """PromptRL's rewrites against one prompt, in the mean of the seeds; each seed's interval is far from 0 or not."""
    key = "rewrites - same_prompt"
    found = [
        run.results["diversity_pixels"]
        for run in studies["geneval"]["promptrl"].tests.values()
        if "diversity_pixels" in run.results
    ]
    if not found:
        return None
    values = [one["geneval"][key]["image_similarity"] for one in found]
    highest = max(one["intervals"]["geneval"][key]["image_similarity"][1] for one in found)
    return Condition(
        "cosine of two pictures, rewrites - one prompt",
        f"{sum(values) / len(values):+.2f} (highest end of a seed's interval {highest:+.2f})",
        HOLDS if highest < 0 else OPEN,
    )
