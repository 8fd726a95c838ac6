"""Bad input to the `lightning` command: one line, exit code 2, and nothing written."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

from lightning_modules.cli import main
from rewards.function import FunctionReward

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

ROOT = Path(__file__).parents[3]
QUICKSTART = "configs/quickstart.yaml"
LANGUAGE, FLOW = "model.init_args.language.init_args", "model.init_args.flow.init_args"
NOTICES = (
    "Running in `fast_dev_run` mode",
    "Seed set to ",
    "GPU available: ",
    "TPU available: ",
    "💡 Tip: ",
)  # Lightning's own
SMALL = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu",
         "--trainer.enable_model_summary=false", "--data.batch_size=1", "--data.train_prompts=6",
         "--data.eval_prompts=6"]  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations name the miniature's folders from the root; the hub is not asked."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def fit(runs: Path, *options: str, config: str = QUICKSTART) -> None:
    main(["fit", "--config", config, "--trainer.default_root_dir", str(runs), *SMALL, *options])


def test_a_module_in_the_current_folder_is_found_and_hides_none_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "a_module_of_mine.py").write_text("def score(prompts, images, metadata): return [1.0] * len(images)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    main(["--help"])
    assert FunctionReward("a_module_of_mine.score").score(["a"], [None], [{}]) == [1.0]
    assert importlib.util.find_spec("rewards").origin == str(ROOT / "rewards" / "__init__.py")  # type: ignore[union-attr]
    assert sys.path[-1] == str(tmp_path)


def complaint(capfd: pytest.CaptureFixture[str], tmp_path: Path, *options: str, config: str = QUICKSTART) -> str:
    """The one line that a fit with bad options ends in."""
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as stopped:
        fit(runs, *options, config=config)
    _, stderr = capfd.readouterr()
    assert stopped.value.code == 2
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert [line.startswith("lightning: error: ") for line in lines if line.strip()].count(True) == 1, stderr
    assert lines[-1].startswith("lightning: error: "), stderr
    assert not [line for line in lines[:-1] if line.strip() and not line.startswith(NOTICES)], stderr
    assert not runs.exists() or not list(runs.rglob("*")), "a run that cannot start leaves nothing behind"
    return lines[-1]


@pytest.fixture(scope="module")
def flow_only_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good run of one step: what is refused below is refused for its own fault."""
    runs = tmp_path_factory.mktemp("flow_only")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        fit(runs, config="configs/miniature/flow_only.yaml")
    (run,) = (runs / "miniature" / "flow_only").iterdir()
    written = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt"} <= written
    assert any("events.out.tfevents" in name for name in written)
    return run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(["--model.init_args.group_sizes=4"], r"group_sizes", id="unknown key"),
        pytest.param(["--trainer.max_step=3"], r"trainer\.max_step\b", id="misspelt option"),
        pytest.param(["--trainer.max_ep=3"], r"trainer\.max_ep\b", id="abbreviated option"),
        pytest.param(["--trainer.max_steps=many"], r"max_steps.*many", id="not a number"),
        pytest.param(
            ["--model.init_args.num_retained=8"],
            r"`model\.num_retained` is 8 of `model\.group_size` 8.*set it below group_size",
            id="m = n",
        ),
        pytest.param(["--model.init_args.num_retained=9"], r"`model\.num_retained` is 9 .*set it below", id="m > n"),
        pytest.param(
            ["--model.init_args.language=null"],
            r"`model\.language` is null.*6 prompts have no writer; set num_retained to 8",
            id="no writer",
        ),
        pytest.param([f"--{FLOW}.model=/no/such/folder"], r"/no/such/folder.*give an existing folder", id="no folder"),
        pytest.param([f"--{FLOW}.model=miniature/flwo"], r"miniature/flwo.*give an existing", id="misspelt folder"),
        pytest.param([f"--{LANGUAGE}.model=miniature/lang"], r"miniature/lang\b.*give an existing", id="no refiner"),
        pytest.param(
            [f"--{FLOW}.sampling.sde_steps=9"],
            r"`sde_steps` is 9, but there are 6 sampler steps; set it from 0 to 6",
            id="too many SDE steps",
        ),
        pytest.param(
            [f"--{FLOW}.sampling.sde_steps=[7,8]"],
            r"`sde_steps` is \[7, 8\], but there are 6 sampler steps; list steps from 0 to 5",
            id="SDE step beyond the schedule",
        ),
        pytest.param(
            [f"--{FLOW}.lora.rank=2", f"--{FLOW}.lora.targets=[to_q,to_nothing]"],
            r"`flow\.lora\.targets` names to_nothing, which matches no module.*use endings",
            id="LoRA target of the flow model",
        ),
        pytest.param(
            [f"--{LANGUAGE}.lora.rank=2", f"--{LANGUAGE}.lora.targets=[nothing_proj]"],
            r"`language\.lora\.targets` names nothing_proj, which matches no module.*use endings",
            id="LoRA target of the refiner",
        ),
        pytest.param(
            [f"--{FLOW}.learning_rate=null", f"--{LANGUAGE}.learning_rate=null"],
            r"nothing learns: set a learning_rate for `model\.flow` or for `model\.language`",
            id="nothing learns",
        ),
        pytest.param(
            [f"--{LANGUAGE}.template=Rewrite it."],
            r"`language\.template` has no \{prompt\}.*add it",
            id="template without prompt",
        ),
        pytest.param(
            ["--ckpt_path=/no/such.ckpt"], r"`ckpt_path` is /no/such\.ckpt.*give a \.ckpt", id="no checkpoint"
        ),
    ],
)
def test_bad_options(options: list[str], said: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert re.search(said, complaint(capfd, tmp_path, *options))


def test_missing_configuration(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "configs/quickstrat.yaml" in complaint(capfd, tmp_path, config="configs/quickstrat.yaml")


def test_pipeline_without_vae(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "flow"
    folder.mkdir()
    for part in (ROOT / "miniature" / "flow").iterdir():
        if part.name != "vae":
            (folder / part.name).symlink_to(part)
    line = complaint(capfd, tmp_path, f"--{FLOW}.model={folder}")
    assert f"the pipeline folder {folder} lacks vae: copy the missing part there" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('{"tag": "colors", "prompt": "a red dog"', r"prompts\.jsonl:2"),
        ('{"tag": "colors", "include": [{"class": "dog", "count": 1}]}', r"prompts\.jsonl:2.*prompt"),
        ('{"tag": "colours", "prompt": "x", "include": [{"class": "dog", "count": 1}]}', r"prompts\.jsonl:2.*colours"),
        (
            '{"tag": "position", "prompt": "x", "include": [{"class": "dog", "count": 1, "position": ["above", 3]}]}',
            r"prompts\.jsonl:2.*3",
        ),
    ],
    ids=["broken line", "no prompt", "unknown tag", "position pointing nowhere"],
)
def test_bad_prompts_file(capfd: pytest.CaptureFixture[str], tmp_path: Path, broken: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"tag": "colors", "prompt": "x", "include": [{"class": "dog", "count": 1}]}\n' + broken + "\n")
    config = tmp_path / "config.yaml"
    whole = yaml.safe_load((ROOT / QUICKSTART).read_text())
    files = {"train_file": str(path), "eval_file": str(path)}
    whole["data"] = {"class_path": "datamodules.geneval.GenEvalPrompts", "init_args": files}
    config.write_text(yaml.safe_dump(whole))
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={config}", f"--trainer.default_root_dir={runs}"])
    line = capfd.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("lightning: error: ") and re.search(said, line), line
    assert not runs.exists()


def test_unreadable_checkpoint(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "notes.ckpt"
    path.write_text("these are my notes\n")
    line = complaint(capfd, tmp_path, f"--ckpt_path={path}")
    assert re.search(r"`ckpt_path` is .*notes\.ckpt.*give a \.ckpt of an earlier run", line)


@pytest.mark.slow
def test_checkpoint_of_other_agents(
    flow_only_checkpoint: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capfd.readouterr()  # what the good run printed
    line = complaint(capfd, tmp_path, f"--ckpt_path={flow_only_checkpoint}", "--trainer.max_steps=2")
    assert re.search(r"does not fit this configuration: \d+ trained weights differ, for example language\.", line)


@pytest.mark.slow
def test_checkpoint_of_the_same_agents_resumes(flow_only_checkpoint: Path, tmp_path: Path) -> None:
    """The counterpart of the refusals: one more step from the checkpoint of step 1."""
    options = (f"--ckpt_path={flow_only_checkpoint}", "--trainer.max_steps=2")
    fit(tmp_path / "runs", *options, config="configs/miniature/flow_only.yaml")
    (metrics,) = (tmp_path / "runs").rglob("metrics.csv")
    header, *rows = metrics.read_text().splitlines()
    column = header.split(",").index("rollouts")
    assert [row.split(",")[column] for row in rows if row.split(",")[column]] == ["16.0"]  # 8 images a step
