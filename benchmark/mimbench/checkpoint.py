"""Weights and training state on disk: safetensors and JSON, written atomically, read strictly, never pickled.

A training run keeps its state in folders ``step-000000123`` with ``model.safetensors``,
``trainer.safetensors`` (optimizer state, averaged weights) and ``trainer.json``. A folder is written under
another name and renamed when complete, so one with that name is never half written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimbench import foreign, pickles
from mimbench.errors import CheckpointError, ResultsError

STATE_DICTS = ("model", "state_dict", "teacher", "student", "ema")  # keys under which trainers keep one
HEADER = 2**25  # bytes of the most that a safetensors file may say of its tensors
LARGEST_EMPTY = 2**20  # numbers along a dimension, or bytes, that a shape may state beyond what a file holds
KEPT = 2  # so that one damaged by the disk leaves another
_FOLDER = re.compile(r"step-(\d+)")


@dataclass
class State:
    """Everything that training needs to go on."""

    step: int  # optimizer steps done
    weights: dict[str, Tensor]  # the model's state_dict
    trainer: dict[str, Tensor]  # optimizer state and averaged weights, by name
    progress: dict[str, Any]  # JSON


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file atomically. Tensors that share memory are each written in full."""
    _atomically(file, lambda temporary: _write_tensors(temporary, tensors))


