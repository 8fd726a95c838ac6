"""The comparisons that the claims rest on: flow-only, prompt-only and joint training, each at its best learning rates.

The same search for each names candidates: rates at which its one seed ends above every seed of the shared ones, 1x. Of
the rates that were run with several seeds the one with the best mean of last validations is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.paper.runs import GENEVAL, LEAST_SEEDS, REWARDS, Score, Setting, Studies, Study

FACTORS = ("0.5", "1", "2", "4")
"""Factors of the learning rates in the search; 1x is what all modes share."""
LEAST_FACTORS = {"0.5", "1", "2"}
"""Factors that have to be tried; 4x need not where nothing does better at 2x."""
SEARCHED = (42,)
"""Seeds of the learning rates' search."""
NAMES = {"geneval": "GenEval", "ocr": "OCR", "preference": "preference"}
"""Reward -> its name in the report."""
FLOW, PROMPT, PLAIN, JOINT = "flow-only", "prompt-only with PE", "PromptRL without PE", "PromptRL with PE"
ARMS = {
    FLOW: ("flow_only", "without_pe"),
    PROMPT: ("prompt_only", "with_pe"),
    PLAIN: ("promptrl", "without_pe"),
    JOINT: ("promptrl", "with_pe"),
}
"""Arm -> the config's name without the reward, and the mode that is scored."""


@dataclass(frozen=True)
class Arm:
    """A way of training, scored with or without the refiner, by one reward.

    Attributes:
        label: name in the report.
        column: name of its validation scores in the logs.
        tried: factor of the learning rates -> the search's run.
        runs: factor -> runs of more seeds; 1x is always a key, with an empty setting if it was not run.
    """

    label: str
    column: str
    tried: Mapping[str, Setting] = field(default_factory=dict)
    runs: Mapping[str, Setting] = field(default_factory=lambda: {"1": Setting({}, {})})

    def finals(self, setting: Setting) -> dict[Any, float]:
        """Returns seed -> last validation score."""
        return {seed: float(series.iloc[-1]) for seed, series in setting.curves(self.column).items()}

    @property
    def searched(self) -> dict[str, float]:
        """Factor -> last validation score of the search's seed."""
        finals = {factor: self.finals(setting.only(SEARCHED)) for factor, setting in self.tried.items()}
        return {factor: value for factor in FACTORS for value in finals.get(factor, {}).values()}

    @property
    def best(self) -> str:
        """Best factor of the search: 1x, unless another one is above every seed of 1x."""
        best = max(self.searched, key=self.searched.__getitem__, default="1")
        return best if self.searched.get(best, 0.0) > max(self.finals(self.runs["1"]).values(), default=1.0) else "1"

    @property
    def factor(self) -> str:
        """Factor of the runs that are compared: the best of those with enough seeds, by the seeds that all have."""
        finals = {factor: self.finals(setting) for factor, setting in self.runs.items()}
        finals = {factor: own for factor, own in finals.items() if len(own) >= LEAST_SEEDS}
        shared = set.intersection(*map(set, finals.values())) if finals else set()
        return max(finals, key=lambda factor: sum(finals[factor][seed] for seed in shared)) if shared else "1"

    @property
    def setting(self) -> Setting:
        """The runs that are compared."""
        return self.runs[self.factor]

    @property
    def complete(self) -> bool:
        """True if enough factors were tried, on both sides of the best."""
        return set(self.searched) >= LEAST_FACTORS and ("2" not in (self.best, self.factor) or "4" in self.searched)

    @property
    def doubt(self) -> str:
        """Reason why the mode may do better than in these runs; empty if there is none."""
        paired = set(self.runs["1"].fits) & set(self.runs.get(self.best, Setting({}, {})).fits)
        few = self.best != "1" and len(paired) < LEAST_SEEDS
        if not few and self.factor not in (FACTORS[0], FACTORS[-1]):
            return ""
        better = self.best if few else self.factor
        scores = f"{self.searched[better]:.2f} against {self.searched['1']:.2f}"
        why = "not run with more seeds" if few else "the last one tried"
        return f"{self.label} does better at {better}x ({scores}), {why}"


