"""The commands of README.md and docs/getting_started.md run as printed, with fewer steps and prompts.

What is left out, and why, is in `LEFT_OUT`. They run one after another in an empty folder, as a reader would, so that
`last` finds what an earlier one has trained.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest

from lightning_modules.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "getting_started.md"]
LEFT_OUT = {
    "pip": "installs this package; CI does so in a new environment",
    "pytest": "is this run",
    "uv": "installs from the network",
    "docker": "needs Docker and a GPU",
    "cd": "the folder of the test is new",
}
SMALL = [
    *("--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--preflight=off"),
    *("--data.init_args.train_prompts=6", "--data.init_args.eval_prompts=3", "--data.init_args.batch_size=2"),
]
OF_SUBCOMMAND = {"fit": SMALL, "quickstart": SMALL, "test": ["--data.init_args.eval_prompts=3"], "predict": []}


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command in a page's bash blocks and indented blocks, with `$NAME` filled in."""
    text = re.sub(r"```(?!bash).*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    variables: dict[str, str] = {}
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if len(words) == 1 and re.fullmatch(r"\w+=\S+", words[0]):
                variables |= [words[0].split("=")]
            elif words and words[0] in {"lightning", "promptrl", "python", *LEFT_OUT}:
                yield [Template(word).safe_substitute(variables) for word in words]


def test_the_commands_of_the_first_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    (function,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    Path("my_rewards.py").write_text(function)
    seen: list[list[str]] = []
    for words in (words for page in PAGES for words in commands(page)):
        if words in seen or words[0] in LEFT_OUT:
            continue
        seen.append(words)
        assert words[0] in ("lightning", "promptrl"), words
        if any("recipes" in word for word in words):  # needs published weights: everything but those
            with pytest.raises(SystemExit) as ended:
                main([*words[1:], "--trainer.accelerator=cpu", "--print_config"])
            assert ended.value.code == 0
        else:
            steps = ["--trainer.max_steps=2"] if "--trainer.max_steps" in words else []
            main([*words[1:], *OF_SUBCOMMAND[words[1]], *steps])
    runs = {path.parent.relative_to("runs").as_posix() for path in Path("runs").rglob("report.html")}
    assert {"quickstart/version_0", "quickstart_edit/version_0"} <= runs
    assert list(Path("predictions").rglob("report.html")) and list(Path("predictions").rglob("*.png"))
    assert [words[1] for words in seen].count("fit") >= 4 and {words[1] for words in seen} == set(OF_SUBCOMMAND)
    assert "Draw:        promptrl predict" in capsys.readouterr().out
