"""Tables as literal text, LaTeX by its structure, and the paper's rows against figures typed a second time."""

from __future__ import annotations

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from callbacks.benchmark import texts_digest
from callbacks.reporting.published import (
    EDIT,
    GENEVAL,
    benchmark_of,
    diversity_rows,
    lm_swap_rows,
    multi_reward_rows,
    paper_rows,
    paraphrase_rows,
    refiner_transfer_rows,
    retention_rows,
)
from callbacks.reporting.results import tables_of
from callbacks.reporting.tables import (
    INTERVAL_NOTE,
    PAPER_NOTE,
    Row,
    Table,
    benchmark_table,
    diversity_table,
    latex,
    markdown,
    report,
    rich_table,
    robustness_table,
)
from datamodules.geneval_names import TAGS
from rewards.hps import HPSReward
from rewards.judges.templates import TEMPLATES
from rewards.ocr import OCRReward
from rewards.pickscore import PickScoreReward

NAN = float("nan")
OURS = Row("flux_a with PE", {"overall": 0.6123, "position": NAN}, intervals={"overall": (0.5711, 0.6504)})
THEIRS = Row("FlowGRPO", {"overall": 0.92, "position": 0.95}, "PromptRL")
BENCHMARKS = ["geneval", "pickscore", "hps", "unified_reward", "ocr", "tmdb", "openlib", "edit"]
TEXTS = {"geneval": "db13d3b9aa8c6628", "ocr": "3191745107059dfe", "drawbench": "1ccb4f9e51c9fd05"}
SMALL = Table("GenEval", ("position", "overall"), (THEIRS, OURS), note="Mean of six tags.")


def check_structure(text: str, columns: int) -> None:
    """Braces balance, environments close, each line of the tabular has one cell per column and the label's."""
    bare = text.replace(r"\{", "").replace(r"\}", "")
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", bare):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    assert bare.count("$") % 2 == bare.count(r"\$") % 2  # math closes
    body = text.split("\\toprule\n")[1].split("\n\\bottomrule")[0].split("\n")
    for line in body:
        if line != r"\midrule":
            assert line.endswith(r" \\")
            assert len(re.findall(r"(?<!\\)&", line)) == columns
    spec = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert spec is not None and spec[1] == "l" + "r" * columns


# --- text -------------------------------------------------------------------------------------------------------------


def test_markdown_is_this_text() -> None:
    assert markdown(SMALL) == (
        "|  | pos. | avg. |\n"
        "| --- | ---: | ---: |\n"
        "| flux_a with PE | – | 0.612 [0.571, 0.650] |\n"
        "| FlowGRPO (PromptRL) | 0.95 | 0.92 |\n"
        "\n"
        "Mean of six tags.\n"
        "\n"
        "Rows marked PromptRL are that paper's (arXiv 2602.01382), for orientation only: its detector, OCR engine and "
        "sampling settings differ from ours or are unknown."
    )


def test_latex_is_this_text() -> None:
    assert latex(SMALL) == "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            r"\caption{GenEval}",
            r"\begin{tabular}{lrr}",
            r"\toprule",
            r" & pos. & avg. \\",
            r"\midrule",
            r"flux\_a with PE & -- & 0.612 {\scriptsize [.571, .650]} \\",
            r"\midrule",
            r"FlowGRPO (PromptRL) & 0.95 & 0.92 \\",
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\smallskip{\footnotesize Mean of six tags.}",
            rf"\par\smallskip{{\footnotesize {PAPER_NOTE}}}",
            r"\end{table}",
        ]
    )
    check_structure(latex(SMALL), 2)


def test_a_table_without_rows_of_others_has_one_rule_and_no_note() -> None:
    table = Table("t", ("mean",), (Row("a", {"mean": 1.0}),))
    assert latex(table).count(r"\midrule") == 1
    assert "PromptRL" not in latex(table) + markdown(table)
    assert markdown(table) == "|  | mean |\n| --- | ---: |\n| a | 1.000 |"


