"""Frozen features: every image of a split through an encoder once, kept on disk for the next protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mimbench import config
from mimbench.augment import resize_and_center_crop
from mimbench.data import Split, prefetch
from mimbench.encoder import Encoder, InputSpec, normalise
from mimbench.errors import DataError, MimbenchError
from mimbench.task import Context

VERSION = 1  # raised whenever the same encoder and images may give other features
BATCH = 256  # images per forward; one number for everybody, so that no score depends on it
What = Literal["pooled", "patches"]


def extract(
    encoder: Encoder, split: Split, context: Context, what: What = "pooled", crop: float = 1.0
) -> Tensor:
    """One field of ``Features`` for all N images of a split, as float32 on the CPU: (N, D) or (N, D, h, w).

    The encoder runs in eval mode, in float32 and without gradients, and is left as it was found. Images are
    brought to ``encoder.input.size`` by ``prepare`` with ``crop``. Kept in ``context.cache`` under the
    encoder's weights, its input and readout, and the split's fingerprint; a file that does not check out is
    computed again.
    Raises MimbenchError when a feature is not finite and DataError for an empty split.
    """
    if not len(split):
        raise DataError(f"'{split.dataset}' has no images in its {split.part} split")
    file = _cache_file(encoder, split, context, what, crop)
    if file is not None and (kept := _read(file, len(split), context)) is not None:
        return kept
    features = _compute(encoder, split, context, what, crop)
    broken = len(split) - int(features.flatten(1).isfinite().all(1).sum())
    if broken:
        raise MimbenchError(
            f"the encoder's features are not finite for {broken} of {len(split)} images"
            f" of {split.dataset}/{split.part}",
            "Look at the loss curve of the pretraining; a diverged run cannot be scored",
        )
    if file is not None:
        try:
            _write(file, features)
        except (
            OSError,
            SafetensorError,
        ) as fault:  # they are at hand, and another time they are computed again
            context.progress.say(f"features could not be kept in {file.parent}: {fault}")
    return features


def prepare(images: Tensor, sizes: Tensor | None, spec: InputSpec, crop: float = 1.0) -> Tensor:
    """uint8 images (B, 3, H, W), padded to H x W where ``sizes`` (B, 2) says so, as an encoder expects them.

    The shorter side is resized to ``spec.size / crop`` (bicubic, antialiased, up or down), the central square
    of ``spec.size`` cut out and normalised: (B, 3, size, size). With ``crop`` 1 a square image is only resized.
    """
    resized = resize_and_center_crop(images, round(spec.size / crop), spec.size, sizes)
    return normalise(resized, spec)


@contextlib.contextmanager
def frozen(encoder: Encoder) -> Iterator[None]:
    """Inside, the encoder is in eval mode and nothing records gradients; after it every mode is as before."""
    assert isinstance(encoder, nn.Module)
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def state_hash(encoder: Encoder) -> str:
    """A hash of every parameter and buffer, by name: equal for equal weights."""
    assert isinstance(encoder, nn.Module)
    total = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        total.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        total.update(raw.data)
    return total.hexdigest()


def positions_in(part: Split, whole: Split) -> Tensor:
    """Where the images of ``part``, a subset of ``whole``, stand in it: (len(part),) int64."""
    order = torch.argsort(whole.index)
    return order[torch.searchsorted(whole.index[order], part.index)]


def _compute(encoder: Encoder, split: Split, context: Context, what: What, crop: float) -> Tensor:
    features: Tensor | None = None
    total = -(-len(split) // BATCH)

    def ready() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in split.batches(BATCH, context.device):
            yield batch.index, prepare(batch.images, batch.sizes, encoder.input, crop)

    label = f"features of {split.dataset}/{split.part}"
    for index, images in context.progress.track(prefetch(ready()), label, total):
        with frozen(encoder), torch.autocast(context.device.type, enabled=False):
            part = getattr(encoder(images), what).float()
        if features is None:
            features = torch.empty(len(split), *part.shape[1:])
        features[index] = part.cpu()
    assert features is not None
    return features


def _cache_file(encoder: Encoder, split: Split, context: Context, what: What, crop: float) -> Path | None:
    if context.cache is None:
        return None
    spec = dataclasses.asdict(encoder.input)
    key = config.digest(VERSION, state_hash(encoder), spec, encoder.readout, split.fingerprint, what, crop)
    return context.cache / f"{split.dataset.replace(os.sep, '_')}-{split.part}-{what}-{key}.safetensors"


def _read(file: Path, count: int, context: Context) -> Tensor | None:
    """The features in a cache file, mapped into memory, or None where there is none or it is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            features, checksum = stored.get_tensor("features"), (stored.metadata() or {}).get("crc32")
    except (SafetensorError, OSError) as fault:
        context.progress.say(f"cached features {file.name} cannot be read ({fault}); computing them again")
        return None
    if len(features) != count or checksum != _checksum(features):
        context.progress.say(f"cached features {file.name} are damaged; computing them again")
        return None
    return features


def _write(file: Path, features: Tensor) -> None:
    """Written beside its place and moved there, so that a reader sees a whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        save_file({"features": features}, partial, {"crc32": _checksum(features)})
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _checksum(features: Tensor) -> str:
    return f"{zlib.crc32(features.contiguous().flatten().view(torch.uint8).numpy().data):08x}"
