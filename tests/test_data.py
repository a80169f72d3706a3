"""Data sets are read as independent readers read them, divided once for all, and never held twice."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits

from mimbench import paths
from mimbench.data import InMemory, Split, catalogue, get, load, prefetch, stores, verify
from mimbench.errors import DataError, LabelLeak

RNG = np.random.default_rng(0)


def noise(height: int = 6, width: int = 5) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def write_parquet(file: Path, images: list[bytes], features: dict | None = None, **columns: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.array([{"bytes": data, "path": ""} for data in images])
    table = pa.table({"image": struct, **columns})
    if features:
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, file)


def write_images(folder: Path, count: int, size: tuple[int, int] | None = (6, 5)) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images = [noise(*(size or RNG.integers(2, 9, 2))) for _ in range(count)]
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return images


def pixels(split: Split) -> list[np.ndarray]:
    """Each image of a split as (H, W, 3), without padding."""
    batch = split.batch(torch.arange(len(split)))
    sizes = batch.sizes if batch.sizes is not None else [batch.images.shape[2:]] * len(split)
    return [
        image[:, :h, :w].permute(1, 2, 0).numpy() for image, (h, w) in zip(batch.images, sizes, strict=True)
    ]


def frames(scenes: list[int], times: list[int], labels: list[int] | None = None) -> Split:
    count = len(scenes)
    return Split(
        dataset="clip",
        part="train",
        store=InMemory(torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)),
        classes=("a", "b"),
        fingerprint="x",
        index=torch.arange(count),
        all_labels=torch.tensor(labels) if labels else None,
        sequence=torch.tensor(scenes),
        frame=torch.tensor(times),
    )


# Names


def test_catalogue_and_package_import_without_torch() -> None:
    code = (
        "import sys, mimbench.data as d; assert 'digits' in d.catalogue();"
        "assert not {'torch', 'pyarrow', 'PIL', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_catalogue_has_every_named_set_and_both_places() -> None:
    names = set(catalogue())
    assert {"digits", "digit-scenes", "cifar10", "cifar100", "stl10", "pets", "imagenet", "camvid"} <= names
    assert {"imagefolder:PATH", "parquet:PATH"} <= names


# Embedded


def test_digits_are_those_of_scikit_learn() -> None:
    reference = load_digits()
    data = load("digits")
    assert torch.equal(torch.cat([data.train.index, data.test.index]).sort().values, torch.arange(1797))
    for split in (data.train, data.test):
        expected = np.floor(reference.images[split.index.numpy()] * 255 / 16 + 0.5)
        batch = split.batch(torch.arange(len(split)), needs=("labels",))
        assert batch.images.shape == (len(split), 3, 8, 8)
        assert np.array_equal(batch.images.numpy(), np.repeat(expected[:, None], 3, 1))
        assert np.array_equal(batch.labels.numpy(), reference.target[split.index.numpy()])


def test_digits_split_is_stratified_and_does_not_move() -> None:
    data = load("digits")
    share = torch.bincount(data.test.labels) / (
        torch.bincount(data.train.labels) + torch.bincount(data.test.labels)
    )
    assert (share - 0.2).abs().max() < 0.01
    assert not {i.tobytes() for i in pixels(data.train)} & {i.tobytes() for i in pixels(data.test)}
    assert data.fingerprint == "8043c7780eff+fcc2e8e9f380"
    assert data.default_preset == "smoke"


def test_digit_scenes_have_exact_masks_and_motion() -> None:
    data = load("digit-scenes")
    assert (len(data.train), len(data.test)) == (1200, 300)
    assert data.train.offers == ("labels", "masks", "frames")
    assert data.fingerprint == "bf15e14bd034+259f1108bb22", "scenes should be the same bytes everywhere"
    split = data.test
    masks, labels = split.masks(torch.arange(300)), split.labels
    assert masks.shape == (300, 64, 64)
    assert masks.max() == 10
    flat = []
    for image, mask, label in zip(split.store.images, masks, labels, strict=True):
        inside = ndimage.binary_erosion((mask == label).numpy(), iterations=2)
        assert (mask == label).sum() > 60, "the leading digit is in sight"
        colours = image[:, torch.from_numpy(inside)].float()
        flat.append(((colours - colours.median(1, keepdim=True).values).abs().amax(0) < 8).float().mean())
    assert np.nanmean(flat) > 0.85, "a digit has one colour, so its mask covers one colour"
    by_scene = split.store.images.view(75, 4, -1).float()
    assert ((by_scene[:, 1:] - by_scene[:, :-1]).abs().mean(2) > 1).all(), "every frame moves"
    assert torch.equal(labels.view(75, 4), labels.view(75, 4)[:, :1].expand(-1, 4))
    assert load("digit-scenes") is data, "made once per process"


# Splits


def test_holdout_is_fixed_disjoint_and_a_tenth() -> None:
    train = load("digits").train
    first, second = train.holdout(), train.holdout()
    assert [len(part) for part in first] == [1294, 144]
    assert torch.equal(torch.cat([part.index for part in first]).sort().values, train.index)
    assert [part.fingerprint for part in first] == [part.fingerprint for part in second]
    assert first[0].fingerprint != first[1].fingerprint != train.fingerprint
    assert len({int(c) for c in first[1].labels}) == 10


def test_holdout_keeps_scenes_whole() -> None:
    train, val = load("digit-scenes").train.holdout()
    assert len(val) == 120
    assert not set(train.sequence[train.index].tolist()) & set(val.sequence[val.index].tolist())


def test_holdout_of_few_scenes_takes_their_ends() -> None:
    split = frames([0] * 20 + [1] * 10, [*range(20), *range(9, -1, -1)])
    train, val = split.holdout(0.2)
    assert val.index.tolist() == [16, 17, 18, 19, 20, 21]
    assert len(train) == 24


def test_subset_follows_the_choice() -> None:
    train = load("digits").train
    some = train.subset(torch.tensor([5, 3]))
    assert torch.equal(some.labels, train.labels[torch.tensor([5, 3])])
    assert some.fingerprint != train.subset(torch.tensor([3, 5])).fingerprint
    assert torch.equal(some.batch(torch.tensor([1])).images, train.batch(torch.tensor([3])).images)


def test_sealed_labels_and_masks_cannot_be_read() -> None:
    sealed = load("digit-scenes").test.without_labels()
    for read in (lambda: sealed.labels, lambda: sealed.masks(torch.arange(2))):
        with pytest.raises(LabelLeak):
            read()
    with pytest.raises(LabelLeak):
        sealed.subset(torch.arange(3)).batch(torch.arange(2), needs=("labels",))


@pytest.mark.parametrize("gap", [(1, 1), (2, 3), (1, 100), (50, 60)])
def test_partners_agree_with_a_plain_search(gap: tuple[int, int]) -> None:
    scenes = [0, 1, 1, 0, 0, 2, 1, 0, 0, 1]
    times = [3, 0, 5, 4, 9, 7, 6, 1, 20, 2]
    split = frames(scenes, times).subset(torch.tensor([9, 8, 7, 6, 5, 4, 3, 2, 1, 0]))
    seen: list[set[int]] = [set() for _ in scenes]
    for seed in range(60):
        chosen = split.partners(torch.arange(10), gap, torch.Generator().manual_seed(seed))
        for row, mate in enumerate(chosen.tolist()):
            seen[row].add(mate)
    scene, frame = split.sequence[split.index].tolist(), split.frame[split.index].tolist()
    for row in range(10):
        mates = [m for m in range(10) if scene[m] == scene[row] and m != row]
        away = {m: abs(frame[m] - frame[row]) for m in mates}
        fitting = {m for m in mates if gap[0] <= away[m] <= gap[1]}
        if fitting:
            assert seen[row] == fitting
        elif mates:
            (only,) = seen[row]
            assert away[only] == min(away.values())
        else:
            assert seen[row] == {row}


def test_batch_brings_a_frame_of_the_same_scene() -> None:
    split = frames([0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1])
    batch = split.batch(torch.arange(4), needs=("labels", "frames"))
    assert batch.frames[:, 0, 0, 0].tolist() == [1, 0, 3, 2]
    assert batch.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="no segmentation masks"):
        split.batch(torch.arange(4), needs=("masks",))


# Parquet


def test_cifar10_is_read_as_pillow_reads_it(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(real_data))
    data = load("cifar10")
    assert isinstance(data.train.store, InMemory)
    file = mapped_file(data.train.store.images)
    assert file is not None, "pixels are mapped from the decoded copy, not gathered in memory"
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert data.train.note == "JPEG re-encoding: cifar10 (jpeg)"
    assert data.train.classes[3] == "cat"
    table = pq.read_table(sorted((real_data / "cifar10").glob("test-*"))[0])
    rows = torch.tensor([0, 17, 9_999])
    batch = data.test.batch(rows, needs=("labels",))
    for row, image, label in zip(rows.tolist(), batch.images, batch.labels, strict=True):
        entry = table.slice(row, 1).to_pylist()[0]
        reference = Image.open(io.BytesIO(entry["img"]["bytes"])).convert("RGB")
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(reference))
        assert label == entry["label"]
    again = load("cifar10")
    assert isinstance(again.train.store, InMemory)
    assert mapped_file(again.train.store.images) == file, "a second load maps the same file"
    assert torch.equal(again.train.store.images[:100], data.train.store.images[:100])
    assert again.fingerprint == data.fingerprint
    assert verify("cifar10") == []


def mapped_file(pixels: torch.Tensor) -> str | None:
    """The file whose pages hold the first and the last byte of ``pixels``; None where memory of no file does."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("mappings are read from /proc")
    files = set()
    for address in (pixels.data_ptr(), pixels.data_ptr() + pixels.nbytes - 1):
        for line in maps.read_text().splitlines():
            span, _, _, _, inode, *name = line.split(maxsplit=5)
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= address < high:
                files.add(name[0] if int(inode) else None)
    return files.pop() if len(files) == 1 else None


