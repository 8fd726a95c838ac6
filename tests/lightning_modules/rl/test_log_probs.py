"""Token log-probs against torch.distributions, their peak memory, and masks by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from lightning_modules.preflight.peak_memory import peak_bytes
from lightning_modules.rl import log_probs as log_probs_module
from lightning_modules.rl.log_probs import completion_mask, position_ids, token_log_probs

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 7, 5, 11


class RecordingHead(nn.Module):
    """A linear head that notes how many positions it was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype))
        self.calls: list[int] = []

    def forward(self, states: Tensor) -> Tensor:
        assert states.ndim == 2
        self.calls.append(states.shape[0])
        return nn.functional.linear(states, self.weight)


def _batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype)
    return hidden, torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)


both_heads = pytest.mark.parametrize("learns", [True, False], ids=["head learns", "head is frozen"])


@both_heads
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 21, 1024, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_match_torch_distributions(
    temperature: float, chunk_size: int | None, learns: bool
) -> None:
    (hidden, targets), head = _batch(), RecordingHead().requires_grad_(learns)
    hidden.requires_grad_()
    weights = torch.linspace(-1, 1, BATCH * LENGTH).view(BATCH, LENGTH).double()
    log_probs = token_log_probs(hidden, head, targets, temperature=temperature, chunk_size=chunk_size)
    expected = Categorical(logits=hidden @ head.weight.T / temperature).log_prob(targets)
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=1e-12)
    learn = (hidden, head.weight)[: 1 + learns]
    gradients = torch.autograd.grad((weights * log_probs).sum(), learn)
    expected_gradients = torch.autograd.grad((weights * expected).sum(), learn)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
        assert gradient.abs().max() > 1e-2


def test_by_hand() -> None:
    # logits log(1), log(3), log(4): probabilities 1/8, 3/8, 1/2; at temperature 1/2 they are squared: 1/26, 9/26, 16/26
    hidden = torch.tensor([1.0, 3.0, 4.0]).double().log().expand(1, 3, 3)
    targets = torch.tensor([[0, 1, 2]])
    log_probs = token_log_probs(hidden, nn.Identity(), targets)
    assert log_probs.exp()[0].tolist() == pytest.approx([1 / 8, 3 / 8, 1 / 2])
    log_probs = token_log_probs(hidden, nn.Identity(), targets, temperature=0.5)
    assert log_probs.exp()[0].tolist() == pytest.approx([1 / 26, 9 / 26, 16 / 26])


def test_a_head_alone_can_be_trained() -> None:
    (hidden, targets), head = _batch(), RecordingHead()
    token_log_probs(hidden, head, targets, chunk_size=4).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() > 1e-2
    assert head.calls == [4, 4, 4, 4, 4, 1, 4, 4, 4, 4, 4], "the hidden states need no gradient: no reason to keep more"


