"""What this machine can do, measured now: time of a call, matmul peak, memory that a call takes."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mimbench import seeds

T = TypeVar("T")

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of settings in glibc's malloc.h

SIZES = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384)}
LONGEST = 0.3  # seconds for one product above which no larger one is tried
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Peak:
    """The fastest square matrix product found."""

    flops: float  # floating-point operations per second, a multiply-add counted as two
    size: int  # side of the matrices


def keep_pages() -> None:
    """Lets this process use freed memory again instead of returning it to the system at once.

    By default glibc returns every large block when it is freed; a training step on a CPU then spends up to half
    the time of its elementwise operations on having fresh pages cleared. Other C libraries are left alone.
    """
    _libc("mallopt", MMAP_THRESHOLD, 2**30)
    _libc("mallopt", TRIM_THRESHOLD, 2**31 - 1)


def _libc(function: str, *arguments: int) -> None:
    """Calls a function of the C library that Linux with glibc has; does nothing elsewhere."""
    if sys.platform == "linux" and (call := getattr(ctypes.CDLL(None), function, None)) is not None:
        call(*arguments)


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Wall time of ``calls`` calls, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return time.perf_counter() - start


def matmul_peak(
    device: torch.device, precision: str, sizes: tuple[int, ...] | None = None, repeats: int = 3
) -> Peak:
    """The best rate of square matrix products of several sizes in "fp32" or "bf16".

    With torch's default settings, so fp32 means full fp32 unless the caller has allowed less. The entries are
    normal random numbers: a GPU spends less power on constants and then runs faster than real work can.
    """
    best = Peak(0.0, 0)
    for size in sizes or SIZES[device.type]:
        draw = seeds.generator(device, 0, "matmul")
        a = torch.randn(size, size, device=device, generator=draw).to(DTYPES[precision])
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, out: torch.Tensor = out) -> torch.Tensor:
            return torch.mm(a, a, out=out)

        first = seconds(product, device)
        fastest = min(seconds(product, device) for _ in range(repeats if first < LONGEST else 1))
        best = max(best, Peak(2 * size**3 / fastest, size), key=lambda peak: peak.flops)
        if fastest > LONGEST:
            break
    return best


def memory_growth(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """The result of a call, and the bytes by which memory rose above its level before, at most, during it.

    On a GPU what torch allocated. On a CPU the resident memory of the process, which understates the need
    where the C library uses memory freed earlier again; None where the system does not say (only Linux does).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    _libc("malloc_trim", 0)  # returns what keep_pages holds, which would otherwise hide what the call takes
    try:
        reset.write_text("5")  # sets the peak to the present level
        resident = _kilobytes(status, "VmRSS")
    except OSError:
        return call(), None
    result = call()
    return result, max(0, _kilobytes(status, "VmHWM") - resident) * 1024


def _kilobytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
