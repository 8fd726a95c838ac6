"""The comparisons that the claims rest on: flow-only, prompt-only and joint training, each at its best learning rates.

The same search for each (four runs of one seed, on validation scenes) chose the rates that stand in
`configs/miniature`, of which the compared runs were made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.paper.runs import GENEVAL, REWARDS, Score, Setting, Studies, Study
from callbacks.runs.curves import Curves

NAMES = {"geneval": "GenEval", "ocr": "OCR", "preference": "preference"}
"""Reward -> its name in the report."""
FLOW, PROMPT, PLAIN, JOINT = "flow-only", "prompt-only with PE", "PromptRL without PE", "PromptRL with PE"
MODES = {
    FLOW: ("flow_only", "without_pe"),
    PROMPT: ("prompt_only", "with_pe"),
    PLAIN: ("promptrl", "without_pe"),
    JOINT: ("promptrl", "with_pe"),
}
"""Mode of training and scoring -> the config's name without the reward, and the mode that is scored."""


@dataclass(frozen=True)
class Comparison:
    """The modes that are compared by one reward.

    Attributes:
        reward: name of its set of prompts, and of its study.
        benchmark: title of the benchmark that scores it.
        settings: mode -> its runs.
        tried: mode -> learning rates -> last validation score of the search's run.
        base: tests of the untrained models.
    """

    reward: str
    benchmark: str
    settings: Mapping[str, Setting]
    tried: Mapping[str, Mapping[str, float]]
    base: Setting

    @property
    def name(self) -> str:
        """Name of the reward in claims and tables."""
        return NAMES[self.reward]

    def score(self, label: str, name: str | None = None) -> Score:
        """Returns the score of a mode on the canonical wording or, by name, on another set."""
        return Score(self.settings[label], name or self.reward, MODES[label][1], self.benchmark)

    def untrained(self, mode: str, name: str | None = None) -> Score:
        """Returns the score of the untrained models, without or with the untrained PE."""
        return Score(self.base, name or self.reward, mode, self.benchmark)

    def curves(self, label: str, name: str | None = None) -> Curves:
        """Returns seed -> validation curve of a mode on the canonical wording or, by name, on another set."""
        return self.settings[label].curves(f"val/{name or self.reward}/{MODES[label][1]}")

    def rates(self, labels: Iterable[str]) -> str:
        """Names the best of the learning rates that were tried; of one agent's, which of them if it is no inner one.

        >>> tried = {FLOW: {"1e-4": 0.4, "2e-4": 0.5}, JOINT: {"1e-4, 2e-4": 0.5}}
        >>> Comparison("ocr", "", {}, tried, Setting({}, {})).rates([FLOW, JOINT, PROMPT])
        'flow-only 2e-4 (the highest tried), PromptRL with PE 1e-4, 2e-4'
        """
        found = []
        for label in labels:
            scores = self.tried.get(label, {})
            if scores:
                best = max(scores, key=scores.__getitem__)
                where = {0: " (the lowest tried)", len(scores) - 1: " (the highest tried)"}
                found.append(f"{label} {best}{'' if ',' in best else where.get([*scores].index(best), '')}")
        return ", ".join(found)


def comparisons(studies: Studies) -> list[Comparison]:
    """Returns the comparison by each reward."""
    found = []
    search = studies["search_flow_only"]  # the three plans of the search share its folder
    for reward, benchmark in {"geneval": GENEVAL, **REWARDS}.items():
        settings = {label: studies[reward][config_of(reward, stem)] for label, (stem, _) in MODES.items()}
        tried = {
            label: searched(search, config_of(reward, stem), f"val/{reward}/{mode}")
            for label, (stem, mode) in MODES.items()
        }
        base = studies["base"][config_of(reward, "promptrl")]
        found.append(Comparison(reward, benchmark, settings, tried, base))
    return found


def searched(study: Study, config: str, column: str) -> dict[str, float]:
    """Returns learning rates -> last validation score of a config's runs in the search, the lowest rates first."""
    found: dict[tuple[float, ...], float] = {}
    for name, setting in study.settings.items():
        stem, *parts = name.split("-", 1)
        if stem == config and parts:
            rates = tuple(float(rate) for rate in re.findall(r"(?:flow|language)([\d.]+(?:e-?\d+)?)", parts[0]))
            for series in setting.curves(column).values():
                found[rates] = float(series.iloc[-1])
    return {", ".join(_short(rate) for rate in rates): found[rates] for rates in sorted(found)}


def config_of(reward: str, stem: str) -> str:
    """Returns the name of the config of a mode and reward.

    >>> config_of("geneval", "promptrl"), config_of("ocr", "promptrl")
    ('promptrl', 'ocr_promptrl')
    """
    return stem if reward == "geneval" else f"{reward}_{stem}"


def _short(rate: float) -> str:
    """Formats a learning rate.

    >>> _short(0.00015), _short(7.5e-05)
    ('1.5e-4', '7.5e-5')
    """
    number, _, power = f"{rate:.1e}".partition("e")
    return f"{float(number):g}e{int(power)}"
