"""What is special to Latent MIM: gaps, who sees which patches, negatives within the image, cues, the moving target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mimbench import config, registry, seeds
from mimbench.data import Batch
from mimbench.errors import ConfigError
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import learning_rate, make_optimizer, parameter_groups

MODULE = registry.load_method("latent_mim")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("latent_mim").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(model: Any, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    size = model.config.image_size
    images, noise = torch.randn(count, 3, size, size), torch.rand(count, model.online.vit.tokens)
    return {"images": images, "noise": noise, "goal": torch.tensor(0.6)}


def patterned(count: int = 3, progress: float = 0.0) -> Batch:
    images = torch.randint(256, (count, 3, 40, 40), generator=torch.Generator().manual_seed(2))
    return Batch(images.to(torch.uint8), None, torch.arange(count), progress=progress)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def test_each_patch_is_cut_from_its_own_cell() -> None:
    torch.manual_seed(0)
    p, gap, rows, columns = 3, 2, 2, 4
    images = torch.randn(2, 3, rows * (p + gap), columns * (p + gap))
    offsets = torch.randint(gap + 1, (2, 2, rows, columns))
    found = MODULE.take_patches(images, offsets, p, gap)
    for b in range(2):
        for i in range(rows):
            for j in range(columns):
                top, left = i * (p + gap) + offsets[b, 0, i, j], j * (p + gap) + offsets[b, 1, i, j]
                expected = images[b, :, top : top + p, left : left + p]
                assert torch.equal(found[b, :, i * p : i * p + p, j * p : j * p + p], expected)


def test_the_offsets_stay_below_the_gap_and_differ_between_rows_columns_and_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    def spy(images: torch.Tensor, offsets: torch.Tensor, patch_size: int, gap: int) -> torch.Tensor:
        taken.append((images.shape, offsets))
        return images[:, :, :32, :32]

    monkeypatch.setattr(MODULE, "take_patches", spy)
    build(patch_gap=3).views(patterned(), seeds.generator("cpu", 0))
    build(patch_gap=0).views(patterned(), seeds.generator("cpu", 0))
    (shape, offsets), (without_gap, zero) = taken
    assert shape == (3, 3, 8 * (4 + 3), 8 * (4 + 3))
    assert offsets.shape == (3, 2, 8, 8)
    assert sorted(offsets.unique().tolist()) == [0, 1, 2]
    assert not torch.equal(offsets[:, 0], offsets[:, 1])
    assert without_gap == (3, 3, 32, 32)
    assert not zero.any()


def test_the_goal_falls_along_a_cosine_with_training() -> None:
    model = build()
    goals = [float(model.views(patterned(1, t), seeds.generator("cpu", 0))["goal"]) for t in (0.0, 0.5, 1.0)]
    assert goals == pytest.approx([0.75, 0.5, 0.25])


@pytest.mark.parametrize("side", ["hidden", "visible"])
def test_each_encoder_sees_its_own_patches_only(side: str) -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    hidden = out["mask"].bool()
    assert (~hidden).sum(1).tolist() == [8] * 3
    assert out["latent"].shape[1] == 1 + 8
    changed = patchify(given["images"], 4)
    changed[hidden if side == "hidden" else ~hidden] += 1.0
    again = model(**{**given, "images": unpatchify(changed, 4)})
    for name, same in (
        ("latent", side == "hidden"),
        ("pred", side == "hidden"),
        ("target", side == "visible"),
    ):
        assert torch.equal(again[name], out[name]) == same, name


def test_a_target_that_sees_all_patches_still_gives_the_hidden_ones() -> None:
    model = build(target_sees="all")
    given = inputs(model)
    order = given["noise"].argsort(1)
    expected = model.target(given["images"], order)[:, 1 + 8 :]
    assert torch.equal(model(**given)["target"], expected)
    assert not torch.allclose(expected, model.target(given["images"], order[:, 8:])[:, 1:])


def test_patch_discrimination_is_the_plain_loop_over_images_and_patches() -> None:
    torch.manual_seed(0)
    pred, target = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    losses = []
    for p, t in zip(pred, target, strict=True):
        p = (p - p.mean(0)) / (p.std(0, unbiased=True) + 1e-4)
        for i in range(5):
            scores = [math.exp(cosine(p[i], t[j]) / 0.2) for j in range(5)]
            losses.append(-math.log(scores[i] / sum(scores)) * 2 * 0.2)
    found = MODULE.patch_discrimination(pred, target, 0.2)
    assert float(found) == pytest.approx(sum(losses) / 15, rel=1e-5)


def test_a_direction_common_to_an_image_counts_in_targets_only() -> None:
    torch.manual_seed(0)
    pred, target, common = torch.randn(2, 6, 8), torch.randn(2, 6, 8), 3 * torch.randn(2, 1, 8)
    loss = MODULE.patch_discrimination(pred, target, 0.2)
    torch.testing.assert_close(MODULE.patch_discrimination(pred + common, target, 0.2), loss)
    assert (MODULE.patch_discrimination(pred, target + common, 0.2) - loss).abs() > 1e-2


def test_the_similarity_is_the_mean_over_all_pairs_of_an_image() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 5, 8)
    pairs = [cosine(a, b) for image in tokens for a in image for b in image]
    torch.testing.assert_close(MODULE.average_similarity(tokens), torch.stack(pairs).mean())


@pytest.mark.parametrize("loss", ["discrimination", "regression"])
def test_the_loss_adds_both_distances_from_the_goal(loss: str) -> None:
    model = build(loss=loss, similarity_weight=0.5)
    out = model(**inputs(model))
    pred, target = out["pred"], out["target"]
    alone = MODULE.patch_discrimination(pred, target, 0.2)
    if loss == "regression":
        plain = torch.stack([(t - t.mean()) / (t.var() + 1e-6).sqrt() for t in target.flatten(0, 1)])
        alone = (pred.flatten(0, 1) - plain).square().mean()
    constraint = (out["avg_sim_pred"] - 0.6) ** 2 + (out["avg_sim_vis"] - 0.6) ** 2
    torch.testing.assert_close(out["loss"], alone + 0.5 * constraint)


def test_a_query_is_the_visible_tokens_weighed_by_nearness_without_positions() -> None:
    decoder = build().decoder
    torch.manual_seed(0)
    memory, order = torch.randn(2, 8, 32), torch.rand(2, 64).argsort(1)
    visible, hidden = order[:, :8], order[:, 8:]
    queries = decoder.queries(memory, visible, hidden)
    places = decoder.pos_embed[0, 1:]
    for b, m in ((0, 0), (1, 17), (1, 55)):
        place = places[hidden[b, m]]
        weights = torch.stack([place @ places[v] / math.sqrt(32) for v in visible[b]]).softmax(0)
        expected = decoder.mask_token[0, 0] + weights @ memory[b] + place
        torch.testing.assert_close(queries[b, 1 + m], expected)
    blind = decoder.queries(torch.zeros(2, 8, 32), visible, hidden)
    assert torch.equal(blind[:, 1:], places[hidden])
    assert torch.equal(build(cues=False).decoder.queries(memory, visible, hidden)[:, 1:], places[hidden])


def test_positions_are_stretched_over_the_whole_side() -> None:
    model = build()
    for width, table in ((64, model.online.vit.pos_embed), (32, model.decoder.pos_embed)):
        quarter = width // 4
        assert not table[0, 0].any()
        for row, column in ((0, 0), (3, 5), (7, 7)):
            code = [
                f(place * 8 / 7 / 10000 ** (i / quarter))
                for place in (column, row)
                for f in (math.sin, math.cos)
                for i in range(quarter)
            ]
            assert table[0, 1 + row * 8 + column].tolist() == pytest.approx(code, abs=1e-6)


def test_the_target_starts_as_a_copy_gets_no_gradient_and_follows_ever_more_slowly() -> None:
    model = build()
    model(**inputs(model))["loss"].backward()
    online, target = list(model.online.parameters()), list(model.target.parameters())
    assert all(torch.equal(a, b) for a, b in zip(online, target, strict=True))
    assert all(p.grad is None and not p.requires_grad for p in target)
    optimised = {
        id(p) for group in make_optimizer(model, model.config.recipe).param_groups for p in group["params"]
    }
    assert optimised == {id(p) for p in (*online, *model.decoder.parameters())}
    with torch.no_grad():
        for parameter in online:
            parameter.add_(1.0)
        for progress, share in ((0.0, 0.01), (0.5, 0.005), (1.0, 0.0)):
            before = [p.clone() for p in target]
            model.after_step(progress)
            for old, new, goal in zip(before, target, online, strict=True):
                torch.testing.assert_close(new, old + share * (goal - old))


def test_the_encoder_reads_below_the_final_norm_and_the_head() -> None:
    model = build()
    images = inputs(model)["images"]
    encoder = model.encoder()
    before = encoder(images).pooled
    with torch.no_grad():
        for parameter in model.online.head.parameters():
            parameter.normal_()
    assert torch.equal(encoder(images).pooled, before)
    last = encoder(images, layers=(encoder.depth - 1,)).layers[0]
    torch.testing.assert_close(before, last.mean((2, 3)))


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    rate = [learning_rate(step, 10, paper.recipe) for step in (0, 400, 8000)]
    assert rate == pytest.approx([6e-4, 2.4e-3, 6e-4])
    model = build()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, model.config.recipe)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    assert {
        "online.vit.cls_token",
        "decoder.mask_token",
        "online.head.linears.0.weight",
        "decoder.head.weight",
    } <= decayed
    assert not [n for n in decayed if "embed" in n or "norm" in n or "bias" in n]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"visible": 63}, "visible = 63 leaves 1 of 64"),
        ({"visible": 80}, "visible = 80 leaves 0 of 64"),
        ({"visible": 0}, "visible = 0 should be above 0"),
        ({"patch_gap": -1}, "patch_gap = -1"),
        ({"temperature": 0.0}, "temperature"),
        ({"momentum": 1.5}, "momentum"),
        ({"head": {"depth": 0}}, "head.depth = 0"),
        ({"decoder": {"width": 30}}, "divisible by 4"),
        ({"decoder": {"heads": 5}}, "5 heads"),
        ({"image_size": 30}, "multiple of the patch size"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**setting)
