"""Digital: brightness, contrast, elastic, pixelate and JPEG."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from mimbench.corruptions.blur import gaussian_filter
from mimbench.corruptions.draws import Draws


def brightness(images: Tensor, draws: Draws, amount: float) -> Tensor:
    """Adds ``amount`` to the value of HSV, capped at 1.

    Hue and saturation stay, so all three channels scale by the same factor; black becomes grey.
    """
    value = images.amax(1, keepdim=True)
    brighter = (value + amount).clamp(0, 1)
    return torch.where(value > 0, images * (brighter / value.clamp(min=1e-6)), brighter)


def contrast(images: Tensor, draws: Draws, factor: float) -> Tensor:
    """Draws each channel towards its mean over the image."""
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * factor + mean


def elastic(images: Tensor, draws: Draws, strength: float, sigma: float, affine: float) -> Tensor:
    """A random affine map, then a smooth random displacement field.

    The map moves three points of the image by up to ``affine`` pixels; the field is uniform noise in [-1, 1]
    smoothed by ``sigma`` pixels, times ``strength`` pixels.
    """
    b, _, h, w = images.shape
    centre, arm = min(h, w) // 2, min(h, w) // 3
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], device=images.device) * arm + centre
    moved = corners + affine * (2 * draws.uniform("corners", 3, 2) - 1)
    ones = torch.ones(b, 3, 1, device=images.device)
    back = torch.linalg.solve(torch.cat([moved, ones], dim=2), corners.expand(b, -1, -1))  # (B, 3, 2)
    columns, rows = torch.meshgrid(
        torch.arange(w, device=images.device).float(),
        torch.arange(h, device=images.device).float(),
        indexing="xy",
    )
    places = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1).view(1, h * w, 3) @ back
    warped = _sample(images, places.view(b, h, w, 2), mirror_at_centre=True)
    if strength == 0:
        return warped
    noise = 2 * draws.uniform("field", 2, h, w) - 1
    field = strength * gaussian_filter(noise, sigma, "reflect", truncate=3.0)
    return _sample(
        warped, torch.stack([columns + field[:, 0], rows + field[:, 1]], dim=-1), mirror_at_centre=False
    )


def _sample(images: Tensor, places: Tensor, mirror_at_centre: bool) -> Tensor:
    """Bilinear values of images (B, C, H, W) at ``places`` (B, h, w, 2) given as (column, row) in pixels.

    Beyond the border the image is mirrored, at the centre of the last pixel or at its outer edge.
    """
    size = torch.tensor([images.shape[3], images.shape[2]], device=images.device)
    if mirror_at_centre:
        grid = 2 * places / (size - 1) - 1
    else:
        grid = (2 * places + 1) / size - 1
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=mirror_at_centre)


def pixelate(images: Tensor, draws: Draws, share: float) -> Tensor:
    """Shrinks to ``share`` of the side by box averaging and enlarges again by repetition, as PIL's BOX filter."""
    h, w = images.shape[-2:]
    small = box_resize(images * 255, (int(h * share), int(w * share)))
    return box_resize(small, (h, w)) / 255