def save_json(file: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    _atomically(file, lambda temporary: _write_json(temporary, content))


def save_bytes(file: Path, content: bytes) -> None:
    """Writes a file atomically."""
    _atomically(file, lambda temporary: _write_bytes(temporary, content))


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError when it is damaged or missing."""
    try:
        _refuse_header(file)
        return load_file(file)
    except Exception as fault:  # what safetensors and torch raise for a damaged file has no common parent
        raise _damaged(file, fault) from None


def load_json(file: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError when it is damaged or missing."""
    try:
        return foreign.decode_json(foreign.read_text(file))
    except (ValueError, OSError) as fault:
        raise _damaged(file, fault) from None


def load_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, or in a file that ``torch.save`` made.

    The latter may hold the state dict itself or under one of the usual keys (``STATE_DICTS``). Code in it is
    never run: a file whose content needs any is refused. So is one that asks for far more memory than it holds.
    Raises CheckpointError.
    """
    if file.suffix == ".safetensors":
        state = load_tensors(file)
        _refuse_shapes(file, state)
        return state
    try:
        _refuse_no_file(file)
        pickles.refuse_bomb(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' command line; plain data
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as fault:
        if named := re.search(r"GLOBAL (\S+)", str(fault)):
            raise CheckpointError(
                f"{file} holds a Python object ({named[1]}) beside tensors, which could run code when loaded",
                "Save its state dict alone with torch.save, or as safetensors",
            ) from None
        raise _damaged(file, "it is no PyTorch checkpoint") from None
    except Exception as fault:  # as above
        raise _damaged(file, str(fault).partition(". ")[0] or "it is empty") from None
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in STATE_DICTS if isinstance(content.get(key), dict)), content)
    is_named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not is_named or not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{file} holds no state dict at its top level or under {', '.join(STATE_DICTS)} (found: {keys})"
        )
    _refuse_shapes(file, state)
    return dict(state)


def _refuse_no_file(file: Path) -> None:
    """Raises OSError for a folder, a device and a pipe, which would be waited for."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError("it is no file")


def _refuse_header(file: Path) -> None:
    """Raises ValueError where a safetensors file describes its tensors at too great a length."""
    _refuse_no_file(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > HEADER:
        raise ValueError(f"its header claims {length:,} bytes")


def _refuse_shapes(file: Path, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for tensors that are larger than what the file holds of them."""
    for name, value in state.items():
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.is_nested:
            raise CheckpointError(f"{file} holds '{name}' as another kind of tensor than weights have")
        held = value.untyped_storage().nbytes()
        if max(value.shape, default=0) > max(held, LARGEST_EMPTY) or value.nbytes > held + LARGEST_EMPTY:
            raise CheckpointError(f"{file} holds less of '{name}' than its shape {tuple(value.shape)} says")


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Loads ``state`` into ``model``, or raises CheckpointError that lists what does not fit."""
    own = model.state_dict()
    faults = {
        "lacks": [name for name in own if name not in state],
        "has unexpected": [name for name in state if name not in own],
        "has another shape for": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
        "has whole numbers for": [
            name
            for name in own
            if name in state and own[name].is_floating_point() and not state[name].is_floating_point()
        ],
    }
    if problems := [f"{verb} {_some(names)}" for verb, names in faults.items() if names]:
        raise CheckpointError(f"{file} does not fit the model: it {'; it '.join(problems)}")
    model.load_state_dict(dict(state))


def write_state(folder: Path, state: State) -> Path:
    """Saves training state under ``folder`` and drops all but the latest ``KEPT``; returns where it is."""
    place = folder / f"step-{state.step:09d}"

    def write(temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while it wrote
        temporary.mkdir()
        _write_tensors(temporary / "model.safetensors", state.weights)
        _write_tensors(temporary / "trainer.safetensors", state.trainer)
        _write_json(temporary / "trainer.json", state.progress | {"step": state.step})

    if not place.exists():  # the state after a given step is always the same
        _atomically(place, write)
    for old in places(folder)[KEPT:]:
        shutil.rmtree(old)
    return place


def remove_states(folder: Path) -> None:
    """Removes all training state under ``folder``, and what a run that was killed left half written."""
    for place in [*places(folder), *folder.glob(".step-*.part")]:
        shutil.rmtree(place)


def read_state(place: Path) -> State:
    """The training state in one folder that ``write_state`` made. Raises CheckpointError when damaged."""
    progress = load_json(place / "trainer.json")
    if not isinstance(progress, dict) or type(progress.get("step")) is not int:
        raise _damaged(place / "trainer.json", "it names no step")
    return State(
        progress["step"],
        load_tensors(place / "model.safetensors"),
        load_tensors(place / "trainer.safetensors"),
        progress,
    )


def places(folder: Path) -> list[Path]:
    """The folders of saved training state, newest first."""
    found = [place for place in folder.glob("step-*") if _FOLDER.fullmatch(place.name)]
    return sorted(found, reverse=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as ``parameter/entry`` (``blocks.0.attn.qkv.weight/exp_avg``)."""
    return {
        f"{name}/{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], file: Path
) -> None:
    """Puts back what ``optimizer_tensors`` gave, bit for bit. Raises CheckpointError for a misfit."""
    parameters = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        misfit = not value.is_floating_point() or (
            value.ndim and value.shape != parameters.get(name, value).shape
        )
        if name not in parameters or misfit:
            raise CheckpointError(f"{file} does not fit the model: its optimizer state has {key}")
        state.setdefault(parameters[name], {})[entry] = value
    if len({frozenset(entries) for entries in state.values()}) > 1:
        raise CheckpointError(f"{file} does not fit the model: its optimizer state is not of one optimizer")
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed = optimizer.state_dict()
    packed["state"] = {n: state[parameter] for n, parameter in enumerate(order) if parameter in state}
    optimizer.load_state_dict(packed)


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    ready: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        start = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if start in memory else tensor  # the format has no shared memory
        memory.add(start)
    save_file(ready, file)
    _sync(file)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(file)


def _write_bytes(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    _sync(file)


def _atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with another name and renames. Raises ResultsError, leaving ``target`` as it was."""
    temporary = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as fault:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
        raise ResultsError(
            f"{target} could not be written: {fault}",
            "Free disk space or set MIMBENCH_CACHE to a folder that can be written, then run the same again",
        ) from None


def _sync(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damaged(file: Path, fault: object) -> CheckpointError:
    if not file.is_file():
        return CheckpointError(f"{file} does not exist")
    return CheckpointError(
        f"{file} cannot be read: {fault}", "It is damaged or incomplete: replace or delete it"
    )


def _some(names: list[str], most: int = 4) -> str:
    return f"{', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''}"
