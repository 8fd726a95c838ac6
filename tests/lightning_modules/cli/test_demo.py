"""`promptrl demo`: a page whose images are those of `predict`, bit for bit, and which asks nobody outside."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from lightning_modules.cli import main
from lightning_modules.cli.demo import predict_words, serve_demo, trained_run
from lightning_modules.run_folder import RunFolder
from tests.browser import chromium, needs_browser
from tests.forked import Forked, free_port
from tests.short_runs import folder, quick

pytestmark = pytest.mark.slow
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
WAIT = 120
STAGES, CPU = ("before", "after"), "--trainer.accelerator=cpu"
PROMPTS = ["a photo of a red circle and a blue square", "a <b>& `two` crosses"]


def complaint(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """Returns the one line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        main(["demo", *words])
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


@needs_gradio
def test_what_cannot_be_shown_is_said_in_a_sentence(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, two_runs: Path
) -> None:
    run = str(folder(two_runs, "promptrl"))
    assert "which run? Give its folder first" in complaint(capfd, "--port=1")
    assert f"{tmp_path} has no config.yaml, so it is no run" in complaint(capfd, str(tmp_path))
    shutil.copy(Path(run, "config.yaml"), tmp_path)
    assert f"{tmp_path} has no checkpoint ({tmp_path}/checkpoints/last.ckpt is not there)" in complaint(
        capfd, run, str(tmp_path)
    )
    assert "argument --port: invalid int value: 'x'" in complaint(capfd, run, "--port", "x")
    assert "trainer.accelerater" in complaint(capfd, run, "--trainer.accelerater=cpu")


