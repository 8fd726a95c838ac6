"""`tensorboard --logdir` in a real browser: two runs, with their curves in common charts and a row each in HParams."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException

from tests.browser import chromium, needs_browser

pytestmark = needs_browser

FLOW_ONLY, PROMPTRL = "miniature/flow_only/version_0", "miniature/promptrl/version_0"
WAIT = 120
"""Seconds after which something counts as broken; a busy machine takes its time."""

# All of a page's parts, through the shadow roots at which `querySelectorAll` stops.
PARTS = """
function parts(root, selector) {
    const found = [...root.querySelectorAll(selector)];
    for (const one of root.querySelectorAll("*")) if (one.shadowRoot) found.push(...parts(one.shadowRoot, selector));
    return found;
}
"""
TEXTS = PARTS + "return parts(document, '*').filter(one => !one.children.length).map(one => one.textContent.trim());"
CELLS = PARTS + "return parts(document, 'vaadin-grid-cell-content').map(one => one.textContent.trim());"
# A chart's legend lists its curves; its lines are drawn in the runs' colours.
CHARTS = PARTS + """
const lines = ".line-plot:not(.ghost) path";
return parts(document, "tf-custom-scalar-multi-line-chart-card").map(card => ({
    title: parts(card.shadowRoot, ".heading-label").map(one => one.textContent.trim()).join(),
    curves: parts(card.shadowRoot, ".match-list-entry").map(one => one.textContent.trim().replace(/^\\S+\\s+/, "")),
    colors: parts(card.shadowRoot, ".match-list-entry").map(one => getComputedStyle(one).color),
    strokes: parts(card.shadowRoot, lines).map(one => getComputedStyle(one).stroke),
    points: parts(card.shadowRoot, lines).map(one => (one.getAttribute("d") || "").split("L").length),
}));
"""  # fmt: skip

T = TypeVar("T")


def waited(look: Callable[[], T]) -> T:
    """Calls `look` until it finds something, at most for `WAIT` seconds."""
    end = time.monotonic() + WAIT
    while not (found := look()) and time.monotonic() < end:
        time.sleep(1)
    return found


@pytest.fixture(scope="module")
def address(two_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a TensorBoard that has read both runs; it picks a free port and prints it."""
    log = tmp_path_factory.mktemp("tensorboard") / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(two_runs), "--host=127.0.0.1", "--port=0"]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as server:
        try:
            found = waited(lambda: re.search(r"http://127\.0\.0\.1:\d+/", log.read_text()))
            assert found, log.read_text()
            assert waited(lambda: has_read_both(found[0])), log.read_text()
            yield found[0]
        finally:
            server.terminate()  # its data server ends with it
            try:
                server.wait(30)
            finally:
                server.kill()


def has_read_both(address: str) -> bool:
    with urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=WAIT) as answer:
        tags = json.load(answer)
    return all("by_rollouts/val/geneval/without_pe" in tags.get(run, {}) for run in (FLOW_ONLY, PROMPTRL))


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    """A headless Chromium, tall enough that all charts are in sight: others are not drawn."""
    with chromium(1400, 4000, load="none") as page:
        page.set_script_timeout(WAIT)
        yield page


def asked(page: webdriver.Chrome, script: str) -> list[Any]:
    """Runs a script in a page, which may still be loading, until it finds something."""
    try:
        return page.execute_script(script) or []
    except WebDriverException:
        return []


def curves(tag: str) -> list[str]:
    """Returns a legend's names of a tag that both runs have."""
    return [f"{tag} ({run})" for run in (FLOW_ONLY, PROMPTRL)]


def test_curves_of_both_runs_in_common_charts(address: str, browser: webdriver.Chrome) -> None:
    browser.get(f"{address}#custom_scalars")
    expected = {
        "task reward": curves("reward/geneval"),
        "task reward by rollouts": curves("by_rollouts/reward/geneval"),
    }
    for title in ("val/geneval", "val/unseen", "by_rollouts/val/geneval"):
        expected[f"{title}/without_pe"] = curves(f"{title}/without_pe")
        expected[f"{title}/with_pe"] = [f"{title}/with_pe ({PROMPTRL})"]

    def charts() -> dict[str, dict[str, Any]]:
        return {chart["title"]: chart for chart in asked(browser, CHARTS)}

    def drawn() -> bool:
        found = charts()
        return all(
            title in found and len(found[title]["points"]) >= len(legend) and min(found[title]["points"]) > 1
            for title, legend in expected.items()
        )

    assert waited(drawn), charts()
    assert {FLOW_ONLY, PROMPTRL} <= set(asked(browser, TEXTS))
    shown = asked(browser, CHARTS)
    titles = [chart["title"] for chart in shown]
    assert len(titles) == len(set(titles)), "a chart that both runs have is shown once"
    assert titles[0] == "task reward" and "" not in titles
    for title, legend in expected.items():
        chart = charts()[title]
        assert sorted(chart["curves"]) == legend
        # A line for each curve in the colours of two runs: two steps; three validations, of which the first two share a
        # step (before and after the first update) but not the number of rollouts.
        assert chart["points"] == [3 if title.startswith("by_rollouts/val/") else 2] * len(legend)
        assert sorted(chart["strokes"]) == sorted(chart["colors"])
        assert len(set(chart["strokes"])) == len(legend)


def test_a_row_of_hyperparameters_and_scores_for_each_run(address: str, browser: webdriver.Chrome) -> None:
    browser.get(f"{address}#hparams")
    rows = {FLOW_ONLY, PROMPTRL, "flow-only", "PromptRL"}
    assert waited(lambda: rows <= set(asked(browser, CELLS))), asked(browser, CELLS)
    # Columns out of sight are not drawn; those that differ between runs come first.
    assert {"agents", "num_retained"} & set(asked(browser, CELLS)), asked(browser, CELLS)
