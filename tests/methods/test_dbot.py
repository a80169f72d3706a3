"""What is special to dBOT: the teacher's features as target, and stages that make the student the next teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimbench import config, data, registry
from mimbench.errors import ConfigError
from mimbench.fit import fit
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import learning_rate, make_optimizer, parameter_groups
from mimbench.progress import quiet

MODULE = registry.load_method("dbot")
SMALL: dict[str, Any] = {
    "image_size": 16,
    "backbone": {"width": 32, "depth": 2},
    "decoder": {"width": 32, "depth": 1},
    "first_teacher_depth": 2,
    "drop_path": 0.1,
    "recipe": {"epochs": 3, "stages": 3, "batch_size": 16, "warmup_epochs": 0},
}


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("dbot").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table))


def small(**overrides: Any) -> Any:
    return build(**config.merge(SMALL, overrides))


def inputs(model: Any, count: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(1)
    size = model.config.image_size
    return {"images": torch.randn(count, 3, size, size), "noise": torch.rand(count, model.backbone.tokens)}


def copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model: Any, folder: Path | None = None) -> Any:
    """Six steps on digits, two in each of three stages."""
    split = data.load("digits").train.subset(torch.arange(32))
    options = {"seed": 0, "device": torch.device("cpu"), "progress": quiet(), "folder": folder}
    return fit(model, split, model.config.recipe, **options)


def watch(model: Any) -> list[dict[str, dict[str, Tensor]]]:
    """A list that fills with copies of student, decoder and teacher as each forward sees them."""
    seen: list[dict[str, dict[str, Tensor]]] = []
    parts = {"student": model.backbone, "decoder": model.decoder, "teacher": model.teacher}
    model.register_forward_pre_hook(
        lambda *_: seen.append({name: copied(part) for name, part in parts.items()})
    )
    return seen


# The loss


@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_is_that_of_a_loop_over_hidden_patches_and_the_class_token(normalised: bool) -> None:
    model = build(normalise_target=normalised)
    out = model(**inputs(model))
    terms = []
    for row in range(3):
        hidden = [0] + [int(patch) + 1 for patch in out["mask"][row].nonzero()]
        assert len(hidden) == 48 + 1
        for place in hidden:
            target = out["target"][row, place]
            if normalised:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                assert float(target.var()) == pytest.approx(1, abs=1e-3)
            gap = (out["pred"][row, place] - target).abs()
            terms.append(torch.where(gap < 2, gap**2 / 4, gap - 1).mean())
    torch.testing.assert_close(out["loss"], torch.stack(terms).mean())


def test_the_target_is_what_the_teacher_makes_of_the_whole_image_before_its_final_norm() -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = inputs(model)
    target = model(**given)["target"]
    normed = model.teacher(model.teacher.embed(given["images"]))
    torch.testing.assert_close(model.teacher.norm(target), normed)
    assert not torch.allclose(target, normed, atol=0.1)


def test_the_student_sees_visible_patches_only_and_the_teacher_all() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    assert out["latent"].shape[1] == model.keep + 1 == 17
    changed = patchify(given["images"], 4)
    changed[out["mask"].bool()] += 1.0
    again = model(unpatchify(changed, 4), given["noise"])
    assert torch.equal(again["pred"], out["pred"])
    assert not torch.allclose(again["target"], out["target"])


def test_student_and_decoder_learn_and_the_teacher_gets_no_gradient() -> None:
    model = build()
    model(**inputs(model))["loss"].backward()
    for network in (model.backbone, model.decoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


def test_only_the_student_skips_branches() -> None:
    model = build(drop_path=0.3, decoder={"depth": 4})
    assert [block.drop_path for block in model.backbone.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [block.drop_path for block in model.decoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert {block.drop_path for block in model.teacher.blocks} == {0.0}


# The stages


def test_the_first_teacher_is_the_student_as_it_starts() -> None:
    model = build()
    assert equal(copied(model.teacher), copied(model.backbone))


@pytest.fixture(scope="module")
def staged() -> tuple[Any, list[dict[str, dict[str, Tensor]]], list[float]]:
    """A model trained in three stages, its networks at each step, and the norm of the optimizer's moments."""
    model, norms = small(), []
    seen = watch(model)

    def spy(*given: Any) -> Any:
        optimizer = make_optimizer(*given)
        model.register_forward_pre_hook(
            lambda *_: norms.append(sum(float(s["exp_avg"].norm()) for s in optimizer.state.values()))
        )
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mimbench.fit.make_optimizer", spy)
        train(model)
    return model, seen, norms


def test_the_teacher_moves_between_stages_only(staged: Any) -> None:
    model, seen, _ = staged
    teachers, students = ([copies[part] for copies in seen] for part in ("teacher", "student"))
    assert [step for step in range(1, 6) if not equal(teachers[step - 1], teachers[step])] == [2, 4]
    assert not any(equal(students[step - 1], students[step]) for step in range(1, 6))
    assert model.stage == 2


