"""The dynamic shift against diffusers, and the choice of SDE steps."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from lightning_modules.rl.schedule import Window, dynamic_mu, sde_step_indices


@pytest.mark.parametrize("seq_len", [64, 256, 1024, 2304, 4096, 8192])
def test_dynamic_mu_equals_diffusers(seq_len: int) -> None:
    assert dynamic_mu(seq_len) == calculate_shift(seq_len)


def test_dynamic_mu_by_hand() -> None:
    assert dynamic_mu(256) == pytest.approx(0.5, abs=1e-12)
    assert dynamic_mu(4096) == pytest.approx(1.15, abs=1e-12)
    # 512 x 512: 0.5 + 0.65 * 768 / 3840
    assert dynamic_mu(1024) == pytest.approx(0.63, abs=1e-12)
    assert dynamic_mu(30, base_seq_len=10, max_seq_len=50, base_shift=1.0, max_shift=2.0) == pytest.approx(1.5)
    assert dynamic_mu(777, base_shift=0.3, max_shift=0.9) == calculate_shift(777, base_shift=0.3, max_shift=0.9)


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        (0, ()),
        (3, (0, 1, 2)),
        (5, (0, 1, 2, 3, 4)),
        ([4, 0, 2], (0, 2, 4)),
        ([], ()),
        (Window(2, 1, 3), (1, 2)),
        (Window(5), (0, 1, 2, 3, 4)),
    ],
)
def test_sde_steps(spec: int | list[int] | Window, steps: tuple[int, ...]) -> None:
    assert sde_step_indices(spec, 5) == steps


def test_window_is_uniform_over_its_places() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = Counter(sde_step_indices(Window(3, 1, 6), 10, generator=generator) for _ in range(1200))
    # three places, each 400 +- 16 times; 5 sigma
    assert set(draws) == {(1, 2, 3), (2, 3, 4), (3, 4, 5)}
    assert all(abs(count - 400) < 80 for count in draws.values())


def test_scattered_steps_are_uniform_over_their_sets() -> None:
    generator, window = torch.Generator().manual_seed(0), Window(2, 1, 5, contiguous=False)
    draws = Counter(sde_step_indices(window, 10, generator=generator) for _ in range(1200))
    # 4 over 2 = 6 sets, each 200 +- 13 times; 5 sigma
    assert set(draws) == {(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)}
    assert all(abs(count - 200) < 65 for count in draws.values())
    assert sde_step_indices(Window(5, contiguous=False), 5) == (0, 1, 2, 3, 4)


def test_a_window_that_moves_on() -> None:
    """Two steps of 1..5, every 10 optimizer steps by two, then from the beginning (MixGRPO)."""
    window = Window(2, 1, 6, every=10, stride=2)
    found = [sde_step_indices(window, 8, optimizer_step=step) for step in (0, 9, 10, 20, 29, 30)]
    assert found == [(1, 2), (1, 2), (3, 4), (1, 2), (1, 2), (3, 4)]
    assert sde_step_indices(Window(2, 1, 6, every=1), 8, optimizer_step=3) == (4, 5)


def test_window_reaches_the_last_step_and_is_the_generators_alone() -> None:
    draws = [
        [sde_step_indices(Window(2), 8, generator=generator) for _ in range(100)]
        for generator in (torch.Generator().manual_seed(7), torch.Generator().manual_seed(7))
    ]
    assert draws[0] == draws[1]
    assert {steps[0] for steps in draws[0]} == set(range(7))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (6, r"`sde_steps` is 6, but there are 5 sampler steps; set it from 0 to 5"),
        (-1, r"set it from 0 to 5"),
        ([0, 5], r"\[0, 5\], but there are 5 sampler steps; list steps from 0 to 4"),
        ([-1, 2], r"list steps from 0 to 4"),
        ([1, 2, 1], r"names a step twice; list each step once"),
        (Window(0), r"`size` of at least 1"),
        (Window(2, -1), r"keep `start` and `stop` from 0 to 5"),
        (Window(2, 0, 6), r"keep `start` and `stop` from 0 to 5"),
        (Window(3, 1, 3), r"3 steps, which does not fit into \[1, 3\); lower `size`"),
        (Window(2, 4), r"does not fit into \[4, 5\)"),
        (Window(6), r"does not fit into \[0, 5\)"),
        (Window(6, contiguous=False), r"does not fit into \[0, 5\)"),
        (Window(2, every=0), r"every 0 and stride 1; use at least 1 of both"),
        (Window(2, every=5, contiguous=False), r"and `contiguous: true`"),
    ],
)
def test_sde_steps_that_cannot_be(spec: int | list[int] | Window, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        sde_step_indices(spec, 5)
    assert "`sde_steps`" in str(error.value)
