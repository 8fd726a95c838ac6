"""The three modes that the claims compare, each at the learning rates that the same search found best for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.paper_runs import GENEVAL, REWARDS, Score, Setting, Studies

FACTORS = ("0.5", "1", "2", "4")
"""Of the learning rates, in the search; 1x is what all modes share."""
LEAST_FACTORS = {"0.5", "1", "2"}
"""4x need not be tried where no mode does better at 2x."""
SEARCHED = (42,)
"""Seed of the learning rates' search."""
TOLERANCE = 0.02
"""How much better another learning rate may be by chance: 192 prompts, one seed."""
NAMES = {"geneval": "GenEval", "ocr": "OCR", "preference": "preference"}
"""Reward -> what it is called."""
MODES = {
    "flow_only": ("flow-only", "without_pe"),
    "prompt_only": ("prompt-only", "with_pe"),
    "promptrl": ("PromptRL", "with_pe"),
}
"""Name of a mode's config -> what it is called, and how it is scored."""


@dataclass(frozen=True)
class Mode:
    """One of the three modes, by one reward.

    Attributes:
        label: what it is called.
        tried: factor of the learning rates -> last validation score of the search's seed.
        tuned: what was run with more seeds, by factor; 1x always stands there, empty if it was not run.
    """

    label: str
    tried: Mapping[str, float] = field(default_factory=dict)
    tuned: Mapping[str, Setting] = field(default_factory=lambda: {"1": Setting({}, {})})

    @property
    def best(self) -> str:
        """1x, unless another one of the search is better by more than chance."""
        best = max(self.tried, key=self.tried.__getitem__, default="1")
        return best if "1" in self.tried and self.tried[best] > self.tried["1"] + TOLERANCE else "1"

    @property
    def factor(self) -> str:
        """Of the runs that are compared: the best, if it was run with more seeds."""
        return self.best if self.tuned.get(self.best, Setting({}, {})).fits else "1"

    @property
    def setting(self) -> Setting:
        """The runs that are compared."""
        return self.tuned[self.factor]

    @property
    def searched(self) -> bool:
        """Whether enough was tried: its best is not the greatest factor, or that is the last of the search."""
        return set(self.tried) >= LEAST_FACTORS and (self.best != "2" or "4" in self.tried)

    @property
    def doubt(self) -> str:
        """Why these runs may do the mode injustice; empty if they do not."""
        better = f"{self.label} does better at {self.best}x ({self.tried[self.best]:.2f} against {self.tried['1']:.2f})"
        if self.factor != self.best:
            return f"{better}, not run with more seeds"
        return f"{better}, the greatest tried" if self.best == FACTORS[-1] else ""


@dataclass(frozen=True)
class Comparison:
    """Three modes and the untrained models by one reward.

    Attributes:
        reward: its set of prompts, and name of its study.
        benchmark: that scores it.
        modes: name of the config, without the reward -> mode.
        base: tests of what was not trained.
    """

    reward: str
    benchmark: str
    modes: Mapping[str, Mode]
    base: Setting

    @property
    def name(self) -> str:
        """Of the reward, in claims and tables."""
        return NAMES[self.reward]

    @property
    def joint(self) -> Setting:
        """PromptRL."""
        return self.modes["promptrl"].setting

    @property
    def flow(self) -> Setting:
        """Flow-only."""
        return self.modes["flow_only"].setting

    @property
    def prompt(self) -> Setting:
        """Prompt-only."""
        return self.modes["prompt_only"].setting

    @property
    def shared_rates(self) -> bool:
        """Whether all three are compared at 1x."""
        return all(mode.factor == "1" for mode in self.modes.values())

    @property
    def rates(self) -> str:
        """Which learning rates are compared.

        >>> Comparison("ocr", "", {"flow_only": Mode("flow-only"), "promptrl": Mode("PromptRL")}, Setting({}, {})).rates
        'flow-only 1x, PromptRL 1x'
        """
        return ", ".join(f"{mode.label} {mode.factor}x" for mode in self.modes.values())

    def score(self, setting: Setting, mode: str, name: str | None = None) -> Score:
        """On the canonical wording, or another set."""
        return Score(setting, name or self.reward, mode, self.benchmark)


def comparisons(studies: Studies) -> list[Comparison]:
    """One for each reward."""
    found = []
    for reward, benchmark in {"geneval": GENEVAL, **REWARDS}.items():
        base = studies["base" if reward == "geneval" else "base_words"][config_of(reward, "promptrl")]
        modes = {stem: _mode(studies, reward, stem) for stem in MODES}
        found.append(Comparison(reward, benchmark, modes, base))
    return found


def config_of(reward: str, stem: str) -> str:
    """Name of a mode's config by the reward.

    >>> config_of("geneval", "promptrl"), config_of("ocr", "promptrl")
    ('promptrl', 'ocr_promptrl')
    """
    return stem if reward == "geneval" else f"{reward}_{stem}"


def _mode(studies: Studies, reward: str, stem: str) -> Mode:
    label, scored = MODES[stem]
    config = config_of(reward, stem)
    shared = studies[reward][config]
    others = {factor: studies[f"search_{reward}"][f"{config}-lr{factor}"] for factor in FACTORS if factor != "1"}
    tuned = {factor: studies[f"{reward}_tuned"][f"{config}-lr{factor}"] for factor in others}
    tried = {
        factor: float(series.iloc[-1])
        for factor, setting in ({"1": shared.only(SEARCHED)} | others).items()
        for series in setting.curves(f"val/{reward}/{scored}").values()
    }
    return Mode(label, {factor: tried[factor] for factor in FACTORS if factor in tried}, {"1": shared} | tuned)
