"""Pages in a real browser, as a phone, a laptop and a 4K screen show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from callbacks.reporting.page import comparison_page, run_page
from callbacks.runs.loading import load
from tests.browser import chromium, needs_browser
from tests.callbacks.reporting.made_run import made_run

pytestmark = needs_browser

IMAGES = """
return [...document.images].map(one => ({
    shown: one.getBoundingClientRect().width / one.getBoundingClientRect().height,
    own: one.naturalWidth / one.naturalHeight,
    width: one.getBoundingClientRect().width,
    source: one.src.slice(0, 5),
}));
"""
# Boxes of all lines of text, without those that lie on images on purpose.
OVERLAPS = """
const boxes = [];
for (const one of document.querySelectorAll("h1, h2, h3, h4, p, dt, dd, td, th, figcaption b, figcaption span, li")) {
    const box = one.getBoundingClientRect();
    if (box.width && one.textContent.trim()) boxes.push([box, one]);
}
const found = [];
for (const [i, [a, one]] of boxes.entries()) for (const [b, other] of boxes.slice(i + 1)) {
    if (one.contains(other) || other.contains(one)) continue;
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 2 && y > 2) found.push([one.textContent.slice(0, 40), other.textContent.slice(0, 40), x, y]);
}
return found;
"""
CUT = """
return [...document.querySelectorAll(".box, h4, figcaption, figcaption span, td, .row, .column")]
    .filter(one => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== "inline")
    .map(one => one.textContent);
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's page and a comparison."""
    root = tmp_path_factory.mktemp("runs")
    first, second = made_run(root / "a" / "version_0"), made_run(root / "b" / "version_0", refines=False)
    return {
        "run": run_page(first),
        "comparison": comparison_page(load(first, second, stage=None), root / "comparison.html"),
    }


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_legible_on_a_phone_a_laptop_and_a_4k_screen(pages: dict[str, Path], name: str) -> None:
    with chromium(1280, 900) as page:
        sizes = {}
        for width in (390, 1280, 3840):
            emulated = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", emulated)
            page.get(pages[name].as_uri())
            page.execute_script("for (const one of document.images) one.loading = 'eager';")
            page.execute_async_script("Promise.all([...document.images].map(i => i.decode())).then(arguments[0]);")
            assert page.execute_script("return document.documentElement.scrollWidth") <= width, "no sideways scrolling"
            images: list[dict[str, Any]] = page.execute_script(IMAGES)
            assert len(images) > 15
            for image in images:
                assert image["source"] == "data:" and image["shown"] == pytest.approx(image["own"], rel=0.02)
                assert image["width"] >= 70
            assert page.execute_script(OVERLAPS) == [] and page.execute_script(CUT) == []
            sizes[width] = float(page.execute_script("return parseFloat(getComputedStyle(document.body).fontSize)"))
        assert sizes[390] >= 15 and sizes[3840] > 1.5 * sizes[1280]
        assert page.title != "hacked", "a prompt's script does not run"
        assert page.get_log("browser") == []  # neither errors nor addresses that were not found
