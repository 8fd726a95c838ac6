"""Misspelt keys: named with their owner and the nearest spelling, before anything slow is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jsonargparse
import pytest

from lightning_modules.cli import HELP, SUBCOMMANDS, command, main
from lightning_modules.cli.misspelt import misspelt
from lightning_modules.cli.renamed import renamed
from lightning_modules.cli.signatures import arguments

ROOT = Path(__file__).parents[3]
QUICKSTART = ["fit", "--config", "configs/quickstart.yaml"]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))

HEAVY = """
import sys
from lightning_modules.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
else:
    status = 0
slow = ("torch", "lightning", "transformers", "diffusers", "jsonargparse")
print(status, [name for name in slow if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.init_args.flow.init_args.learnin_rate", "3e-4"],
         "`model.init_args.flow.init_args.learnin_rate`: Flux1Policy has no argument `learnin_rate`; did you mean "
         "`learning_rate`?"),
        (["--model.flow.learning_rat=3e-4"],
         "`model.init_args.flow.init_args.learning_rat`: Flux1Policy has no argument `learning_rat`; did you mean "
         "`learning_rate`?"),
        (["--model.flow.sampling.num_step=3"],
         "`model.init_args.flow.init_args.sampling.num_step`: Sampling has no argument `num_step`; did you mean "
         "`num_steps`?"),
        (["--model.flow.lora.ranks=2"],
         "`model.init_args.flow.init_args.lora.ranks`: LoRA has no argument `ranks`; did you mean `rank`?"),
        (["--model.init_args.reward=rewards.serving.client.RemoteReward", "--model.init_args.reward.init_args.url=x"],
         "`model.init_args.reward.init_args.url`: RemoteReward has no argument `url`; did you mean `urls`?"),
        (["--data.batchsize=2"],
         "`data.init_args.batchsize`: ShapesPrompts has no argument `batchsize`; did you mean `batch_size`?"),
        (["--trainer.max_step=3"], "`trainer.max_step`: Trainer has no argument `max_step`; did you mean `max_steps`?"),
        (["--data", "datamodules.text.TextPrompts", "--data.train_fil=x"],
         "`data.init_args.train_fil`: TextPrompts has no argument `train_fil`; did you mean `train_file`?"),
    ],
)  # fmt: skip
def test_it_names_the_owner_and_the_nearest_spelling(options: list[str], said: str) -> None:
    assert misspelt([*QUICKSTART, *options]) == said


def test_a_file_laid_over_another(tmp_path: Path) -> None:
    """A new class in an overlay takes its own arguments and no longer the first file's."""
    overlay = tmp_path / "overlay.yaml"
    reward = "model: {init_args: {reward: {class_path: rewards.ocr.OCRReward, init_args: {max_extr: 3}}}}"
    overlay.write_text(reward)
    said = misspelt([*QUICKSTART, "--config", str(overlay)])
    assert said is not None and "OCRReward has no argument `max_extr`" in said
    overlay.write_text(reward.replace("max_extr", "max_extra"))
    assert misspelt([*QUICKSTART, "--config", str(overlay)]) is None


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.callbacks+=callbacks.health.Health", "--trainer.callbacks.patience=3"],
        ["--trainer.strategy=lightning.pytorch.strategies.DDPStrategy", "--trainer.strategy.bucket_cap_mb=1"],
        ["--model.init_args.optimizer=bitsandbytes.optim.AdamW8bit", "--model.init_args.optimizer.init_args.lr=1e-4"],
        ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=x"],
        ["--model.language=null"],
        ["--data.help", "datamodules.text.TextPrompts"],
        ["--config", "no/such/file.yaml"],
    ],
)
def test_what_it_cannot_judge_is_left_to_the_parser(options: list[str]) -> None:
    assert misspelt([*QUICKSTART, *options]) is None


OTHER_DATA = "{class_path: datamodules.text.TextPrompts, init_args: {train_file: a, eval_file: b}}"
OTHER_REWARD = "{class_path: rewards.ocr.OCRReward}"


