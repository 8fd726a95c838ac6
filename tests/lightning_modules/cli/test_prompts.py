"""Any text is a prompt on the command line, and none is taken for an option or YAML."""

from __future__ import annotations

import pytest

from lightning_modules.cli import main
from lightning_modules.cli.prompts import split_prompts

TEXTS = [
    "--red circle",
    "-x",
    "{a: b}",
    "${a}",
    r"\${a}",
    '"',
    "a\nb",
    "null",
    "[a]",
    "[1]",
    "[]",
    "=",
    "--=",
    "é" * 5000,
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_stay_what_they_are(text: str) -> None:
    others = ["--config", "c.yaml", "--model.flow.negative_prompt", "--prompts"]
    assert split_prompts(["predict", "--prompt", text, *others]) == (["predict", *others], {"prompt": [text]})
    assert split_prompts(["predict", *others, f"--prompt={text}"]) == (["predict", *others], {"prompt": [text]})


def test_a_list_stands_for_its_texts() -> None:
    words = ["predict", "--prompt", "a", '--prompt=["b", "--c"]', "--image", "i.png", "--prompt=--d"]
    assert split_prompts(words) == (["predict"], {"prompt": ["a", "b", "--c", "--d"], "image": ["i.png"]})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "--prompt"], "`--prompt` stands at the end without a text"),
        (["predict", "--image", "--ckpt_path", "last"], "`--image` is followed by `--ckpt_path` and not by a text"),
        (["predict", "--prompt=a", "--prompt", " "], "`--prompt` number 2 of 2 is blank: give it a text."),
        (["predict", "--prompt", "a\udcff"], "`--prompt` number 1 of 1 is not UTF-8 text"),
        (["fit", "--prompt=a"], "`--prompt` is an option of `lightning predict`, not of `lightning fit`."),
    ],
)
def test_what_is_no_prompt_is_said_at_once(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