def test_camvid_has_masks_and_frame_order(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(real_data))
    data = load("camvid")
    assert (len(data.train), len(data.test)) == (367, 233)
    assert data.train.offers == ("masks", "frames")
    assert data.train.ignore_index == 11
    assert len(data.train.classes) == 11
    entry = pq.read_table(sorted((real_data / "camvid").glob("train-*"))[0]).slice(200, 1).to_pylist()[0]
    batch = data.train.batch(torch.tensor([200]), needs=("masks",))
    assert np.array_equal(batch.masks[0].numpy(), np.asarray(Image.open(io.BytesIO(entry["mask"]["bytes"]))))
    assert batch.images.shape == (1, 3, 360, 480)
    times = data.train.frame
    mates = data.train.partners(torch.arange(367), (4, 48), torch.Generator().manual_seed(0))
    assert torch.equal(data.train.sequence[mates], data.train.sequence)
    away = (times[mates] - times).abs()
    assert (away == 30).float().mean() > 0.98, "neighbours are 30 video frames apart, but for a gap or two"
    assert (away > 0).all()


def test_parquet_folder_with_hub_metadata_and_class_missing_from_train(tmp_path: Path) -> None:
    train, test = [noise() for _ in range(4)], [noise() for _ in range(2)]
    names = {"label": {"names": ["ant", "bee", "cow"]}}
    write_parquet(tmp_path / "data/train-0.parquet", [png(i) for i in train[:3]], names, label=[0, 1, 1])
    write_parquet(tmp_path / "data/train-1.parquet", [png(i) for i in train[3:]], names, label=[0])
    write_parquet(tmp_path / "data/validation-0.parquet", [png(i) for i in test], names, label=[2, 0])
    data = load(f"parquet:{tmp_path}")
    assert data.train.classes == ("ant", "bee", "cow")
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert data.test.labels.tolist() == [2, 0]
    for split, images in ((data.train, train), (data.test, test)):
        assert all(np.array_equal(a, b) for a, b in zip(pixels(split), images, strict=True))
    assert data.default_preset == "cifar"
    assert data.name == f"parquet:{tmp_path.name}"


