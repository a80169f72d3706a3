"""Method cards, sweeps, reported numbers, and the archives of data sets as their authors made them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import scipy.io

from fuzz import draws, target
from fuzz.pictures import picture, png
from mimbench import compat, config, data, paths, progress, registry, reported
from mimbench.data import sources
from mimbench.errors import MimbenchError
from mimbench.sweep import file as sweep_file
from mimbench.sweep import plan

CLONE = Path(__file__).parents[2]


def toml_value(rng: Random) -> str:
    """The right-hand side of a line of TOML, often a wrong one."""
    odd = (
        '"a"',
        "3",
        "-1.5",
        "true",
        "[]",
        "{}",
        "[1, [2, [3]]]",
        "1979-05-27",
        '"""x"""',
        "inf",
        "nan",
        "'",
    )
    deep = "[" * rng.choice((3, 200, 3000))
    return rng.choice(
        (*odd, deep, deep + deep.replace("[", "]"), f'"{draws.text(rng)}"', "1" * 5000, "{a = {b = 1}}")
    )


@target("method.toml", 6)
def card(rng: Random, folder: Path) -> None:
    """A card of a real method with lines changed, or bytes damaged; then all that reads cards."""
    origin = rng.choice(sorted((CLONE / "methods").glob("*/method.toml")))
    lines = origin.read_text(encoding="utf-8").splitlines()
    for _ in range(rng.choice((0, 1, 3))):
        place = rng.randrange(len(lines))
        key = lines[place].partition("=")[0] or "x "
        lines[place] = rng.choice((f"{key}= {toml_value(rng)}", f"[{draws.text(rng)}]", draws.text(rng), ""))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    slug = rng.choice((*[origin.parent.name] * 8, "a b", "Mae", "x-y", "1a"))
    place = folder / "methods" / slug
    place.mkdir(parents=True)
    (place / "method.py").touch()  # the real one is imported
    (place / "method.toml").write_bytes(draws.damage(rng, content) if rng.random() < 0.4 else content)
    registry.methods.cache_clear()
    try:
        with mock.patch.object(paths, "methods", return_value=folder / "methods"):
            for found in registry.methods().values():
                settings = registry.load_method(found.slug).Config
                for name in found.presets:
                    config.build(settings, found.preset(name))
                assert all(type(each) is str for each in (*found.protocols, *found.deviations))
                _exports(found)
    finally:
        registry.methods.cache_clear()


def _exports(found: registry.Card) -> None:
    from mimbench import export
    from mimbench.report.pages import _method

    export.citation(found)
    _method(found.slug, [])


SWEEP = """
name = "small"
retries = 1
backoff = 0.5
device = "cpu"
[resources.pretrain]
cpus = 1
memory_gib = 0.5
[defaults]
preset = "smoke"
seeds = 2
[[runs]]
methods = ["mae"]
protocols = ["knn", "linear:mae"]
dataset = "digits"
eval_dataset = { knn = "digits" }
budget = "2m"
set.image_size = 16
set.knn = { ks = [10] }
[runs.grid]
mask_ratio = [0.5, 0.75]
"recipe.base_lr" = [1e-4]
[runs.exclude]
"simsiam/linear" = "a reason"
[runs.per_method.mae]
set = { recipe = { epochs = 1 } }
[[runs]]
methods = "random_init"
recipes = { knn = "lightly" }
seeds = [0, 3]
"""


@target("sweep.toml", 4)
def sweep(rng: Random, folder: Path) -> None:
    """A sweep with lines changed, given twice or damaged: planned, or refused; nothing runs."""
    lines = SWEEP.strip().splitlines()
    for _ in range(rng.choice((0, 1, 1, 2))):
        place = rng.randrange(len(lines))
        key, _, held = lines[place].partition(" = ")
        hostile = rng.choice((toml_value(rng), str(draws.number(rng)), str([draws.number(rng)] * 3)))
        many = str(list(range(rng.choice((3, 40, 2000)))))
        lines[place] = rng.choice(
            (
                *(f"{key} = {hostile}", f"{key} = {hostile}", f"{draws.text(rng)} = {held}", ""),
                *(
                    f"{key} = 10000000",
                    f"{key} = {many}",
                    f'a{place} = {many}\n"b.c" = {many}',
                    draws.text(rng),
                ),
            )
        )
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    file = folder / "small.toml"
    file.write_bytes(draws.damage(rng, content) if rng.random() < 0.3 else content)
    plan.content(plan.plan(sweep_file.read(file), progress.quiet()))


@target("reported.csv", 6)
def numbers(rng: Random, folder: Path) -> None:
    """Reported numbers, or the catalogue of papers, with cells changed."""
    catalogue = rng.random() < 0.4
    files = (
        [CLONE / "results" / "papers.csv"]
        if catalogue
        else sorted((CLONE / "methods").glob("*/reported.csv"))
    )
    lines = rng.choice(files).read_text(encoding="utf-8").splitlines()[:6]
    for _ in range(rng.choice((1, 2, 4))):
        place = rng.randrange(len(lines))
        cells = lines[place].split(",")
        at = rng.randrange(len(cells))
        hostile = draws.text(rng) if rng.random() < 0.6 else str(draws.number(rng))
        cells[at] = rng.choice((hostile, f'"{hostile}"', '"', "", cells[at] * 3))
        lines[place] = ",".join(cells)
    content = rng.choice(("\n", "\r\n", "\r")).join(lines).encode("utf-8", "surrogatepass")
    content = draws.damage(rng, content) if rng.random() < 0.3 else content
    file = folder / "reported" / "other.csv"
    file.parent.mkdir()
    file = folder / "papers.csv" if catalogue else file
    file.write_bytes(content)
    with mock.patch.object(paths, "papers", return_value=folder):
        if catalogue:
            reported.catalogue()
        else:
            for row in reported.read("other"):
                assert isinstance(row["value"], float)


class Marked:
    """Unpickled by a reader that runs code, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def pickled(rng: Random, content: dict[str, Any], mark: Path) -> bytes:
    """A pickle of a batch of CIFAR, hostile in some way."""
    kind = rng.randrange(6)
    if kind == 0:
        content = {**content, "extra": Marked(mark)}
    elif kind == 1:
        key = rng.choice(list(content))
        odd = (
            None,
            3,
            "x",
            [],
            [[1]],
            {},
            np.zeros((2, 3)),
            np.array(5),
            np.zeros((0, 3072), np.uint8),
            [2**70],
            ["a"],
        )
        content = {**content, key: rng.choice(odd)}
    elif kind == 2:
        shape = rng.choice((b"J\xff\xff\xff\x7f", b"\x8a\x06\0\0\0\0\0\x10"))  # elements that are not there
        return b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + shape + b"tU\x01btR."
    elif kind == 3:
        codec = rng.choice((b"rot13", b"zlib", b"idna", b"nonesuch", b"latin1"))
        return b"c_codecs\nencode\n(X\x02\0\0\0abX" + bytes([len(codec)]) + b"\0\0\0" + codec + b"tR."
    data = pickle.dumps(content, protocol=rng.choice((0, 2, 4, 5)))
    return draws.damage(rng, data) if kind == 4 else data