def test_the_student_that_ends_a_stage_is_the_next_teacher(staged: Any) -> None:
    """The first stage is a training of its own of a third of the epochs, its schedule included."""
    alone = small(recipe={"epochs": 1, "stages": 1})
    train(alone)
    assert equal(staged[1][2]["teacher"], copied(alone.backbone))


def test_a_new_student_is_neither_the_teacher_nor_the_first_student(staged: Any) -> None:
    model, seen, _ = staged
    starts = [seen[step] for step in (0, 2, 4)]
    for part, network in (("student", model.backbone), ("decoder", model.decoder)):
        for name, parameter in network.named_parameters():
            first, second, third = (start[part][name] for start in starts)
            if parameter.ndim > 1 or name == "patch_embed.proj.bias":
                assert not torch.equal(first, second), name
                assert not torch.equal(second, third), name
                assert first.std().item() == pytest.approx(second.std().item(), rel=0.4), name
            else:  # zero biases and unit norms again, whatever training made of them
                assert torch.equal(first, second), name
        assert all(torch.equal(value, starts[1][part][name]) for name, value in network.named_buffers())
    for start in starts[1:]:
        assert not any(
            torch.equal(start["student"][n], start["teacher"][n])
            for n, _ in model.backbone.named_parameters()
        )


def test_the_optimizer_keeps_its_moments_when_the_student_starts_afresh(staged: Any) -> None:
    norms = staged[2]
    assert norms[0] == 0
    assert len(norms) == 6
    assert all(norm > 0 for norm in norms[1:])


def test_two_runs_with_one_seed_agree_whatever_was_drawn_before(staged: Any) -> None:
    again = small()
    torch.manual_seed(99)
    train(again)
    assert equal(copied(again), copied(staged[0]))


@pytest.mark.parametrize("stop", [1, 2])  # the last step of a stage, and the first of the next
def test_an_interrupted_run_ends_as_a_whole_one(stop: int, tmp_path: Path, staged: Any) -> None:
    stopped, resumed = (small(recipe={"checkpoint_minutes": 0}) for _ in range(2))

    def after_step(progress: float) -> None:
        if round(progress * 6) == stop + 1:  # what the step before it left was saved
            raise KeyboardInterrupt

    stopped.after_step = after_step
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path)
    assert train(resumed, tmp_path).resumed == 1
    assert equal(copied(resumed), copied(staged[0]))
    assert resumed.reached == 2


# The depth of the first teacher


def test_a_first_teacher_of_no_depth_gives_a_linear_map_of_each_patch() -> None:
    model = build(first_teacher_depth=0)
    images = inputs(model)["images"]
    vit = model.teacher
    found = model.target(images)
    weight = vit.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    expected = patchify(images, 4) @ weight.T + vit.patch_embed.proj.bias + vit.pos_embed[:, 1:]
    torch.testing.assert_close(found[:, 1:], expected)
    torch.testing.assert_close(found[:, 0], (vit.cls_token + vit.pos_embed[:, :1])[:, 0].expand(3, -1))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_later_teachers_have_the_depth_of_the_student(depth: int) -> None:
    model = small(first_teacher_depth=depth)
    names = list(model.state_dict())
    calls: list[int] = []
    for number, block in enumerate(model.teacher.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    model(**inputs(model))
    assert calls == list(range(depth))
    model.before_step(0.33)
    assert model.stage == 0
    model.before_step(1 / 3)
    calls.clear()
    model(**inputs(model))
    assert calls == [0, 1]
    assert list(model.state_dict()) == names
    again = small(first_teacher_depth=depth)
    again.load_state_dict(model.state_dict())
    given = inputs(model)
    assert torch.equal(again.target(given["images"]), model.target(given["images"]))


# Settings


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"first_teacher_depth": 5}, "first_teacher_depth"),
        ({"first_teacher_depth": -1}, "first_teacher_depth"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"recipe": {"stages": 0}}, "stages"),
        ({"image_size": 30}, "multiple of the patch size"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**wrong)


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    recipe = paper.recipe
    assert recipe.base_lr * recipe.batch_size / recipe.lr_batch == pytest.approx(2.4e-3)
    rates = [learning_rate(epoch, 1, recipe) for epoch in (0, 40, 799, 800, 840, 1599)]
    assert rates == pytest.approx([0, 2.4e-3, 0, 0, 2.4e-3, 0], abs=2e-8)
    model = build()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, model.config.recipe)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    assert {"decoder.mask_token", "backbone.cls_token"} <= decayed
    assert not any(name.startswith("teacher.") or name.endswith(("bias", "norm.weight")) for name in decayed)