@pytest.mark.parametrize(
    ("value", "digits", "signed", "expected_md", "expected_tex"),
    [
        (0.5, {}, (), "0.500", "0.500"),
        (9.9994, {}, (), "9.999", "9.999"),
        (10.0, {}, (), "10.00", "10.00"),
        (-23.456, {}, (), "-23.46", "$-$23.46"),
        (192, {"x": 0}, (), "192", "192"),
        (23.456, {"x": 1}, (), "23.5", "23.5"),
        (0.0149, {"x": 2}, ("x",), "+0.01", "$+$0.01"),
        (-0.0149, {"x": 2}, ("x",), "-0.01", "$-$0.01"),
        (-0.0001, {}, (), "0.000", "0.000"),  # no minus zero
        (NAN, {}, (), "–", "--"),
        (math.inf, {}, (), "–", "--"),
        (None, {}, (), "–", "--"),
    ],
)
def test_numbers(
    value: float | None, digits: dict[str, int], signed: tuple[str, ...], expected_md: str, expected_tex: str
) -> None:
    table = Table("t", ("x",), (Row("a", {"x": value}),), digits=digits, signed=signed)
    assert markdown(table).split("\n")[2] == f"| a | {expected_md} |"
    assert rf"a & {expected_tex} \\" in latex(table)


def test_a_column_has_one_number_of_digits_and_others_figures_stay_as_printed() -> None:
    rows = (Row("a", {"x": 9.5}), Row("b", {"x": 24.05}), Row("c", {"x": 24.1}, "PromptRL"))
    assert [line.split(" | ")[1] for line in markdown(Table("t", ("x",), rows)).split("\n")[2:5]] == [
        "9.50 |",
        "24.05 |",
        "24.10 |",
    ]
    judged = Table("t", ("x",), (Row("a", {"x": 3.4444}), Row("c", {"x": 2.982}, "s"), Row("d", {"x": 3.14}, "s")))
    assert [line.split(" | ")[1] for line in markdown(judged).split("\n")[2:5]] == ["3.444 |", "2.982 |", "3.14 |"]


@pytest.mark.parametrize(
    ("value", "ends", "expected_md", "expected_tex"),
    [
        (0.61, (0.57, 0.65), "0.61 [0.57, 0.65]", r"0.61 {\scriptsize [.57, .65]}"),
        (-0.05, (-0.1, 0.003), "-0.05 [-0.10, 0.00]", r"$-$0.05 {\scriptsize [$-$.10, .00]}"),
        (24.0, (9.5, 30.5), "24.00 [9.50, 30.50]", r"24.00 {\scriptsize [9.50, 30.50]}"),
        (0.61, (NAN, NAN), "0.61", "0.61"),
        (0.61, (None, 0.65), "0.61", "0.61"),
        (0.61, None, "0.61", "0.61"),
        (NAN, (NAN, NAN), "–", "--"),
        (None, (0.58, 0.72), "0.58 to 0.72", "0.58--0.72"),  # a range read off a figure
    ],
)
def test_intervals(
    value: float | None, ends: tuple[float | None, float | None] | None, expected_md: str, expected_tex: str
) -> None:
    intervals = {} if ends is None else {"x": ends}
    table = Table("t", ("x",), (Row("a", {"x": value}, intervals=intervals),), digits={"x": 2})
    assert markdown(table).split("\n")[2] == f"| a | {expected_md} |"
    assert rf"a & {expected_tex} \\" in latex(table)


def test_escaping() -> None:
    label = "a_b 5% & #1 $x {y} ~ ^ \\ <z> |"
    table = Table(label, ("my_score",), (Row(label, {"my_score": 1.0}),), headings={"my_score": label})
    escaped = (
        r"a\_b 5\% \& \#1 \$x \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{} "
        r"\textless{}z\textgreater{} \textbar{}"
    )
    assert rf"{escaped} & 1.000 \\" in latex(table)
    assert rf" & {escaped} \\" in latex(table)
    assert rf"\caption{{{escaped}}}" in latex(table)
    assert markdown(table).split("\n")[2] == r"| a_b 5% & #1 $x {y} ~ ^ \\ \<z> \| | 1.000 |"


@pytest.mark.parametrize("label", ["[t]", "*"])
def test_a_label_is_no_argument_of_the_line_break_before_it(label: str) -> None:
    table = Table("t", ("x",), (Row("a", {}), Row(label, {})))
    assert f"\n{{}}{label} & -- " in latex(table)


@given(st.text(alphabet="ab_%&#${}~^\\[]*|<>\n\"'", max_size=20), st.floats() | st.none(), st.floats(), st.floats())
def test_any_label_and_value_keeps_the_structure(label: str, value: float | None, low: float, high: float) -> None:
    row = Row(label, {"x": value, "y": low}, intervals={"x": (low, high)})
    table = Table(label, ("x", label, "y"), (row, Row(label, {}, label)), note=label)
    check_structure(latex(table), 3)
    lines = [line for line in markdown(table).split("\n\n")[0].split("\n")]
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {5}


