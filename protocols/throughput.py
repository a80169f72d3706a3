"""What an encoder costs: images per second, latency, memory, parameters, FLOPs and share of the matmul peak.

Inference is the encoder in eval mode on random images of its own size, already on the device; training is one
step of the method's pretraining (views, forward, backward, optimizer) on one batch that stays the same, so
reading data is not counted. Every combination of stage, precision and eager or compiled execution is a row.
After a warm-up of all rows their repeats are interleaved, so that a slower spell of the machine hits all alike;
a row's value is the median of its repeats. bf16 is autocast. Latency is that of single images.

The matrix-product peak is measured in the same run, so the share of it that a row reaches can be compared
between machines when images per second cannot.

Held against: FLOPs counted by hand, and batches that do not fit (``tests/protocols/test_throughput.py``).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimbench import config, machine, seeds
from mimbench.encoder import Encoder
from mimbench.errors import MimbenchError
from mimbench.task import Context, Metric, Result, Task

VERSION = 1
NEEDS = ()
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {
        "compile": False,
        "batch_size": 32,
        "repeats": 5,
        "repeat_seconds": 0.2,
        "latency_calls": 30,
    },
}
FLOP_BATCH = 32  # images, at most, of the training step whose FLOPs are counted
MEBI = 2**20


@dataclass(frozen=True)
class Settings:
    """Everything that can move the numbers, the machine aside. The defaults are those of ``full``."""

    recipe: str = "full"  # the name these settings go by
    batch_size: int = 256  # images per call; halved where memory does not suffice
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")  # bf16 is autocast
    compile: bool = True  # whether to measure torch.compile beside eager execution
    training: bool = True  # whether to measure the pretraining step beside inference
    warmup: int = 3  # calls before anything is timed
    repeats: int = 11  # timed spells per row
    repeat_seconds: float = 0.5  # length of a spell, at least one call
    latency_calls: int = 200  # single images timed per row of inference

    def __post_init__(self) -> None:
        config.check(
            self,
            "throughput",
            positive=("batch_size", "warmup", "repeats", "latency_calls"),
            not_negative=("repeat_seconds",),
            filled=("precisions",),
        )


@dataclass
class Row:
    """One way of running one stage."""

    stage: Literal["inference", "training"]
    precision: str
    mode: Literal["eager", "compiled"]
    batch_size: int = 0
    call: Callable[[], object] | None = None  # processes one batch; None: not available
    single: Callable[[], object] | None = None  # inference of one image
    memory: int | None = None  # bytes
    calls: int = 1  # per repeat
    rates: list[float] = field(default_factory=list)  # images per second, per repeat
    latencies: list[float] = field(default_factory=list)  # milliseconds, per image

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.precision}_{self.mode}"


def evaluate(encoder: Encoder, task: Task, settings: Settings, context: Context) -> Result:
    """Measures; ``task`` is not looked at."""
    warnings: list[str] = []
    with context.stage("matmul peak"):
        peaks: dict[str, machine.Peak] = {
            name: machine.matmul_peak(context.device, name) for name in settings.precisions
        }
    assert isinstance(encoder, nn.Module)
    encoder = copy.deepcopy(encoder).eval()  # the caller's keeps its modes
    rows = _rows(context, settings)
    with context.stage("warm-up"):
        for row in context.progress.track(rows, "warm-up and compilation"):
            _prepare(row, encoder, settings, context, warnings)
    rows = [row for row in rows if row.call is not None]
    if not any(row.mode == "eager" and row.stage == "inference" for row in rows):
        raise MimbenchError("not even one image fits into memory", "Choose a smaller model or more memory")
    with context.stage("timing"):
        _time(rows, settings, context)
    with context.stage("FLOPs"):
        flops: dict[str, float] = {"inference": inference_flops(encoder, context.device)}
        if context.pretrain_step is not None and settings.training:
            flops["training"] = training_flops(context.pretrain_step, min(settings.batch_size, FLOP_BATCH))
    metrics = _metrics(encoder, rows, flops, peaks)
    return Result(metrics, rows[0].name, _details(rows, peaks, context), warnings=warnings)


def _rows(context: Context, settings: Settings) -> list[Row]:
    """All rows asked for; the first is inference, eager, in the first precision."""
    stages: list[Literal["inference", "training"]] = ["inference"]
    if settings.training and context.pretrain_step is not None:
        stages.append("training")
    modes: list[Literal["eager", "compiled"]] = ["eager", "compiled"] if settings.compile else ["eager"]
    return [Row(s, precision, mode) for s in stages for mode in modes for precision in settings.precisions]


def _prepare(row: Row, encoder: Encoder, settings: Settings, context: Context, warnings: list[str]) -> None:
    """Builds and warms up a row's calls, at the largest batch that fits."""

    def build(batch_size: int) -> Callable[[], object]:
        if row.stage == "inference":
            return _inference(row, encoder, batch_size, context)
        assert context.pretrain_step is not None
        return _training(row, context.pretrain_step(batch_size), context)

    def warm_up(batch_size: int) -> Callable[[], object]:
        call = build(batch_size)
        for _ in range(settings.warmup):
            call()
        return call

    batch_size = settings.batch_size
    while batch_size:
        try:
            call, memory = machine.memory_growth(functools.partial(warm_up, batch_size), context.device)
            row.call, row.batch_size = call, batch_size
            if row.mode == "eager" or context.device.type == "cuda":  # else it is the compiler's own memory
                row.memory = memory
            if row.stage == "inference":
                row.single = warm_up(1)
            spell = machine.seconds(call, context.device)
            row.calls = max(1, round(settings.repeat_seconds / spell))
            break
        except Exception as fault:
            row.call = row.single = None
            if out_of_memory(fault):
                if context.device.type == "cuda":
                    torch.cuda.empty_cache()
                batch_size //= 2
            elif (
                row.mode == "compiled"
            ):  # a compiler may fail in any way; the eager row has shown the code to work
                reason = str(fault).strip().partition("\n")[0] or "no message"
                warnings.append(f"{row.name} is not available: {type(fault).__name__}: {reason[:200]}")
                return
            else:
                raise
    if not batch_size:
        warnings.append(f"{row.name} is not available: not even one image fits into memory")
    elif batch_size < settings.batch_size:
        warnings.append(f"{row.name}: memory holds batches of {batch_size}, not of {settings.batch_size}")


