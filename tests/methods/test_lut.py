"""What is special to LUT: which places each view shows, who predicts what, how the teacher moves, the two views."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mimbench import config, registry, seeds
from mimbench.data import Batch
from mimbench.encoder import normalise
from mimbench.errors import ConfigError
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import learning_rate, parameter_groups

MODULE = registry.load_method("lut")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("lut").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table))


def inputs(model: Any, count: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shape = (count, 3, *(model.config.image_size,) * 2)
    noise = torch.rand(count, model.backbone.tokens)
    return {"images": torch.randn(shape), "coloured": torch.randn(shape), "noise": noise}


def shake(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(("ratio", "keep"), [(0.75, 16), (0.5, 32), (0.9, 6)])
def test_the_views_show_as_many_places_and_none_in_common(ratio: float, keep: int) -> None:
    model = build(mask_ratio=ratio)
    given = inputs(model)
    out = model(**given)
    first, second = out["mask"] == 0, out["mask2"] == 0
    assert first.sum(1).tolist() == second.sum(1).tolist() == [keep] * 4
    assert not (first & second).any()
    rank = given["noise"].argsort(1).argsort(1)
    assert torch.equal(first | second, rank < 2 * keep)


def test_the_student_sees_nothing_of_what_is_hidden_and_the_teacher_all() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    changed = dict(given)
    for view, mask in [("images", "mask"), ("coloured", "mask2")]:
        patches = patchify(given[view], 4)
        patches[out[mask].bool()] += 1.0
        changed[view] = unpatchify(patches, 4)
    again = model(**changed)
    for key in ("latent", "latent2", "pred", "student"):
        assert torch.equal(out[key], again[key])
    assert ((out["teacher"] - again["teacher"]).abs().amax(1) > 1e-4).all()


def test_the_teacher_projects_whole_views_without_mask_and_predictor() -> None:
    model = build()
    shake(model.teacher)
    given = inputs(model)
    out = model(**given)
    backbone, projector = model.teacher["backbone"], model.teacher["projector"]
    tokens = backbone(backbone.embed(torch.cat([given["images"], given["coloured"]])))
    torch.testing.assert_close(out["teacher"], projector(tokens[:, 1:].mean(1)), rtol=1e-5, atol=1e-5)
    again = model(**given | {"noise": given["noise"].flip(1)})
    assert torch.equal(again["teacher"], out["teacher"])
    assert not torch.allclose(again["student"], out["student"])


@pytest.mark.parametrize("normalised", [True, False])
def test_only_view_1_is_reconstructed_and_only_where_it_is_hidden(normalised: bool) -> None:
    model = build(normalise_target=normalised)
    given = inputs(model)
    out = model(**given)
    patches, errors = patchify(given["images"], 4), []
    for row, place in out["mask"].nonzero().tolist():
        target = patches[row, place]
        if normalised:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((out["pred"][row, place] - target).square().mean())
    torch.testing.assert_close(out["loss_mae"], torch.stack(errors).mean())
    again = model(**given | {"coloured": torch.randn_like(given["coloured"])})
    assert torch.equal(again["loss_mae"], out["loss_mae"])


def test_each_student_view_is_compared_with_the_teachers_other_view() -> None:
    model = build(bc_weight=0.25)
    shake(model.teacher)
    out = model(**inputs(model))
    student = out["student"].detach().double().numpy().reshape(2, 4, -1)
    teacher = out["teacher"].double().numpy().reshape(2, 4, -1)
    terms = []
    for view in (0, 1):
        for a, b in zip(student[view], teacher[1 - view], strict=True):
            terms.append(np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)).sum())
    assert out["loss_bc"].item() == pytest.approx(np.mean(terms), rel=1e-5)
    assert out["loss"].item() == pytest.approx((out["loss_mae"] + 0.25 * out["loss_bc"]).item())


def test_the_heads_read_the_mean_of_the_patches_without_the_class_token() -> None:
    model = build()
    latent = torch.randn(4, 17, 64)
    other = latent.clone()
    other[:, 0] = torch.randn(4, 64)
    assert torch.equal(model.contextualise(latent), model.contextualise(other))
    shuffled = torch.cat([latent[:, :1], latent[:, 1:].flip(1)], dim=1)
    torch.testing.assert_close(
        model.contextualise(latent), model.contextualise(shuffled), rtol=1e-4, atol=1e-4
    )


def test_each_loss_trains_the_encoder_and_its_own_heads() -> None:
    for loss, own, foreign in [
        ("loss_mae", ["decoder"], ["projector", "predictor"]),
        ("loss_bc", ["projector", "predictor"], ["decoder"]),
    ]:
        model = build()
        shake(model.teacher)
        model(**inputs(model))[loss].backward()
        assert model.backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
        assert all(p.grad.abs().sum() > 0 for n in own for p in getattr(model, n).parameters())
        assert all(p.grad is None for n in [*foreign, "teacher"] for p in getattr(model, n).parameters())


def test_batch_norm_takes_one_view_at_a_time_and_the_teachers_reads_averages() -> None:
    model = build().train()
    student_norm, teacher_norm = model.projector[1], model.teacher["projector"][1]
    assert student_norm.training
    assert not teacher_norm.training
    given = inputs(model)
    out = model(**given)
    for view, latent in enumerate((out["latent"], out["latent2"])):
        hidden = latent[:, 1:].mean(1)
        for head in (model.projector, model.predictor):
            hidden = head[0](hidden)
            hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
            hidden = head[3](hidden.relu())
        torch.testing.assert_close(out["student"].chunk(2)[view], hidden, rtol=1e-4, atol=1e-4)
    assert student_norm.num_batches_tracked == 2
    assert not teacher_norm.running_mean.any()
    model.after_step(0.0)
    torch.testing.assert_close(teacher_norm.running_mean, 0.1 * student_norm.running_mean)
    assert not model.eval().projector[1].training


def test_the_teacher_starts_as_the_student_and_its_decay_rises_to_1_by_a_cosine() -> None:
    model = build(momentum=0.6)
    own, teacher = model.state_dict(), model.teacher.state_dict()
    assert all(torch.equal(own[key], value) for key, value in teacher.items())
    shake(model.backbone)
    shake(model.projector)
    expected = {key: value.clone() for key, value in teacher.items() if value.is_floating_point()}
    for iteration in (0, 3, 7, 9):
        model.after_step(iteration / 10)
        decay = 1 + 0.5 * (0.6 - 1) * (1 + np.cos(np.pi * iteration / 10))
        expected = {key: decay * value + (1 - decay) * own[key] for key, value in expected.items()}
    for key, value in expected.items():
        torch.testing.assert_close(model.teacher.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch", "lr"), [(4096, 2.4e-3), (1024, 1.2e-3), (256, 6e-4)])
def test_the_learning_rate_grows_with_the_square_root_of_the_batch(batch: int, lr: float) -> None:
    recipe = config.build(MODULE.Config, {"recipe": {"batch_size": batch}}).recipe
    (scale,) = {group["lr_scale"] for group in parameter_groups(build(), recipe)}
    assert scale * learning_rate(40, 1, recipe) == pytest.approx(lr)


def test_a_learning_rate_given_outright_is_kept() -> None:
    recipe = config.build(MODULE.Config, {"recipe": {"batch_size": 64, "lr_batch": 0}}).recipe
    assert {group["lr_scale"] for group in parameter_groups(build(), recipe)} == {1.0}


def windows(image: torch.Tensor, size: int, padding: int) -> torch.Tensor:
    """Every crop that torchvision's Resize, RandomCrop (reflect) and RandomHorizontalFlip can give, by torch alone."""
    height, width = image.shape[1:]
    target = [length * size // min(height, width) for length in (height, width)]
    if target != [height, width]:
        resized = F.interpolate(image[None], target, mode="bicubic", antialias=True, align_corners=False)
        image = resized[0].clamp(0, 1)
    image = F.pad(image[None], [padding] * 4, mode="reflect")
    crops = image.unfold(2, size, 1).unfold(3, size, 1).permute(2, 3, 0, 1, 4, 5).reshape(-1, 3, size, size)
    return torch.cat([crops, crops.flip(3)])


def test_crops_are_all_those_of_the_resized_image_with_mirrored_borders() -> None:
    image = torch.randint(256, (1, 3, 6, 7), dtype=torch.uint8)
    batch = Batch(image.expand(2000, -1, -1, -1), None, torch.arange(2000))
    found = MODULE.simple_crop(batch, 6, 2, 0.5, seeds.generator("cpu", 0))
    expected = windows(image[0] / 255, 6, 2)
    distance = torch.cdist(found.flatten(1), expected.flatten(1), p=float("inf"))
    assert distance.amin(1).max() < 1e-5
    assert len(expected) == 2 * 5 * 6
    assert (distance.argmin(1).bincount(minlength=60) > 10).all()


def test_the_shorter_side_of_each_image_of_a_batch_becomes_the_crop() -> None:
    generator = seeds.generator("cpu", 0)
    sizes = torch.tensor([[20, 33], [47, 24], [16, 16]])
    images = torch.zeros(3, 3, 47, 33)
    for row, (height, width) in enumerate(sizes.tolist()):
        images[row, :, :height, :width] = torch.rand(3, height, width)
    found = MODULE.simple_crop(Batch(images, sizes, torch.arange(3)), 16, 4, 0.5, generator)
    for row, (height, width) in enumerate(sizes.tolist()):
        expected = windows(images[row, :, :height, :width], 16, 4)
        assert (found[row] - expected).abs().amax((1, 2, 3)).min() < 1e-5


def picture_batch(count: int) -> Batch:
    torch.manual_seed(3)
    return Batch(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), None, torch.arange(count))


