"""Copies of weights that follow them: by hand, in half precision too, and while they are in use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_modules.policies.kept import Decay, KeptWeights


def test_decay_by_hand() -> None:
    rising = Decay(0.5, slope=0.1, start=2)
    assert [rising.at(step) for step in (1, 2, 3, 6, 20)] == pytest.approx([0, 0, 0.1, 0.4, 0.5])
    resets = Decay(0, every=3)
    assert [resets.at(step) for step in (1, 2, 3, 4)] == [1, 1, 0, 1]
    assert [Decay(0.9, start=2).at(step) for step in (1, 2)] == [0, 0.9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slow_copy_moves(dtype: torch.dtype) -> None:
    """From 1 towards 2 at .999: after 500 steps 2 - .999^500 = 1.394, where bf16 would have stayed at 1."""
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    copy = KeptWeights({"w": weight}, Decay(0.999))
    with torch.no_grad():
        weight.fill_(2)
    for step in range(1, 501):
        copy.follow(step)
    for _ in range(2):  # to be in use changes neither
        with copy.in_use():
            assert weight.tolist() == pytest.approx([1.394] * 3, abs=5e-3)
            assert not (weight * 2).requires_grad
        assert weight.tolist() == [2, 2, 2]
    assert copy.values["w"].tolist() == pytest.approx([2 - 0.999**500] * 3, abs=1e-5)


def test_a_copy_of_another_network_is_refused() -> None:
    copy = KeptWeights({"w": nn.Parameter(torch.ones(3))}, Decay())
    copy.load({})
    for values in ({"w": torch.ones(4)}, {"v": torch.ones(3)}):
        with pytest.raises(ValueError, match="copies of the weights .* are of another network"):
            copy.load(values)
    copy.load({"w": torch.full((3,), 7.0)})
    assert copy.values["w"].tolist() == [7, 7, 7]