def test_single_parquet_file_with_bytes_and_strings_is_divided_the_same_way(tmp_path: Path) -> None:
    file = tmp_path / "all.parquet"
    images = [noise(70, 70) for _ in range(20)]
    labels = ["cat", "dog"] * 10
    pq.write_table(pa.table({"picture": [png(i) for i in images], "label": labels}), file)
    data, again = load(f"parquet:{file}"), load(f"parquet:{file}")
    assert (len(data.train), len(data.test)) == (16, 4)
    assert torch.equal(data.test.index, again.test.index)
    assert not set(data.train.index.tolist()) & set(data.test.index.tolist())
    assert data.train.classes == ("cat", "dog")
    assert data.test.labels.bincount().tolist() == [2, 2]
    assert data.default_preset == "paper"


def test_integer_labels_without_names_may_be_sparse(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [png(noise())] * 2, label=[7, 1000])
    write_parquet(tmp_path / "test.parquet", [png(noise())], label=[40])
    data = load(f"parquet:{tmp_path}")
    assert data.train.classes == ("7", "40", "1000")
    assert data.train.labels.tolist() == [0, 2]


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    images = [png(noise()) for _ in range(3)]
    for folder, label in (("a", 0), ("b", 0), ("c", 1)):
        write_parquet(tmp_path / folder / "train.parquet", images, label=[0, 1, label])
        write_parquet(tmp_path / folder / "test.parquet", images[:1], label=[0])
    prints = [load(f"parquet:{tmp_path / folder}").fingerprint for folder in "abc"]
    assert prints[0] == prints[1] != prints[2]
    write_parquet(tmp_path / "b/train.parquet", images[::-1], label=[0, 1, 0])
    assert load(f"parquet:{tmp_path / 'b'}").fingerprint != prints[1]


