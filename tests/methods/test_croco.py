"""What is special to CroCo: who is masked, what the decoder sees of both images, the pairs, rotary positions."""

from __future__ import annotations

import cmath
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mimbench import config, registry, seeds
from mimbench.checkpoint import load_strictly
from mimbench.data import Batch
from mimbench.errors import CheckpointError, ConfigError
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import learning_rate

MODULE = registry.load_method("croco")
NETWORKS = registry.load_method("croco", "model")
OFFICIAL = registry.load_method("croco", "official")
KINDS = pytest.mark.parametrize("kind", ["sincos", "rope"])


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("croco").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(count: int = 3) -> dict[str, Any]:
    torch.manual_seed(1)
    first, second = torch.randn(2, count, 3, 32, 32)
    return {"images1": first, "images2": second, "noise": torch.rand(count, 64)}


def coordinates(count: int = 64, height: int = 64, width: int = 64) -> Batch:
    """Images whose red and green channels are their own column and row, so that a crop tells its box."""
    column = torch.arange(width).expand(height, width)
    row = torch.arange(height)[:, None].expand(height, width)
    image = torch.stack([column, row, torch.full_like(row, 128)]).byte()
    return Batch(image.repeat(count, 1, 1, 1), None, torch.arange(count))


def pixels(model: Any, view: torch.Tensor) -> torch.Tensor:
    """A view's grey levels of 255."""
    mean = torch.tensor(model.input.mean).view(1, 3, 1, 1)
    return (view * torch.tensor(model.input.std).view(1, 3, 1, 1) + mean) * 255


def boxes(model: Any, view: torch.Tensor) -> torch.Tensor:
    """First and last column and row (B, 4) in a view of ``coordinates``, to half a pixel or so."""
    place = pixels(model, view)[:, :2]
    return torch.cat([place.amin((2, 3)), place.amax((2, 3)) + 1], dim=1)


def test_the_mask_compares_the_sorting_permutation_itself() -> None:
    noise = torch.rand(5, 12)
    mask, visible = MODULE.random_mask(noise, 9)
    for row, hidden, left in zip(noise.tolist(), mask, visible, strict=True):
        order = sorted(range(12), key=row.__getitem__)
        assert hidden.tolist() == [place < 9 for place in order]
        assert left.tolist() == [patch for patch in range(12) if order[patch] >= 9]


