"""The judge's server that all judges' tests ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rewards.judges.judge_server import Judge, serving


@pytest.fixture
def judge() -> Iterator[Judge]:
    with serving() as running:
        yield running
