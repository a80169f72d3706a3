"""Frozen features: right pixels, untouched encoder, a cache that is never trusted blindly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor, nn

from mimbench import features, registry
from mimbench.data import InMemory, Split
from mimbench.encoder import Features, InputSpec, normalise
from mimbench.errors import DataError, MimbenchError
from mimbench.models.resnet import ResNet, ResNetEncoder, ResNetShape
from mimbench.progress import quiet
from mimbench.task import Context, Task


class Stub(nn.Module):
    """Mean colour of each quarter, through a BatchNorm that would change in training mode."""

    dim, depth, stride, readout = 12, 1, 1, "quarters"

    def __init__(self) -> None:
        super().__init__()
        self.input = InputSpec(8)
        self.norm = nn.BatchNorm2d(3)
        self.frozen_child = nn.BatchNorm2d(3).eval()
        self.calls = 0

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> Features:
        self.calls += 1
        x = self.frozen_child(self.norm(images))
        quarters = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return Features(quarters, x)

    def for_finetuning(self, drop_path: float = 0.0) -> Stub:
        return self

    def layer_of(self, parameter: str) -> int:
        return 0


def split_of(images: Tensor, fingerprint: str = "abc", part: str = "test") -> Split:
    labels = torch.zeros(len(images), dtype=torch.long)
    return Split("toy", part, InMemory(images), ("a",), fingerprint, torch.arange(len(images)), labels)


def images(count: int, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=draw)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(torch.device("cpu"), 0, quiet(), tmp_path, tmp_path / "features")


def test_features_are_the_encoders_in_eval_mode_and_leave_it_as_it_was(context: Context) -> None:
    encoder = Stub().train()
    encoder.frozen_child.eval()
    before = features.state_hash(encoder)
    split = split_of(images(10))
    found = features.extract(encoder, split.without_labels(), context)
    assert encoder.training
    assert encoder.norm.training
    assert not encoder.frozen_child.training
    assert features.state_hash(encoder) == before
    pixels = normalise(split.store.read(split.index)[0], encoder.input)
    torch.testing.assert_close(found, encoder.eval()(pixels).pooled.detach())
    assert not found.is_inference()


def test_the_batch_size_does_not_matter(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    resnet = ResNet(ResNetShape(layers=(1, 1, 1, 1), widths=(8, 8, 16, 16), block="basic", stem="cifar"))
    encoder = ResNetEncoder(resnet, InputSpec(16))
    bare = dataclasses.replace(context, cache=None)
    split = split_of(images(23, 16, 16))
    whole = features.extract(encoder, split, bare)
    monkeypatch.setattr(features, "BATCH", 4)
    torch.testing.assert_close(features.extract(encoder, split, bare), whole, rtol=1e-5, atol=1e-6)
    assert features.extract(encoder, split, bare, "patches").shape == (23, 16, 2, 2)


@pytest.mark.parametrize(("height", "width"), [(20, 31), (31, 20), (6, 5), (12, 12), (8, 8)])
def test_images_are_resized_by_the_shorter_side_and_cropped(height: int, width: int) -> None:
    picture = images(2, height, width)
    spec = InputSpec(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    found = features.prepare(picture, None, spec)
    scaled = tv.resize(picture, [8], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    expected = tv.center_crop(scaled, [8, 8]).float() / 255
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255)  # torchvision rounds to 8 bits


def test_padding_of_ragged_images_is_never_seen() -> None:
    spec = InputSpec(8)
    small, large = images(1, 9, 14, seed=1), images(1, 20, 17, seed=2)
    padded = torch.full((2, 3, 20, 17), 255, dtype=torch.uint8)
    padded[0, :, :9, :14] = small
    padded[1] = large
    found = features.prepare(padded, torch.tensor([[9, 14], [20, 17]]), spec)
    torch.testing.assert_close(found[:1], features.prepare(small, None, spec), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:], features.prepare(large, None, spec), rtol=0, atol=1e-5)


def test_the_cache_is_used_until_anything_changes(context: Context) -> None:
    encoder = Stub()
    split = split_of(images(10))
    first = features.extract(encoder, split, context)
    calls = encoder.calls
    assert torch.equal(features.extract(encoder, split, context), first)
    assert encoder.calls == calls
    features.extract(encoder, split_of(images(10), fingerprint="other"), context)
    assert encoder.calls == calls + 1
    encoder.input = InputSpec(16)
    features.extract(encoder, split, context)
    assert encoder.calls == calls + 2
    with torch.no_grad():
        encoder.norm.weight += 1
    encoder.input = InputSpec(8)
    assert not torch.equal(features.extract(encoder, split, context), first)


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_a_damaged_cache_file_is_computed_again(context: Context, harm: str) -> None:
    encoder = Stub()
    split = split_of(images(10))
    first = features.extract(encoder, split, context)
    (file,) = context.cache.iterdir()
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes({"truncate": bytes(raw[:-40]), "flip": bytes(raw), "empty": b""}[harm])
    calls = encoder.calls
    assert torch.equal(features.extract(encoder, split, context), first)
    assert encoder.calls == calls + 1
    assert torch.equal(features.extract(encoder, split, context), first)
    assert encoder.calls == calls + 1
    assert list(context.cache.iterdir()) == [file]


def test_what_cannot_be_scored_says_why(context: Context) -> None:
    encoder = Stub().eval()
    split = split_of(images(10))
    with pytest.raises(DataError, match="no images"):
        features.extract(encoder, split.subset(torch.arange(0)), context)
    assert encoder.norm.running_var is not None
    encoder.norm.running_var.fill_(float("nan"))
    with pytest.raises(MimbenchError, match="10 of 10 images"):
        features.extract(encoder, split, context)
    assert not context.cache.exists()


def test_positions_of_a_subset() -> None:
    whole = split_of(images(12)).subset(torch.tensor([7, 2, 9, 11, 0]))
    part = whole.subset(torch.tensor([4, 1, 2]))
    assert features.positions_in(part, whole).tolist() == [4, 1, 2]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_cached_features_are_mapped_and_not_copied(context: Context) -> None:
    split = split_of(images(10))
    features.extract(Stub(), split, context)
    (file,) = context.cache.iterdir()
    assert file.stat().st_size < 10 * 12 * 4 + 400  # float32 and a short header
    found = features.extract(Stub(), split, context)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    places = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    assert any(low <= found.data_ptr() < high for low, high in places)


def test_the_next_protocol_reads_what_the_first_extracted(context: Context) -> None:
    encoder = Stub()
    train, test = (
        split_of(images(40, seed=seed), str(seed), part) for seed, part in enumerate(("train", "test"))
    )
    labels = torch.arange(40) % 2
    train, test = (dataclasses.replace(part, classes=("a", "b"), all_labels=labels) for part in (train, test))
    calls = []
    for name, settings in (("knn", {"ks": (1, 3)}), ("linear", {"c_steps": 2})):
        protocol = registry.load_protocol(name)
        protocol.evaluate(encoder, Task(train, test), protocol.Settings(**settings), context)
        calls.append(encoder.calls)
    assert calls == [2, 2]