def test_the_number_of_hidden_patches_is_truncated_as_in_the_authors_code() -> None:
    assert build().hidden == 57
    paper = MODULE.Config()
    assert int(paper.mask_ratio * (paper.image_size // paper.backbone.patch_size) ** 2) == 176


@KINDS
def test_of_the_first_image_the_encoder_sees_visible_patches_and_of_the_second_all(kind: str) -> None:
    model, given = build(positions=kind), inputs()
    out = model(**given)
    assert out["latent"].shape[1] == 64 - 57
    assert out["latent2"].shape[1] == 64
    patches = patchify(given["images1"], 4)
    patches[out["mask"].bool()] += 1.0
    again = model(**{**given, "images1": unpatchify(patches, 4)})
    assert torch.equal(again["latent"], out["latent"])
    assert torch.equal(again["pred"], out["pred"])
    for patch in (0, 40, 63):
        patches = patchify(given["images2"], 4)
        patches[:, patch] += 1.0
        moved = model(**{**given, "images2": unpatchify(patches, 4)})["pred"]
        assert not torch.allclose(moved, out["pred"], atol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_is_the_plain_loop_over_hidden_patches(normalised: bool) -> None:
    model, given = build(normalise_target=normalised), inputs()
    out = model(**given)
    errors = []
    for image, pred, mask in zip(given["images1"], out["pred"], out["mask"], strict=True):
        for patch in range(64):
            if not mask[patch]:
                continue
            top, left = 4 * (patch // 8), 4 * (patch % 8)
            target = image[:, top : top + 4, left : left + 4].permute(1, 2, 0).flatten()
            if normalised:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            errors.append((pred[patch] - target).square().mean())
    assert len(errors) == 3 * 57
    torch.testing.assert_close(out["loss"], torch.stack(errors).mean())


def test_gradient_reaches_both_images_and_no_visible_prediction() -> None:
    model, given = build(), inputs()
    given["images1"].requires_grad_()
    given["images2"].requires_grad_()
    out = model(**given)
    out["pred"].retain_grad()
    out["loss"].backward()
    assert given["images1"].grad.abs().sum() > 0
    assert given["images2"].grad.abs().sum() > 0
    reached = out["pred"].grad.abs().sum(-1) > 0
    assert torch.equal(reached, out["mask"].bool())


@KINDS
def test_the_decoder_knows_where_the_second_image_has_its_patches_and_never_changes_them(kind: str) -> None:
    decoder = build(positions=kind).decoder
    torch.manual_seed(0)
    latent, memory = torch.randn(2, 7, 64), torch.randn(2, 64, 64)
    chosen = torch.rand(2, 64).argsort(1)[:, :7].sort(1).values
    seen = []
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1].clone()))
    pred = decoder(latent, chosen, memory)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    shuffled = decoder(latent, chosen, memory[:, torch.randperm(64)])
    assert not torch.allclose(shuffled, pred, atol=1e-4)


@KINDS
def test_positions_follow_the_patches_that_are_chosen(kind: str) -> None:
    backbone = build(positions=kind).backbone
    images = inputs()["images1"]
    whole = backbone(images)[0]
    order = torch.rand(3, 64).argsort(1)
    shuffled = backbone(images, order)[0]
    torch.testing.assert_close(shuffled, NETWORKS.take(whole, order), rtol=1e-4, atol=1e-5)


def test_rope_turns_pairs_of_channels_by_row_then_by_column() -> None:
    torch.manual_seed(0)
    rows, columns, width = 3, 5, 16
    quarter = width // 4
    angles = NETWORKS.rotary_angles((rows, columns), width, 100.0)
    x = torch.randn(1, 2, rows * columns, width)
    found = NETWORKS.rotate(x, torch.stack([angles.cos(), angles.sin()]))
    for row in range(rows):
        for column in range(columns):
            place = row * columns + column
            for half, coordinate in enumerate((row, column)):
                for i in range(quarter):
                    at = half * 2 * quarter + i
                    pair = complex(x[0, 1, place, at], x[0, 1, place, at + quarter])
                    turned = pair * cmath.exp(1j * coordinate * 100 ** (-i / quarter))
                    assert float(found[0, 1, place, at]) == pytest.approx(turned.real, abs=1e-5)
                    assert float(found[0, 1, place, at + quarter]) == pytest.approx(turned.imag, abs=1e-5)


def test_with_rope_a_score_depends_on_the_offset_alone_and_any_grid_has_angles() -> None:
    places = NETWORKS.Positions("rope", (8, 8), 32, 2, 100.0)
    assert not places.state_dict()
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)
    for grid in ((8, 8), (4, 16)):
        turn = places.turn(grid)
        q_at, k_at = (NETWORKS.rotate(x.expand(-1, -1, 64, -1), turn)[0, 0] for x in (q, k))
        scores = (q_at @ k_at.T).unflatten(0, grid).unflatten(2, grid)
        torch.testing.assert_close(scores[1, 2, 3, 5], scores[0, 0, 2, 3])
        assert not torch.allclose(scores[1, 2, 3, 5], scores[0, 0, 3, 2])


def test_there_is_no_class_token_and_probes_read_the_mean_of_all_patches() -> None:
    model = build()
    assert not [name for name in model.state_dict() if "cls" in name]
    images = inputs()["images1"]
    tokens = model.backbone(images)[0]
    assert tokens.shape[1] == 64
    found = model.encoder()(images, layers=(3,))
    torch.testing.assert_close(found.pooled, tokens.mean(1))
    torch.testing.assert_close(found.patches[:, :, 2, 5], tokens[:, 2 * 8 + 5])
    torch.testing.assert_close(model.backbone.norm(found.layers[0].flatten(2).mT), tokens)


def test_two_crops_of_an_image_differ_share_half_of_it_and_are_never_mirrored() -> None:
    model = build(jitter=[0, 0, 0], crop=[0.775, 1.0])
    # long images too, which without a common square could give crops far apart
    for height, width in ((64, 64), (50, 120)):
        views = model.views(coordinates(400, height, width), seeds.generator("cpu", 0))
        a, b = boxes(model, views["images1"]), boxes(model, views["images2"])
        low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
        for box in (a, b):
            side = box[:, 2:] - box[:, :2]
            assert ((high - low).prod(1) / side.prod(1)).min() > 0.49
            torch.testing.assert_close(side[:, 0], side[:, 1], rtol=0, atol=1.0)
        assert ((a - b).abs().amax(1) > 1).float().mean() > 0.9
        for view in (views["images1"], views["images2"]):
            assert (view[:, 0, :, 0] < view[:, 0, :, -1]).all()


def test_crops_stay_inside_images_padded_to_a_common_size() -> None:
    model = build(jitter=[0, 0, 0])
    batch = coordinates(32)
    batch.sizes = torch.tensor([[40, 64], [64, 30]]).repeat(16, 1)
    last = boxes(model, model.views(batch, seeds.generator("cpu", 0))["images2"])[:, 2:]
    assert (last <= batch.sizes.flip(1) + 0.5).all()