# Folders


def test_imagefolder_reads_what_torchvision_reads(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            write_images(tmp_path / part / name, 3, size=None)
    Image.fromarray(noise()).save(tmp_path / "train/bee/deep.jpg")
    (tmp_path / "train/bee/Thumbs.db").write_bytes(b"no image")
    data = load(f"imagefolder:{tmp_path}")
    for split, part in ((data.train, "train"), (data.test, "val")):
        reference = torchvision.datasets.ImageFolder(str(tmp_path / part))
        assert split.classes == tuple(reference.classes)
        assert split.labels.tolist() == reference.targets
        for ours, (theirs, _) in zip(pixels(split), reference, strict=True):
            assert np.array_equal(ours, np.asarray(theirs))


def test_ragged_batches_are_padded_at_the_right_and_the_bottom(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(np.full((2, 7, 3), 9, np.uint8)).save(tmp_path / part / "a/0.png")
        Image.fromarray(np.full((5, 3, 3), 8, np.uint8)).save(tmp_path / part / "a/1.png")
    batch = load(f"imagefolder:{tmp_path}").train.batch(torch.arange(2))
    assert batch.images.shape == (2, 3, 5, 7)
    assert batch.sizes.tolist() == [[2, 7], [5, 3]]
    assert batch.images[0].sum() == 9 * 3 * 14
    assert (batch.images[1, :, :5, :3] == 8).all()
    assert load(f"imagefolder:{tmp_path}").train.batch(torch.tensor([1])).sizes is None


def test_imagefolder_without_parts_is_divided_by_class(tmp_path: Path) -> None:
    place = tmp_path / "flowers"
    write_images(place / "a", 10)
    write_images(place / "b", 5)
    data = load(f"imagefolder:{place}")
    assert data.train.labels.bincount().tolist() == [8, 4]
    assert data.test.labels.bincount().tolist() == [2, 1]
    kept = {i.tobytes() for i in pixels(data.test)}
    write_images(place / "c", 5)
    assert kept <= {i.tobytes() for i in pixels(load(f"imagefolder:{place}").test)}


def test_imagefolder_without_classes_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path, 10)
    data = load(f"imagefolder:{tmp_path}")
    assert data.train.offers == ()
    assert len(data.train) == 8
    with pytest.raises(DataError, match="no labels"):
        _ = data.train.labels


def test_large_images_are_reduced_with_their_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, mask = noise(100, 1280), RNG.integers(0, 11, (100, 1280), dtype=np.uint8)
    columns = {"mask": [png(mask)], "sequence": ["s"], "frame": ["s_01"]}
    for part in ("train", "test"):
        write_parquet(tmp_path / f"camvid/{part}.parquet", [png(wide)], **columns)
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    batch = load("camvid").train.batch(torch.tensor([0]), needs=("masks",))
    assert batch.images.shape == (1, 3, 50, 640)
    reference = Image.fromarray(wide).resize((640, 50), Image.Resampling.BICUBIC)
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), np.asarray(reference))
    assert torch.equal(batch.masks[0], torch.from_numpy(mask[1::2, 1::2]))
    assert load("camvid").train.note == "images reduced to 640 px"


