"""Modules that are imported when something of them is asked for."""

from __future__ import annotations

import importlib.util
import inspect
import sys

import pytest

from lightning_modules.late_imports import LateModule


def test_it_is_imported_at_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    late = LateModule("colorsys", {"old_name": "colorsys.rgb_to_hsv"})
    monkeypatch.setitem(sys.modules, "colorsys", late)
    assert hasattr(late, "old_name") and not hasattr(late, "__file__")  # `inspect` asks every module for its file
    assert inspect.getmodule(test_it_is_imported_at_the_first_use) is not None
    assert importlib.util.find_spec("colorsys") is late.__spec__
    assert sys.modules["colorsys"] is late
    assert late.rgb_to_hsv(1.0, 0.0, 0.0) == (0.0, 1.0, 1.0)
    assert sys.modules["colorsys"] is not late and sys.modules["colorsys"].rgb_to_hsv is late.rgb_to_hsv


def test_a_placeholder_calls_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    late = LateModule("colorsys", {"old_name": "colorsys.rgb_to_hsv"})
    monkeypatch.setitem(sys.modules, "colorsys", late)
    assert late.old_name(1.0, 0.0, 0.0) == (0.0, 1.0, 1.0)


def test_what_is_not_there_is_an_attribute_error(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateModule("colorsys", {})
    monkeypatch.setitem(sys.modules, "colorsys", late)
    with pytest.raises(AttributeError, match="no_such_thing"):
        late.no_such_thing  # noqa: B018