def box_resize(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """PIL's BOX resize of levels in [0, 255] (B, C, H, W) to (height, width); rounded after each axis, as there."""
    h, w = levels.shape[-2:]
    across = _box_matrix(w, size[1]).to(levels.device)
    down = _box_matrix(h, size[0]).to(levels.device)
    wide = (levels @ across.T + 0.5 + 1e-4).floor()
    return (down @ wide + 0.5 + 1e-4).floor()


@functools.lru_cache(maxsize=64)
def _box_matrix(size: int, target: int) -> Tensor:
    """(target, size): the mean over the input pixels whose centres an output pixel covers, or the nearest one."""
    step = size / target
    centre = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * step
    distance = (torch.arange(size, dtype=torch.float64) + 0.5 - centre) / max(step, 1.0)
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return (inside / inside.sum(1, keepdim=True)).float()


# Quantisation steps for brightness and colour at quality 50 (ITU-T T.81, tables K.1 and K.2), row by row.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)


def jpeg(images: Tensor, draws: Draws, quality: int) -> Tensor:
    """JPEG at a ``quality`` of 1 to 100 with 4:2:0 colour: the pixels that libjpeg gives back, bit for bit.

    What entropy coding does not change is left out. Stages and rounding are those of libjpeg's accurate integer
    transform; float64 holds all its integers exactly.
    """
    h, w = images.shape[-2:]
    rgb = (images.double() * 255).round()
    to_planes = rgb.new_tensor(((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329)))
    offset = rgb.new_tensor((32768, (128 << 16) + 32767, (128 << 16) + 32767)).view(3, 1, 1)
    planes = ((torch.einsum("pc,bchw->bphw", to_planes, rgb) + offset) / 65536).floor()
    planes = F.pad(planes, (0, -w % 16, 0, h % 2), mode="replicate")
    colour = F.avg_pool2d(planes[:, 1:], 2) * 4
    bias = 1 + torch.arange(colour.shape[-1], device=images.device) % 2  # 1, 2, 1, 2 so that no drift arises
    colour = ((colour + bias) / 4).floor()
    luma = _through_dct(planes[:, :1], LUMINANCE, quality)[:, 0, :h, :w]
    colour = _through_dct(colour, CHROMINANCE, quality)[..., : -(-h // 2), : -(-w // 2)]
    cb, cr = (_upsample(colour)[..., :h, :w] - 128).unbind(1)
    shifts = (91881 * cr, -22554 * cb - 46802 * cr, 116130 * cb)
    back = [luma + ((shift + 32768) / 65536).floor() for shift in shifts]
    return torch.stack(back, dim=1).clamp(0, 255).float() / 255


def quantisation(table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """The steps (8, 8) at a quality, scaled from those at quality 50 as libjpeg does."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(table) * percent + 50) // 100).clamp(1, 255).double()


@functools.cache
def _dct_matrix() -> Tensor:
    """The cosine transform (8, 8), frequency by sample, times 2^13 * sqrt(8), in libjpeg's whole numbers.

    The factors of Loeffler, Ligtenberg and Moschytz (1989) are rounded to 13 bits before they are multiplied
    out, so the entries differ in the last place from rounded cosines.
    """
    eye = torch.eye(8, dtype=torch.float64)
    s0, s1, s2, s3 = (eye[i] + eye[7 - i] for i in range(4))
    d0, d1, d2, d3 = (eye[i] - eye[7 - i] for i in range(4))
    even = 4433 * (s1 - s2 + s0 - s3)
    z5 = 9633 * (d0 + d1 + d2 + d3)
    z1, z2 = -7373 * (d3 + d0), -20995 * (d2 + d1)
    z3, z4 = -16069 * (d3 + d1) + z5, -3196 * (d2 + d0) + z5
    rows = (
        8192 * (s0 + s1 + s2 + s3),
        12299 * d0 + z1 + z4,
        even + 6270 * (s0 - s3),
        25172 * d1 + z2 + z3,
        8192 * (s0 - s1 - s2 + s3),
        16819 * d2 + z2 + z4,
        even - 15137 * (s1 - s2),
        2446 * d3 + z1 + z3,
    )
    return torch.stack(rows)


def _descale(values: Tensor, bits: int) -> Tensor:
    """Whole numbers divided by 2^bits, rounded to the nearest, halves upwards."""
    return (values / 2**bits + 0.5).floor()


def _through_dct(planes: Tensor, table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Levels (B, C, H, W), W a multiple of 8, after quantising the DCT of each 8x8 block."""
    b, c, rows, w = planes.shape
    planes = F.pad(planes, (0, 0, 0, -rows % 8), mode="replicate")
    h = planes.shape[2]
    dct, steps = _dct_matrix().to(planes.device), quantisation(table, quality).to(planes.device)
    blocks = (planes - 128).view(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    eightfold = _descale(dct @ _descale(blocks @ dct.T, 11), 15)
    whole = eightfold.sign() * ((eightfold.abs() + 4 * steps) / (8 * steps)).floor()
    blocks = _descale(_descale(dct.T @ (whole * steps), 11) @ dct, 18)
    return (blocks.transpose(3, 4).reshape(b, c, h, w) + 128).clamp(0, 255)[:, :, :rows]


def _upsample(planes: Tensor) -> Tensor:
    """Levels (B, C, h, w) doubled per side: each is 3/4 of the nearest and 1/4 of the next, per axis."""
    b, c, h, w = planes.shape
    padded = F.pad(planes, (0, 0, 1, 1), mode="replicate")
    rows = torch.stack([3 * planes + padded[..., :-2, :], 3 * planes + padded[..., 2:, :]], dim=3)
    rows = rows.view(b, c, 2 * h, w)
    padded = F.pad(rows, (1, 1, 0, 0), mode="replicate")
    left, right = 3 * rows + padded[..., :-2] + 8, 3 * rows + padded[..., 2:] + 7
    return (torch.stack([left, right], dim=4).view(b, c, 2 * h, 2 * w) / 16).floor()
