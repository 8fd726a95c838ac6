"""Tables of tests in the report of `benchmarks.paper`, in the layout of the paper's tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.paper.claims import probed
from benchmarks.paper.modes import FLOW, JOINT, MODES, PLAIN, PROMPT, comparisons
from benchmarks.paper.runs import (
    GENEVAL,
    REWARDS,
    VARIED,
    Score,
    Setting,
    Studies,
    contrast,
    merged,
    shared_seeds,
    span,
)
from callbacks.reporting import published as paper
from callbacks.reporting.tables import Row, Table
from miniature.scenes.world import TAGS

PE = {"without_pe": "without PE", "with_pe": "with PE"}
WORDINGS = ("unseen", "geneval.synonyms", "geneval.terse", "geneval.gallery", "geneval.template", "geneval.detailed")
CORRECT = "RewardBenchmark by geneval"
"""Benchmark of how many images drawn for the preference reward also show what was asked for."""
MULTI = "By tags the tests draw other noise, for the preference also other scenes, than those of one reward."
BRACKETS = (
    "Brackets: 95 % interval for other seeds, noise and prompts of the test's scenes, from three seeds on; "
    "parentheses: number of seeds and, where there is one score, their range."
)


def tested(settings: Mapping[str, Setting], base: Setting) -> dict[str, tuple[Setting, str]]:
    """Returns label -> setting and mode, in the order of the tables, of those that have tests.

    Args:
        settings: mode of training -> its runs.
        base: tests of the untrained models.
    """
    named = {"base": (base, "without_pe"), "base with the untrained PE": (base, "with_pe")}
    named |= {label: (settings[label], mode) for label, (_, mode) in MODES.items() if label in settings}
    return {label: (setting, mode) for label, (setting, mode) in named.items() if setting.tests}


def _score_row(label: str, scores: Mapping[str, Score]) -> Row:
    """Makes a setting's row; the number of seeds stands beside its name, with their range if there is one column."""
    there = {column: score for column, score in scores.items() if score.there}
    seeds = max((len(score.tests) for score in there.values()), default=0)
    ranges = f", {span(next(iter(there.values())).by_seed)}" if len(scores) == 1 and seeds > 1 else ""
    gaps = {column: score.value for column, score in there.items()}
    return Row(
        f"{label} ({seeds}{ranges})" if seeds > 1 else label,
        {column: gap.value for column, gap in gaps.items()},
        intervals={column: (gap.low, gap.high) for column, gap in gaps.items()},
    )


def _with_gaps(row: Row, pairs: Mapping[str, tuple[Score, Score]]) -> Row:
    """Adds columns with the difference of two scores each, where these have seeds in common."""
    gaps = {
        column: contrast((1, score), (-1, other))
        for column, (score, other) in pairs.items()
        if score.there and other.there and shared_seeds(score, other) and score.setting.fits
    }
    values = {**row.scores, **{column: gap.value for column, gap in gaps.items()}}
    ends = {**row.intervals, **{column: (gap.low, gap.high) for column, gap in gaps.items()}}
    return replace(row, scores=values, intervals=ends)


def geneval_table(studies: Studies) -> Table:
    """Makes the table of the main results: GenEval by tag."""
    one, rows = comparisons(studies)[0], []
    for label, (setting, mode) in tested(one.settings, one.base).items():
        score = Score(setting, "geneval", mode)
        if score.there:
            row = _score_row(label, {"overall": score})
            rows.append(replace(row, scores={**score.by_tag, **row.scores}))
    return Table(
        "GenEval, canonical prompts of fresh scenes",
        (*TAGS, "overall"),
        [*rows, *paper.paper_rows("geneval")],
        note=BRACKETS,
    )