def test_report_joins_tables_under_their_titles() -> None:
    one, two = (Table(title, ("x",), (Row("a", {"x": 0.5}),)) for title in ("A_1", "B"))
    text, tex = report([one, two])
    assert text == (
        "## A_1\n\n|  | x |\n| --- | ---: |\n| a | 0.500 |\n\n## B\n\n|  | x |\n| --- | ---: |\n| a | 0.500 |\n"
    )
    assert tex == f"% Needs \\usepackage{{booktabs}} in the preamble.\n\n{latex(one)}\n\n{latex(two)}\n"
    for part in tex.split("\n\n")[1:]:
        check_structure(part, 1)


def test_console_shows_the_same_cells_and_takes_labels_to_the_letter() -> None:
    rows = (Row("run [/x]", {"x": 0.61}, intervals={"x": (0.57, 0.65)}), Row("FlowGRPO", {"x": 0.92}, "PromptRL"))
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(rich_table(Table("[b]t", ("x",), rows)))
    text = console.export_text()
    for expected in ("[b]t", "run [/x]", "0.610 [0.570, 0.650]", "FlowGRPO (PromptRL)", "0.92"):
        assert expected in text
    lines = text.split("\n")
    ours, theirs = (next(i for i, line in enumerate(lines) if word in line) for word in ("run", "FlowGRPO"))
    assert theirs == ours + 2  # a rule between


# --- the tables of the suite ------------------------------------------------------------------------------------------


def test_benchmark_table() -> None:
    table = benchmark_table(
        "GenEval",
        "geneval",
        {"without_pe": {"overall": 0.5, "counting": None}, "with_pe": {"overall": 0.75, "counting": 0.25}},
        {"with_pe": {"overall": [0.7, 0.8]}},
        ("counting", "overall"),
        [Row("FlowGRPO", {"counting": 0.91, "overall": 0.92}, "PromptRL"), Row("none", {"mean": 1.0}, "PromptRL")],
        "joint",
    )
    assert table.title == "GenEval"
    assert markdown(table).split("\n\n") == [
        "|  | count | avg. |\n"
        "| --- | ---: | ---: |\n"
        "| joint without PE | – | 0.500 |\n"
        "| joint with PE | 0.250 | 0.750 [0.700, 0.800] |\n"
        "| FlowGRPO (PromptRL) | 0.91 | 0.92 |",
        INTERVAL_NOTE,
        PAPER_NOTE,
    ]


def test_benchmark_table_names_the_set_and_the_reward() -> None:
    def title(title: str, key: str) -> str:
        return benchmark_table(title, key, {"with_pe": {"mean": 1.0}}, {}, ("mean",), (), "r").title

    assert title("", "drawbench/hps") == "HPSv2.1 on DrawBench"
    assert title("Step 80", "geneval.typos") == "Step 80: GenEval, typos"
    assert title("x", "mine/other") == "x: other on mine"


def test_brackets_are_explained_only_where_there_are_some() -> None:
    scores = {"without_pe": {"mean": 24.0}}
    bare = benchmark_table("", "pickscore", scores, {}, ("mean",), paper_rows("pickscore"), "r")
    assert bare.note == ""
    unknown = benchmark_table("", "pickscore", scores, {"without_pe": {"mean": [None, None]}}, ("mean",), (), "r")
    assert unknown.note == ""
    other_column = benchmark_table("", "pickscore", scores, {"without_pe": {"rl": [0, 1]}}, ("mean",), (), "r")
    assert other_column.note == ""


def test_robustness_table() -> None:
    results = {
        "typos": {
            "prompts": 192,
            "rejected": 3,
            "original": 0.61,
            "paraphrase": 0.58,
            "difference": -0.03,
            "low": -0.06,
            "high": 0.004,
            "by_tag": {"counting": -0.1, "position": 0.0125},
        },
        "synonyms": {"prompts": 1200, "rejected": 0, "original": 0.6, "paraphrase": NAN, "by_tag": {"colors": 0.5}},
    }
    table = robustness_table("Robustness", results)
    assert markdown(table).split("\n\n")[:2] == [
        "|  | prompts | rejected | original | paraphrase | difference | count | pos. | color |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| typos | 192 | 3 | 0.610 | 0.580 | -0.030 [-0.060, +0.004] | -0.100 | +0.013 | – |\n"
        "| synonyms | 1200 | 0 | 0.600 | – | – | – | – | +0.500 |",
        f"Difference: paraphrase - original, also by tag. {INTERVAL_NOTE}",
    ]
    check_structure(latex(table), 8)


def test_a_tag_may_be_called_like_a_column() -> None:
    table = robustness_table("t", {"a": {"original": 0.5, "by_tag": {"original": 0.25}}})
    assert markdown(table).split("\n")[2] == "| a | – | – | 0.500 | – | – | +0.250 |"


