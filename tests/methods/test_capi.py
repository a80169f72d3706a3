"""What is special to CAPI: masks, assignments, who sees what, who learns from what, rotary positions, the readout."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from mimbench import config, registry, seeds
from mimbench.data import Batch
from mimbench.errors import ConfigError
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import learning_rate, make_optimizer, parameter_groups, set_learning_rates

MODULE = registry.load_method("capi")
NETWORKS = registry.load_method("capi", "model")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("capi").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def views(model: Any, count: int = 4) -> dict[str, torch.Tensor]:
    images = torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    batch = Batch(images.to(torch.uint8), None, torch.arange(count))
    return model.views(batch, seeds.generator("cpu", 0))


def widths(mask: torch.Tensor, roll: bool) -> set[int]:
    """Widths of the rectangles in raster order, cut to the mask's size and placed anywhere, that the mask is."""
    side, cells = mask.shape[0], int(mask.sum())
    found = set()
    for width in range(1, side + 1):
        height = -(-cells // width)
        if height > side:
            continue
        whole = torch.zeros(side, side, dtype=torch.bool)
        whole[:height, :width] = True
        whole[height - 1, cells - (height - 1) * width : width] = False
        for top in range(side if roll else side - height + 1):
            for left in range(side if roll else side - width + 1):
                if torch.equal(whole.roll((top, left), (0, 1)), mask):
                    found.add(width)
    return found


@pytest.mark.parametrize("roll", [True, False])
def test_what_is_visible_is_one_rectangle_of_the_exact_count_up_to_its_last_row(roll: bool) -> None:
    model = build(roll=roll)
    masks = ~model.draw_hidden(32, seeds.generator("cpu", 0)).unflatten(1, (8, 8))
    assert masks.sum((1, 2)).tolist() == [64 - 41] * 32
    found = [widths(mask, roll) for mask in masks]
    assert all(found)
    # Aspects from 1/2 to 2 make 23 patches 4 to 7 wide.
    assert set().union(*found) == {4, 5, 6, 7}
    wrapped = [not widths(mask, roll=False) for mask in masks]
    assert any(wrapped) == roll


def test_a_block_may_be_what_is_hidden_and_masks_may_be_random() -> None:
    block, scattered = (
        build(masking=name).draw_hidden(8, seeds.generator("cpu", 0)).unflatten(1, (8, 8))
        for name in ("block", "random")
    )
    for masks in (block, scattered):
        assert masks.sum((1, 2)).tolist() == [41] * 8
    assert all(widths(mask, roll=True) for mask in block)
    assert not any(widths(mask, roll=True) or widths(~mask, roll=True) for mask in scattered)


def test_a_share_of_the_hidden_patches_is_predicted() -> None:
    model = build()
    given = views(model, 16)
    mask = model(**given)["mask"].bool()
    assert given["visible"].shape == (16, 23)
    assert given["predicted"].shape == (16, 8)
    assert torch.equal(given["visible"], given["visible"].sort(1).values)
    assert not mask.gather(1, given["visible"]).any()
    assert mask.gather(1, given["predicted"]).all()
    assert all(len(set(row)) == 8 for row in given["predicted"].tolist())
    assert given["predicted"].unique().numel() > 40


def test_the_student_sees_the_visible_patches_only_and_the_teacher_all() -> None:
    model = build()
    given = views(model)
    out = model(**given)
    for hidden in (True, False):
        changed = patchify(given["images"], 4)
        changed[out["mask"].bool() == hidden] += 1.0
        again = model(**{**given, "images": unpatchify(changed, 4)})
        assert torch.equal(again["latent"], out["latent"]) == hidden
        assert torch.equal(again["pred"], out["pred"]) == hidden
        assert not torch.allclose(again["target"], out["target"])


def test_predictions_are_independent_of_each_other_and_differ_by_place() -> None:
    model = build()
    given = views(model)
    pred = model(**given)["pred"]
    alone = model(**{**given, "predicted": given["predicted"][:, 2:3]})["pred"]
    torch.testing.assert_close(alone, pred[:, 2:3])
    assert not torch.allclose(pred[:, 2], pred[:, 3])


def slow_sinkhorn(scores: list[list[float]], iterations: int) -> list[list[float]]:
    highest = [max(column) for column in zip(*scores, strict=True)]
    shares = [[math.exp(s - top + 50) for s, top in zip(row, highest, strict=True)] for row in scores]
    for _ in range(iterations):
        sums = [sum(column) + 1e-8 for column in zip(*shares, strict=True)]
        shares = [[s / total for s, total in zip(row, sums, strict=True)] for row in shares]
        shares = [[s / (sum(row) + 1e-8) for s in row] for row in shares]
    return shares


def test_assignments_are_even_over_the_batch_at_each_position_for_itself() -> None:
    torch.manual_seed(0)
    scores = 3 * torch.randn(5, 6, 4)  # positions, images, prototypes
    found = MODULE.sinkhorn(scores, 3)
    for position in range(5):
        expected = torch.tensor(slow_sinkhorn(scores[position].tolist(), 3))
        torch.testing.assert_close(found[position], expected, rtol=1e-4, atol=1e-6)
    even = MODULE.sinkhorn(scores, 200)
    torch.testing.assert_close(even.sum(1), torch.full((5, 4), 6 / 4), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(even.sum(2), torch.ones(5, 6))
    torch.testing.assert_close(MODULE.sinkhorn(scores + 1e4, 3), found, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("positionwise", [True, False])
def test_the_clustering_is_the_plain_computation(positionwise: bool) -> None:
    model = build(positionwise=positionwise, prototypes=5)
    torch.manual_seed(0)
    patches = torch.randn(3, 7, 64)
    layer = model.clustering.layer
    with torch.no_grad():
        layer.bias.normal_()
    shares, loss = model.clustering(patches)
    assert loss.requires_grad
    assert not shares.requires_grad
    loss = loss.detach()
    logits = patches / patches.norm(dim=-1, keepdim=True) @ layer.weight.detach().T + layer.bias.detach()
    scores = (logits / 0.06).double()
    rows = [scores[:, n] for n in range(7)] if positionwise else [scores.flatten(0, 1)]
    slow = [torch.tensor(slow_sinkhorn(group.tolist(), 3)) for group in rows]
    expected = torch.stack(slow, 1) if positionwise else slow[0].unflatten(0, (3, 7))
    torch.testing.assert_close(shares, expected, rtol=1e-3, atol=1e-5)
    own = (logits / 0.12).softmax(-1).flatten(0, 1).tolist()
    losses = [
        -sum(share * math.log(p) for share, p in zip(*rows, strict=True))
        for rows in zip(shares.flatten(0, 1).tolist(), own, strict=True)
    ]
    assert float(loss) == pytest.approx(sum(losses) / 21, rel=1e-4)


def test_the_head_weighs_the_directions_of_input_and_prototypes_by_a_gain() -> None:
    torch.manual_seed(0)
    head, x = MODULE.Head(8, 3), torch.randn(2, 8)
    assert torch.equal(head.gain.detach(), torch.ones(3, 1))
    with torch.no_grad():
        head.gain.copy_(torch.tensor([[1.0], [2.0], [-0.5]]))
    cosine = torch.cosine_similarity(x[:, None], head.direction[None], dim=-1)
    torch.testing.assert_close(head(5 * x), cosine * head.gain[:, 0], rtol=1e-5, atol=1e-6)


def test_each_loss_trains_its_own_and_the_teacher_gets_no_gradient() -> None:
    model = build()
    for loss, trained in (("loss_capi", {"student", "head"}), ("loss_clustering", {"clustering"})):
        model.zero_grad()
        model(**views(model))[loss].backward()
        reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert reached == trained
    out = model(**views(model))
    torch.testing.assert_close(out["loss"], out["loss_capi"] + out["loss_clustering"])
    entropy = -(out["target"].double() * out["target"].double().log()).nansum(-1).mean()
    torch.testing.assert_close(out["target_entropy"].double(), entropy, rtol=1e-4, atol=1e-5)


def test_groups_of_one_optimizer_step_as_the_two_of_the_authors() -> None:
    ratio = 0.5
    model = build(clustering_lr=ratio)
    twin = copy.deepcopy(model)
    recipe = model.config.recipe
    together = make_optimizer(model, recipe)
    lr, betas = 3e-3, (0.9, 0.95)
    names = {id(p): n for n, p in twin.named_parameters()}

    def group(lr: float, decay: float, chosen: Any) -> dict[str, Any]:
        parameters = [p for p in twin.parameters() if p.requires_grad and chosen(names[id(p)])]
        return {"params": parameters, "lr": lr, "weight_decay": decay}

    def plain(name: str) -> bool:
        return not name.startswith("clustering") and "patch_embed" not in name and ".norm" not in name

    student = torch.optim.AdamW(
        [
            group(lr, 0.1, plain),
            group(lr, 0.01, lambda n: ".norm" in n),
            group(lr / 5, 0.1, lambda n: n.endswith("patch_embed.proj.weight")),
            group(lr / 5, 0.0, lambda n: n.endswith("patch_embed.proj.bias")),
        ],
        betas=betas,
    )
    clustering = torch.optim.AdamW(twin.clustering.parameters(), lr=lr * ratio, betas=betas)
    given = views(model)
    for _ in range(3):
        for each in (together, student, clustering):
            each.zero_grad()
        model(**given)["loss"].backward()
        set_learning_rates(together, lr, lr)
        together.step()
        out = twin(**given)
        out["loss_clustering"].backward()
        out["loss_capi"].backward()
        student.step()
        clustering.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_teacher_starts_as_a_copy_and_follows_as_the_schedule_says() -> None:
    model = build(momentum=0.9, recipe={"epochs": 20, "warmup_epochs": 5}, drop_path=0.5)
    student, teacher = list(model.student.parameters()), list(model.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(student, teacher, strict=True))
    assert all(block.drop_path == 0 for block in (*model.teacher.encoder, *model.teacher.predictor))
    end = 0.1 * (1 + math.cos(0.8 * math.pi)) / 2
    schedule = {0.0: 0.0, 0.125: 0.05, 0.25: 0.1, 0.625: 0.1 * (1 + math.cos(0.4 * math.pi)) / 2, 1.0: end}
    with torch.no_grad():
        for parameter in student:
            parameter.add_(1.0)
        for progress, share in schedule.items():
            before = [p.clone() for p in teacher]
            model.after_step(progress)
            for old, new, goal in zip(before, teacher, student, strict=True):
                torch.testing.assert_close(new, old + share * (goal - old))


def test_rotary_positions_turn_each_channel_by_its_own_angle() -> None:
    torch.manual_seed(0)
    freqs, x, places = NETWORKS.frequencies(8), torch.randn(1, 2, 3, 8), torch.rand(1, 3, 2)
    found = NETWORKS.rotate(x, places, freqs)
    turns = [7.0, 7e-4]  # of a quarter of the channels; log-spaced
    for h in range(2):
        for n in range(3):
            for c in range(8):
                angle = 2 * math.pi * turns[c % 2] * float(places[0, n, 0 if c < 4 else 1])
                other = -x[0, h, n, c + 4] if c < 4 else x[0, h, n, c - 4]
                expected = float(x[0, h, n, c]) * math.cos(angle) + float(other) * math.sin(angle)
                assert float(found[0, h, n, c]) == pytest.approx(expected, abs=1e-5)


def test_registers_stand_around_the_bounding_box_of_what_is_visible() -> None:
    backbone = build(registers=8).student
    images = torch.randn(1, 3, 32, 32)
    visible = torch.tensor([[2 * 8 + 3, 4 * 8 + 6]])
    low, high = torch.tensor([2 / 7, 3 / 7]), torch.tensor([4 / 7, 6 / 7])
    around = [(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (0.5, 1), (0, 1), (0, 0.5)]
    tokens, places = backbone.embed(images, visible)
    assert tokens.shape == (1, 10, 64)
    torch.testing.assert_close(places[0, :8], low + torch.tensor(around) * (high - low))
    torch.testing.assert_close(places[0, 8:], torch.stack([low, high]))
    torch.testing.assert_close(backbone.embed(images)[1][0, :8], torch.tensor(around, dtype=torch.float32))


def test_drop_path_leaves_out_a_fixed_number_of_images_and_scales_up_the_others() -> None:
    block = build(drop_path=0.25).student.encoder[0].train()
    x = torch.randn(8, 3, 64)
    out = block.residual(lambda part: torch.ones_like(part), x) - x
    changes = sorted(round(float(value), 4) for value in out[:, 0, 0])
    assert changes == pytest.approx([0.0] * 2 + [8 / 6] * 6, abs=1e-4)


def test_the_encoder_averages_what_the_teachers_first_predictor_block_says_of_each_place() -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.zero_()
    teacher, images = model.teacher, torch.randn(2, 3, 32, 32)
    latent, places = teacher.encode(images)
    query = teacher.mask_token.expand(2, 1, -1)
    said = [
        teacher.norm(teacher.predictor[0](query, teacher.grid(images)[:, [n]], latent, places))
        for n in range(64)
    ]
    found = model.encoder()(images, layers=(3,))
    torch.testing.assert_close(found.pooled, torch.cat(said, 1).mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patches, latent[:, 4:].transpose(1, 2).unflatten(2, (8, 8)))
    rms = found.layers[0].square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(found.layers[0] / rms, found.patches, rtol=1e-4, atol=1e-4)
    averaged = build(pool="mean").encoder()
    torch.testing.assert_close(averaged(images).pooled, averaged(images).patches.mean((2, 3)))
    tuned = averaged.for_finetuning().train()
    tuned(images).pooled.square().sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    recipe = paper.recipe
    steps = 1_281_167 // recipe.batch_size
    assert steps * recipe.epochs == pytest.approx(500_000, rel=1e-3)
    assert steps * recipe.warmup_epochs == pytest.approx(50_000, rel=1e-3)
    rates = [learning_rate(step, 10, recipe) for step in (0, 6410, 64099)]
    assert rates == pytest.approx([0.0, 1e-3, 1e-3 * (1 + math.cos(0.8 * math.pi)) / 2], rel=1e-3)
    assert int(256 * paper.mask_ratio) == 166
    assert int(166 * paper.predicted) == 8
    groups = parameter_groups(build(clustering_lr=paper.clustering_lr), recipe)
    clustering = [g for g in groups if g["lr_scale"] == 0.5]
    assert [(len(g["params"]), g["weight_decay"]) for g in clustering] == [(2, 0.01)]


def test_a_released_checkpoint_is_the_averaged_student_by_itself() -> None:
    model = build()
    official = registry.load_method("capi", "official")
    theirs = [
        "backbone.mask_token",
        "backbone.patch_embed.weight",
        "backbone.encoder.blocks.1.residual1.fn.rope.freqs",
        "backbone.decoder.blocks.0.residual2.fn.fc1.weight",
        "backbone.decoder.blocks.0.residual2.norm.weight",
        "head.last_layer.weight_g",
    ]
    ours = official.from_official({name: torch.zeros(()) for name in theirs}, model.config)
    assert ours.keys() <= model.state_dict().keys()
    assert [name.split(".")[0] for name in ours] == ["teacher"] * 5 + ["head"]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"recipe": {"accumulate": 2}}, "recipe.accumulate = 2"),
        ({"registers": 6}, "registers = 6"),
        ({"registers": 0}, "registers = 0"),
        ({"predictor": 0}, "predictor of 0 blocks"),
        ({"mask_ratio": 1.0}, "hides 64 of 64"),
        ({"mask_ratio": 0.01}, "hides 0 of 64"),
        ({"predicted": 0.01}, "predicts 0"),
        ({"prototypes": 0}, "prototypes = 0"),
        ({"target_temperature": 0.0}, "target_temperature"),
        ({"momentum": 1.5}, "momentum"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"backbone": {"heads": 5}}, "5 heads"),
        ({"backbone": {"heads": 32}}, "head width divisible by 4"),
        ({"image_size": 30}, "multiple of the patch size"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**setting)
