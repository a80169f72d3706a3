"""The shared transformer's operators against torch's own, in every precision they have a path for."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench.compiling import compiled
from mimbench.models import vit
from mimbench.models.vit import Block, attention, dropout, gelu


def heads(dtype: torch.dtype, queries: int = 17, keys: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 3, queries, 16), (2, 3, keys, 16), (2, 3, keys, 16))
    return tuple(torch.randn(shape, generator=draw).to(dtype) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("biased", [False, True])
def test_written_out_attention_is_torchs(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(torch.bfloat16)
    bias = torch.randn(1, 3, 17, 23).bfloat16() if biased else None
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), None if bias is None else bias.double()
    )
    explicit = attention(q, k, v, bias)
    monkeypatch.setattr(vit, "LARGEST_EXPLICIT", 0)
    fused = attention(q, k, v, bias)
    assert not torch.equal(explicit, fused), "two ways were taken"
    assert (fused - exact).abs().max() < 0.03
    assert (explicit - exact).abs().max() < 0.03  # of values around 1 with 8 bits


def test_float32_attention_is_the_fused_operator() -> None:
    q, k, v = heads(torch.float32)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_weights_are_dropped_and_the_rest_scaled_up() -> None:
    q, k, v = heads(torch.float64)
    mean = torch.stack([attention(q, k, v, drop=0.3) for _ in range(2_000)]).mean(0)
    torch.testing.assert_close(mean, attention(q, k, v), atol=0.08, rtol=0)
    assert not torch.equal(attention(q, k, v, drop=0.3), attention(q, k, v, drop=0.3))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_independently(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.full((1_000, 1_001), 2.0, dtype=torch.float64, requires_grad=True)
    y = dropout(x, rate)
    y.sum().backward()
    y = y.detach()
    kept = y != 0
    assert abs(float(kept.double().mean()) - (1 - rate)) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / (1 - rate)), rtol=1e-3, atol=0)
    assert abs(float(y.mean()) - 2) < 0.02
    assert torch.equal(x.grad != 0, kept)
    for lane in range(1, 5):  # the four entries of a draw, and the next draw
        both = (kept.flatten()[lane:] & kept.flatten()[:-lane]).double().mean()
        assert abs(float(both) - (1 - rate) ** 2) < 0.003


def test_dropout_repeats_with_its_seed_and_rests_outside_training() -> None:
    x = torch.randn(7, 3)
    torch.manual_seed(1)
    first = dropout(x, 0.4)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.4), first)
    assert dropout(x, 0.4, training=False) is x
    assert dropout(x, 0.0) is x


def test_compiled_gelu_keeps_its_precision() -> None:
    x = torch.linspace(-12, 12, 4_001).bfloat16()
    exact_in = x.double().requires_grad_()
    exact = F.gelu(exact_in)
    exact.sum().backward()
    ours_in = x.clone().requires_grad_()
    ours = vit._GELU.apply(ours_in)
    ours.sum().backward()
    theirs_in = x.clone().requires_grad_()
    theirs = F.gelu(theirs_in)
    theirs.sum().backward()
    for mine, others, reference in (
        (ours, theirs, exact),
        (ours_in.grad, theirs_in.grad, exact_in.grad),
    ):
        off, usual = (mine - reference).abs().max(), (others - reference).abs().max()
        assert off <= 1.01 * usual, "no worse than torch's own in bfloat16"
    assert torch.equal(gelu(x), F.gelu(x)), "not compiled, it is torch's"


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch itself
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_a_compiled_block_trains_as_an_eager_one() -> None:
    """In bfloat16, where the compiled graph holds another GELU and keeps what the forward pass computed."""
    torch.manual_seed(0)
    eager = nn.Sequential(Block(32, 2))
    other = nn.Sequential(Block(32, 2))
    other.load_state_dict(eager.state_dict())
    x = torch.randn(4, 9, 32)
    for model, forward in ((eager, eager), (other, compiled(other, torch.device("cpu")))):
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(x).square().mean()
        loss.backward()
        model.loss = loss.detach()  # type: ignore[assignment]
    torch.testing.assert_close(other.loss, eager.loss, rtol=2e-3, atol=0)
    for (name, mine), theirs in zip(other.named_parameters(), eager.parameters(), strict=True):
        size = theirs.grad.norm()
        assert (mine.grad - theirs.grad).norm() < 0.03 * size, name
