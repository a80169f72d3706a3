"""Throughput: FLOPs against hand counts, and what happens when memory or a compiler gives out. No timings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from mimbench import config, machine, registry
from mimbench.data import InMemory, Split
from mimbench.encoder import Encoder, Features, InputSpec
from mimbench.errors import ConfigError, MimbenchError
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.progress import quiet
from mimbench.task import Context, Result, Task

throughput = registry.load_protocol("throughput")
CPU = torch.device("cpu")
FAST: dict[str, Any] = {
    "compile": False,
    "batch_size": 8,
    "warmup": 1,
    "repeats": 3,
    "repeat_seconds": 0.001,
    "latency_calls": 5,
}


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.SIZES, "cpu", (64, 128))


def vit() -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(ViT(16, ViTShape(4, 32, 2, 2)), InputSpec(16), "mean")


def step_of(encoder: ViTEncoder) -> Callable[[int], Callable[[], Tensor]]:
    """Training steps that regress the pooled features to zero."""

    def prepare(batch_size: int) -> Callable[[], Tensor]:
        images = torch.randn(batch_size, 3, 16, 16)

        def step() -> Tensor:
            loss = encoder(images).pooled.square().mean()
            loss.backward()
            encoder.zero_grad()
            return loss.detach()

        return step

    return prepare


def run(
    encoder: Encoder,
    tmp_path: Path,
    step: Callable[[int], Callable[[], Tensor]] | None = None,
    **changes: Any,
) -> Result:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    split = Split("none", "train", InMemory(images), (), "", torch.arange(4))
    settings = config.build(throughput.Settings, FAST | changes)
    context = Context(CPU, 0, quiet(), tmp_path, pretrain_step=step)
    return throughput.evaluate(encoder, Task(split, split), settings, context)


def by_hand(tokens: int, width: int, depth: int, patch: int, patches: int) -> int:
    """Multiply-adds of a ViT, times two: embedding, and per block qkv, scores, values, projection and MLP."""
    block = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    block += 2 * tokens * width * 4 * width
    return 2 * (patches * patch * patch * 3 * width + depth * block)


def test_inference_flops_are_the_hand_count() -> None:
    assert throughput.inference_flops(vit(), CPU) == by_hand(17, 32, 2, 4, 16)


def test_training_flops_are_three_forwards_less_the_gradient_of_the_pixels() -> None:
    # Each product has two gradients of its own size; only the image needs none.
    encoder = vit()
    expected = 3 * by_hand(17, 32, 2, 4, 16) - 2 * 16 * 4 * 4 * 3 * 32
    assert throughput.training_flops(step_of(encoder), 4) == expected
    assert throughput.training_flops(step_of(encoder), 8) == expected


def test_rows_are_complete_and_consistent(tmp_path: Path) -> None:
    encoder = vit().train()
    result = run(encoder, tmp_path, step_of(vit()))
    assert encoder.training
    assert result.primary == "inference_fp32_eager"
    assert not result.warnings
    for stage in ("inference", "training"):
        for precision in ("fp32", "bf16"):
            name = f"{stage}_{precision}_eager"
            rate = result.metrics[name]
            assert rate.low <= rate.value <= rate.high
            assert rate.value == np.median(result.details["rows"][name]["images_per_second"])
            share = result.metrics[f"peak_share_{name}"].value
            peak = result.metrics[f"matmul_peak_{precision}"].value
            assert share == pytest.approx(
                100 * rate.value * result.metrics[f"flops_{stage}"].value / (1000 * peak)
            )
    latencies = [result.metrics[f"latency_p{level}_fp32_eager"].value for level in (50, 90, 99)]
    assert latencies == sorted(latencies)
    assert result.metrics["parameters"].value == sum(p.numel() for p in vit().parameters()) / 1e6
    assert result.details["threads"] == torch.get_num_threads()


def test_a_method_without_training_has_inference_rows_only(tmp_path: Path) -> None:
    result = run(vit(), tmp_path)
    assert not [name for name in result.metrics if "training" in name]


class Greedy(nn.Module):
    """Runs out of memory above a batch size."""

    input, dim, depth, stride, readout = InputSpec(8), 3, 1, 8, "mean"

    def __init__(self, largest: int, fault: Exception) -> None:
        super().__init__()
        self.largest, self.fault = largest, fault

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        if len(images) > self.largest:
            raise self.fault
        return Features(images.mean((2, 3)), images.mean((2, 3), keepdim=True))


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_said(fault: Exception, tmp_path: Path) -> None:
    result = run(Greedy(3, fault), tmp_path)
    assert result.details["rows"]["inference_fp32_eager"]["batch_size"] == 2
    assert "inference_fp32_eager: memory holds batches of 2, not of 8" in result.warnings


def test_nothing_fits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MimbenchError, match="memory"):
        run(Greedy(0, torch.OutOfMemoryError("CUDA out of memory")), tmp_path)


def test_other_faults_of_eager_code_are_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(Greedy(3, ZeroDivisionError("a bug")), tmp_path)


def test_a_compiler_that_fails_costs_its_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, dynamic: bool) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("no C++ compiler\nlong trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    result = run(vit(), tmp_path, step_of(vit()), compile=True, precisions=["fp32"])
    assert "inference_fp32_eager" in result.metrics
    assert "inference_fp32_compiled" not in result.metrics
    assert result.warnings == [
        f"{stage}_fp32_compiled is not available: RuntimeError: no C++ compiler"
        for stage in ("inference", "training")
    ]


def test_compiled_rows_run_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: (compiled.append(f), f)[1])
    result = run(vit(), tmp_path, step_of(vit()), compile=True, precisions=["bf16"])
    assert {"inference_bf16_compiled", "training_bf16_compiled"} <= set(result.metrics)
    assert len(compiled) == 3  # a batch, a single image, the training step


def test_bf16_rows_compute_in_bf16(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    class Watched(ViTEncoder):
        def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
            seen.add(self.vit.patch_embed(images).dtype)
            return super().forward(images, layers)

    run(Watched(vit().vit, InputSpec(16), "mean"), tmp_path, precisions=["bf16"])
    assert torch.bfloat16 in seen
    seen.clear()
    run(Watched(vit().vit, InputSpec(16), "mean"), tmp_path, precisions=["fp32"])
    assert seen == {torch.float32}


def test_the_interval_of_a_median_covers_it() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        metric = throughput.quantile(list(draw.normal(size=25)), 0.5, "s")
        covered += metric.low <= 0 <= metric.high
    assert stats.binomtest(covered, 200, 0.95).pvalue > 1e-3


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        run(vit(), tmp_path, batch_size=0)
    with pytest.raises(ConfigError, match="precision"):
        run(vit(), tmp_path, precisions=[])


def test_memory_growth_sees_what_was_held() -> None:
    size = 64 * 2**20
    result, grown = machine.memory_growth(lambda: int(torch.ones(size, dtype=torch.uint8).max()), CPU)
    assert result == 1
    if grown is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert size * 0.9 <= grown < 1.5 * size
