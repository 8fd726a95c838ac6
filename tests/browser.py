"""A headless Chromium, for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium import webdriver

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="chromium or chromedriver is not on PATH (Debian: apt-get install chromium chromium-driver)",
    ),
]
"""Marks of tests that need one."""


@contextmanager
def chromium(width: int, height: int, load: str = "normal") -> Iterator[webdriver.Chrome]:
    """Starts a browser.

    Args:
        width: of the window, in pixels.
        height: of the window, in pixels.
        load: what `get` waits for (Selenium's page load strategy).
    """
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.page_load_strategy = load
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"window-size={width},{height}"):
        options.add_argument(f"--{flag}")
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield page
    finally:
        page.quit()
