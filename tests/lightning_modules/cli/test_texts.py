"""Templates that look like YAML or like an interpolation: written as they are, or refused with how to write them."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from lightning_modules.cli import main
from lightning_modules.cli.command import PromptRLCLI
from lightning_modules.cli.texts import load_config
from tests.short_runs import quick

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

TEMPLATE = "Rewrite: ${5}, ${} and ${ 1\n\"{prompt}\" [a: b] # 'c' 😀\x85\x7f" + " in many words" * 30


def overlay(folder: Path, line: str) -> str:
    path = folder / "overlay.yaml"
    path.write_text("model:\n  init_args:\n    language:\n      init_args:\n        " + line)
    return f"--config={path}"


def read(*options: str) -> Any:
    """The template that a command's refiner gets, also from what `--print_config` prints."""

    def stop(cli: PromptRLCLI) -> None:
        templates.append(cli.config["fit"]["model"]["init_args"]["language"]["init_args"]["template"])
        printed.write_text(cli.parser.dump(cli.config))
        raise SystemExit

    templates: list[str] = []
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        printed = Path(folder) / "config.yaml"
        patch.setattr(PromptRLCLI, "instantiate_classes", stop)
        for command in (options, ["--config", str(printed)]):
            with pytest.raises(SystemExit):
                main(["fit", *command])
            if len(templates) == 1:
                printed.write_text(yaml.safe_dump(yaml.safe_load(printed.read_text())["fit"]))
    template, again = templates
    assert template == again
    return template


@pytest.mark.parametrize(
    "words",
    [["--model.language.template", TEMPLATE], [f"--model.init_args.language.init_args.template={TEMPLATE}"]],
    ids=["short", "long"],
)
def test_a_template_on_the_command_line_is_taken_as_it_is(words: list[str]) -> None:
    assert read("--config=configs/quickstart.yaml", *words) == TEMPLATE


def test_a_template_in_a_file(tmp_path: Path) -> None:
    r"""`${key}` is another key's value, `\${key}` is text, and so is what can be no key."""
    line = r"template: '${seed_everything} ${model.init_args.group_size} \${seed_everything} \${size} ${5}: {prompt}'"
    written = "42 8 ${seed_everything} ${size} ${5}: {prompt}"
    assert read("--config=configs/quickstart.yaml", overlay(tmp_path, line)) == written


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "template: 'for ${price}: {prompt}'",
            r"`model\.init_args\.language\.init_args\.template` .*'price' not found; .*`\\\$\{",
        ),
        ("template: {prompt}", r"`template` is a text, but YAML reads it as a mapping or a list: put it in quotes\."),
    ],
)
def test_refusals_say_how_to_write_it(line: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config=configs/quickstart.yaml", overlay(tmp_path, line)])
    assert stopped.value.code == 2
    assert re.search(f"^lightning: error: {said}", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("text", ["1: &a ", "{2: }"])
def test_settings_without_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the configuration has a setting whose name is a number"):
        load_config(text)


def test_a_runs_own_configuration_reads_the_same(tmp_path: Path) -> None:
    template = TEMPLATE + " \\${seed_everything} \\${price}"
    options = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", f"--model.language.template={template}"]
    main(quick("fit", tmp_path, *options))
    (saved,) = tmp_path.rglob("config.yaml")
    assert read(f"--config={saved}") == TEMPLATE + " ${seed_everything} ${price}"