def test_the_published_crop_is_224_of_256_pixels_unscaled() -> None:
    model = build(image_size=224, crop=[0.875, 0.875], jitter=[0, 0, 0])
    image = torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8)
    view = pixels(
        model, model.views(Batch(image, None, torch.arange(2)), seeds.generator("cpu", 0))["images2"]
    )
    windows = image[1].unfold(1, 224, 1).unfold(2, 224, 1)[0, :, :, :1].float()
    assert (windows - view[1, 0, 0, :]).abs().amax((-2, -1)).min() < 1e-2


def test_both_views_get_a_jitter_of_their_own() -> None:
    model = build()
    grey = Batch(torch.full((300, 3, 16, 16), 128, dtype=torch.uint8), None, torch.arange(300))
    views = model.views(grey, seeds.generator("cpu", 0))
    first, second = (pixels(model, views[name])[:, 0, 0, 0] / 128 for name in ("images1", "images2"))
    for factor in (first, second):  # of a grey image only the brightness changes
        assert 0.599 < factor.min() < 0.63
        assert 1.37 < factor.max() < 1.401
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.2


def test_real_pairs_and_the_two_controls() -> None:
    real = build(pairs="frames", jitter=[0, 0, 0], crop=[1.0, 1.0])
    assert real.needs == ("frames",)
    assert build().needs == ()
    first, second = torch.randint(256, (2, 8, 3, 40, 40), dtype=torch.uint8)
    batch = Batch(first, None, torch.arange(8), frames=second)
    views = real.views(batch, seeds.generator("cpu", 0))
    swapped = real.views(Batch(second, None, torch.arange(8), frames=first), seeds.generator("cpu", 0))
    torch.testing.assert_close(views["images2"], swapped["images1"])
    assert not torch.equal(views["images1"], views["images2"])

    views = build(pairs="same").views(batch, seeds.generator("cpu", 0))
    assert torch.equal(views["images1"], views["images2"])
    views = build(pairs="other", jitter=[0, 0, 0], crop=[1.0, 1.0]).views(batch, seeds.generator("cpu", 0))
    assert torch.equal(views["images2"], views["images1"].roll(1, 0))


@pytest.mark.parametrize(
    ("preset", "peak", "warmup", "stop", "planned"),
    [("paper", 1.5e-4, 40, 400, 800), ("v2", 3e-4, 12, 125, 250)],
)
def test_the_cosine_is_planned_for_twice_the_epochs_and_stopped_half_way(
    preset: str, peak: float, warmup: int, stop: int, planned: int
) -> None:
    recipe = config.build(MODULE.Config, registry.method("croco").preset(preset)).recipe
    assert recipe.epochs == stop
    for epoch in (warmup, (warmup + stop) // 2, stop):
        theirs = peak * (1 + math.cos(math.pi * (epoch - warmup) / (planned - warmup))) / 2
        assert learning_rate(epoch, 1, recipe) == pytest.approx(theirs, rel=1e-6)
    assert learning_rate(stop, 1, recipe) / peak == pytest.approx(0.54, abs=2e-3)


def test_weights_of_one_version_do_not_load_into_the_other() -> None:
    plain, rotary = build(), build(positions="rope")
    names = {ours: theirs for theirs, ours in OFFICIAL.PREFIXES.items()}

    def official(model: Any) -> dict[str, torch.Tensor]:
        def theirs(name: str) -> str:
            start = next(p for p in names if name.startswith(p))
            return name.replace(start, names[start], 1)

        state = model.state_dict()
        return {theirs(k): v[0] if k.endswith("table") else v for k, v in state.items()}

    load_strictly(plain, OFFICIAL.from_official(official(plain), plain.config), Path("v1"))
    load_strictly(rotary, OFFICIAL.from_official(official(rotary), rotary.config), Path("v2"))
    with pytest.raises(CheckpointError, match=r"positions\.table"):
        load_strictly(rotary, OFFICIAL.from_official(official(plain), rotary.config), Path("v1"))
    with pytest.raises(CheckpointError, match=r"positions\.table"):
        load_strictly(plain, OFFICIAL.from_official(official(rotary), plain.config), Path("v2"))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"mask_ratio": 0.01}, "hides 0 of 64"),
        ({"mask_ratio": 1.0}, "hides 64 of 64"),
        ({"crop": [0.7, 1.0]}, "share less than half"),
        ({"crop": [0.3, 1.0]}, "share less than half"),
        ({"crop": [0.9, 0.8]}, "crop"),
        ({"crop": [0.9, 1.2]}, "crop"),
        ({"positions": "rope", "decoder": {"width": 36, "heads": 6}}, "divisible by 4, not 6"),
        ({"decoder": {"width": 30}}, "divisible by 4"),
        ({"decoder": {"heads": 5}}, "5 heads"),
        ({"decoder": {"heads": 0}}, "0 heads"),
        ({"image_size": 30}, "multiple of the patch size"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**setting)
