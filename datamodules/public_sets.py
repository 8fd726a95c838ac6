"""Public sets of prompts that the configurations read from `data/`: where each file lies, and the id of its content."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

_FLOW_GRPO = "yifan123/flow_grpo/ac4c86e8cae021841f1fde853d340e0db67690dd/dataset"
_GENEVAL = "djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts"
_DIFFUSION_NFT = "NVlabs/DiffusionNFT/24af5554898d85e93efa492f42b5e9cdf4156e9b/dataset"


@dataclass(frozen=True)
class PublicFile:
    """A file of a public repository on GitHub.

    Args:
        path: where it goes, below the folder of all data.
        source: `owner/repository/commit/path`, which is its address below https://raw.githubusercontent.com.
        blob: git's id of its content.
        holds: its prompts and size, for people.
    """

    path: str
    source: str
    blob: str
    holds: str


@dataclass(frozen=True)
class PublicSet:
    """Files that are fetched together.

    Args:
        licence: licence of the prompts, as far as it is stated.
        files: the files.
    """

    licence: str
    files: tuple[PublicFile, ...]


SETS = {
    "geneval": PublicSet(
        "MIT",
        (
            PublicFile(
                "geneval/train_metadata.jsonl",
                f"{_FLOW_GRPO}/geneval/train_metadata.jsonl",
                "0b97e8a6802c08fc7537cd00c76ae79c851bddcb",
                "50,000 prompts",
            ),
            PublicFile(
                "geneval/evaluation_metadata.jsonl",
                f"{_GENEVAL}/evaluation_metadata.jsonl",
                "efc21c7e639cd45554a1e44fac87157211f16d51",
                "553 prompts, 85 kB",
            ),
        ),
    ),
    "ocr": PublicSet(
        "MIT, the repository's",
        (
            PublicFile(
                "ocr/train.txt",
                f"{_FLOW_GRPO}/ocr/train.txt",
                "3ce0521b77b0a9031191d66ecc36ebaaf27a3922",
                "19,653 prompts",
            ),
            PublicFile(
                "ocr/test.txt",
                f"{_FLOW_GRPO}/ocr/test.txt",
                "8deb4f8d8f2e863f45353354243669b3c991a6a2",
                "1,018 prompts, 218 kB",
            ),
        ),
    ),
    "pickscore": PublicSet(
        "MIT, the repository's; written by users of Pick-a-Pic, not all of it fit for work",
        (
            PublicFile(
                "pickscore/train.txt",
                f"{_FLOW_GRPO}/pickscore/train.txt",
                "a437bd921c03fbc00c4e7ce148ae2d28fcd6e49b",
                "25,432 prompts, 2.9 MB",
            ),
            PublicFile(
                "pickscore/test.txt",
                f"{_FLOW_GRPO}/pickscore/test.txt",
                "45f05231b969fb5f74c8debd606b22cd3be27f8e",
                "2,048 prompts, 240 kB",
            ),
        ),
    ),
    "drawbench": PublicSet(
        "none stated for the prompts; Apache-2.0, the repository's",
        (
            PublicFile(
                "drawbench/prompts.txt",
                f"{_DIFFUSION_NFT}/drawbench/test.txt",
                "8d96e7cf7017ce6ce299a6eec96e21467a2ac7aa",
                "200 prompts, each five times, 65 kB",
            ),
        ),
    ),
}
"""Name for `python -m datamodules.fetch` -> its files."""
_DOCUMENTED = ("edit", "gedit", "imgedit", "mario_eval", "multi_reward")
"""Folders below `data/` that other programs fetch, as docs/data.md says."""


def origin(path: Path) -> str | None:
    """Returns how to get a file that a configuration names and that is not there; None for one of the user's own."""
    for name, known in SETS.items():
        for file in known.files:
            if path.as_posix().endswith(f"/{file.path}") or path.as_posix() == file.path:
                folder = Path(*path.parts[: -len(Path(file.path).parts)])
                to = "" if folder == Path("data") else f" --to {shlex.quote(str(folder))}"
                return f"`python -m datamodules.fetch {name}{to}` brings it ({file.holds}; licence: {known.licence})"
    if len(path.parts) > 1 and path.parts[0] == "data" and path.parts[1] in _DOCUMENTED:
        return "docs/data.md says where it comes from"
    return None
