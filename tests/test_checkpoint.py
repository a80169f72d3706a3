"""Files of weights and training state: exact, atomic, strict, never running code."""

from __future__ import annotations

import argparse
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from mimbench import checkpoint
from mimbench.checkpoint import State
from mimbench.errors import CheckpointError, ResultsError


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.detach().flatten().view(torch.uint8).numpy().tobytes()
        if tensor.ndim
        else repr(tensor).encode()
    )


def test_tensors_survive_bit_for_bit(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    tensors = {
        "half": torch.randn(3, dtype=torch.bfloat16),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "count": torch.tensor(2**40),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "transposed": table.T,
        "whole": table,
        "same": table,
        "row": table[1],
        "last": nn.Parameter(torch.ones(2, 2, 3, 3).to(memory_format=torch.channels_last)),
    }
    checkpoint.save_tensors(tmp_path / "a" / "x.safetensors", tensors)
    back = checkpoint.load_tensors(tmp_path / "a" / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert bits(back[name]) == bits(value)
    assert os.listdir(tmp_path / "a") == ["x.safetensors"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
def test_optimizers_go_on_bit_for_bit(tmp_path: Path, make) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        first, second = list(model[0].parameters()), list(model[2].parameters())
        return model, make([{"params": second}, {"params": first}])

    model, optimizer = fresh()
    trained(model, optimizer, 3)
    file = tmp_path / "optimizer.safetensors"
    checkpoint.save_tensors(file, checkpoint.optimizer_tensors(model, optimizer))
    other, restored = fresh()
    other.load_state_dict(model.state_dict())
    checkpoint.restore_optimizer(other, restored, checkpoint.load_tensors(file), file)
    trained(model, optimizer, 2)
    trained(other, restored, 2)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_optimizer_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    trained(model, optimizer, 1)
    tensors = checkpoint.optimizer_tensors(model, optimizer)
    wider = nn.Linear(4, 3)
    with pytest.raises(CheckpointError, match=r"x\.st does not fit.*weight/exp_avg"):
        checkpoint.restore_optimizer(wider, torch.optim.AdamW(wider.parameters()), tensors, tmp_path / "x.st")
    with pytest.raises(CheckpointError, match="head/exp_avg"):
        checkpoint.restore_optimizer(model, optimizer, {"head/exp_avg": torch.ones(1)}, tmp_path / "x.st")


def test_misfits_are_listed_and_change_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items() if not name.endswith("bias")}
    state |= {"head.weight": torch.ones(1), "0.weight": torch.ones(3, 2)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_strictly(model, state, tmp_path / "w.safetensors")
    text = str(caught.value)
    assert str(tmp_path / "w.safetensors") in text
    assert "lacks 0.bias, 1.bias, 2.bias, 3.bias;" in text
    assert "unexpected head.weight" in text
    assert "0.weight (3, 2) instead of (2, 2)" in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"lacks 0.weight, 0.bias, 1.weight, 1.bias and 4 more"):
        checkpoint.load_strictly(model, {}, tmp_path / "w.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path: Path, share: float) -> None:
    safe, pickled, text = tmp_path / "a.safetensors", tmp_path / "a.pth", tmp_path / "a.json"
    checkpoint.save_tensors(safe, {"a": torch.ones(1000)})
    torch.save({"a": torch.ones(1000)}, pickled)
    checkpoint.save_json(text, {"a": list(range(1000))})
    for file, read in [
        (safe, checkpoint.load_weights),
        (pickled, checkpoint.load_weights),
        (text, checkpoint.load_json),
    ]:
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(CheckpointError, match=f"{file} cannot be read"):
            read(file)
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{file} does not exist"):
            read(file)


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_checkpoints_of_authors(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "mae.pth")
    torch.save({"state_dict": state, "arch": "resnet50"}, tmp_path / "moco.pth.tar")
    checkpoint.save_tensors(tmp_path / "s.safetensors", state)
    for name in ("plain.pt", "mae.pth", "moco.pth.tar", "s.safetensors"):
        assert torch.equal(checkpoint.load_weights(tmp_path / name)["a"], state["a"])

    torch.save({"model": state, "extra": Harmful(tmp_path / "harm")}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad\.pth holds a Python object \(\w+\.mkdir\)"):
        checkpoint.load_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "harm").exists()

    torch.save({"net": state, "arch": "resnet50"}, tmp_path / "other.pth.tar")
    with pytest.raises(CheckpointError, match="found: net, arch"):
        checkpoint.load_weights(tmp_path / "other.pth.tar")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="no PyTorch checkpoint"):
        checkpoint.load_weights(tmp_path / "pointer.pth")


def state_at(step: int) -> State:
    return State(step, {"w": torch.full((50,), step)}, {"optimizer/w/m": torch.ones(1)}, {"note": step})


def test_the_last_two_states_are_kept(tmp_path: Path) -> None:
    for step in (1, 9, 10, 1000):
        place = checkpoint.write_state(tmp_path, state_at(step))
    assert [p.name for p in checkpoint.places(tmp_path)] == ["step-000001000", "step-000000010"]
    back = checkpoint.read_state(place)
    assert (back.step, back.progress["note"]) == (1000, 1000)
    assert torch.equal(back.weights["w"], torch.full((50,), 1000))
    checkpoint.remove_states(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_half_written_state_is_no_state(tmp_path: Path) -> None:
    checkpoint.write_state(tmp_path, state_at(1))
    # what a run leaves that is killed while it writes step 2
    torn = tmp_path / ".step-000000002.part"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    assert [p.name for p in checkpoint.places(tmp_path)] == ["step-000000001"]
    place = checkpoint.write_state(tmp_path, state_at(2))
    assert checkpoint.read_state(place).step == 2
    assert not torn.exists()


def test_a_full_disk_is_reported_and_harms_nothing(tmp_path: Path) -> None:
    checkpoint.write_state(tmp_path, state_at(1))
    checkpoint.save_json(tmp_path / "history.json", {"a": 1})
    with files_of_at_most(150):
        with pytest.raises(ResultsError, match=r"step-000000002 could not be written.*Free disk space"):
            checkpoint.write_state(tmp_path, state_at(2))
        with pytest.raises(ResultsError, match=r"history\.json could not be written"):
            checkpoint.save_json(tmp_path / "history.json", list(range(1000)))
    assert sorted(os.listdir(tmp_path)) == ["history.json", "step-000000001"]
    assert json.loads((tmp_path / "history.json").read_text()) == {"a": 1}
    assert checkpoint.read_state(checkpoint.places(tmp_path)[0]).step == 1


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="could not be written"):
        checkpoint.save_json(tmp_path / "file" / "history.json", {})