@dataclass(frozen=True)
class Comparison:
    """The arms that are compared by one reward.

    Attributes:
        reward: name of its set of prompts, and of its study.
        benchmark: title of the benchmark that scores it.
        arms: label -> arm.
        base: tests of the untrained models.
    """

    reward: str
    benchmark: str
    arms: Mapping[str, Arm]
    base: Setting

    @property
    def name(self) -> str:
        """Name of the reward in claims and tables."""
        return NAMES[self.reward]

    @property
    def settings(self) -> dict[str, Setting]:
        """Arm -> its runs at its best learning rates."""
        return {label: arm.setting for label, arm in self.arms.items()}

    def score(self, label: str, name: str | None = None) -> Score:
        """Returns the score of an arm on the canonical wording or, by name, on another set."""
        return Score(self.arms[label].setting, name or self.reward, ARMS[label][1], self.benchmark)

    def untrained(self, mode: str, name: str | None = None) -> Score:
        """Returns the score of the untrained models, without or with the untrained PE."""
        return Score(self.base, name or self.reward, mode, self.benchmark)

    def rates(self, labels: Iterable[str]) -> str:
        """Lists the learning rates at which arms are compared.

        >>> Comparison("ocr", "", {FLOW: Arm(FLOW, ""), JOINT: Arm(JOINT, "")}, Setting({}, {})).rates([FLOW, JOINT])
        'flow-only 1x, PromptRL with PE 1x'
        """
        return ", ".join(f"{label} {self.arms[label].factor}x" for label in labels)


def comparisons(studies: Studies) -> list[Comparison]:
    """Returns the comparison by each reward."""
    found = []
    for reward, benchmark in {"geneval": GENEVAL, **REWARDS}.items():
        base = studies["base" if reward == "geneval" else "base_words"][config_of(reward, "promptrl")]
        arms = {label: _arm(studies, reward, label) for label in ARMS}
        found.append(Comparison(reward, benchmark, arms, base))
    return found


def other_bases(studies: Studies) -> dict[str, Comparison]:
    """Returns comparisons by GenEval, at 1x, of the second flow model, of its refiner, and of both."""
    first, second = (studies[name]["flow_only"] for name in ("geneval", "words_geneval"))
    pairs = {
        "second flow model and refiner": ("words_geneval", "base_words_geneval", second),
        "second refiner": ("crossed", "base_crossed", first),  # flow-only has none
        "second flow model": ("crossed_words", "base_crossed_words", second),
    }
    found = {}
    for label, (name, untrained, flow) in pairs.items():
        settings = geneval_arms(studies[name]) | {FLOW: flow}
        arms = {arm: Arm(arm, f"val/geneval/{mode}", runs={"1": settings[arm]}) for arm, (_, mode) in ARMS.items()}
        found[label] = Comparison("geneval", GENEVAL, arms, studies[untrained]["promptrl"])
    return found


def geneval_arms(study: Study) -> dict[str, Setting]:
    """Returns arm -> its runs in a study of GenEval's configs."""
    return {label: study[stem] for label, (stem, _) in ARMS.items()}


def config_of(reward: str, stem: str) -> str:
    """Returns the name of the config of a mode and reward.

    >>> config_of("geneval", "promptrl"), config_of("ocr", "promptrl")
    ('promptrl', 'ocr_promptrl')
    """
    return stem if reward == "geneval" else f"{reward}_{stem}"


def _arm(studies: Studies, reward: str, label: str) -> Arm:
    stem, mode = ARMS[label]
    config = config_of(reward, stem)
    shared = studies[reward][config]
    others = [factor for factor in FACTORS if factor != "1"]
    tried = {factor: studies[f"search_{reward}"][f"{config}-lr{factor}"] for factor in others}
    runs = {factor: studies[f"{reward}_tuned"][f"{config}-lr{factor}"] for factor in others}
    return Arm(label, f"val/{reward}/{mode}", {"1": shared} | tried, {"1": shared} | runs)
