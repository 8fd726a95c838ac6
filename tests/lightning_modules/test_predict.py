"""`lightning predict`: validation's images, each drawn once, however often the command is stopped and run again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from callbacks.predictions import SavePredictions
from datamodules.base import PredictBatch, PromptSample
from lightning_modules.cli import main
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.seeding import seed_of
from miniature.scenes.prompts import ShapesPrompts
from tests.forked import run

pytestmark = pytest.mark.slow

QUICKSTART = "configs/quickstart.yaml"
FLOW = "model.init_args.flow.init_args"
DATA = ["--data.init_args.eval_prompts=7", "--data.init_args.eval_batch_size=3", f"--{FLOW}.sampling.eval_steps=2"]
MODES = ("without_pe", "with_pe")
SETS = ("geneval", "paraphrase", "unseen")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of images of every call to the flow model."""
    sizes: list[int] = []
    generate = Flux1Policy.generate

    def counted(self: Flux1Policy, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(prompts))
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Flux1Policy, "generate", counted)
    yield sizes


def predict(folder: Path, *options: str, config: str = QUICKSTART, data: list[str] = DATA) -> None:
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    runs = f"--trainer.default_root_dir={folder.parent}/runs"
    main(["predict", f"--config={config}", runs, f"--predictions.directory={folder}", *quiet, *data, *options])
    assert not (folder.parent / "runs").exists(), "predictions open no run folder"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the note, which has the folder's own settings in it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "predictions.yaml"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run: 7 prompts in 3 sets, in batches of 3."""
    folder = tmp_path_factory.mktemp("whole") / "predictions"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        predict(folder)
    return folder


def complaint(capfd: pytest.CaptureFixture[str], folder: Path, *options: str, **kwargs: Any) -> str:
    capfd.readouterr()
    before = contents(folder)
    with pytest.raises(SystemExit) as stopped:
        predict(folder, *options, **kwargs)
    assert stopped.value.code == 2 and contents(folder) == before
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("lightning: error: ")
    return line


def test_images_are_those_of_validation(whole: Path, make_flow: Any, make_language: Any) -> None:
    """Same prompts, noise and batches as `lightning test`, bit for bit, with the list telling all of it."""
    flow = make_flow(sampling=Sampling(8, 3, eval_steps=2))
    agents = EvaluatedAgents(flow, make_language(), optimizer=None)  # type: ignore[arg-type]
    lines = {(line["set"], line["id"], line["mode"]): line for line in listed(whole)}
    assert len(lines) == len(listed(whole)) == 3 * 7 * 2
    for name, samples in ShapesPrompts(eval_prompts=7).test_samples().items():
        for start in (0, 3, 6):
            batch = samples[start : start + 3]
            tested = agents.predict_step(PredictBatch(name, batch), 0)
            for row, sample in enumerate(batch):
                for mode in MODES:
                    line = lines.pop((name, sample.id, mode))
                    assert line["prompt"] == sample.prompt
                    assert line["rewrite"] == (tested.prompts[mode][row] if mode == "with_pe" else None)
                    assert line["seed"] == seed_of("evaluation", sample.id) and line["k"] == 0
                    assert line["file"] == f"{name}/{mode}/{sample.id}_0.png"
                    with Image.open(whole / line["file"]) as image:
                        assert image.tobytes() == tested.images[mode][0][row].tobytes()
    assert not lines
    assert {path for path in contents(whole) if path.endswith(".png")} == {line["file"] for line in listed(whole)}


def test_several_images_have_noise_of_their_own(whole: Path, tmp_path: Path, drawn: list[int]) -> None:
    folder = tmp_path / "three"
    predict(folder, "--predictions.images_per_prompt=3")
    assert len(drawn) == 3 * 3 * 2 * 3  # sets, batches, modes, images
    lines = [line for line in listed(folder) if (line["set"], line["id"]) == ("geneval", "test-00003")]
    assert [(line["mode"], line["k"]) for line in lines] == [(mode, k) for mode in MODES for k in range(3)]
    seeds = [seed_of("evaluation", "test-00003", *more) for more in ((), (1,), (2,))]
    assert [line["seed"] for line in lines] == seeds * 2
    assert len({(folder / line["file"]).read_bytes() for line in lines}) == 6
    first = {name: data for name, data in contents(folder).items() if name.endswith("_0.png")}
    assert first == {name: data for name, data in contents(whole).items() if name.endswith(".png")}