@pytest.mark.parametrize(
    ("overlay", "options"),
    [
        ("", ["--data", OTHER_DATA, "--data.eval_file=c"]),
        ("", ["--model.init_args.reward", OTHER_REWARD, "--model.reward.max_extra=3"]),
        ("", ["--model.reward=OCRReward", "--model.reward.max_extra=3"]),
        ("", ["--model.language=LanguagePolicy", "--model.language.temperature=0.9"]),
        ("", ["--trainer.callbacks+", "callbacks.health.Health", "--trainer.callbacks.patience", "3"]),
        (f"data: {OTHER_DATA}", ["--data.eval_file=c"]),
        ("model: {init_args: {flow.init_args.height: 16}}", []),
        ("model.init_args.reward.class_path: rewards.ocr.OCRReward", ["--model.reward.max_extra=3"]),
        ("model: {init_args: {reward.class_path: rewards.ocr.OCRReward, reward.init_args.max_extra: 3}}", []),
    ],
)
@pytest.mark.parametrize("file", [["--config"], ["--print_config", "--config"], ["-c"]])
def test_all_spellings_of_a_valid_setting_pass(
    overlay: str, options: list[str], file: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text(overlay or "{}")
    assert misspelt([*QUICKSTART, *file, str(path), *options]) is None


@pytest.mark.parametrize(
    ("overlay", "options", "said"),
    [
        ("trainer: {callbacks+: [{class_path: callbacks.health.Health, init_args: {patienc: 3}}]}", [],
         "`trainer.callbacks[2].init_args.patienc`: Health has no argument `patienc`"),
        ("model: {init_args: {flow.init_args.heigt: 16}}", [], "has no argument `heigt`; did you mean `height`?"),
        ("{}", ["--trainer.callbacks", '[{"class_path": "callbacks.health.Health", "init_args": {"patienc": 3}}]'],
         "`trainer.callbacks[0].init_args.patienc`"),
        ("{}", ["--model.flow.init_args.sampling", "{num_stps: 3}"], "did you mean `num_steps`?"),
    ],
)  # fmt: skip
def test_all_spellings_are_read(overlay: str, options: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text(overlay)
    assert said in (misspelt([*QUICKSTART, "-c", str(path), *options]) or "")


LOCAL = """
from typing import Generic, TypeVar
from other import Again, make
from rewards.base import Reward
T = TypeVar("T")
class Known(Reward, Generic[T]):
    def __init__(self, scale: float) -> None: ...
class Parametrised(Known[int]): ...
class Again(Again): ...
class Made(make()): ...
class First(Known):
    def __init__(self, one: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
class Second(Known):
    def __init__(self, two: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
class Diamond(First, Second): ...
class Either:
    def __init__(self, part: "First | Second | None") -> None: ...
"""


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Known", {"scale"}),
        ("Parametrised", {"scale"}),
        ("Again", None),
        ("Made", None),
        ("First", {"one", "scale"}),
        ("Diamond", None),
        ("Either", {"part"}),
    ],
)
def test_classes_in_the_current_folder(
    name: str, found: set[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"local_{name}.py").write_text(LOCAL)
    monkeypatch.syspath_prepend(tmp_path)
    known = arguments(f"local_{name}.{name}")
    assert (None if known is None else set(known)) == found


@pytest.mark.parametrize("content", [b"class Mine(: ...", "class Größe: ...".encode("latin-1")])
def test_a_module_that_cannot_be_read_is_left_to_its_import(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"broken_{len(content)}"
    (tmp_path / f"{name}.py").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    assert misspelt([*QUICKSTART, f"--model.reward={name}.Mine", "--model.reward.scale=2"]) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["configs/quickstart.yaml"],
            "`configs/quickstart.yaml` is no option: write `--config configs/quickstart.yaml`.",
        ),
        (["--config", "configs/quickstart.yaml", "other.YML"], "`other.YML` is no option: write `--config other.YML`."),
        ([*QUICKSTART[1:], "model.group_size=4"], "`model.group_size=4` is no option: write `--model.group_size=4`."),
        ([*QUICKSTART[1:], "-model.group_size=4"], "`-model.group_size=4` is no option: write `--model.group_size=4`."),
        ([*QUICKSTART[1:], "\u2013experiment=a"], "`\u2013experiment=a` is no option: write `--experiment=a`."),
        ([*QUICKSTART[1:], "--experiment", "my", "run"], "`run` is no option: options begin with two dashes"),
    ],
)
def test_words_that_are_no_options(words: list[str], said: str) -> None:
    assert (misspelt(["fit", *words]) or "").startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model:\n\tinit_args: 3\n", ":2 is no YAML: a tab, where YAML takes spaces alone; correct the line."),
        (b"a: 1\nmodel: {init_args: [3}\n", ":2 is no YAML: did not find expected ',' or ']'; correct the line."),
        (b"a: 'x\nb: 2\n", ":3 is no YAML: found unexpected end of stream; correct the line."),
        ("a: Größe".encode("latin-1"), ":1: the file is not UTF-8 text: save it as UTF-8."),
        (b"\xef", ":1: the file is not UTF-8 text: save it as UTF-8."),
    ],
    ids=["tab", "brackets", "open string", "Latin-1", "half a mark"],
)
def test_files_that_are_no_yaml(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert misspelt([*QUICKSTART, "--config", str(path)]) == f"{path}{said}"


def test_a_word_that_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["configs/quickstart.yaml"])
    assert "`configs/quickstart.yaml` is no command: begin with fit, validate, test, predict" in capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_in_our_configurations_is_misspelt(config: str) -> None:
    assert misspelt(["fit", "--config", config]) is None