def test_diversity_table() -> None:
    results = {
        "same_prompt": {"image_similarity": 0.9, "pickscore": 22.0},
        "rewrites": {"image_similarity": 0.8, "text_similarity": 0.3},
    }
    intervals = {"same_prompt": {"image_similarity": [0.88, 0.92]}}
    table = diversity_table("Diversity", results, intervals)
    assert markdown(table).split("\n\n")[0] == (
        "|  | image-image | pickscore | text-image |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| same prompt | 0.900 [0.880, 0.920] | 22.00 | – |\n"
        "| rewrites | 0.800 | – | 0.300 |"
    )
    assert table.note == INTERVAL_NOTE
    check_structure(latex(table), 3)


# --- the paper's figures, typed a second time -------------------------------------------------------------------------

MAIN = """
FLUX.1-dev           .98 .81 .74 .79 .22 .45 .66
FlowGRPO            1.00 .99 .91 .89 .95 .80 .92  23.33 29.80 3.33 .89 .83 .73
DiffusionNFT        1.00 .98 .74 .92 .85 .80 .88  23.63 31.79 3.39 .89 .91 .86
PromptRL_without_PE 1.00 .96 .95 .95 .93 .85 .94  24.01 31.79 3.38 .97 .92 .95
PromptRL_with_PE    1.00 .99 .99 .96 .99 .90 .97  24.05 32.03 3.44 .98 .91 .95
"""
LINES = {
    line.split()[0].replace("_", " "): [float(figure) for figure in line.split()[1:]]
    for line in MAIN.strip().split("\n")
}


def test_main_results() -> None:
    geneval = paper_rows("geneval")
    assert GENEVAL == (*TAGS, "overall")
    assert [row.label for row in geneval] == list(LINES)
    for row in geneval:
        assert list(row.scores) == list(GENEVAL)
        assert list(row.scores.values()) == LINES[row.label][:7]
    for index, benchmark in enumerate(("pickscore", "hps", "unified_reward", "ocr", "tmdb", "openlib")):
        expected = [(label, {"mean": line[7 + index]}) for label, line in LINES.items() if len(line) > 7]
        assert [(row.label, row.scores) for row in paper_rows(benchmark)] == expected


def test_geneval_is_the_mean_of_its_tags() -> None:
    for row in paper_rows("geneval"):
        scores = [score for score in row.scores.values() if score is not None]
        assert sum(scores[:6]) / 6 == pytest.approx(scores[6], abs=0.006), row.label


def test_editing() -> None:
    rows = {row.label: row.scores for row in paper_rows("edit")}
    figures = ("swap", "style", "addition", "attribute_modification", "env", "removal", "mean")
    assert figures == EDIT
    assert rows == {
        "FLUX.1-Kontext": dict(zip(figures, (1.35, 1.36, 1.16, 1.15, 1.44, 0.55, 1.19), strict=True)),
        "FLUX.1-Kontext with an untrained PE": {"style": 0.97, "attribute_modification": 0.48, "mean": 1.01},
        "PromptRL without PE": {"mean": 1.36},
        "PromptRL with PE": dict(zip(figures, (1.47, 1.43, 1.29, 1.39, 1.72, 1.24, 1.43), strict=True)),
    }


def test_editing_is_the_mean_of_700_edits() -> None:
    edits = {"swap": 200, "style": 100, "addition": 100, "attribute_modification": 100, "env": 100, "removal": 100}
    full = [row for row in paper_rows("edit") if len(row.scores) == 7]
    assert [row.label for row in full] == ["FLUX.1-Kontext", "PromptRL with PE"]
    for row in full:
        mean = sum((row.scores[task] or 0.0) * number for task, number in edits.items()) / 700
        assert mean == pytest.approx(row.scores["mean"], abs=0.011), row.label


def test_paraphrases() -> None:
    rows = [Row(row.label, row.scores, row.source) for row in paraphrase_rows()]
    columns = ("original", "paraphrase", "difference")
    assert rows == [
        Row(label, dict(zip(columns, values, strict=True)), "PromptRL Table 1")
        for label, values in (
            ("SD3", (0.58, 0.63, 0.05)),
            ("DiffusionNFT", (0.88, 0.77, -0.11)),
            ("FlowGRPO", (0.92, 0.81, -0.11)),
        )
    ]


