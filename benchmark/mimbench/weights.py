"""Published checkpoints: reading them, finding out whose they are, and loading them without a gap.

A checkpoint fits a method when its names, put through the method's ``official.py``, give every tensor of the
encoder. What is trained beside the encoder, such as a decoder or a teacher, may each be absent as a whole but not
in part, and nothing may be left over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mimbench import checkpoint, config, registry
from mimbench.errors import CheckpointError, MimbenchError
from mimbench.models.mae import DecoderShape
from mimbench.models.vit import ViTShape

# What trainers and wrappers put before a parameter's own name.
PREFIXES = ("module.", "_orig_mod.", "teacher.", "student.", "backbone.", "model.", "encoder.", "online.")
HEAD_WIDTH = 64  # channels of an attention head in every named ViT
DECODER_HEAD_WIDTH = 32  # and in MAE's decoders


@dataclass(frozen=True)
class Match:
    """A checkpoint as a method's weights."""

    slug: str
    config: Any  # the method's Config, sized by the checkpoint
    state: dict[str, Tensor]  # under our names
    names: dict[str, str]  # our name -> the name in the file
    prefix: str  # what was taken off every name in the file
    whole: bool  # False: the encoder alone


def digest(file: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits. Raises CheckpointError when it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as fault:
        raise CheckpointError(f"{file} cannot be read: {fault.strerror}") from None


def load(file: Path, slug: str, settings: Any, model: nn.Module) -> Match:
    """Loads a file into a method's model, which has the given Config.

    The names may be ours, as ``mimbench pretrain`` leaves them, or the authors', with a wrapper's prefix or
    without. Raises CheckpointError, which says what does not fit, for anything but a complete match.
    """
    match, _, reason = _match(checkpoint.load_weights(file), slug, settings, model)
    if match is None:
        raise CheckpointError(
            f"{file} does not fit {slug} with these settings: {reason}",
            f"'mimbench weights {file}' tells whose weights they are and of which size",
        )
    model.load_state_dict(match.state, strict=False)
    return match


def recognise(
    file: Path, slugs: tuple[str, ...], overrides: dict[str, Any]
) -> tuple[list[Match], dict[str, str]]:
    """The methods that a file fits, sized as it is, and why it does not fit the others, the nearest first.

    Heads cannot be read off weights: they have their usual widths unless ``overrides``, as ``--set`` gives
    them, says otherwise. Several methods may fit, for papers share their names.
    """
    state = checkpoint.load_weights(file)
    found: list[Match] = []
    others: dict[str, tuple[int, str]] = {}
    for slug in slugs:
        module = registry.load_method(slug)
        try:
            settings = config.build(module.Config, overrides)
            settings = config.override(_sized(slug, state, settings), overrides)
            match, fits, reason = _match(state, slug, settings, _sketch(slug, settings))
        except MimbenchError as fault:
            match, fits, reason = None, -1, str(fault)
        if match is None:
            others[slug] = fits, reason
        else:
            found.append(match)
    nearest = sorted(others, key=lambda slug: -others[slug][0])
    return found, {slug: others[slug][1] for slug in nearest}


def command(file: Path, match: Match) -> str:
    """The command that scores a checkpoint: its sizes as settings over the method's ``paper`` preset."""
    table = config.to_dict(match.config)
    default = config.to_dict(registry.load_method(match.slug).Config())
    words = ["mimbench", "run", "--method", match.slug, "--protocol", "linear,knn", "--preset", "paper"]
    words += ["--weights", str(file)]
    for key, value in _changes(default, table):
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def _changes(old: dict[str, Any], new: dict[str, Any], root: str = "") -> Iterator[tuple[str, Any]]:
    """What differs between two tables, as dotted keys with the new value."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            yield from _changes(old[key], value, f"{root}{key}.")
        elif value != old.get(key):
            yield root + key, value


def _match(
    state: dict[str, Tensor], slug: str, settings: Any, model: nn.Module
) -> tuple[Match | None, int, str]:
    """The first complete reading of a state dict; else how many tensors of the nearest fit, and what does not."""
    own = model.state_dict()
    beside = set(own) - _encoder_names(model)
    official = _official(slug)
    nearest, reason = -1, ""
    for prefix, names, ours in _readings(state, official, settings):
        fits = {name for name in ours if name in own and own[name].shape == ours[name].shape}
        wrong = sorted(set(ours) - fits)
        lacking = [name for name in own if name not in ours and name not in beside]
        given = {_part(name) for name in beside if name in ours}
        half = sorted(name for name in beside if _part(name) in given and name not in ours)
        if not (wrong or lacking or half):
            return Match(slug, settings, ours, names, prefix, beside <= ours.keys()), len(fits), ""
        if len(fits) > nearest:
            nearest = len(fits)
            reason = _misfit(wrong, lacking, half, own, ours, len(fits))
    return None, nearest, reason or "it holds no tensor"


def _readings(
    state: dict[str, Tensor], official: Any, settings: Any
) -> Iterator[tuple[str, dict[str, str], dict[str, Tensor]]]:
    """Ways to read a state dict: a prefix taken off, our name -> the file's, and the tensors under our names."""
    for prefix, part in _unwrapped(state):
        yield prefix, {name: prefix + name for name in part}, part
        if official is None:
            continue
        try:
            ours = official.from_official(part, settings)
            names: dict[str, str] = {}
            for name, value in part.items():
                names |= dict.fromkeys(official.from_official({name: value}, settings), prefix + name)
        except (LookupError, ValueError, RuntimeError, StopIteration):  # of another shape than this method's
            continue
        yield prefix, names, ours


def _unwrapped(state: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dict, and the same without a prefix that all of its names have, or several."""
    ahead = [("", state)]
    while ahead:
        prefix, part = ahead.pop(0)
        yield prefix, part
        for more in PREFIXES:
            if part and all(name.startswith(more) for name in part):
                ahead.append((prefix + more, {k.removeprefix(more): v for k, v in part.items()}))


def _encoder_names(model: nn.Module) -> set[str]:
    """Which names of the model's state dict the encoder that protocols see is made of."""
    encoder: nn.Module = model.encoder()  # type: ignore[operator]
    used = {id(t) for t in (*encoder.parameters(), *encoder.buffers())}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in named if id(tensor) in used}


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to: its first name."""
    return name.partition(".")[0]


def _official(slug: str) -> Any:
    if not (registry.method(slug).folder / "official.py").is_file():
        return None
    return registry.load_method(slug, "official")


def _misfit(
    wrong: list[str],
    lacking: list[str],
    half: list[str],
    own: dict[str, Tensor],
    ours: dict[str, Tensor],
    fits: int,
) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    shapes = [f"{n} {tuple(ours[n].shape)} instead of {tuple(own[n].shape)}" for n in wrong if n in own]
    faults = [
        (shapes, "it has another shape for"),
        ([name for name in wrong if name not in own], "it has names that have no place:"),
        (lacking, "it lacks of the encoder"),
        (half, "it holds a part of what is trained beside the encoder, but lacks"),
    ]
    return f"{fits} tensors fit; " + "; ".join(f"{text} {some(names)}" for names, text in faults if names)


def _sized(slug: str, state: dict[str, Tensor], settings: Any) -> Any:
    """The Config with the sizes of its ViT, decoder and image as the tensors tell them, where they do."""
    if not isinstance(getattr(settings, "backbone", None), ViTShape):
        return settings
    own = set(_sketch(slug, settings).state_dict())
    readings = [ours for _, _, ours in _readings(state, _official(slug), settings)]
    ours = max(readings, key=lambda names: len(own & names.keys()))
    patch = next((name for name in ours if name.endswith("patch_embed.proj.weight")), "")
    root = patch.removesuffix("patch_embed.proj.weight")
    hidden = ours.get(f"{root}blocks.0.mlp.fc1.weight")
    if not patch or ours[patch].ndim != 4 or not ours[patch].numel() or hidden is None or hidden.ndim != 2:
        return settings
    width, _, size, _ = ours[patch].shape
    depth, ratio = _count(ours, f"{root}blocks."), len(hidden) / width
    if not _holds(state, width, depth, ratio):
        return settings
    heads = max(1, width // HEAD_WIDTH)
    changes: dict[str, Any] = {"backbone": ViTShape(size, width, depth, heads, ratio)}
    positions = ours.get(f"{root}pos_embed")
    if positions is not None and positions.ndim > 1 and positions.shape[-1] == width and positions.shape[-2]:
        changes["image_size"] = int((positions.shape[-2] - 1) ** 0.5) * size
    embed, decoder = ours.get("decoder.embed.weight"), getattr(settings, "decoder", None)
    if embed is not None and embed.ndim == 2 and embed.numel() and isinstance(decoder, DecoderShape):
        hidden = ours.get("decoder.blocks.0.mlp.fc1.weight")
        ratio = decoder.mlp_ratio if hidden is None or hidden.ndim != 2 else len(hidden) / len(embed)
        depth = _count(ours, "decoder.blocks.")
        heads = max(1, len(embed) // DECODER_HEAD_WIDTH)
        if _holds(state, len(embed), depth, ratio):
            changes["decoder"] = DecoderShape(len(embed), depth, heads, ratio)
    return dataclasses.replace(settings, **changes)


def _holds(state: dict[str, Tensor], width: int, depth: int, mlp_ratio: float) -> bool:
    """Whether a file is large enough for a transformer: a width read off one small tensor could be any."""
    return (4 + 2 * mlp_ratio) * width**2 * depth <= 2 * sum(
        tensor.numel() for tensor in state.values()
    ) + 2**20


def _sketch(slug: str, settings: Any) -> nn.Module:
    """A method's model with the shapes of its tensors and without their content."""
    build = registry.load_method(slug).Model
    model: nn.Module
    for numbers in (contextlib.nullcontext(), _NumbersAreRead()):
        try:
            with torch.device("meta"), numbers:
                model = build(settings)
            return model
        except (NotImplementedError, RuntimeError):  # it reads numbers off tensors while it is built
            continue
    model = build(settings)
    return model


class _NumbersAreRead(TorchFunctionMode):
    """Inside, evenly spaced numbers have content where other tensors have none: rates are read off them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        return function(*args, **({"device": "cpu", **given} if function is torch.linspace else given))


def _count(state: dict[str, Tensor], root: str) -> int:
    """How many numbered modules follow ``root``: no more than there are tensors, whatever a name says."""
    numbers = (re.match(rf"{re.escape(root)}(\d{{1,9}})\.", name) for name in state)
    return min(len(state), max((int(number[1]) + 1 for number in numbers if number), default=0))