def test_view_1_keeps_its_colours_and_view_2_is_grey_solarised_or_blurred() -> None:
    model = build(jitter_p=0.0, padding=0, blur=[1.0, 1.0])
    batch = picture_batch(300)
    views = model.views(batch, seeds.generator("cpu", 0))
    images = batch.images / 255
    torch.testing.assert_close(views["images"], normalise(images, model.input), rtol=0, atol=1e-4)
    bell = torch.exp(-0.5 * torch.arange(-3.0, 4.0) ** 2)
    kernel = (bell[:, None] * bell / bell.sum() ** 2).expand(3, 1, 7, 7)
    level = batch.images.long()
    effects = [
        torch.tensor([0.2989, 0.587, 0.114])
        .view(1, 3, 1, 1)
        .mul(images)
        .sum(1, keepdim=True)
        .expand_as(images),
        torch.where(level < 128, level, 255 - level) / 255,
        F.conv2d(F.pad(images, [3] * 4, mode="reflect"), kernel, groups=3),
    ]
    away = [(views["coloured"] - normalise(e, model.input)).abs().amax((1, 2, 3)) for e in effects]
    found = torch.stack(away) < 1e-3
    assert (found.sum(0) == 1).all()
    assert ((found.sum(1) > 70) & (found.sum(1) < 130)).all()