def test_probes() -> None:
    assert [(row.intervals, row.source) for row in diversity_rows()] == [
        ({"image_similarity": (0.58, 0.72)}, "PromptRL Fig. 2"),
        ({"image_similarity": (0.92, 0.93)}, "PromptRL Fig. 2"),
        ({"image_similarity": (0.84, 0.85)}, "PromptRL Fig. 2"),
        ({"text_similarity": (0.28, 0.36)}, "PromptRL Fig. 2"),
    ]
    assert [row.scores for row in lm_swap_rows()] == [{"overall": 0.97}, {"overall": 0.88}]
    assert {row.label: row.scores["overall"] for row in refiner_transfer_rows()} == {
        "SANA": 0.62,
        "SANA with PromptRL's refiner": 0.70,
        "SANA with a refiner trained for it": 0.76,
        "SD3": 0.58,
        "SD3 with PromptRL's refiner": 0.77,
        "SD3 with a refiner trained for it": 0.83,
    }
    assert {row.source for row in refiner_transfer_rows()} == {"PromptRL Table 8"}
    assert [(row.label, tuple(row.scores.values()), row.source) for row in multi_reward_rows()] == [
        ("PromptRL, one reward each", (0.97, 0.98, 24.05), "PromptRL"),
        ("PromptRL, rewards by tags", (0.93, 0.96, 23.94), "PromptRL"),
        ("Flow-only, twice the rollouts", (0.93, 0.93, 23.85), "PromptRL Table 9"),
    ]
    assert {row.label: row.scores["overall"] for row in retention_rows()} == {
        "m = 0": 0.83,
        "m = 1": 0.77,
        "m = 2": 0.94,
        "m = 4": 0.92,
    }


def test_every_row_has_a_source_and_names_are_those_of_the_rewards() -> None:
    names = {PickScoreReward.name, HPSReward.name, TEMPLATES["unified_reward_v1"].reward, OCRReward.name}
    assert names < set(BENCHMARKS)
    rows = [row for benchmark in BENCHMARKS for row in paper_rows(benchmark)]
    assert len(rows) == 5 + 6 * 4 + 4
    rows += [*paraphrase_rows(), *diversity_rows(), *lm_swap_rows(), *refiner_transfer_rows(), *multi_reward_rows()]
    assert all(row.source.startswith("PromptRL") for row in [*rows, *retention_rows()])
    assert paper_rows("clipscore") == []


@pytest.mark.parametrize(
    ("key", "texts", "benchmark"),
    [
        ("geneval", TEXTS["geneval"], "geneval"),
        ("ocr", TEXTS["ocr"], "ocr"),
        *((f"drawbench/{reward}", TEXTS["drawbench"], reward) for reward in ("pickscore", "hps", "unified_reward")),
        ("geneval", TEXTS["ocr"], ""),
        ("geneval", None, ""),
        ("tmdb/ocr", None, ""),
        ("edit/editreward", TEXTS["geneval"], ""),
        *((key, TEXTS["drawbench"], "") for key in ("pickscore", "drawbench/clipscore", "drawbench/ocr")),
        *((key, TEXTS["geneval"], "") for key in ("geneval.typos", "geneval/hps")),
    ],
)
def test_the_papers_rows_stand_beside_its_own_prompts_only(key: str, texts: str | None, benchmark: str) -> None:
    assert benchmark_of(key, texts) == benchmark
    scores = {"overall": 0.5} if key == "geneval" else {"mean": 0.5}
    sets = {} if texts is None else {key: {"texts": texts}}
    (table,) = tables_of({key: {"without_pe": scores}, "sets": sets}, "run")
    assert [row.label for row in table.rows if row.source] == [row.label for row in paper_rows(benchmark)]
    assert ("could not be had" in table.note) == (key in ("tmdb/ocr", "edit/editreward"))


def test_the_digest_is_of_the_different_texts() -> None:
    # printf 'a\\nb' | sha256sum
    assert texts_digest(["b", "a ", "b"]) == "7e18f737311b2dc3"


def test_whole_paper_renders() -> None:
    tables = [
        benchmark_table("", benchmark, {"with_pe": {"mean": 1.0}}, {}, columns, paper_rows(benchmark), "run")
        for benchmark in BENCHMARKS
        for columns in [{"geneval": GENEVAL, "edit": EDIT}.get(benchmark, ("mean",))]
    ]
    text, tex = report(tables)
    assert "| PromptRL with PE (PromptRL) | 1.00 | 0.99 | 0.99 | 0.96 | 0.99 | 0.90 | 0.97 |" in text
    assert r"FlowGRPO (PromptRL) & 29.80 \\" in tex
    assert r"FLUX.1-Kontext with an untrained PE (PromptRL) & -- & 0.97 & -- & 0.48 & -- & -- & 1.01 \\" in tex
    for table, part in zip(tables, tex.split("\n\n")[1:], strict=True):
        check_structure(part, len(table.columns))
