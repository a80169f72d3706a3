"""Encoded images to arrays. Needs Pillow and NumPy only."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image, UnidentifiedImageError

from mimbench.errors import DataError

LONGEST_SIDE = 640  # larger images are reduced on reading, which bounds the memory of a padded batch
VERSION = 1  # raised whenever the same file may decode to other pixels
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
)
# No others are tried, whatever a file is called: Pillow would hand PostScript to an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
MOST_PIXELS = (
    2**26
)  # of an image, and of all that threads decode at once: about half a GiB while they are converted
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MOST_PIXELS is less


class Undecodable(Exception):  # a verdict that is handed on, seldom raised to the caller
    """Bytes that are no image, or an image with no obvious form in 8-bit RGB."""


def decode(data: bytes | None, channels: int = 3, longest: int = LONGEST_SIDE) -> np.ndarray:
    """An encoded image as uint8 (channels, H, W): 3 for RGB, 1 for a mask of class indices.

    Colours are converted as torchvision's ``ImageFolder`` does (alpha is dropped, EXIF orientation is left
    alone), except that 16-bit greys keep their upper 8 bits where Pillow would clip them to white. An image
    whose longer side exceeds ``longest`` is reduced to it: bicubic and antialiased, masks by nearest neighbour.
    Raises Undecodable.
    """
    image = _open(data)
    with _ROOM.taken(image.width * image.height):
        try:
            image.load()
            image = _mask(image) if channels == 1 else _rgb(image)
        except Undecodable:
            raise
        except Exception as fault:  # what Pillow raises for a damaged file has no common parent
            raise Undecodable(_reason(fault)) from None
        if max(image.size) > longest:
            filter_ = Image.Resampling.NEAREST if channels == 1 else Image.Resampling.BICUBIC
            image = image.resize(reduced(image.size, longest), filter_)
        pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _open(data: bytes | None) -> Image.Image:
    """An image of which the header alone was read, no larger than may be decoded. Raises Undecodable."""
    if not isinstance(data, bytes) or not data:
        raise Undecodable("no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise Undecodable("it is no image of a format that is read here") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Undecodable(f"it has more than {MOST_PIXELS:,} pixels") from None
    except Exception as fault:  # as above
        raise Undecodable(_reason(fault)) from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise Undecodable(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}")
    if width < 1 or height < 1:
        raise Undecodable("it has no pixels")
    return image


def _reason(fault: Exception) -> str:
    return str(fault).strip().partition("\n")[0] or type(fault).__name__


class _Room:
    """Lets threads in as long as their images together have no more than ``MOST_PIXELS``, and one at any size."""

    def __init__(self) -> None:
        self.pixels = 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.pixels or self.pixels + pixels <= MOST_PIXELS)
            self.pixels += pixels
        try:
            yield
        finally:
            with self.changed:
                self.pixels -= pixels
                self.changed.notify_all()


_ROOM = _Room()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise Undecodable("floating-point pixels have no fixed range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise Undecodable("32-bit pixels have no fixed range")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _mask(image: Image.Image) -> Image.Image:
    if image.mode not in ("L", "P"):
        raise Undecodable(f"a mask should be an 8-bit image of class indices, not {image.mode}")
    return image


def size_of(data: bytes | None) -> tuple[int, int] | None:
    """(width, height) that the header states; None for what is no image, or too large to be decoded."""
    try:
        return _open(data).size
    except Undecodable:
        return None


def reduced(size: tuple[int, int], longest: int = LONGEST_SIDE) -> tuple[int, int]:
    """The size that an image is decoded to."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def decode_all(
    items: Iterable[bytes | None], pool: ThreadPoolExecutor, channels: int = 3, ahead: int = 256
) -> Iterator[np.ndarray | Undecodable]:
    """Decodes in threads, in order, at most ``ahead`` images ahead; what fails is yielded as its fault."""

    def attempt(data: bytes | None) -> np.ndarray | Undecodable:
        try:
            return decode(data, channels)
        except Undecodable as fault:
            return fault

    Image.init()  # registers all formats once, before threads ask for them
    source = iter(items)
    while chunk := list(islice(source, ahead)):
        yield from pool.map(attempt, chunk)


def refuse(failed: dict[str, str], total: int, where: str) -> None:
    """Raises DataError naming the first images that could not be decoded, if there are any."""
    if failed:
        names = ", ".join(f"{name} ({why[:80]})" for name, why in list(failed.items())[:5])
        more = ", ..." if len(failed) > 5 else ""
        raise DataError(
            f"{len(failed)} of {total} images of {where} cannot be decoded: {names}{more}",
            "Replace or remove them; nothing is left out silently",
        )
