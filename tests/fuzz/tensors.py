"""Checkpoints, training state, and files of features."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch

from fuzz import draws, prepared, target
from fuzz.tables import Marked
from mimbench import checkpoint, progress, score, weights
from mimbench.data import InMemory, Split
from mimbench.fit import Recipe, fit

NAMES = (
    "patch_embed.proj.weight",
    "blocks.0.mlp.fc1.weight",
    "blocks.999999999.mlp.fc1.weight",
    "pos_embed",
    "cls_token",
)
SIDES = (0, 1, 2, 16, 768, 2**31, 2**40)


def header(rng: Random) -> bytes:
    """A safetensors file whose header lies, or is too long, too deep, or no JSON."""
    kind = rng.randrange(6)
    table: Any = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"x": "y"}}
    if kind == 0:
        table["a"]["shape"] = [rng.choice(SIDES), rng.choice(SIDES)]
    elif kind == 1:
        table = draws.change(rng, table)
    elif kind == 2:
        table = {
            f"blocks.{n}.w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            for n in range(rng.choice((9, 20_000)))
        }
    elif kind == 3:
        return struct.pack("<Q", rng.choice((0, 2**32, 2**63, 2**64 - 1, 100))) + b"{}"
    elif kind == 4:
        return struct.pack("<Q", 4000) + b"[" * 4000
    written = json.dumps(table).encode()
    return struct.pack("<Q", len(written)) + written + bytes(16)


def named_state(rng: Random) -> dict[str, Any]:
    """A state dict with names of ViTs and shapes of nothing that exists; tensors may share one element."""
    state: dict[str, Any] = {}
    for name in rng.sample(NAMES, rng.randint(1, len(NAMES))):
        dims = rng.choice(((), (3,), (2, 2), (1, 5, 8), (8, 3, 4, 4), (rng.choice(SIDES), 3, 16, 16)))
        state[rng.choice(("", "module.", "teacher.backbone.")) + name] = torch.zeros(()).expand(dims)
    if rng.random() < 0.3:
        state[rng.choice(draws.TEXTS)] = torch.zeros(2)
    if rng.random() < 0.2:
        kinds = (torch.float64, torch.complex64, torch.bool)
        state = {n: t if t.numel() > 1e6 else t.to(rng.choice(kinds)) for n, t in state.items()}
    return state


def zipped(rng: Random, program: bytes, storage: bytes = bytes(64)) -> bytes:
    """A checkpoint as torch writes it, around any pickle."""
    stream = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(stream, "w", method) as made:
        made.writestr("archive/data.pkl", program)
        made.writestr("archive/byteorder", "little")
        made.writestr("archive/data/0", storage)
        made.writestr("archive/version", "3\n")
        if rng.random() < 0.2:
            made.writestr("../../escaped", b"harm")
    return stream.getvalue()


# Programs for weights_only's unpickler that ask for much with little.
BOMBS = (
    b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",  # 64 GiB of zeros
    b"\x80\x02]q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b".",  # a tuple of tuples: 2^60 leaves
    b"\x80\x02}K\x01K\x02\x86q\x00"
    + b"h\x00h\x00\x86q\x00" * 40
    + b"K\x01s.",  # the same as a key, to be hashed
    b"\x80\x02" + b"(" * 100_000 + b".",
    b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
)


def saved(rng: Random, mark: Path) -> bytes:
    """A file that ``torch.save`` made, or might have."""
    stream = io.BytesIO()
    state: Any = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(2, dtype=torch.int64)}
    kind = rng.randrange(9)
    if kind == 0:
        state = {"model": state, "extra": Marked(mark)}
    elif kind == 1:
        state = rng.choice(
            ([1, 2], {"a": 1}, {"a": "b"}, None, {"model": {"a": 3}}, {1: torch.ones(1)}, "x", torch.ones(3))
        )
    elif kind == 2:
        state = named_state(rng)
    elif kind == 3:
        return zipped(rng, rng.choice(BOMBS))
    elif kind == 4:
        return zipped(rng, pickle.dumps(Marked(mark), protocol=2), bytes(2 ** rng.choice((6, 28))))
    elif kind == 5:
        return pickle.dumps(Marked(mark), protocol=rng.choice((0, 2, 4)))
    elif kind == 6:
        return rng.choice(BOMBS)
    elif kind == 7:
        nested: Any = torch.ones(1)
        for _ in range(rng.choice((10, 400))):
            nested = {"model": nested}
        state = nested
    torch.save(state, stream, _use_new_zipfile_serialization=rng.random() < 0.7)
    return stream.getvalue()


@target("checkpoint.load", 8)
def loaded(rng: Random, folder: Path) -> None:
    """Files of weights of any origin, none of which may run code; then a guess whose they are."""
    mark = folder / "harm"
    file = (
        folder
        / f"weights{rng.choice(('.pth', '.pt', '.pth.tar', '.bin', '.joblib', '.safetensors', '.npz', '.pkl', ''))}"
    )
    kind = rng.randrange(5)
    if kind == 0:
        content = header(rng)
    elif kind == 1:
        checkpoint.save_tensors(
            file, {n: t for n, t in named_state(rng).items() if t.numel() < 1e6 and "\ud800" not in n}
        )
        content = file.read_bytes()
    else:
        content = saved(rng, mark)
    file.write_bytes(draws.damage(rng, content) if rng.random() < 0.4 else content)
    try:
        weights.recognise(file, rng.choice((("mae",), ("simsiam",), ("beitv2", "capi"))), {})
    finally:
        assert not mark.exists(), "a checkpoint ran code"


class Tiny(torch.nn.Module):
    """A model that learns a constant."""

    needs = ()

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def views(self, batch: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"x": batch.images.float().mean((2, 3)) / 255}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.linear(x).square().mean()}


def train(folder: Path, epochs: int = 4) -> None:
    """A training of four steps that keeps its state in ``folder``."""
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    split = Split("zeros", "train", InMemory(images), (), "zeros", torch.arange(8))
    recipe = Recipe(epochs=epochs, batch_size=8, compile=False, checkpoint_minutes=0.0)
    torch.manual_seed(0)
    with torch.random.fork_rng():
        model = Tiny()
    fit(model, split, recipe, seed=0, device=torch.device("cpu"), progress=progress.quiet(), folder=folder)


@prepared
def state_files() -> dict[str, bytes]:
    """The files of training state after an interrupted run of ``train``."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with mock.patch.object(checkpoint, "remove_states"):
            train(folder)
        return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@target("checkpoint.state", 4)