@target("archives.official", 4)
def official(rng: Random, folder: Path) -> None:
    """CIFAR's pickles, STL-10's bytes, the lists of pets, videos and their joints."""
    root = folder / "data"
    mark = folder / "harm"
    name = rng.choice(("cifar10", "cifar100", "stl10", "pets", "davis-2017", "vip", "jhmdb"))
    root.mkdir()
    {"cifar10": _cifar, "cifar100": _cifar, "stl10": _stl10, "pets": _pets}.get(name, _videos)(
        rng, root, mark, name
    )
    with mock.patch.dict(os.environ, {"MIMBENCH_DATA": str(root)}):
        try:
            dataset = data.load(name)
            dataset.train.store.read(dataset.train.index[:2])
        finally:
            assert not mark.exists(), "a pickle ran code"


def _cifar(rng: Random, root: Path, mark: Path, name: str) -> None:
    hundred = name == "cifar100"
    place = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    place.mkdir()
    files = ["train", "test"] if hundred else [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    batch = {"data": np.zeros((2, 3072), np.uint8), "fine_labels" if hundred else "labels": [0, 1]}
    names = {
        "fine_label_names" if hundred else "label_names": [str(n) for n in range(100 if hundred else 10)]
    }
    odd = rng.choice([*files, "names"])
    for file in files:
        (place / file).write_bytes(
            pickled(rng, batch, mark) if file == odd else pickle.dumps(batch, protocol=2)
        )
    meta = place / ("meta" if hundred else "batches.meta")
    meta.write_bytes(pickled(rng, names, mark) if odd == "names" else pickle.dumps(names, protocol=2))


def _stl10(rng: Random, root: Path, mark: Path, name: str) -> None:
    place = root / "stl10_binary"
    place.mkdir()
    (place / "class_names.txt").write_bytes(rng.choice((b"a b", b"", b"\xff\xfe", b"\x00" * 10)))
    for part in ("train", "test"):
        (place / f"{part}_X.bin").write_bytes(
            bytes(3 * 96 * 96 * rng.choice((0, 1, 2))) + rng.choice((b"", b"x"))
        )
        (place / f"{part}_y.bin").write_bytes(bytes(rng.choice(([], [1, 2], [1, 1], [0, 255], [1]))))


def _pets(rng: Random, root: Path, mark: Path, name: str) -> None:
    place = root / "oxford-iiit-pet"
    (place / "annotations").mkdir(parents=True)
    (place / "images").mkdir()
    for image in ("a_cat_1", "a_dog_2"):
        (place / "images" / f"{image}.jpg").write_bytes(png(4, 4, rows=4))
    good = ["a_cat_1 1 1 1", "a_dog_2 2 1 1"]
    odd = ["", "#", "a_cat_1", "a_cat_1 x", "a_cat_1 0", "a_cat_1 -5", "a_cat_1 99999999999", "a_cat_1 1e9"]
    odd += ["../../../secret 1", f"{draws.text(rng)} 1", "a_cat_1 ١"]
    for listing in ("trainval.txt", "test.txt"):
        lines = [*good, *(rng.choice(odd) for _ in range(rng.choice((0, 1, 2))))]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        (place / "annotations" / listing).write_bytes(
            draws.damage(rng, content) if rng.random() < 0.2 else content
        )


def _videos(rng: Random, root: Path, mark: Path, name: str) -> None:
    from mimbench.data.videos import LAYOUTS

    layout = LAYOUTS[name]
    place = root / layout.folder
    listed = ["one", "two"] if name != "jhmdb" else ["wave/one", "wave/two"]
    for video in listed:
        for part in (layout.images, layout.labels):
            (place / part / video).mkdir(parents=True)
        for n in range(2):
            (place / layout.images / video / f"{n + 1:05d}.png").write_bytes(png(4, 4, rows=4))
            if name != "jhmdb":
                mask = png(4, 4, rows=4, colours=0) if rng.random() < 0.7 else picture(rng)
                (place / layout.labels / video / f"{n + 1:05d}.png").write_bytes(mask)
        if name == "jhmdb":
            _joints(rng, place / layout.labels / video / "joint_positions.mat")
    odd = [draws.text(rng), "../../../../etc", "/etc", "none"]
    if name == "jhmdb":
        (place / layout.test).mkdir(parents=True)
        lines = ["one.avi 1", "two.avi 2", *([f"{rng.choice(odd)}.avi 1"] if rng.random() < 0.4 else [])]
        text = "\n".join(lines).encode("utf-8", "surrogatepass")
        (place / layout.test / "wave_test_split1.txt").write_bytes(text)
        return
    for listing, video in ((layout.test, "one"), (layout.train, "two")):
        if listing:
            (place / listing).parent.mkdir(parents=True, exist_ok=True)
            lines = [video, *([rng.choice(odd)] if rng.random() < 0.4 else [])]
            (place / listing).write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def _joints(rng: Random, file: Path) -> None:
    shape = rng.choice(((2, 15, 2), (2, 15, 2), (2, 15, 0), (3, 15, 2), (2, 15), (0,)))
    held: Any = np.full(shape, rng.choice((1.0, float("nan"), 1e308)))
    if rng.random() < 0.2:
        held = rng.choice(("text", np.array(["a", 1], object), {"a": 1}))
    scipy.io.savemat(file, {"pos_img": held}, do_compression=rng.random() < 0.5)
    if rng.random() < 0.4:
        file.write_bytes(draws.damage(rng, file.read_bytes()))


@target("archives.unpacked", 3)
def unpacked(rng: Random, folder: Path) -> None:
    """What a download unpacks stays in its folder, whatever names and links the archive has."""
    archive = folder / f"archive.{rng.choice(('tar', 'tar.gz', 'zip'))}"
    outside = folder / "outside"
    outside.mkdir()
    names = [
        "../outside/x",
        "a/../../outside/x",
        str(outside / "x"),
        "good/x",
        "cifar-10-batches-py/x",
        draws.text(rng),
    ]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as made:
            for name in rng.sample(names, 3):
                made.writestr(name.replace("\0", "") or "x", b"harm")
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as made:
            for name in rng.sample(names, 3):
                info = tarfile.TarInfo(name.encode("utf-8", "replace").decode() or "x")
                info.type = rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
                info.linkname = rng.choice(("../outside", str(outside), "good", "../../.."))
                info.size = 4 if info.type == tarfile.REGTYPE else 0
                made.addfile(info, io.BytesIO(b"harm") if info.size else None)
            beyond = tarfile.TarInfo(f"{rng.choice(('good', 'cifar-10-batches-py'))}/y")
            beyond.size = 4
            made.addfile(beyond, io.BytesIO(b"harm"))
    if rng.random() < 0.2:
        archive.write_bytes(draws.damage(rng, archive.read_bytes()))

    compat.torchvision()
    from torchvision.datasets.utils import extract_archive

    def download(root: str, download: bool) -> None:
        extract_archive(str(archive), root)

    with (
        mock.patch.dict(
            os.environ, {"MIMBENCH_CACHE": str(folder / "cache"), "MIMBENCH_DATA": str(folder / "none")}
        ),
        mock.patch("torchvision.datasets", SimpleNamespace(CIFAR10=download)),
    ):
        with contextlib.suppress(MimbenchError):
            sources.get("cifar10")
        cache = (folder / "cache").resolve()
        assert not list(outside.iterdir()), "an archive wrote outside its folder"
        for found in cache.rglob("*"):
            assert found.resolve().is_relative_to(cache), "an archive made a link that leads outside"
