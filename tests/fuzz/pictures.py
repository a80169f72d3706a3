"""Images, folders of them, and Parquet files that hold them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fuzz import draws, target
from mimbench import data
from mimbench.data import decode, labels

MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)
KINDS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
    "MPO",
    "ICO",
    "TGA",
    "JPEG2000",
    "SGI",
    "EPS",
    "PDF",
    "AVIF",
)
SIDES = (1, 2, 3, 8, 17, 64)
HUGE = (5000, 9000, 30_000, 65_535, 2**31 - 1, 2**32 - 1)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: int = 1, depth: int = 8, colours: int = 2) -> bytes:
    """A PNG whose header declares a size, with zeros for the first ``rows`` of it."""
    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colours, 0, 0, 0)
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    line = 1 + (min(width, 70_000) * samples * depth + 7) // 8
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(line)) for _ in range(rows)) + packer.flush()
    palette = chunk(b"PLTE", bytes(3)) if colours == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def declared(rng: Random) -> bytes:
    """A file of a few bytes whose header promises a large image."""
    w, h = rng.choice(HUGE), rng.choice((1, *HUGE))
    kind = rng.randrange(7)
    if kind == 0:
        return png(w, h, depth=rng.choice((1, 8, 16)), colours=rng.choice((0, 2, 4, 6)))
    if kind == 1:
        return f"P{rng.choice('456')} {w} {h} 255\n".encode() + bytes(10)
    if kind == 2:
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", w & 0xFFFF, h & 0xFFFF, 0, 0, 0)
            + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;"
        )
    if kind == 3:
        bits = struct.pack("<IiiHHIIiiII", 40, w & 0x7FFFFFFF, h & 0x7FFFFFFF, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + bits + bytes(50)
    if kind == 4:
        frame = struct.pack(">BHHB", 8, h & 0xFFFF, w & 0xFFFF, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
        return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xd9"
    if kind == 5:
        sides = struct.pack("<I", w & 0xFFFFFF)[:3] + struct.pack("<I", h & 0xFFFFFF)[:3]
        return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + sides
    tags = [
        (256, 4, 1, w & 0xFFFFFFFF),
        (257, 4, 1, h & 0xFFFFFFFF),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
    ]
    tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, h & 0xFFFFFFFF), (279, 4, 1, rng.choice((1, 2**31)))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def picture(rng: Random) -> bytes:
    """An image in some mode and format, perhaps animated, perhaps damaged."""
    if rng.random() < 0.2:
        return declared(rng)
    if rng.random() < 0.02:  # honest, and as large as it says
        side = rng.choice((4000, 8000, 12_000))
        return png(side, side, rows=side, depth=rng.choice((8, 16)), colours=rng.choice((0, 2)))
    size = rng.choice(SIDES), rng.choice((*SIDES, 700))
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    stream = io.BytesIO()
    options: dict[str, Any] = {}
    kind = rng.choice(KINDS[:7] if rng.random() < 0.8 else KINDS)
    try:
        image = image.convert(rng.choice(MODES))
        if kind in ("GIF", "WEBP", "TIFF", "PNG") and rng.random() < 0.3:
            options = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)] * 3}
        if image.mode == "P" and rng.random() < 0.5:
            options["transparency"] = rng.choice((0, 255))
        image.save(stream, kind, **options)
    except (OSError, ValueError, KeyError):  # a mode that the format does not know
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, "PNG")
    content = stream.getvalue()
    return draws.damage(rng, content) if rng.random() < 0.5 else content


@target("images.decode", 10)
def decoded(rng: Random, folder: Path) -> None:
    """An image becomes uint8 of a bounded size, or is refused by a reason of one line."""
    content = rng.choice((None, b"", rng.randbytes(40))) if rng.random() < 0.05 else picture(rng)
    decode.size_of(content)
    for channels in (3, 1):
        try:
            found = decode.decode(content, channels)
        except decode.Undecodable:
            continue
        assert found.dtype == np.uint8
        assert found.shape[0] == channels
        assert 0 < max(found.shape[1:]) <= decode.LONGEST_SIDE


def _quiet_load(place: str) -> None:
    """Opens a data set as commands do, and looks at all of it as ``mimbench data verify`` does."""
    for finding in data.verify(place):
        assert "\n" not in finding, finding


@target("images.folder", 4)
def image_folder(rng: Random, folder: Path) -> None:
    """A folder of classes with files of any name, links in circles, pipes and devices."""
    place = folder / "images"
    for name in rng.choice((["a", "b"], ["train/a", "train/b", "test/a"], ["train/a", "val/a"], [""])):
        (place / name).mkdir(parents=True, exist_ok=True)
        for n in range(rng.choice((1, 3, 6))):
            stem = draws.text(rng).replace("/", "_").replace("\0", "_")[:40] if rng.random() < 0.3 else str(n)
            content = picture(rng) if rng.random() < 0.2 else png(4, 4, rows=4)
            file = place / name / f"{stem}{rng.choice(('.png', '.PNG', '.jpg', '.gif', '.txt', ''))}"
            file.write_bytes(content)
    for _ in range(rng.choice((0, 0, 1, 2))):
        odd = place / rng.choice(("", "a", "train/a")) / f"odd{rng.randrange(9)}{rng.choice(('', '.png'))}"
        odd.parent.mkdir(parents=True, exist_ok=True)
        kind = rng.randrange(4)
        if odd.exists() or odd.is_symlink():
            continue
        if kind == 0:
            odd.symlink_to(rng.choice((place, odd.parent, Path("/dev/zero"), Path("/nowhere"), odd)))
        elif kind == 1:
            os.mkfifo(odd)
        elif kind == 2:
            odd.mkdir()
        else:
            odd.write_bytes(picture(rng))
    _quiet_load(f"imagefolder:{place}")


def column(rng: Random, count: int) -> pa.Array:
    """Labels, or what somebody took for labels."""
    kind = rng.randrange(12)
    n = range(count)
    if kind == 0:
        return pa.array([rng.choice((0, 1, -1, 10**6, 2**62)) for _ in n], pa.int64())
    if kind == 1:
        return pa.array([rng.choice((0, 2**64 - 1, 2**63)) for _ in n], pa.uint64())
    if kind == 2:
        return pa.array([rng.choice((0.0, 1.0, float("nan"), 1e308)) for _ in n])
    if kind == 3:
        return pa.array([draws.text(rng).encode("utf-8", "replace").decode() for _ in n])
    if kind == 4:
        return pa.array([rng.choice((True, False, None)) for _ in n])
    if kind == 5:
        return pa.array([[0, 1]] * count)
    if kind == 6:
        return pa.array([{"a": 1}] * count)
    if kind == 7:
        return pa.array([str(i % 2) for i in n]).dictionary_encode()
    if kind == 8:
        return pa.array([None] * count)
    if kind == 9:
        return pa.array([b"\xff\xfe"] * count)
    if kind == 10:
        return pa.array([i % 2 for i in n], pa.int8())
    return pa.array(range(count), pa.timestamp("ns"))


def parquet(rng: Random, file: Path) -> None:
    """A Parquet file of images with some other columns, most of them odd."""
    count = rng.choice((0, 1, 2, 12, 12))
    images: list[Any] = [png(4, 4, rows=4) for _ in range(count)]
    if rng.random() < 0.4:
        images = [rng.choice((image, picture(rng), None, b"")) for image in images]
    kind = rng.random()
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    if kind < 0.5:
        held = pa.array(
            [
                {"bytes": image, "path": draws.text(rng)[:20].encode("utf-8", "replace").decode()}
                for image in images
            ],
            struct_type,
        )
    elif kind < 0.8:
        held = pa.array(images, pa.binary())
    else:
        held = rng.choice(
            (pa.array([str(i) for i in range(count)]), pa.array([[b"x"]] * count), column(rng, count))
        )
    table = {rng.choice(("image", "img", "picture")): held}
    for name in rng.sample(
        ("label", "labels", "fine_label", "mask", "sequence", "frame", "image2"), rng.randint(0, 4)
    ):
        table[name] = held if name == "mask" and rng.random() < 0.7 else column(rng, count)
    made = pa.table(table)
    if rng.random() < 0.2:
        made = made.replace_schema_metadata(
            {b"huggingface": draws.as_json(rng, draws.value(rng)).encode("utf-8", "replace")}
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, file, compression=rng.choice(("snappy", "zstd", "gzip", "none")))
    if rng.random() < 0.4:
        file.write_bytes(draws.damage(rng, file.read_bytes()))


@target("parquet.place", 6)
def parquet_place(rng: Random, folder: Path) -> None:
    """One file, or a folder of several that may not fit each other."""
    place = folder / "table.parquet"
    if rng.random() < 0.6:
        parquet(rng, place)
    else:
        place = folder / "several"
        for name in rng.sample(
            ("train-0.parquet", "test-0.parquet", "val-0.parquet", "x/train.parquet"), rng.randint(1, 3)
        ):
            parquet(rng, place / name)
    _quiet_load(f"parquet:{place}")


@target("parquet.bomb")
def parquet_bomb(rng: Random, folder: Path) -> None:
    """A few kilobytes that hold a value of megabytes, or gigabytes in all."""
    size, groups = rng.choice(((2**24, 1), (2**26, 1), (2**24, 80), (2**20, 9)))
    file = folder / "bomb.parquet"
    held = pa.array([rng.choice((bytes(size), png(4, 4, rows=4))), png(4, 4, rows=4)], pa.binary())
    table = pa.table({"image": held, "label": [0, 1]})
    with pq.ParquetWriter(file, table.schema, compression=rng.choice(("zstd", "gzip"))) as writer:
        for _ in range(groups):
            writer.write_table(table)
    _quiet_load(f"parquet:{file}")


@target("parquet.named", 3)
def named(rng: Random, folder: Path) -> None:
    """Files in the place of a known data set, whose classes and columns are known."""
    name = rng.choice(("cifar10", "camvid", "stl10", "imagenet", "cifar100"))
    with mock.patch.dict(os.environ, {"MIMBENCH_DATA": str(folder / "data")}):
        for part in ("train", "test"):
            parquet(rng, folder / "data" / name / f"{part}-0.parquet")
        _quiet_load(name)


@target("labels.encode", 2)
def encoded_labels(rng: Random, folder: Path) -> None:
    """Lists of labels of one kind, in or out of range."""
    kinds = (
        lambda: draws.text(rng),
        lambda: rng.choice((0, 1, 5, -1, 2**62, 2**63, 2**64, True)),
        lambda: rng.randrange(3),
    )
    kind = rng.choice(kinds)
    parts = [[kind() for _ in range(rng.choice((0, 1, 5)))] for _ in range(2)]
    names = rng.choice(((), ("a",), tuple("abcdefghij")))
    tensors, classes = labels.encode(parts, names, "here")
    for numbers in tensors:
        assert numbers.dtype == torch.int64
        assert not len(numbers) or (numbers.min() >= 0 and numbers.max() < max(1, len(classes)))