def wording_table(studies: Studies) -> Table:
    """Makes the paper's Table 1: differences by other wordings, and by an untrained refiner in front."""
    rows, probes, base = [], probed(studies), studies["probes_base"]["promptrl"]
    for label, (setting, mode) in tested(probes | {PLAIN: probes[JOINT]}, base).items():
        original = Score(setting, "geneval", mode)
        gaps = {}
        # The untrained refiner replaces a run's own, so it has no other mode.
        for name in ("geneval.static_pe", *WORDINGS):
            other = Score(setting, name, "without_pe" if name.endswith("static_pe") else mode)
            if original.there and other.there:
                gaps[name] = contrast((1, other), (-1, original))
        if gaps:
            intervals = {name: (gap.low, gap.high) for name, gap in gaps.items()}
            values = {name: gap.value for name, gap in gaps.items()}
            seeds = f" ({len(original.tests)})" if len(original.tests) > 1 else ""
            rows.append(Row(label + seeds, {"original": original.value.value} | values, intervals=intervals))
    columns = ("geneval.static_pe", *WORDINGS)
    headings = {name: name.removeprefix("geneval.").replace("static_pe", "untrained PE") for name in columns}
    title = "Other wordings minus the original, GenEval (the paper's Table 1)"
    others = [
        Row(row.label, {"original": row.scores["original"], "geneval.static_pe": row.scores["difference"]}, row.source)
        for row in paper.paraphrase_rows()
    ]
    return Table(title, ("original", *columns), [*rows, *others], headings=headings, signed=columns, note=BRACKETS)


def rewards_table(studies: Studies) -> Table:
    """Makes the table of OCR and preference, trained one at a time, on canonical and unseen wording."""
    rows = []
    for one in comparisons(studies):
        if one.benchmark == GENEVAL:
            continue
        for label, (setting, mode) in tested(one.settings, one.base).items():
            own = {name: Score(setting, name, mode, one.benchmark) for name in ("unseen", one.reward)}
            scores = {"canonical": own[one.reward], "unseen": own["unseen"]}
            row = _score_row(f"{one.name}: {label}", scores | {"correct": Score(setting, one.reward, mode, CORRECT)})
            rows += [row] if row.scores else []
    return Table(
        "The other rewards, single",
        ("canonical", "unseen", "correct"),
        rows,
        headings={"correct": "GenEval, canonical"},
        note=f"GenEval: share of the same images that show what was asked. {BRACKETS}",
    )


def gain_table(studies: Studies) -> Table:
    """Makes the table of gains over the base on canonical and unseen wording."""
    rows = []
    for one in comparisons(studies):
        for label in (FLOW, PLAIN, JOINT, PROMPT):
            gaps = {}
            for column, name in (("canonical", one.reward), ("unseen", "unseen")):
                after, before = one.score(label, name), one.untrained("without_pe", name)
                if after.there and before.there:
                    gaps[column] = contrast((1, after), (-1, before))
            if len(gaps) == 2:
                values = {column: gap.value for column, gap in gaps.items()}
                ends = {column: (gap.low, gap.high) for column, gap in gaps.items()}
                share = {"share": values["unseen"] / values["canonical"] if ends["canonical"][0] > 0 else None}
                rows.append(Row(f"{one.name}: {label}", values | share, intervals=ends))
    return Table(
        "Gain over the base without PE, canonical and unseen wording",
        ("canonical", "unseen", "share"),
        rows,
        note=f"Share: gain on the unseen wording over that on the canonical one, where the latter is clear. {BRACKETS}",
        digits={"share": 2},
        headings={"share": "share that transfers"},
        signed=("canonical", "unseen"),
    )


def multi_reward_table(studies: Studies) -> Table:
    """Makes the table of three rewards by tags against one each, from the same base models and as many rollouts."""
    columns = {"geneval": GENEVAL, **REWARDS}
    base = studies["base"]["multi_reward_promptrl"]
    rows = []
    for label, mode in (("base", "without_pe"), ("base with the untrained PE", "with_pe")):
        rows.append(_score_row(label, {name: Score(base, name, mode, title) for name, title in columns.items()}))
    for label, (stem, mode) in MODES.items():
        single = {name: Score(studies[name][f"{name}_{stem}"], name, mode, title) for name, title in REWARDS.items()}
        setting = studies["multi_reward"][f"multi_reward_{stem}"]
        tagged = {name: Score(setting, name, mode, title) for name, title in columns.items()}
        rows.append(_score_row(f"{label}, one reward each", single))
        rows.append(_score_row(f"{label}, rewards by tags", tagged))
    rows = [row for row in rows if row.scores]
    return Table(
        "Several rewards by tags", tuple(columns), [*rows, *paper.multi_reward_rows()], note=f"{MULTI} {BRACKETS}"
    )