def test_colours_are_jittered_in_view_2_alone() -> None:
    calm, lively = build(jitter_p=0.0), build(jitter_p=1.0)
    before, after = (model.views(picture_batch(16), seeds.generator("cpu", 0)) for model in (calm, lively))
    assert torch.equal(before["images"], after["images"])
    assert ((before["coloured"] - after["coloured"]).abs().amax((1, 2, 3)) > 0.01).all()


def test_the_authors_names_find_their_place_and_what_the_teacher_never_runs_is_left_out() -> None:
    official = registry.load_method("lut", "official")
    model = build()
    ours = {**model.state_dict()}
    theirs = {}
    for name, value in ours.items():
        network = "ema" if name.startswith("teacher.") else "model"
        name = name.removeprefix("teacher.").removeprefix("backbone.").replace("projector.", "head.")
        theirs[
            f"{network}.{name.replace('decoder.mask_token', 'mask_token').replace('decoder.', 'decoder_')}"
        ] = value
    unread = {"ema.decoder_embed.weight": torch.ones(1), "ema.predictor.1.running_mean": torch.ones(1)}
    found = official.from_official(theirs | unread, model.config)
    assert found.keys() == ours.keys()
    assert all(found[name] is ours[name] for name in ours)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"mask_ratio": 0.4}, "same places"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"recipe": {"batch_size": 4, "accumulate": 4}}, "BatchNorm"),
        ({"padding": 32}, "padding"),
        ({"momentum": 1.1}, "momentum"),
        ({"blur": [0.0, 1.0]}, "blur"),
        ({"bc_weight": -1}, "bc_weight"),
        ({"image_size": 30}, "multiple of the patch size"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**overrides)


def test_heads_without_batch_norm_take_single_images() -> None:
    model = build(
        recipe={"batch_size": 1}, heads={"norm": "layer", "activation": "gelu", "predictor_layers": 0}
    )
    out = model.train()(**inputs(model, count=1))
    assert torch.isfinite(out["loss"])
    assert not list(model.predictor.parameters())