def test_an_interrupted_run_continues_to_the_same_bytes(whole: Path, tmp_path: Path, drawn: list[int]) -> None:
    folder = tmp_path / "parts"
    for batches, total in ((2, 2), (4, 6)):
        predict(folder, f"--trainer.limit_predict_batches={batches}")
        assert len(drawn) == 2 * total
    assert len(listed(folder)) == (7 + 7) * 2  # six batches are two of the three sets
    predict(folder)
    assert contents(folder) == contents(whole)
    assert drawn == [3, 3, 3, 3, 1, 1] * 3  # each once


def test_a_complete_folder_costs_no_image(whole: Path, drawn: list[int]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")}
    files = contents(whole)
    predict(whole)
    assert drawn == []
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")} == before
    assert contents(whole) == files


def test_a_killed_process_leaves_nothing_that_is_wrong(whole: Path, tmp_path: Path, drawn: list[int]) -> None:
    """Half a line, an image that was not listed yet, an unfinished file, a second process' list."""
    folder = tmp_path / "killed"
    predict(folder, "--trainer.limit_predict_batches=4")
    lines = (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == (7 + 3) * 2
    # The third batch is test-00006 alone, whose second line breaks off; the fourth comes from a process of rank 1.
    (folder / "predictions.jsonl").write_bytes(b"".join(lines[:13]) + lines[13][:40])
    (folder / "predictions.1.jsonl").write_bytes(b"".join(lines[14:]))
    (folder / "geneval" / "with_pe" / "test-00006_0.png").write_bytes(b"half an image")
    (folder / "unseen" / "with_pe").mkdir(parents=True)
    (folder / "unseen" / "with_pe" / "test-00000_0.tmp").write_bytes(b"a quarter")
    (folder / "paraphrase" / "with_pe" / "test-00001_0.png").unlink()
    drawn.clear()
    predict(folder)
    left = {"unseen/with_pe/test-00000_0.tmp": b"a quarter"}  # of a process that may still be writing, for all we know
    assert contents(folder) == contents(whole) | left
    assert drawn == [1, 1] + [3, 3, 3, 3, 1, 1] * 2  # the batch of the lost image as a whole, so in the same bits


def test_images_of_others_settings_are_not_mixed_in(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capfd, whole, f"--{FLOW}.sampling.eval_steps=4")
    assert f"{whole} were drawn with {FLOW}.sampling.eval_steps 2, which is 4 now: set `--predictions.dir" in line
    assert "images_per_prompt 1, which is 2 now" in complaint(capfd, whole, "--predictions.images_per_prompt=2")
    assert "data.init_args.eval_prompts 7, which is 8 now" in complaint(capfd, whole, "--data.init_args.eval_prompts=8")

    shorter = ["--data.init_args.train_prompts=8", "--trainer.limit_val_batches=0", "--trainer.max_steps=1"]
    main(["fit", f"--config={QUICKSTART}", f"--trainer.default_root_dir={tmp_path}/fit", *shorter])
    (run,) = (tmp_path / "fit" / "quickstart").iterdir()
    checkpoint = run / "checkpoints" / "last.ckpt"
    with_checkpoint = f"--ckpt_path={checkpoint}"
    line = complaint(capfd, whole, with_checkpoint)
    assert f"were drawn with ckpt_path None, which is {checkpoint} now" in line
    # By the run's own config.yaml, no options: what was trained draws, and not the base.
    folder = tmp_path / "trained"
    predict(folder, with_checkpoint, *DATA, config=str(run / "config.yaml"))
    assert contents(folder).keys() == contents(whole).keys() and contents(folder) != contents(whole)
    os.utime(checkpoint, (1e9, 1e9))
    line = complaint(capfd, folder, with_checkpoint, config=str(run / "config.yaml"))
    assert "ckpt_modified 20" in line and "which is 2001-09-09T01:46:40+00:00 now" in line
    assert "`ckpt_path` is last, but no run in " in complaint(capfd, folder, "--ckpt_path=last")
    (folder / "predictions.yaml").unlink()
    assert "not the predictions.yaml that says" in complaint(capfd, folder, with_checkpoint)


def files_config(tmp_path: Path, **files: str) -> str:
    config = yaml.safe_load(Path("configs/miniature/flow_only.yaml").read_text())
    named = {"train_file": "none.jsonl", "eval_file": "none.jsonl"} | files
    config["data"] = {"class_path": "datamodules.geneval.GenEvalPrompts", "init_args": named}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "c.yaml")


def test_flow_only_draws_a_file_of_bare_prompts_in_one_mode(
    tmp_path: Path, drawn: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my prompts.txt").write_text("a red circle\n\na line\u2028separator\n")
    config = files_config(tmp_path, predict_file=f"{tmp_path}/my prompts.txt")
    folder = tmp_path / "predictions"
    for _ in range(2):
        predict(folder, config=config, data=[])
        assert drawn == [2]  # the separator breaks no line of the list
    assert [(line["set"], line["mode"], line["prompt"], line["rewrite"]) for line in listed(folder)] == [
        ("my prompts", "without_pe", "a red circle", None),
        ("my prompts", "without_pe", "a line\u2028separator", None),
    ]
    assert listed(folder)[0]["file"].startswith("my_prompts-")
    (tmp_path / "my prompts.txt").write_text("a blue circle\n\na line\u2028separator\n")
    assert "were drawn with prompts 2 (" in complaint(capfd, folder, config=config, data=[])

    gone = files_config(tmp_path, predict_file="gone.txt")
    line = complaint(capfd, folder, config=gone, data=[])
    assert "data.predict_file is 'gone.txt', which is not a file: give the path of a .jsonl or .txt file." in line


TYPED = ["a red circle", "--a {x}: ${y}", '["x"', "null", "\\${a} 'q' \"q\"", "a red circle", "two red circles " * 300]


def test_typed_prompts_are_drawn_as_those_of_a_file(
    tmp_path: Path, drawn: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever data the configuration has: its files need not be there."""
    (tmp_path / "prompts.txt").write_text("\n".join(TYPED))
    from_file = files_config(tmp_path, predict_file=f"{tmp_path}/prompts.txt")
    predict(tmp_path / "file", config=from_file, data=[])
    words = [word for prompt in TYPED[1:] for word in ("--prompt", prompt)]
    typed = [f"--prompt={json.dumps(TYPED[:1])}", *words]
    line = complaint(capfd, tmp_path / "file", *typed, config=from_file, data=[])
    assert f"`--prompt` and `data.predict_file` ({tmp_path}/prompts.txt) are both given: keep one." in line
    predict(tmp_path / "typed", *typed, config=files_config(tmp_path), data=[])
    assert [line["prompt"] for line in listed(tmp_path / "typed")] == [prompt.strip() for prompt in TYPED[:-1]] + TYPED[
        -1:
    ]
    images = [
        {name: data for name, data in contents(tmp_path / folder).items() if name.endswith(".png")}
        for folder in ("file", "typed")
    ]
    assert images[0] == images[1] and len({*images[0].values()}) == len(TYPED)
    assert drawn == [7, 7]


def test_every_request_gets_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    config = files_config(tmp_path)
    (tmp_path / "miniature").symlink_to(Path("miniature").absolute())
    monkeypatch.chdir(tmp_path)
    words = ["predict", f"--config={config}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    for prompt, version, number in (("a red circle", 0, 1), ("a blue circle", 1, 2), ("a red circle", 0, 2)):
        main([*words, "--prompt", prompt])
        said = capfd.readouterr().out.splitlines()[-1]
        assert said == f"1 images are in predictions/version_{version}, listed in predictions.jsonl"
        assert [line["prompt"] for line in listed(Path(f"predictions/version_{version}"))] == [prompt]
        assert len(drawn) == number


def test_typed_prompts_edit_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit = "configs/quickstart_edit.yaml"
    for name, size in (("wide", (40, 32)), ("red", (32, 32))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    steps, prompts = [f"--{FLOW}.sampling.eval_steps=2"], ["--prompt=remove it", "--prompt=paint it blue"]
    wide, red = (f"--image={tmp_path}/{name}.png" for name in ("wide", "red"))

    def sources(folder: str, *images: str) -> list[str]:
        predict(tmp_path / folder, *prompts, *images, config=edit, data=steps)
        return [line["source"] for line in listed(tmp_path / folder)]

    one, both = sources("one", wide), sources("both", wide, red)
    assert one == one[:1] * 4 and both[:2] == one[:2] and both[2] == both[3] != one[0]
    folder = tmp_path / "one"
    line = complaint(capfd, folder, *prompts, red, config=edit, data=steps)
    assert f"the images in {folder} were drawn with prompts 2 (" in line
    line = complaint(capfd, folder, *prompts, "--prompt=c", wide, red, config=edit, data=steps)
    assert "`--image` is given 2 times and `--prompt` 3 times: give one image for all prompts, or one for each." in line
    line = complaint(capfd, folder, *prompts, "--image", "gone.png", config=edit, data=steps)
    assert "`--image` gone.png cannot be read (" in line
    assert "`--image` is given without `--prompt`" in complaint(capfd, folder, wide, config=edit, data=steps)
    line = complaint(capfd, folder, *prompts, wide, data=steps)
    assert "`--image` is given, but Flux1Policy draws from text alone" in line


def test_ids_become_file_names(tmp_path: Path) -> None:
    record = {"tag": "colors", "prompt": "a red circle", "include": [{"class": "circle", "count": 1}]}
    ids = ["a/b", "a_b", "../../up", "..", "", "x" * 300, "x" * 301, "ein Kreis", "圆", "方"]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(record | {"id": name}) for name in ids))
    folder = tmp_path / "predictions"
    predict(folder, config=files_config(tmp_path, predict_file=str(path)), data=[])
    assert [line["id"] for line in listed(folder)] == ids
    files = [folder / line["file"] for line in listed(folder)]
    assert len({*files}) == len(ids) and all(file.is_file() for file in files)
    assert {file.parent for file in files} == {folder / "p" / "without_pe"}
    assert files[1].name == "a_b_0.png"
    assert len({file.read_bytes() for file in files}) == len(ids)  # noise is the id's own


def test_no_images_per_prompt_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`predictions.images_per_prompt` is 0, use at least 1"):
        SavePredictions(images_per_prompt=0)
    line = complaint(capfd, tmp_path / "none", "--predictions.images_per_prompt=0")
    assert "`predictions.images_per_prompt` is 0, use at least 1." in line


def test_only_prompts_are_drawn(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = complaint(capfd, tmp_path / "none", config="configs/miniature/pretrain_vae.yaml", data=[])
    assert "`lightning predict` draws prompts, but this configuration has VAEPretraining and " in line
    assert not (tmp_path / "none").exists()


def test_the_reward_is_not_needed(tmp_path: Path, drawn: list[int]) -> None:
    """A reward whose model is nowhere: predictions neither load nor ask it."""
    options = ["--model.init_args.reward=rewards.pickscore.PickScoreReward",
               "--model.init_args.reward.init_args.model=/no/such/folder"]  # fmt: skip
    predict(tmp_path / "predictions", *options, "--trainer.limit_predict_batches=1")
    assert drawn == [3, 3]


def test_fit_knows_nothing_of_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--config={QUICKSTART}", f"--trainer.default_root_dir={tmp_path}", "--predictions.directory=x"])
    assert "predictions" in capfd.readouterr().err.splitlines()[-1]


def test_a_step_of_several_images(make_flow: Any) -> None:
    """K lists of a batch's images, the first with validation's noise."""
    agents = EvaluatedAgents(make_flow(sampling=Sampling(2, 1)), None, optimizer=None)  # type: ignore[arg-type]
    batch = [PromptSample("7", "a red circle", "colors", {})]
    agents.images_per_evaluation = 2
    drawn = agents.predict_step(PredictBatch("set", batch), 0)
    assert list(drawn.prompts) == list(drawn.images) == ["without_pe"]
    agents.images_per_evaluation = 1
    ((alone,),) = agents.predict_step(PredictBatch("set", batch), 0).images["without_pe"]
    assert drawn.images["without_pe"][0][0].tobytes() == alone.tobytes()
    assert drawn.images["without_pe"][1][0].tobytes() != alone.tobytes()


def test_two_processes_draw_what_one_does(whole: Path, tmp_path: Path) -> None:
    """Stopped after a batch each, then continued by two, then by one: the same lines and names, nothing twice."""
    folder = tmp_path / "predictions"
    options = ["predict", f"--config={QUICKSTART}", "--trainer.accelerator=cpu", f"--predictions.directory={folder}",
               "--trainer.enable_progress_bar=false", *DATA]  # fmt: skip
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    for batches in (1, 2):
        for process in run(tmp_path, *options, *two, f"--trainer.limit_predict_batches={batches}", processes=2):
            assert process.returncode == 0, process.text
        if batches == 1:
            assert len(listed(folder)) == 2 * 3 * 2
    predict(folder)
    assert listed(folder) == listed(whole)
    assert contents(folder).keys() == contents(whole).keys()


def test_more_processes_than_prompts(tmp_path: Path) -> None:
    words = ["predict", f"--config={QUICKSTART}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    words += [f"--predictions.directory={tmp_path}/drawn", "--trainer.devices=2", "--trainer.strategy=ddp"]
    for process in run(tmp_path, *words, "--prompt=a red circle", processes=2):
        assert process.returncode == 0, process.text
    assert [line["mode"] for line in listed(tmp_path / "drawn")] == list(MODES)
