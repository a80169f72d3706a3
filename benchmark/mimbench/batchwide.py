"""Modules that look at all images of a batch, where several processes share it (``mimbench.distributed``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mimbench import distributed
from mimbench.errors import ConfigError
from mimbench.models.vq import Quantiser


@contextlib.contextmanager
def over_all_processes(model: nn.Module) -> Iterator[None]:
    """Lets a model's norms and codebooks follow the whole batch, for as long as it lasts.

    Only their classes change, so parameters, names and values stay where they are. torch's own SyncBatchNorm does
    not work on CPUs. Raises ConfigError for a norm over the batch that is none of torch's.
    """
    if distributed.size() == 1:
        yield
        return
    changed: list[tuple[nn.Module, type[nn.Module]]] = [
        (module, type(module)) for module in model.modules() if isinstance(module, (_BatchNorm, Quantiser))
    ]
    for _, kind in changed:
        if kind not in _WIDE:
            raise ConfigError(
                f"{kind.__name__} cannot be computed over the batch of {distributed.size()} processes",
                "Train in one process",
            )
    for module, kind in changed:
        module.__class__ = _WIDE[kind]
    try:
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) per channel of (B, C, ...), with the moments of all processes' values.

    Each sends its count, mean and sum of squared deviations, which are combined as by Chan et al. (1979): that of
    large means no digits are lost. Returns the moments too, the variance unbiased. Backward, two sums are sent.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        values = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
        mean = values.mean(1)
        spread = (values - mean[:, None]).square().sum(1)
        count = values.new_full((1,), values.shape[1])
        table = values.new_zeros(distributed.size(), 2 * len(mean) + 1)
        table[distributed.rank()] = torch.cat([count, mean, spread])
        counts, means, spreads = distributed.batch_sum(table).split([1, len(mean), len(mean)], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        spread = (spreads + counts * (means - mean).square()).sum(0)
        scale = (spread / total + eps).rsqrt()
        normed = (
            ((values - mean[:, None]) * scale[:, None]).unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)
        )
        ctx.save_for_backward(normed, scale, total)
        variance = spread / (total - 1)
        ctx.mark_non_differentiable(mean, variance)
        return normed, mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        normed, scale, total = ctx.saved_tensors
        dims = [d for d in range(normed.ndim) if d != 1]
        sums = torch.stack([gradient.sum(dims), (gradient * normed).sum(dims)])
        shape = [-1 if d == 1 else 1 for d in range(normed.ndim)]
        plain, weighted = (part.view(shape) / total for part in distributed.batch_sum(sums))
        return (gradient - plain - normed * weighted) * scale.view(shape), None


class _WideNorm(_BatchNorm):
    """BatchNorm whose moments in training mode are those of all processes' images."""

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        x, mean, variance = _Normalise.apply(input, self.eps)
        shape = [-1 if d == 1 else 1 for d in range(input.ndim)]
        if self.weight is not None:
            x = x * self.weight.view(shape)
        if self.bias is not None:
            x = x + self.bias.view(shape)
        if self.training and self.running_mean is not None:
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(variance.to(self.running_var.dtype), share)
        return x.to(input.dtype)


class _WideNorm1d(_WideNorm, nn.BatchNorm1d): ...


class _WideNorm2d(_WideNorm, nn.BatchNorm2d): ...


class _WideNorm3d(_WideNorm, nn.BatchNorm3d): ...


class _WideQuantiser(Quantiser):
    """A codebook that follows the vectors of all processes: the first one moves it as if it were alone."""

    @torch.compiler.disable
    def _follow(self, z: Tensor, numbers: Tensor) -> None:
        z, numbers = distributed.gather_rows(z), distributed.gather_rows(numbers)
        if distributed.first():
            super()._follow(z, numbers)
        distributed.copy_from_first(self.codebook, self.use)


_WIDE: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _WideNorm1d,
    nn.BatchNorm2d: _WideNorm2d,
    nn.BatchNorm3d: _WideNorm3d,
    Quantiser: _WideQuantiser,
}