@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "PA", "1", "RGBA", "CMYK", "YCbCr", "I;16", "transparent P"]
)
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    colour = Image.fromarray(noise(8, 8))
    file = tmp_path / "train/a" / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    file.parent.mkdir(parents=True)
    if mode == "I;16":
        grey = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)
        Image.fromarray(grey).save(file)
        expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2)
    elif mode in ("PA", "transparent P"):
        palette = colour.convert("P")
        palette.save(file, transparency=bytes(range(0, 256)))
        expected = np.asarray(palette.convert("RGB"))
    else:
        colour.convert(mode).save(file)
        expected = np.asarray(Image.open(file).convert("RGB"))
    (tmp_path / "test/a").mkdir(parents=True)
    (tmp_path / "test/a" / file.name).write_bytes(file.read_bytes())
    assert np.array_equal(pixels(load(f"imagefolder:{tmp_path}").train)[0], expected)


def test_one_pixel_images_and_a_single_class_load(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_images(tmp_path / part / "only", 3, size=(1, 1))
    data = load(f"imagefolder:{tmp_path}")
    assert data.train.batch(torch.arange(3)).images.shape == (3, 3, 1, 1)
    assert data.train.classes == ("only",)


def test_imagenet_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "val"):
        for number, name in enumerate(("n01440764", "n01443537")):
            write_images(tmp_path / "imagenet" / part / name, 2 + number)
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    data = load("imagenet")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.default_preset == "paper"
    assert any("1,281,167" in finding for finding in verify("imagenet"))


def test_imagenet_in_parquet_is_tested_on_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, labels in (("train", [0, 1]), ("validation", [1]), ("test", [-1])):
        images = [png(noise()) for _ in labels]
        write_parquet(tmp_path / f"imagenet/data/{part}-0.parquet", images, label=labels)
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    assert load("imagenet").test.labels.tolist() == [1]


# Official archives, against torchvision's own readers


def write_cifar(folder: Path, fine: bool = False) -> None:
    """A few images in the official format: pickles of protocol 2, as Python 2 wrote them."""
    folder.mkdir(parents=True)
    files = ["train", "test"] if fine else [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    key = "fine_labels" if fine else "labels"
    for file in files:
        data = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = {"data": data, key: RNG.integers(0, 10, 4).tolist(), "filenames": ["x.png"] * 4}
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    meta, names = ("meta", "fine_label_names") if fine else ("batches.meta", "label_names")
    (folder / meta).write_bytes(pickle.dumps({names: [f"class {n}" for n in range(10)]}, protocol=2))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("inner", [True, False])
def test_cifar_pickles_as_torchvision_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inner: bool
) -> None:
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    root = tmp_path / name if inner else tmp_path
    write_cifar(root / kind.base_folder, fine=name == "cifar100")
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: None)
    data = load(name)
    for split, train in ((data.train, True), (data.test, False)):
        reference = kind(root, train=train)
        assert np.array_equal(np.stack(pixels(split)), reference.data)
        assert split.labels.tolist() == reference.targets
    assert data.train.classes[2] == "class 2"
    assert data.train.note == ""
    assert len([f for f in verify(name) if "MD5" in f]) == len(kind.train_list) + len(kind.test_list)


def test_stl10_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part, count in (("train", 5), ("test", 3)):
        RNG.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{part}_X.bin")
        RNG.integers(1, 11, count, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    data = load("stl10")
    for split, part in ((data.train, "train"), (data.test, "test")):
        reference = torchvision.datasets.STL10(tmp_path, split=part)
        assert np.array_equal(split.batch(torch.arange(len(split))).images.numpy(), reference.data)
        assert split.labels.tolist() == reference.labels.tolist()


def write_pets(folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, breed in enumerate(("Abyssinian", "american_bulldog"), 1):
        for part, rows in lines.items():
            name = f"{breed}_{len(rows) + 10 * (part == 'test')}"
            Image.fromarray(noise(9 + number, 7)).save(folder / "images" / f"{name}.jpg")
            rows.append(f"{name} {number} {number} 1")
    for part, rows in lines.items():
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(rows) + "\n")


def test_pets_as_torchvision_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pets(tmp_path / "pets" / "oxford-iiit-pet")
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    data = load("pets")
    assert data.train.classes == ("Abyssinian", "american bulldog")
    for split, part in ((data.train, "trainval"), (data.test, "test")):
        reference = torchvision.datasets.OxfordIIITPet(tmp_path / "pets", split=part)
        for ours, label, (image, target) in zip(pixels(split), split.labels, reference, strict=True):
            assert np.array_equal(ours, np.asarray(image))
            assert label == target


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a local server of tmp_path/served."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_download_goes_through_torchvision_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    folder = tmp_path / "made" / "cifar-10-batches-py"
    write_cifar(folder)
    archive = tmp_path / "served/cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)

    def sums(files: list[list[str]]) -> list[list[str]]:
        return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in files]

    kind = torchvision.datasets.CIFAR10
    monkeypatch.delenv("MIMBENCH_DATA", raising=False)
    monkeypatch.setattr(kind, "url", f"{server}/{archive.name}")
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", sums(kind.train_list))
    monkeypatch.setattr(kind, "test_list", sums(kind.test_list))
    meta = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    assert len(load("cifar10").train) == 20
    assert get("cifar10") == paths.cache() / "data/cifar10/cifar-10-batches-py"
    assert not any("MD5" in finding for finding in verify("cifar10"))
    archive.unlink()
    assert len(load("cifar10").test) == 4, "downloaded once"