def resumed(rng: Random, folder: Path) -> None:
    """Training goes on from a folder in which something is damaged, or says what is."""
    place = folder / "state"
    files = state_files()
    kept = [name for name in files if name.startswith("step-")]
    if rng.random() < 0.4:
        kept += ["history.json", "model.safetensors"]
    damaged = rng.choice(kept)
    for name in kept:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        content = files[name]
        if name == damaged:
            if name.endswith(".json") and rng.random() < 0.6:
                changed = draws.change(rng, json.loads(content))
                content = draws.as_json(rng, changed).encode("utf-8", "surrogatepass")
            else:
                content = rng.choice((draws.damage(rng, content), b"", header(rng)))
        (place / name).write_bytes(content)
    train(place)


def features(rng: Random) -> dict[str, Any]:
    """The arrays of a file of features, of which some are odd."""
    draw = np.random.default_rng(rng.randrange(2**32))
    n, d = rng.choice((1, 2, 30)), rng.choice((1, 4))
    arrays: dict[str, Any] = {
        "train": draw.normal(size=(n, d)).astype(rng.choice((np.float16, np.float32, np.float64))),
        "train_labels": draw.integers(0, 3, n),
        "test": draw.normal(size=(n, d)).astype(np.float32),
        "test_labels": draw.integers(0, 3, n),
    }
    if rng.random() < 0.2:
        cases = (
            "knn_cosine_k10_T0.07",
            "knn_euclid_k1_uniform",
            "linear_C0.01",
            "linear_C1e400",
            "knn_cosine_k0_T0",
        )
        arrays[f"pred/{rng.choice((*cases, 'x', 'knn_cosine_k1_T1.2.3'))}"] = draw.integers(0, 3, n)
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(arrays))
        labels = (10**6 - 1, 2**40, -1, 2**63 - 1, 50_000)
        arrays[name] = rng.choice(
            (
                *(
                    np.zeros(0),
                    np.array(1.0),
                    np.zeros((n, d, 2)),
                    np.zeros((n, 0)),
                    np.full((n, d), np.nan, np.float32),
                ),
                *(
                    np.full((n, d), 1e300),
                    np.zeros((n, d), np.float32),
                    np.array(["a"] * n),
                    np.zeros(n, bool),
                ),
                *(
                    np.array([{"a": 1}] * n, object),
                    np.full(n, rng.choice(labels)),
                    np.zeros((n, d), np.complex64),
                ),
                *(np.zeros(n, "M8[s]"), np.zeros(n, [("a", int)]), np.full(n, 2**64 - 1, np.uint64)),
            )
        )
    return arrays


def lying(rng: Random) -> bytes:
    """An .npz whose entries declare other sizes than they have."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        for name in ("train", "train_labels", "test", "test_labels"):
            shape = rng.choice(((2**40,), (2**20, 2**20), (4, 4), (2**62, 4), (-1, 4), (0, 2**40)))
            kind = rng.choice(("<f4", "<i8", "|O", "<U9999999"))
            described = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
            described = rng.choice((described, draws.text(rng).encode("utf-8", "replace").decode()))
            head = described.encode().ljust(117) + b"\n"
            made.writestr(
                f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(64)
            )
    return stream.getvalue()


@target("features.score", 6)
def scored(rng: Random, folder: Path) -> None:
    """Features from elsewhere: scored, or refused."""
    mark = folder / "harm"
    file = folder / f"features{rng.choice(('.npz', '.npy', '.joblib', '.pkl', ''))}"
    kind = rng.random()
    if kind < 0.5:
        with file.open("wb") as stream:
            rng.choice((np.savez, np.savez_compressed))(stream, **features(rng))
    elif kind < 0.65:
        file.write_bytes(lying(rng))
    elif kind < 0.75:
        with file.open("wb") as stream:
            np.savez(stream, train=np.array([Marked(mark)], object))
    elif kind < 0.85:
        file.write_bytes(pickle.dumps(Marked(mark)))
    elif kind < 0.9:
        with file.open("wb") as stream:  # honest, and a hundred times its size in memory
            np.savez_compressed(
                stream,
                **(features(rng) | {"train": np.zeros((2 ** rng.choice((20, 24, 26)), 4), np.float32)}),
            )
    else:
        os.mkfifo(file) if rng.random() < 0.3 else file.symlink_to(
            rng.choice(("/dev/zero", "/dev/null", str(folder)))
        )
    if kind < 0.85 and rng.random() < 0.3:
        file.write_bytes(draws.damage(rng, file.read_bytes()))
    if rng.random() < 0.1:
        draws_of = draws.as_json(rng, draws.change(rng, {"linear": {"C=0.01": {"objective": 1.0}}}))
        (folder / "expected.json").write_bytes(draws_of.encode("utf-8", "surrogatepass"))
    try:
        score.score(file, rng.choice((["knn"], ["linear"], ["knn", "linear"], ["knn:sklearn"])), [])
    finally:
        assert not mark.exists(), "a file of features ran code"