def retention_table(studies: Studies) -> Table:
    """Makes the table of GenEval by the number of retained prompts."""
    found = {m: studies["retention"][f"promptrl-num_retained{m}"] for m in (0, 1, 4)}
    found[2] = studies["geneval"]["promptrl"].only(VARIED)
    rows = []
    for m in sorted(found):
        scores = {mode: Score(found[m], "geneval", mode) for mode in ("with_pe", "without_pe")}
        row = _score_row(f"m = {m}", scores)
        if row.scores:
            rows.append(row)
    others = [replace(row, scores={"without_pe": row.scores["overall"]}) for row in paper.retention_rows()]
    return Table("Prompt retention (n = 8), GenEval", tuple(PE), [*rows, *others], headings=PE, note=BRACKETS)


def swap_table(studies: Studies) -> Table:
    """Makes the table of other refiners in front of the trained flow models, and of a second one."""
    probes = probed(studies)
    transfers = studies["transfer"].settings
    untrained = {name: one for name, one in transfers.items() if "runs" not in name}
    second = merged(untrained.values())
    trained = merged(one for name, one in transfers.items() if name not in untrained)
    shown = {
        "PromptRL with its refiner": Score(probes[JOINT], "geneval", "with_pe"),
        "PromptRL with another seed's refiner": Score(merged(studies["swap"].settings.values()), "geneval", "with_pe"),
        "PromptRL with the untrained refiner": Score(probes[JOINT], "geneval.static_pe", "without_pe"),
        "flow-only": Score(probes[FLOW], "geneval", "without_pe"),
        "flow-only with the untrained refiner": Score(probes[FLOW], "geneval.static_pe", "without_pe"),
        "second flow model": Score(second, "geneval", "without_pe"),
        "second flow model with the untrained refiner": Score(second, "geneval", "with_pe"),
        "second flow model with PromptRL's refiner": Score(trained, "geneval", "with_pe"),
    }
    rows = [_score_row(label, {"overall": score}) for label, score in shown.items() if score.there]
    title = "Swapped and transferred refiners, GenEval (the paper's Table 8)"
    return Table(title, ("overall",), [*rows, *paper.lm_swap_rows(), *paper.refiner_transfer_rows()], note=BRACKETS)


def long_table(studies: Studies) -> Table:
    """Makes the table of runs with three times the usual rollouts (the paper's Table 9: twice, of flow-only)."""
    rows = []
    for study, rollouts in (("geneval", "7,680"), ("long", "23,040")):
        settings = {label: studies[study][stem].only(VARIED) for label, (stem, _) in MODES.items()}
        alone = Score(settings[FLOW], "unseen", "without_pe")
        for label, (setting, mode) in tested(settings, Setting({}, {})).items():
            own = {kind: Score(setting, kind, mode) for kind in ("unseen", "geneval")}
            row = _score_row(f"{label}, {rollouts} rollouts", own)
            pairs = {"cost": (own["geneval"], own["unseen"])}
            pairs |= {} if label == FLOW else {"lead": (own["unseen"], alone)}
            rows.append(_with_gaps(row, pairs))
    rows = [row for row in rows if row.scores]
    return Table(
        "Longer training, GenEval",
        ("geneval", "unseen", "cost", "lead"),
        rows,
        headings={"geneval": "canonical", "cost": "canonical - unseen", "lead": "unseen: minus flow-only"},
        signed=("cost", "lead"),
        note=BRACKETS,
    )