@pytest.mark.parametrize(
    "path",
    [
        "lightning_modules.prompt_rl.PromptRL",
        "lightning_modules.policies.flux1_kontext.KontextPolicy",
        "lightning_modules.policies.vision_language.VisionLanguagePolicy",
        "datamodules.ocr.OCRPrompts",
        "datamodules.editing.prompts.EditPrompts",
        "miniature.signs.prompts.MultiRewardPrompts",
        "rewards.judges.viescore.VIEScore",
        "rewards.hps.HPSReward",
        "callbacks.robustness.PromptRobustness",
        "callbacks.ema.EMA",
        "lightning.pytorch.trainer.trainer.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
    ],
)
def test_arguments_are_those_that_the_parser_takes(path: str) -> None:
    """What is read from the source, against what jsonargparse finds in the imported class."""
    module, _, name = path.rpartition(".")
    parser = jsonargparse.ArgumentParser()
    imported = getattr(__import__(module, fromlist=[name]), name)
    given = set(parser.add_class_arguments(imported, as_group=False, fail_untyped=False))
    found = arguments(path)
    assert found is not None
    assert given == set(found)


@pytest.mark.parametrize("options", [["--help"], [], [*QUICKSTART, "--model.flow.learnin_rate=3"]])
def test_it_imports_nothing_slow(options: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HEAVY, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == ("2 []" if len(options) > 1 else "0 []"), done.stderr


def test_help_names_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert capsys.readouterr().out == HELP
    command.PromptRLCLI.wanted = None
    assert tuple(command.PromptRLCLI.subcommands()) == SUBCOMMANDS and all(name in HELP for name in SUBCOMMANDS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("datamodules.shapes_edit_rewrites.ShapesEditRewrites", "miniature.edits.rewrites.ShapesEditRewrites"),
        ("callbacks.pictures.KeepPictures", "callbacks.kept_images.KeepImages"),
        ("pictures.directory", "images.directory"),
    ],
)
def test_old_names_are_told(old: str, new: str) -> None:
    said = f"`{old}` is now called `{new}`; change it in the config."
    assert renamed(f"Subcommand 'test' does not accept option '{old}'") == said