def out_of_memory(fault: Exception) -> bool:
    """Whether an exception says that the device's or the machine's memory is used up."""
    if isinstance(fault, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(fault, RuntimeError) and "can't allocate memory" in str(fault)


def _inference(row: Row, encoder: Encoder, batch_size: int, context: Context) -> Callable[[], object]:
    model: Callable[[Tensor], object] = encoder
    if row.mode == "compiled":
        model = torch.compile(encoder, dynamic=False)
    images = _images(encoder, batch_size, context.device)

    def call() -> object:
        with torch.inference_mode(), _precision(row.precision, context.device):
            return model(images)

    return call


def _training(row: Row, step: Callable[[], Tensor], context: Context) -> Callable[[], object]:
    if row.mode == "compiled":
        step = torch.compile(step, dynamic=False)

    def call() -> object:
        with _precision(row.precision, context.device):
            return step()

    return call


def _precision(name: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16")


def _images(encoder: Encoder, count: int, device: torch.device) -> Tensor:
    """Random normalised images (count, C, S, S)."""
    spec = encoder.input
    draw = seeds.generator(device, 0, "throughput images")
    return torch.randn(count, len(spec.mean), spec.size, spec.size, device=device, generator=draw)


def _time(rows: list[Row], settings: Settings, context: Context) -> None:
    """Fills ``rates`` and ``latencies``, one repeat of each row after the other."""
    for _ in context.progress.track(range(settings.repeats), "throughput"):
        for row in rows:
            assert row.call is not None
            spent = machine.seconds(row.call, context.device, row.calls)
            row.rates.append(row.calls * row.batch_size / spent)
    for _ in context.progress.track(range(settings.latency_calls), "latency"):
        for row in rows:
            if row.single is not None:
                row.latencies.append(1000 * machine.seconds(row.single, context.device))


def inference_flops(encoder: Encoder, device: torch.device) -> int:
    """Floating-point operations of one image's forward, a multiply-add counted as two.

    Matrix products, convolutions and attention only. Attention runs as plain matrix products while it is
    counted: its fused CPU kernel is unknown to torch's counter and would count as nothing.
    """
    images = _images(encoder, 1, device)
    with torch.no_grad():
        return _count(lambda: encoder(images))


def training_flops(pretrain_step: Callable[[int], Callable[[], Tensor]], batch_size: int) -> float:
    """The same of one training step, per image of the batch; where a loss compares images it grows with these."""
    return _count(pretrain_step(batch_size)) / batch_size


def _count(call: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _metrics(
    encoder: Encoder, rows: list[Row], flops: dict[str, float], peaks: dict[str, machine.Peak]
) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for row in rows:
        metrics[row.name] = quantile(row.rates, 0.5, "images/s")
        per_image = 100 * flops[row.stage] / peaks[row.precision].flops
        metrics[f"peak_share_{row.name}"] = quantile([per_image * r for r in row.rates], 0.5, "%")
        for level in (50, 90, 99):
            if row.latencies:
                name = f"latency_p{level}_{row.precision}_{row.mode}"
                metrics[name] = quantile(row.latencies, level / 100, "ms")
        if row.memory is not None:
            metrics[f"memory_{row.name}"] = Metric(row.memory / MEBI, unit="MiB")
    for stage, count in flops.items():
        metrics[f"flops_{stage}"] = Metric(count / 1e9, unit="GFLOP/image")
    assert isinstance(encoder, nn.Module)
    metrics["parameters"] = Metric(sum(p.numel() for p in encoder.parameters()) / 1e6, unit="million")
    for precision, peak in peaks.items():
        metrics[f"matmul_peak_{precision}"] = Metric(peak.flops / 1e12, unit="TFLOP/s")
    return metrics


def _details(rows: list[Row], peaks: dict[str, machine.Peak], context: Context) -> dict[str, Any]:
    cuda = context.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(context.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "memory": "allocated on the GPU beyond what was before" if cuda else "growth of resident memory",
        "matmul_size": {precision: peak.size for precision, peak in peaks.items()},
        "rows": {row.name: {"batch_size": row.batch_size, "images_per_second": row.rates} for row in rows},
    }


def quantile(values: list[float], level: float, unit: str) -> Metric:
    """A quantile of ``values`` with the percentile interval of its bootstrap."""
    data = np.asarray(values)
    draws = np.random.default_rng(0).choice(data, size=(2000, len(data)))
    low, high = np.percentile(np.quantile(draws, level, axis=1), [2.5, 97.5])
    return Metric(float(np.quantile(data, level)), float(low), float(high), len(data), unit)
