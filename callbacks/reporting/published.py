"""Results that the paper (PromptRL, arXiv 2602.01382) reports, as table rows, for orientation.

The paper's detector (mmdetection's, where ours is transformers'), its OCR engine, the way it scores TMDB and OpenLib
and the wording of its paraphrases differ from ours or are not known. Its own tables differ among themselves, too
(SD3's GenEval is .58 in one and .62 in another), so compare inside one table only.
"""

from __future__ import annotations

from callbacks.reporting.tables import Row

GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "overall")
"""Columns of GenEval; `overall` is the mean of the six tags."""
EDIT = ("swap", "style", "addition", "attribute_modification", "env", "removal", "mean")
"""Columns of editing, OmniEdit's names of tasks; `mean` is over the 700 edits, so swap (200 of them) counts twice."""

FLOW_GRPO, DIFFUSION_NFT = "FlowGRPO", "DiffusionNFT"
WITHOUT, WITH = "PromptRL without PE", "PromptRL with PE"
PAPER = "PromptRL"

_GENEVAL = {
    "FLUX.1-dev": (0.98, 0.81, 0.74, 0.79, 0.22, 0.45, 0.66),
    FLOW_GRPO: (1.00, 0.99, 0.91, 0.89, 0.95, 0.80, 0.92),
    DIFFUSION_NFT: (1.00, 0.98, 0.74, 0.92, 0.85, 0.80, 0.88),
    WITHOUT: (1.00, 0.96, 0.95, 0.95, 0.93, 0.85, 0.94),
    WITH: (1.00, 0.99, 0.99, 0.96, 0.99, 0.90, 0.97),
}
# Preference scorers are measured on DrawBench, the OCR reward on three sets of prompts.
_MEANS = {
    "pickscore": {FLOW_GRPO: 23.33, DIFFUSION_NFT: 23.63, WITHOUT: 24.01, WITH: 24.05},
    "hps": {FLOW_GRPO: 29.80, DIFFUSION_NFT: 31.79, WITHOUT: 31.79, WITH: 32.03},
    "unified_reward": {FLOW_GRPO: 3.33, DIFFUSION_NFT: 3.39, WITHOUT: 3.38, WITH: 3.44},
    "ocr": {FLOW_GRPO: 0.89, DIFFUSION_NFT: 0.89, WITHOUT: 0.97, WITH: 0.98},
    "tmdb": {FLOW_GRPO: 0.83, DIFFUSION_NFT: 0.91, WITHOUT: 0.92, WITH: 0.91},
    "openlib": {FLOW_GRPO: 0.73, DIFFUSION_NFT: 0.86, WITHOUT: 0.95, WITH: 0.95},
}
_EDIT = {
    "FLUX.1-Kontext": dict(zip(EDIT, (1.35, 1.36, 1.16, 1.15, 1.44, 0.55, 1.19), strict=True)),
    "FLUX.1-Kontext with an untrained PE": {"style": 0.97, "attribute_modification": 0.48, "mean": 1.01},
    WITHOUT: {"mean": 1.36},
    WITH: dict(zip(EDIT, (1.47, 1.43, 1.29, 1.39, 1.72, 1.24, 1.43), strict=True)),
}
# Model -> GenEval of the prompts as they are, and paraphrased by a pretrained Qwen2.5-VL; 20 steps at 1024 pixels.
_PARAPHRASE = {"SD3": (0.58, 0.63), DIFFUSION_NFT: (0.88, 0.77), FLOW_GRPO: (0.92, 0.81)}

_GENEVAL_553, _OCR_1018, _DRAWBENCH_200 = "db13d3b9aa8c6628", "3191745107059dfe", "1ccb4f9e51c9fd05"
_KEYS = {
    "geneval": ("geneval", _GENEVAL_553),
    "ocr": ("ocr", _OCR_1018),
    "tmdb/ocr": ("tmdb", None),
    "openlib/ocr": ("openlib", None),
    "edit/editreward": ("edit", None),
    **{f"drawbench/{reward}": (reward, _DRAWBENCH_200) for reward in ("pickscore", "hps", "unified_reward")},
}
"""Key of `results.json` -> the paper's benchmark, and the digest of its prompts (`callbacks.benchmark.texts_digest`).

Digests are of the files in the paper's code (G-U-N/UniRL, `prompts/`): GenEval's `evaluation_metadata.jsonl`,
Flow-GRPO's `ocr_test.txt`, DrawBench's `draw_test.txt` (each prompt five times). None: the file could not be had.
"""