# Stores


@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_streaming_gives_what_the_decoded_copy_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = tmp_path / "data"
    if kind == "imagefolder":
        write_images(place / "a", 12, size=None)
    else:
        sizes = RNG.integers(2, 9, (12, 2))
        write_parquet(place / "x.parquet", [png(noise(*size)) for size in sizes], label=[0] * 12)
    decoded = load(f"{kind}:{place}")
    assert isinstance(decoded.train.store, stores.Ragged)
    monkeypatch.setenv("MIMBENCH_DECODED_GIB", "0")
    streamed = load(f"{kind}:{place}")
    assert isinstance(streamed.train.store, stores.Streaming)
    assert streamed.fingerprint == decoded.fingerprint
    rows = torch.tensor([4, 0, 0, 7])
    ours, theirs = streamed.train.batch(rows), decoded.train.batch(rows)
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.sizes, theirs.sizes)


def test_two_at_once_decode_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", [png(noise()) for _ in range(200)], label=[0, 1] * 100)
    written = []

    def write(source: object, folder: Path, *rest: object) -> None:
        written.append(folder)
        time.sleep(0.2)
        original(source, folder, *rest)

    original = stores._write_decoded
    monkeypatch.setattr(stores, "_write_decoded", write)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, [f"parquet:{tmp_path / 'x.parquet'}"] * 2)
    assert len(written) == 1, "the lock is on a file, so it holds between processes as between threads"
    assert torch.equal(first.train.store.images, second.train.store.images)


def test_what_a_killed_process_left_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "d/a", 10)
    monkeypatch.setattr(stores, "_write_decoded", die)
    with pytest.raises(KeyboardInterrupt):
        load(f"imagefolder:{tmp_path / 'd'}")
    assert not [f for f in (paths.cache() / "decoded").iterdir() if f.is_dir()]
    monkeypatch.undo()
    monkeypatch.setenv("MIMBENCH_CACHE", str(tmp_path / "cache"))
    lock = next((tmp_path / "cache/decoded").glob("*.lock"))
    leftover = lock.with_suffix(".part")
    leftover.mkdir()
    (leftover / "pixels").write_bytes(b"half")
    assert len(load(f"imagefolder:{tmp_path / 'd'}").train) == 8
    assert not leftover.exists()


def die(*_: object) -> None:
    raise KeyboardInterrupt


# Reading ahead


def test_prefetch_keeps_order_and_raises_in_place() -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise DataError("broken")

    seen: list[int] = []
    with pytest.raises(DataError, match="broken"):
        seen.extend(prefetch(source()))
    assert seen == list(range(5))


def test_prefetch_reads_no_further_than_asked_and_its_thread_ends() -> None:
    made = []

    def source() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    items = prefetch(source(), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    items.close()
    assert len(made) == 4, "one handed over, two waiting, one in hand"
    assert not [t for t in threading.enumerate() if t.name == "mimbench-prefetch"]


def test_rows_in_order_are_read_without_a_copy_and_others_are_gathered() -> None:
    store = InMemory(torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8))
    for index in ([3, 4, 5], [0], [], list(range(9)), [3, 4, 6], [5, 4, 3], [2, 2, 3], [0, 1, 1]):
        found, sizes = store.read(torch.tensor(index, dtype=torch.long))
        assert sizes is None
        assert torch.equal(
            found, torch.stack([store.images[i] for i in index]) if index else store.images[:0]
        )
        if index in ([3, 4, 5], list(range(9))):
            assert found.data_ptr() == store.images[index[0]].data_ptr()
