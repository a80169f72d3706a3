"""Missing and damaged data give one clear line that says what is wrong, where, and what to do."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from mimbench.data import get, load, verify
from mimbench.errors import ConfigError, DataError, UnknownName

GREY = np.full((4, 4, 3), 100, np.uint8)


def encoded(kind: str = "jpeg", pixels: np.ndarray = GREY) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def folder(root: Path, **classes: int) -> Path:
    """Grey JPEG images: folder(root, train__a=3) makes root/train/a/0.jpg to 2.jpg."""
    for name, count in classes.items():
        place = root / name.replace("__", "/")
        place.mkdir(parents=True)
        for number in range(count):
            (place / f"{number}.jpg").write_bytes(encoded())
    return root


def parquet(file: Path, images: list[bytes | None], **columns: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": data, "path": "x"} for data in images], kind)
    pq.write_table(pa.table({"image": rows, **columns}), file)
    return file


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path / "user data"))


# Names and places


def test_unknown_name_suggests() -> None:
    with pytest.raises(UnknownName, match=r"unknown data set 'cifer10'.*cifar10"):
        load("cifer10")


def test_a_bare_folder_suggests_imagefolder(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="write imagefolder:"):
        load(str(tmp_path))


def test_unknown_kind_of_place() -> None:
    with pytest.raises(UnknownName, match="unknown data set 'webdataset:/x'"):
        load("webdataset:/x")


@pytest.mark.parametrize("place", ["imagefolder:/nowhere/at/all", "parquet:/nowhere/x.parquet", "parquet:"])
def test_place_that_does_not_exist(place: str) -> None:
    with pytest.raises(DataError, match=r"does not exist.*PATH"):
        load(place)


@pytest.mark.parametrize("name", ["camvid", "imagenet"])
def test_missing_data_say_where_to_get_them_and_where_to_put_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        get(name)
    text = str(caught.value)
    assert str(tmp_path / "user data") in text
    assert "https://" in text
    assert f"{name}/train" in text
    assert verify(name) == [text]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "pets"])
def test_failed_download_says_where_to_get_them(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = (tmp_path / "gone.tar.gz").as_uri()
    kinds = torchvision.datasets
    for kind in (kinds.CIFAR10, kinds.CIFAR100, kinds.STL10):
        monkeypatch.setattr(kind, "url", gone)
    monkeypatch.setattr(kinds.OxfordIIITPet, "_RESOURCES", [(gone, "0" * 32)])
    with pytest.raises(DataError, match=r"download failed.*Get it from https://.*user data"):
        load(name)


# Parquet


def test_truncated_parquet(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", [encoded()] * 50, label=[0] * 50)
    whole = file.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 5):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"x\.parquet cannot be read: .*truncated"):
            load(f"parquet:{file}")


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [encoded("png", rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(20)]
    file = parquet(tmp_path / "x.parquet", images)
    whole = bytearray(file.read_bytes())
    whole[4:3000] = b"\xff" * 2996
    file.write_bytes(whole)
    with pytest.raises(DataError, match=r"cannot be (read|decoded)"):
        load(f"parquet:{file}")


def test_undecodable_and_missing_rows_are_named_and_counted(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", [encoded(), b"junk", None, encoded()[:-200], *[encoded()] * 6])
    with pytest.raises(DataError, match=r"3 of 10 images of .*row 1 of x\.parquet .*row 2.*no bytes.*row 3"):
        load(f"parquet:{file}")


def test_no_image_column(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), file)
    with pytest.raises(DataError, match="has no image columns among a, b"):
        load(f"parquet:{file}")


def test_two_unnamed_image_columns(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"left": [encoded()], "right": [encoded()]}), file)
    with pytest.raises(DataError, match="has 2 image columns among left, right"):
        load(f"parquet:{file}")


def test_empty_parquet_and_folder_without_any(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        load(f"parquet:{parquet(tmp_path / 'x' / 'x.parquet', [])}")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"holds no \*.parquet"):
        load(f"parquet:{tmp_path / 'bare'}")


@pytest.mark.parametrize("bad", [10, -1])
def test_label_out_of_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    parquet(tmp_path / "cifar10/train.parquet", [encoded()] * 2, label=[0, 9])
    parquet(tmp_path / "cifar10/test.parquet", [encoded()] * 3, label=[bad, bad, 1])
    with pytest.raises(DataError, match=rf"2 label\(s\) .* out of range, such as {bad} where 0 to 9"):
        load("cifar10")


def test_missing_label_names_its_row(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", [encoded()] * 3, label=[0, None, 1])
    with pytest.raises(DataError, match=r"1 value\(s\) of 'label' are missing, the first in row 1 of x"):
        load(f"parquet:{file}")


def test_parts_with_different_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", [encoded()], label=[0])
    parquet(tmp_path / "test.parquet", [encoded()])
    with pytest.raises(DataError, match=r"test\.parquet has no column 'label'"):
        load(f"parquet:{tmp_path}")


def test_camvid_without_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    for part in ("train", "test"):
        parquet(tmp_path / f"camvid/{part}.parquet", [encoded()])
    with pytest.raises(DataError, match="has no column 'mask'"):
        load("camvid")


def test_colour_masks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    for part in ("train", "test"):
        beside = {"mask": [encoded("png")], "sequence": ["a"], "frame": ["0"]}
        parquet(tmp_path / f"camvid/{part}.parquet", [encoded()], **beside)
    with pytest.raises(DataError, match="a mask should be an 8-bit image of class indices, not RGB"):
        load("camvid")


# Folders


@pytest.mark.parametrize("limit", ["16", "0"])
def test_corrupt_images_in_a_folder_are_named_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("MIMBENCH_DECODED_GIB", limit)
    place = folder(tmp_path / "x", train__a=3, train__b=3, test__a=1)
    (place / "train/a/1.jpg").write_bytes(encoded()[:-300])
    (place / "train/b/2.jpg").write_bytes(b"")

    def read() -> None:
        load(f"imagefolder:{place}").train.batch(torch.arange(6))

    with pytest.raises(DataError, match=r"2 of 6 images of .*train .*a/1\.jpg .*b/2\.jpg"):
        read()
    assert any("2 of 6 images" in finding for finding in verify(f"imagefolder:{place}"))


def test_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="bare holds no images"):
        load(f"imagefolder:{tmp_path / 'bare'}")
    with pytest.raises(DataError, match=r"class folder\(s\) empty of .* hold no images"):
        load(f"imagefolder:{folder(tmp_path / 'x', train__a=2, train__empty=0, test__a=1)}")
    with pytest.raises(DataError, match="test holds no images"):
        load(f"imagefolder:{folder(tmp_path / 'y', train__a=2, test=0)}")


def test_images_beside_class_folders(tmp_path: Path) -> None:
    place = folder(tmp_path / "x", train__a=2, val=2)
    with pytest.raises(DataError, match="val has images outside class folders"):
        load(f"imagefolder:{place}")


def test_class_only_in_test_is_kept(tmp_path: Path) -> None:
    data = load(f"imagefolder:{folder(tmp_path / 'x', train__a=2, test__a=1, test__b=1)}")
    assert data.train.classes == ("a", "b")
    assert data.test.labels.tolist() == [0, 1]


def test_too_few_images_to_divide(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 image\(s\), too few"):
        load(f"imagefolder:{folder(tmp_path / 'x', a=1, b=1)}")
    one = load(f"imagefolder:{folder(tmp_path / 'y', train__a=1, test__a=1)}")
    with pytest.raises(DataError, match="too few for a validation split"):
        one.train.holdout()


def test_imagefolder_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.jpg"
    file.write_bytes(encoded())
    with pytest.raises(DataError, match="is a file"):
        load(f"imagefolder:{file}")


def test_float_images_are_refused(tmp_path: Path) -> None:
    place = folder(tmp_path / "x", train__a=1, test__a=1)
    Image.fromarray(np.zeros((3, 3), np.float32)).save(place / "train/a/f.tiff")
    with pytest.raises(DataError, match=r"1 of 2 images .*f\.tiff \(floating-point"):
        load(f"imagefolder:{place}")


def test_dangling_link(tmp_path: Path) -> None:
    place = folder(tmp_path / "x", train__a=2, test__a=1)
    (place / "train/a/gone.jpg").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read: No such file"):
        load(f"imagefolder:{place}")


def test_verify_finds_test_images_in_train(tmp_path: Path) -> None:
    assert verify(f"imagefolder:{folder(tmp_path / 'x', train__a=2, test__a=1)}") == [
        "1 test image(s) are also in the training split, pixel by pixel."
    ]


# Official archives


def cifar(root: Path, **content: object) -> Path:
    place = root / "cifar-10-batches-py"
    place.mkdir(parents=True)
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], **content}
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        (place / name).write_bytes(pickle.dumps(batch, protocol=2))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    return place


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch $MIMBENCH_CACHE.hacked",)


def test_pickles_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    cifar(tmp_path, extra=Malicious())
    with pytest.raises(DataError, match=r"data_batch_1 cannot be read: it asks for (posix|nt)\.system"):
        load("cifar10")
    assert not (tmp_path / "cache.hacked").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [0]}, "'labels' do not fit"),
        ({"labels": [0, 10]}, "out of range, such as 10"),
        ({"data": np.zeros((2, 3000), np.uint8)}, r"not \(N, 3072\)"),
    ],
)
def test_damaged_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, object], message: str
) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    cifar(tmp_path, **content)
    with pytest.raises(DataError, match=message):
        load("cifar10")


def test_truncated_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    file = cifar(tmp_path) / "data_batch_3"
    whole = file.read_bytes()
    for content in (whole[:100], b"", b"\x80\x02K"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"data_batch_3 cannot be read"):
            load("cifar10")
    file.unlink()
    with pytest.raises(DataError, match=r"data_batch_3 cannot be read"):
        load("cifar10")


def test_truncated_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    place = tmp_path / "stl10_binary"
    place.mkdir()
    (place / "class_names.txt").write_text("a b")
    for part in ("train", "test"):
        np.zeros((2, 3, 96, 96), np.uint8).tofile(place / f"{part}_X.bin")
        np.array([1, 2], np.uint8).tofile(place / f"{part}_y.bin")
    whole = (place / "test_X.bin").read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        (place / "test_X.bin").write_bytes(content)
        with pytest.raises(DataError, match=r"test_X\.bin cannot be read"):
            load("stl10")
    (place / "train_y.bin").unlink()
    with pytest.raises(DataError, match=r"train_y\.bin cannot be read"):
        load("stl10")


def test_pets_without_lists_or_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    place = tmp_path / "oxford-iiit-pet"
    (place / "annotations").mkdir(parents=True)
    with pytest.raises(DataError, match=r"trainval\.txt cannot be read"):
        load("pets")
    for part in ("trainval", "test"):
        (place / f"annotations/{part}.txt").write_text("Bengal_1 1 1 1\n")
    with pytest.raises(DataError, match=r"Bengal_1\.jpg cannot be read"):
        load("pets")


def test_imagenet_without_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path))
    folder(tmp_path / "imagenet", train__n01440764=1)
    with pytest.raises(DataError, match=r"has no val folder.*imagenet/val/<wnid>"):
        load("imagenet")


# The cache


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MIMBENCH_CACHE", str(blocked / "cache"))
    assert len(load("digits").train) > 0, "embedded data need no cache"
    with pytest.raises(DataError, match=r"cannot be written.*MIMBENCH_CACHE"):
        load(f"imagefolder:{folder(tmp_path / 'x', train__a=1, test__a=1)}")


def test_limit_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMBENCH_DECODED_GIB", "lots")
    with pytest.raises(ConfigError, match="MIMBENCH_DECODED_GIB=lots is not a number"):
        load(f"imagefolder:{folder(tmp_path / 'x', train__a=1, test__a=1)}")