def test_without_gradio(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_modules.cli.demo.find_spec", lambda name: None)
    assert "the demo page needs gradio: run `pip install -e '.[demo]'`." in complaint(capfd, "run")


def test_the_folder_of_a_test_leads_to_its_fit(tmp_path: Path, two_runs: Path) -> None:
    fit = folder(two_runs, "promptrl")
    checkpoint = fit / "checkpoints" / "last.ckpt"
    (tmp_path / "config.yaml").write_text(f"ckpt_path: {checkpoint}\nimages: {{}}\n")
    run = trained_run(tmp_path)
    assert run.folder == fit
    words = predict_words(run, ["--x=1"])
    assert words[:3] == ["predict", f"--config={fit}/config.yaml", f"--ckpt_path={checkpoint}"] and words[-1] == "--x=1"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        serve_demo(["--help"])
    assert ended.value.code == 0
    assert "promptrl demo RUN [RUN ...] [--host HOST]" in capsys.readouterr().out


@contextmanager
def served(tmp_path: Path, *words: str) -> Iterator[str]:
    """Serves a page in a fork; yields its address."""
    port = free_port()
    (tmp_path / "demo.log").touch()
    server = Forked(lambda: main(["demo", *words, f"--port={port}", CPU]), tmp_path / "demo.log")
    try:
        end = time.monotonic() + WAIT
        while not (found := re.search(r"^Demo: (http\S+)", server.text, re.MULTILINE)) and time.monotonic() < end:
            time.sleep(0.5)
        assert found, server.text
        assert found[1] == f"http://127.0.0.1:{port}/"
        yield found[1]
    finally:
        server.kill(signal.SIGKILL)


def waited(page: webdriver.Chrome, script: str) -> object:
    """Runs a script until it returns something, at most for `WAIT` seconds."""
    end = time.monotonic() + WAIT
    while not (found := page.execute_script(script)) and time.monotonic() < end:
        time.sleep(0.2)
    assert found, page.find_element(By.TAG_NAME, "body").text
    return found


def draw(page: webdriver.Chrome, prompt: str, noise: int, num: int) -> list[bytes]:
    """Draws on the page; returns the pixels of its images, in order."""
    text, number = page.find_element(By.TAG_NAME, "textarea"), page.find_element(By.CSS_SELECTOR, "input[type=number]")
    for field, value in ((text, prompt), (number, str(noise))):
        page.execute_script("arguments[0].select()", field)
        field.send_keys(value)
    old = sources(page)
    page.find_element(By.CSS_SELECTOR, "button.primary").click()
    end = time.monotonic() + WAIT
    while len(new := sources(page)) != num or set(new) & set(old):
        assert time.monotonic() < end, page.find_element(By.TAG_NAME, "body").text
        time.sleep(0.2)
    return [pixels(urllib.request.urlopen(source, timeout=WAIT).read()) for source in new]


def sources(page: webdriver.Chrome) -> list[str]:
    found: list[str] = page.execute_script("return [...document.querySelectorAll('.drawn img')].map(one => one.src)")
    return found


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode.encode() + image.tobytes()


def predicted(tmp_path: Path, run: Path, *more: str) -> tuple[list[bytes], list[str]]:
    """Draws with `lightning predict`, before and after training; returns pixels and rewrites, in the page's order."""
    images, rewrites = [], []
    words = predict_words(
        RunFolder.read(run), [CPU, "--trainer.fast_dev_run=false", "--data.init_args.eval_batch_size=1"]
    )
    for stage in STAGES:
        directory = tmp_path / f"{run.parent.name}-{stage}"
        stage_words = [word for word in words if stage == "after" or not word.startswith("--ckpt_path")]
        main([*stage_words, f"--predictions.directory={directory}", *more])
        lines = [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]
        images += [pixels((directory / line["file"]).read_bytes()) for line in lines]
        rewrites += [line["rewrite"] for line in lines]
    return images, rewrites


def rewrites_on(page: webdriver.Chrome) -> Sequence[str]:
    values = page.execute_script("return [...document.querySelectorAll('textarea')].map(one => one.value)")
    return [*values[1:]]


@needs_gradio
@pytest.mark.browser
@needs_browser[1]
def test_two_runs_beside_each_other(tmp_path: Path, two_runs: Path) -> None:
    runs = [folder(two_runs, name) for name in ("promptrl", "flow_only")]
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    expected = [predicted(tmp_path, run, *prompts) for run in runs]
    # Stage by stage, prompt by prompt, and then, where there is a refiner, as written and rewritten.
    both, alone = (dict(zip(("images", "rewrites"), one, strict=True)) for one in expected)
    with served(tmp_path, *map(str, runs)) as address, chromium(1280, 1500) as page:
        page.get(address)
        waited(page, "return document.querySelector('button.primary')")
        for noise, prompt in enumerate(PROMPTS):
            drawn = draw(page, prompt, noise, 6)
            rows = [4 * stage + 2 * noise + mode for stage in (0, 1) for mode in (0, 1)]
            assert drawn[:4] == [both["images"][row] for row in rows]
            assert drawn[4:] == [alone["images"][2 * stage + noise] for stage in (0, 1)]
            assert rewrites_on(page) == [both["rewrites"][row] for row in rows if both["rewrites"][row] is not None]
        assert both["images"][0] != both["images"][4] and len({*both["images"]}) > 4
        said = page.find_element(By.TAG_NAME, "body").text
        assert said.count("This run has no refiner (flow-only RL)") == 1
        assert all(f"{run} ({mode})" in said for run, mode in zip(runs, ("PromptRL", "flow-only"), strict=True))
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        page.find_element(By.CSS_SELECTOR, "button.gallery-item").click()
        first = "return document.querySelector('textarea').value"
        assert waited(page, f"{first}.startsWith('a photo') && {first.removeprefix('return ')}") not in PROMPTS
        page.execute_script("arguments[0].select()", page.find_element(By.TAG_NAME, "textarea"))
        page.find_element(By.TAG_NAME, "textarea").send_keys(" ")
        page.find_element(By.CSS_SELECTOR, "button.primary").click()
        waited(page, "return document.body.innerText.includes('The prompt is empty: type what to draw')")
        assert not sources(page)
        asked = page.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
        assert len(asked) > 10 and all(name.startswith(address) for name in asked)
        assert not [line for line in page.get_log("browser") if line["level"] == "SEVERE"]


@needs_gradio
@pytest.mark.browser
@needs_browser[1]
def test_editing(tmp_path: Path) -> None:
    options = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--data.init_args.train_prompts=6"]
    main(quick("fit", tmp_path, *options, config="configs/quickstart_edit.yaml"))
    run = tmp_path / "quickstart_edit" / "version_0"
    source = tmp_path / "source.png"
    Image.effect_noise((32, 32), 90).convert("RGB").save(source)
    images, rewrites = predicted(tmp_path, run, "--prompt=make it red", f"--image={source}")
    with served(tmp_path, str(run)) as address, chromium(1280, 1500) as page:
        page.get(address)
        waited(page, "return document.querySelector('button.primary')")
        page.find_element(By.TAG_NAME, "textarea").send_keys("make it red")
        page.find_element(By.CSS_SELECTOR, "button.primary").click()
        waited(page, "return document.body.innerText.includes('This run edits images: give it one')")
        page.find_element(By.CSS_SELECTOR, ".source input[type=file]").send_keys(str(source))
        waited(page, "return document.querySelector('.source img')")
        assert draw(page, "make it red", 0, 4) == images
        assert rewrites_on(page) == [text for text in rewrites if text is not None]