def benchmark_of(key: str, texts: str | None) -> str:
    """Name of the paper's benchmark that scores in `results.json` stand for; empty if the prompts are not the paper's.

    Args:
        key: key of the scores.
        texts: digest of the set's prompts; None if it is not known.

    >>> benchmark_of("drawbench/hps", "1ccb4f9e51c9fd05"), benchmark_of("geneval", None), benchmark_of("tmdb/ocr", None)
    ('hps', '', '')
    """
    name, published = _KEYS.get(key, ("", None))
    return name if published is not None and texts == published else ""


def note_on(key: str) -> str:
    """Sentence below a table whose rows of the paper cannot be shown; empty for other keys of `results.json`."""
    unknown = key in _KEYS and _KEYS[key][1] is None
    return "The paper's rows are left out: its prompts could not be had, to compare these with." if unknown else ""


def paper_rows(benchmark: str) -> list[Row]:
    """The paper's main results on a benchmark.

    Args:
        benchmark: as returned by `benchmark_of`, which is also the reward's name where the prompts are DrawBench's.

    Returns:
        Rows with the columns `GENEVAL`, `EDIT`, else `mean`; none for a benchmark that the paper does not report.
    """
    if benchmark == "geneval":
        return [Row(label, dict(zip(GENEVAL, values, strict=True)), PAPER) for label, values in _GENEVAL.items()]
    if benchmark == "edit":
        return [Row(label, dict(scores), PAPER) for label, scores in _EDIT.items()]
    return [Row(label, {"mean": value}, PAPER) for label, value in _MEANS.get(benchmark, {}).items()]


def paraphrase_rows() -> list[Row]:
    """GenEval of models behind an untrained refiner (a static PE); columns `original`, `paraphrase`, `difference`."""
    return [
        Row(
            label,
            {"original": before, "paraphrase": after, "difference": round(after - before, 3)},
            f"{PAPER} Table 1",
        )
        for label, (before, after) in _PARAPHRASE.items()
    ]


def diversity_rows() -> list[Row]:
    """Ranges of CLIP ViT-g-14 cosines, between the images of one prompt and between image and text."""
    ranges = [
        ("SD1.5", "image_similarity", (0.58, 0.72)),
        ("FLUX.1-dev", "image_similarity", (0.92, 0.93)),
        ("FLUX.1-dev with a language model", "image_similarity", (0.84, 0.85)),
        ("all of these", "text_similarity", (0.28, 0.36)),
    ]
    return [Row(label, {}, f"{PAPER} Fig. 2", {column: ends}) for label, column, ends in ranges]


def lm_swap_rows() -> list[Row]:
    """GenEval when the co-trained language model is replaced at test time."""
    return _overall({WITH: 0.97, "PromptRL with another language model": 0.88})


def refiner_transfer_rows() -> list[Row]:
    """GenEval of frozen image models behind PromptRL's refiner; 20 steps at 1024 pixels."""
    values = {
        "SANA": 0.62,
        "SANA with PromptRL's refiner": 0.70,
        "SANA with a refiner trained for it": 0.76,
        "SD3": 0.58,
        "SD3 with PromptRL's refiner": 0.77,
        "SD3 with a refiner trained for it": 0.83,
    }
    return _overall(values, f"{PAPER} Table 8")


def multi_reward_rows() -> list[Row]:
    """One model for three rewards by tags, against a model for each; columns `geneval`, `ocr`, `pickscore`."""
    rows = [
        ("PromptRL, one reward each", (0.97, 0.98, 24.05), PAPER),
        ("PromptRL, rewards by tags", (0.93, 0.96, 23.94), PAPER),
        ("Flow-only, twice the rollouts", (0.93, 0.93, 23.85), f"{PAPER} Table 9"),
    ]
    columns = ("geneval", "ocr", "pickscore")
    return [Row(label, dict(zip(columns, values, strict=True)), source) for label, values, source in rows]


def retention_rows() -> list[Row]:
    """GenEval without PE by the number m of a group's 8 prompts that are kept as they are."""
    return _overall({"m = 0": 0.83, "m = 1": 0.77, "m = 2": 0.94, "m = 4": 0.92})


def _overall(values: dict[str, float], source: str = PAPER) -> list[Row]:
    return [Row(label, {"overall": value}, source) for label, value in values.items()]
