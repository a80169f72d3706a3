"""What is special to DMAE: one mask for two networks, which layers are compared and how, what a teacher must be."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mimbench import config, data, paths, progress, registry, runner
from mimbench.encoder import InputSpec
from mimbench.errors import ConfigError
from mimbench.models.vit import ViT, ViTEncoder, ViTShape, patchify, unpatchify
from mimbench.optim import parameter_groups
from mimbench.runner import Request

MODULE = registry.load_method("dmae")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("dmae").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(model: Any, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    size = model.config.image_size
    return {"images": torch.randn(count, 3, size, size), "noise": torch.rand(count, model.backbone.tokens)}


def visible(model: Any, given: dict[str, torch.Tensor]) -> list[list[int]]:
    """The patches that a plain sort of the noise leaves visible, in the order of the noise."""
    return [np.argsort(row.numpy())[: model.keep].tolist() for row in given["noise"]]


def test_both_see_the_same_visible_patches_and_nothing_else() -> None:
    model = build()
    given = inputs(model)
    out, taught = model(**given), model.teach(**given)[0]
    assert taught.shape[1] == out["latent"].shape[1] == model.keep + 1
    hidden = out["mask"].bool()
    for row, places in enumerate(visible(model, given)):
        assert sorted((~hidden[row]).nonzero().flatten().tolist()) == sorted(places)
        x = model.teacher.embed(given["images"][row : row + 1])[:, places]
        x = torch.cat([model.teacher.cls_token + model.teacher.pos_embed[:, :1], x], dim=1)
        for block in model.teacher.blocks[: model.config.teacher_layers[0] + 1]:
            x = block(x)
        torch.testing.assert_close(taught[row], x[0], rtol=1e-5, atol=1e-5)
    changed = patchify(given["images"], 4)
    changed[hidden] += torch.randn_like(changed[hidden])
    again = {**given, "images": unpatchify(changed, 4)}
    assert torch.equal(model.teach(**again)[0], taught)
    assert torch.equal(model(**again)["latent"], out["latent"])


def test_a_teacher_like_the_student_with_the_identity_between_has_nothing_to_teach() -> None:
    model = build(teacher_backbone={"width": 64})
    model.load_teacher(model.encoder())
    with torch.no_grad():
        model.projections[0].weight.copy_(torch.eye(64))
        model.projections[0].bias.zero_()
    given = inputs(model)
    assert model(**given)["loss_distillation"] < 1e-6
    with torch.no_grad():
        model.teacher.blocks[0].mlp.fc2.bias.add_(torch.randn(64))
    assert model(**given)["loss_distillation"] > 1e-3


def test_the_teacher_stops_at_its_layer_and_the_student_goes_on() -> None:
    model, ran = build(student_layers=[1, 3], teacher_layers=[2, 0]), []
    for name in ("backbone", "teacher"):
        for number, block in enumerate(getattr(model, name).blocks):
            block.register_forward_hook(lambda *_, entry=(name, number): ran.append(entry))
    model.teacher.norm.register_forward_hook(lambda *_: ran.append(("teacher", "norm")))
    model(**inputs(model))
    assert sorted(ran) == [("backbone", n) for n in range(4)] + [("teacher", n) for n in range(3)]


def test_layers_are_blocks_counted_from_zero_and_paired_in_the_order_given() -> None:
    model = build(student_layers=[1, 3], teacher_layers=[2, 0])
    outputs: dict[tuple[str, int], torch.Tensor] = {}
    for name in ("backbone", "teacher"):
        for number, block in enumerate(getattr(model, name).blocks):
            block.register_forward_hook(
                lambda module, taken, made, entry=(name, number): outputs.update({entry: made})
            )
    out = model(**inputs(model))
    expected = 0.0
    for project, n, m in zip(model.projections, (1, 3), (2, 0), strict=True):
        student, teacher = project(outputs["backbone", n]).detach().numpy(), outputs["teacher", m].numpy()
        student = student / np.linalg.norm(student, axis=-1, keepdims=True)
        teacher = teacher / np.linalg.norm(teacher, axis=-1, keepdims=True)
        expected += np.abs(student - teacher).mean()
    assert out["loss_distillation"].item() == pytest.approx(expected, rel=1e-5)


def test_a_layer_listed_twice_counts_twice() -> None:
    once, twice = build(), build(student_layers=[2, 2], teacher_layers=[2, 2])
    state = once.state_dict()
    first = {name: value for name, value in state.items() if name.startswith("projections.0.")}
    twice.load_state_dict(state | {name.replace(".0.", ".1."): value for name, value in first.items()})
    given = inputs(once)
    expected = 2 * once(**given)["loss_distillation"]
    torch.testing.assert_close(twice(**given)["loss_distillation"], expected)


def test_the_distance_of_unrelated_features_is_small_as_in_the_authors_code() -> None:
    torch.manual_seed(0)
    found = MODULE.distance(torch.randn(4, 50, 1024), 100 * torch.randn(4, 50, 1024))
    assert found.item() == pytest.approx(2 / (np.pi * 1024) ** 0.5, rel=0.02)  # E|a - b|, a, b ~ N(0, 1 / D)
    assert 0.02 < found < 0.05


@pytest.mark.parametrize("normalised", [False, True])
def test_the_loss_is_that_of_hidden_pixels_plus_the_weighted_distance(normalised: bool) -> None:
    model = build(normalise_target=normalised, distill_weight=3.0)
    given = inputs(model)
    out = model(**given)
    patches, errors = patchify(given["images"], 4), []
    for row, patch in out["mask"].nonzero().tolist():
        target = patches[row, patch]
        if normalised:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((out["pred"][row, patch] - target).square().mean())
    assert len(errors) == 3 * 48
    torch.testing.assert_close(out["loss_reconstruction"], torch.stack(errors).mean())
    torch.testing.assert_close(out["loss"], out["loss_reconstruction"] + 3 * out["loss_distillation"])


def test_imitation_trains_the_student_up_to_its_layer_and_never_the_teacher() -> None:
    model = build(student_layers=[1], teacher_layers=[2])
    model(**inputs(model))["loss_distillation"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.blocks[1].parameters())
    assert model.projections[0].weight.grad.abs().sum() > 0
    untouched = (model.backbone.blocks[2], model.backbone.norm, model.decoder, model.teacher)
    assert all(p.grad is None for part in untouched for p in part.parameters())
    trained = {id(p) for group in parameter_groups(model, model.config.recipe) for p in group["params"]}
    assert not trained & {id(p) for p in model.teacher.parameters()}


def test_the_projection_is_the_students_and_starts_as_pytorch_makes_it() -> None:
    model = build()
    given = inputs(model)
    before = model.teach(**given)[0]
    assert model.projections[0].weight.shape == (128, 64)
    bound = 64**-0.5  # Xavier's would be sqrt(6 / 192), larger, and its bias zero
    assert 0.95 * bound < model.projections[0].weight.abs().max() <= bound
    assert model.projections[0].bias.abs().sum() > 0
    with torch.no_grad():
        model.projections[0].weight.add_(1.0)
    assert torch.equal(model.teach(**given)[0], before)


def test_without_distillation_the_teacher_rests_and_the_loss_is_maes() -> None:
    model = build(distill_weight=0, teacher="")
    model.teacher.blocks[0] = nn.Module()  # would fail when called
    given = inputs(model)
    out = model(**given)
    mae = registry.load_method("mae")
    table = config.merge(registry.method("mae").preset("smoke"), {"normalise_target": False})
    other = mae.Model(config.build(mae.Config, table)).eval()
    state = model.state_dict()
    other.load_state_dict({name: state[name] for name in other.state_dict()})
    assert torch.equal(out["loss"], other(**given)["loss"])
    assert "loss_distillation" not in out


@pytest.mark.parametrize("preset", ["cifar", "laptop", "smoke"])
def test_the_teacher_of_a_preset_fits_and_reconstructs_what_the_student_does(preset: str) -> None:
    student = config.build(MODULE.Config, registry.method("dmae").preset(preset))
    run, *settings = student.teacher.split()
    assert run == "run:mae"
    table = config.merge(registry.method("mae").preset(preset), config.parse_overrides(settings))
    teacher = config.build(registry.load_method("mae").Config, table)
    assert teacher.backbone == student.teacher_backbone
    assert teacher.image_size == student.image_size
    assert teacher.normalise_target is student.normalise_target is False
    assert (teacher.crop_scale, teacher.flip) == (student.crop_scale, student.flip)
    assert student.backbone.width * 2 == teacher.backbone.width
    for layers, shape in [
        (student.student_layers, student.backbone),
        (student.teacher_layers, teacher.backbone),
    ]:
        assert layers == (round(0.75 * shape.depth) - 1,)


def encoder(**changes: Any) -> ViTEncoder:
    shape = dataclasses.replace(ViTShape(patch_size=4, width=128, depth=4, heads=2), **changes)
    return ViTEncoder(ViT(32, shape), InputSpec(32), "class")


def test_any_plain_vit_of_the_right_size_can_teach() -> None:
    model, teacher = build(), encoder()
    model.load_teacher(teacher)
    own, given = model.teacher.state_dict(), teacher.vit.state_dict()
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in own)
    assert not any(p.requires_grad for p in model.teacher.parameters())
    teacher.vit.norm = nn.Identity()  # as where a paper has none
    model.load_teacher(teacher)


def test_another_teacher_is_refused() -> None:
    model = build()
    with pytest.raises(ConfigError, match=r"depth=5.*teacher_backbone is .*depth=4"):
        model.load_teacher(encoder(depth=5))
    with pytest.raises(ConfigError, match=r"heads=4.*teacher_backbone is .*heads=2"):
        model.load_teacher(encoder(heads=4))
    larger = ViTEncoder(ViT(64, model.config.teacher_backbone), InputSpec(64), "class")
    with pytest.raises(ConfigError, match=r"size=64.*size=32.*image_size"):
        model.load_teacher(larger)
    grey = ViTEncoder(ViT(32, model.config.teacher_backbone), InputSpec(32, (0.5,) * 3, (0.5,) * 3), "class")
    with pytest.raises(ConfigError, match="normalised alike"):
        model.load_teacher(grey)


@pytest.mark.parametrize("slug", ["simmim", "simsiam"])
def test_a_teacher_that_is_no_plain_vit_is_refused(slug: str) -> None:
    other = registry.load_method(slug)
    made = other.Model(config.build(other.Config, registry.method(slug).preset("smoke"))).encoder()
    with pytest.raises(ConfigError, match=re.escape(made.name) + r".*not MAE's plain ViT.*run:mae"):
        build().load_teacher(made)


def test_a_model_of_timm_is_refused() -> None:
    timm = registry.load_method("timm")
    made = timm.Model(timm.Config(name="vit_tiny_patch16_224", pretrained=False)).encoder()
    with pytest.raises(ConfigError, match=r"vit_tiny_patch16_224.*not MAE's plain ViT"):
        build().load_teacher(made)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"student_layers": [4]}, r"student_layers = \[4\].*4 blocks.*here \[2\]"),
        ({"teacher_layers": [-1]}, "teacher_layers"),
        ({"student_layers": []}, "student_layers"),
        ({"student_layers": [1, 2]}, "2 student_layers cannot imitate 1"),
        ({"teacher": ""}, "without a teacher"),
        ({"distill_weight": -1.0}, "distill_weight"),
        ({"teacher_backbone": {"patch_size": 8}}, "patches of 4 pixels are not the teacher's of 8"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**overrides)


def train(*overrides: str) -> runner.Pretrained:
    (made,) = runner.pretrain_all(Request(("dmae",), preset="smoke", overrides=overrides), progress.quiet())
    return made


def test_the_teacher_is_trained_first_and_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    few = dataclasses.replace(digits, train=digits.train.subset(torch.arange(128)))
    monkeypatch.setattr(data, "load", lambda *_: few)
    size = ("width=32", "depth=2", "heads=2")
    teacher = "run:mae normalise_target=false recipe.epochs=1 recipe.warmup_epochs=0"
    teacher += "".join(f" backbone.{item}" for item in size)
    student = [f"backbone.{item}" for item in size] + [f"teacher_backbone.{item}" for item in size]
    layers = ("student_layers=[1]", "teacher_layers=[1]")
    made = train(f"teacher={teacher}", "recipe.epochs=2", "recipe.warmup_epochs=0", *student, *layers)
    table = config.merge(registry.method("mae").preset("smoke"), config.parse_overrides(teacher.split()[1:]))
    mae = config.build(registry.load_method("mae").Config, table)
    taught = runner.pretrain(
        "mae", mae, few, 0, torch.device("cpu"), progress.quiet(), preset="smoke", may_train=False
    )
    found, expected = made.model.teacher.state_dict(), taught.encoder.vit.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {"loss_reconstruction", "loss_distillation"} <= made.history.curve[0].keys()
    assert any("128 images" in line for line in made.history.warnings)


def test_a_missing_teacher_is_named_before_any_training() -> None:
    with pytest.raises(ConfigError, match=r"no teacher 'nowhere'.*run:SLUG"):
        train("teacher=nowhere")
    assert not (paths.cache() / "pretrain").exists()


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    assert paper.recipe.base_lr * paper.recipe.batch_size / paper.recipe.lr_batch == pytest.approx(2.4e-3)
    assert (paper.recipe.epochs, paper.recipe.warmup_epochs, paper.mask_ratio) == (100, 20, 0.75)
    assert (paper.backbone.name, paper.teacher_backbone.name) == ("vit-b/16", "vit-l/16")
    assert (paper.student_layers, paper.teacher_layers) == ((8,), (17,))
    assert not paper.normalise_target