@both_heads
@pytest.mark.parametrize("chunk_bytes", [2**20, 2**23], ids=["eight chunks", "one chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_one_chunk_of_logits(
    dtype: torch.dtype, learns: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, on shapes alone: 2,048 positions of 1,024 words are 8 MiB of fp32 logits."""
    monkeypatch.setattr(log_probs_module, "CHUNK_BYTES", chunk_bytes)
    head = nn.Linear(4, 1024, bias=False, device="meta").requires_grad_(learns)
    hidden = torch.empty(4, 512, 4, device="meta", requires_grad=True)
    targets = torch.empty(4, 512, dtype=torch.long, device="meta")
    head, hidden = head.to(dtype), hidden.to(dtype)
    peak = peak_bytes(
        [*head.parameters(), hidden, targets],
        lambda: token_log_probs(hidden, head, targets, temperature=0.7).sum().backward(),
    )
    assert (dtype.itemsize / 4 - 0.1) * chunk_bytes < peak < 1.1 * chunk_bytes + 2**18


@both_heads
def test_a_head_runs_again_only_where_it_must(learns: bool) -> None:
    """A frozen head runs once; one that learns runs again but for the last chunk, whose logits are kept."""
    (hidden, targets), head = _batch(), RecordingHead().requires_grad_(learns)
    hidden.requires_grad_()
    log_probs = token_log_probs(hidden, head, targets, chunk_size=9)
    assert head.calls == [7, 7, 7], "equal chunks"
    log_probs.sum().backward(retain_graph=True)
    assert head.calls == [7] * (5 if learns else 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


@both_heads
def test_no_positions(learns: bool) -> None:
    head = RecordingHead().requires_grad_(learns)
    hidden = torch.empty(0, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    log_probs = token_log_probs(hidden, head, torch.empty(0, LENGTH, dtype=torch.long))
    assert log_probs.shape == (0, LENGTH)
    log_probs.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape


@both_heads
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_bf16_logits_are_rounded_once(autocast: bool, learns: bool) -> None:
    """They are those of a plain log-softmax in fp32 on the same logits, to the rounding of bf16."""
    (hidden, targets), head = _batch(torch.float32), RecordingHead(torch.float32)
    if not autocast:
        hidden, head = hidden.bfloat16(), RecordingHead(torch.bfloat16)
    head.requires_grad_(learns)
    hidden.requires_grad_()
    weights = torch.linspace(-1, 1, BATCH * LENGTH).view(BATCH, LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        log_probs = token_log_probs(hidden, head, targets, temperature=0.7)
        logits = head(hidden.flatten(0, 1)).view(BATCH, LENGTH, VOCABULARY)
    plain = (logits.float() / 0.7).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(log_probs, plain, rtol=1e-6, atol=1e-6)
    learn = (hidden, head.weight)[: 1 + learns]
    expected = torch.autograd.grad((weights * plain).sum(), learn, retain_graph=True)
    for gradient, right in zip(torch.autograd.grad((weights * log_probs).sum(), learn), expected, strict=True):
        assert gradient.dtype == right.dtype and (gradient - right).norm() < 4e-3 * right.norm()


def test_without_gradient_nothing_is_computed_twice() -> None:
    (hidden, targets), head = _batch(), RecordingHead()
    with torch.no_grad():
        log_probs = token_log_probs(hidden, head, targets, chunk_size=8)
    assert head.calls == [7, 7, 7]
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, token_log_probs(hidden, head, targets).detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("autocast", [False, True])
def test_log_softmax_is_fp32_whatever_the_logits(autocast: bool) -> None:
    """Only the head may be bf16: from its logits on, the values are those of fp32 (bf16 would be off by 1e-2)."""
    (hidden, targets), head = _batch(torch.float32), RecordingHead(torch.float32)
    if not autocast:
        hidden, head = hidden.bfloat16(), RecordingHead(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = head(hidden.flatten(0, 1))
        log_probs = token_log_probs(hidden, head, targets, temperature=0.7, chunk_size=BATCH * LENGTH)
    assert logits.dtype == torch.bfloat16
    assert log_probs.dtype == torch.float32
    exact = Categorical(logits=logits.double().view(BATCH, LENGTH, VOCABULARY) / 0.7)
    torch.testing.assert_close(log_probs.double(), exact.log_prob(targets), rtol=1e-6, atol=2e-6)


def test_completion_mask_ends_with_the_first_eos() -> None:
    tokens = torch.tensor([[5, 6, 9, 9, 7], [9, 5, 5, 5, 5], [5, 6, 7, 5, 6], [5, 5, 8, 9, 5], [5, 5, 5, 5, 9]])
    expected = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert completion_mask(tokens, [9, 8]).int().tolist() == expected
    assert completion_mask(tokens, [9])[3].int().tolist() == [1, 1, 1, 1, 0]
    assert completion_mask(tokens, []).all()
    assert completion_mask(tokens, [9]).dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_position_ids_skip_the_padding(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]).to(dtype)
    positions = position_ids(mask)
    assert positions.dtype == torch.long
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 1, 1]]