def base_table(studies: Studies) -> Table:
    """Makes the table of two bases: pairs of words, or single words, decide which wordings they heed.

    They differ in more: `miniature/README.md` has what was measured of both.
    """
    rows: list[Row] = []
    bases = (("pairs", "geneval", "base"), ("words", "lucky", "base_lucky"))
    for name, study, base in bases if studies["lucky"].settings else ():
        settings = {label: studies[study][stem].only(VARIED) for label, (stem, _) in MODES.items()}
        untrained = studies[base]["promptrl"]
        for label, (setting, mode) in tested(settings, untrained).items():
            own = {kind: Score(setting, kind, mode) for kind in ("geneval", "unseen")}
            alone = Score(settings[FLOW], "geneval", "without_pe")
            pairs = {} if label == FLOW else {"lead": (own["geneval"], alone)}
            rows.append(_with_gaps(_score_row(f"{name}: {label}", own), pairs))
    rows = [row for row in rows if row.scores]
    return Table(
        "Two bases: pairs of words or single words decide which wordings are heeded, GenEval",
        ("geneval", "unseen", "lead"),
        rows,
        headings={"geneval": "canonical", "lead": "canonical: minus flow-only"},
        signed=("lead",),
        note=(
            "Both at the learning rates that were searched with the first base. The second one's canonical score is "
            f"higher, and the seeds of one wording agree more (miniature/README.md). {BRACKETS}"
        ),
    )


def similarity_table(studies: Studies) -> Table:
    """Makes the table of the cosine of two images of a group, by pixels (the paper's Figure 2)."""
    rows, columns = [], ("same_prompt", "rewrites", "rewrites_shared_noise")
    for label, (setting, _) in tested(probed(studies), studies["probes_base"]["promptrl"]).items():
        if label == "base with the untrained PE":
            continue
        found = [test.run.results for test in setting.tests.values() if "diversity_pixels" in test.run.results]
        means, ends = {}, {}
        for arm in columns:
            groups = [one["diversity_pixels"]["geneval"] for one in found]
            values = [group[arm]["image_similarity"] for group in groups if arm in group]
            if values:
                means[arm], ends[arm] = sum(values) / len(values), (min(values), max(values))
        if means:
            rows.append(Row(label.replace(" with PE", ""), means, intervals=ends))
    others = [
        Row(row.label, {}, row.source, {"same_prompt": row.intervals["image_similarity"]})
        for row in paper.diversity_rows()
        if "image_similarity" in row.intervals
    ]
    return Table(
        "Cosine of two images of a prompt, by pixels (the paper's Figure 2, by CLIP)",
        columns,
        [*rows, *others],
        note="Brackets: the range over seeds.",
    )


def settings_table(studies: Studies) -> Table:
    """Makes the table of settings of a run of each comparison (the paper's Table 7)."""
    keys = {
        "group n": "group_size",
        "retained m": "num_retained",
        "steps": "flow.init_args.sampling.num_steps",
        "SDE steps": "flow.init_args.sampling.sde_steps",
        "noise": "flow.init_args.sampling.noise_level",
        "LR flow": "flow.init_args.learning_rate",
        "LR LM": "language.init_args.learning_rate",
        "KL LM": "language.init_args.kl_weight",
    }
    rows = []
    found = {one.name: one.settings[JOINT] for one in comparisons(studies)}
    for name, setting in (found | {"by tags": studies["multi_reward"]["multi_reward_promptrl"]}).items():
        for run in list(setting.fits.values())[:1]:
            values = {column: run.get(f"model.init_args.{key}") for column, key in keys.items()}
            values["rollouts"] = run.history[-1]["rollouts"]
            rows.append(Row(name, values))
    digits = {"group n": 0, "retained m": 0, "steps": 0, "SDE steps": 0, "rollouts": 0, "noise": 1, "KL LM": 2}
    return Table(
        "Settings of PromptRL (the paper's Table 7)",
        (*keys, "rollouts"),
        rows,
        digits=digits | {"LR flow": 5, "LR LM": 5},
        note="The other modes differ in their agents, and where the search said so in their learning rates.",
    )
