"""What is special to LocalMIM: which layers are supervised, at which scale, with which target and weight."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from mimbench import config, registry
from mimbench.errors import ConfigError
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import learning_rate, parameter_groups

MODULE = registry.load_method("localmim")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("localmim").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(model: Any, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    size = model.config.image_size
    return {"images": torch.randn(count, 3, size, size), "noise": torch.rand(count, model.backbone.tokens)}


@pytest.mark.parametrize(("depth", "blocks"), [(12, [2, 4, 10, 12]), (24, [2, 4, 22, 24])])
def test_the_published_layers(depth: int, blocks: list[int]) -> None:
    assert MODULE.block_numbers(MODULE.Config().layers, depth) == blocks


def test_a_head_reads_the_output_of_its_block_and_the_next_block_gets_it_without_a_norm() -> None:
    model = build(backbone={"depth": 6}, layers=[2, 3, -2, -1])
    assert model.supervised == [2, 3, 5, 6]
    given, seen = inputs(model), []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    for norm in (*model.norms, model.backbone.norm):
        torch.nn.init.normal_(norm.weight)
    latents, *_ = model.encode(**given)
    assert all(torch.equal(below[1], above[0]) for below, above in itertools.pairwise(seen))
    for latent, block, norm in zip(latents, [2, 3, 5, 6], [*model.norms, model.backbone.norm], strict=True):
        torch.testing.assert_close(latent, norm(seen[block - 1][1]))


def test_the_encoder_sees_the_class_token_and_the_visible_patches_only() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    assert out["latent"].shape[1:3] == (4, model.keep + 1)
    changed = patchify(given["images"], 4)
    changed[out["mask"].bool()] += 1.0
    again, *_ = model.encode(unpatchify(changed, 4), given["noise"])
    assert torch.equal(torch.stack(again, dim=1), out["latent"])


def test_a_loss_trains_its_own_decoder_and_all_blocks_below() -> None:
    model = build()
    out = model(**inputs(model))
    parts = [out[f"loss_block{block}"] for block in (1, 2, 3, 4)]
    torch.testing.assert_close(out["loss"], sum(parts[1:], parts[0]))
    for head, part in enumerate(parts):
        model.zero_grad()
        part.backward(retain_graph=True)
        learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        decoders = {int(name.split(".")[1]) for name in learns if name.startswith("decoders.")}
        blocks = {int(name.split(".")[2]) for name in learns if name.startswith("backbone.blocks.")}
        norms = {name for name in learns if name.startswith(("norms.", "backbone.norm."))}
        assert decoders == {head}
        assert blocks == set(range(head + 1))
        assert {name.rpartition(".")[0] for name in norms} == {
            [*(f"norms.{k}" for k in range(3)), "backbone.norm"][head]
        }


def test_a_coarse_cell_counts_by_its_hidden_share_and_a_fine_one_as_its_token() -> None:
    checkerboard = (torch.arange(4)[:, None] + torch.arange(4)) % 2.0
    assert torch.equal(
        MODULE.hidden_share(checkerboard.flatten()[None], (4, 4), 0.5), torch.full((1, 4), 0.5)
    )
    mask = (torch.rand(3, 24) < 0.7).float()
    grid = mask.reshape(3, 4, 6).numpy()
    coarse = [[g[i : i + 2, j : j + 2].mean() for i in (0, 2) for j in (0, 2, 4)] for g in grid]
    np.testing.assert_allclose(MODULE.hidden_share(mask, (4, 6), 0.5), coarse, rtol=1e-6)
    for scale in (1, 2, 4):
        fine = grid.repeat(scale, axis=1).repeat(scale, axis=2).reshape(3, -1)
        np.testing.assert_array_equal(MODULE.hidden_share(mask, (4, 6), scale), fine)


@pytest.mark.parametrize("scale", [4.0, 2.0, 1.0, 0.5])
def test_a_token_decides_the_predictions_of_its_own_cells(scale: float) -> None:
    """With rows and columns of a 4 x 4 grid in raster order, before and after the convolutions."""
    decoder = build(image_size=16, layers=[-1], scales=[scale], target="pixels").decoders[0]
    tokens = torch.randn(1, 17, 32)
    decoder.tokens = lambda latent, restore: latent
    before = decoder(tokens, None)
    side = int(4 * scale)
    assert before.shape[1] == side**2
    for row, column in [(0, 0), (1, 3), (2, 1)]:
        changed = tokens.clone()
        changed[0, 1 + 4 * row + column] += torch.randn(32)
        moved = (decoder(changed, None) != before).any(-1).reshape(side, side)
        expected = torch.zeros(side, side, dtype=torch.bool)
        top, left, width = int(row * scale), int(column * scale), max(int(scale), 1)
        expected[top : top + width, left : left + width] = True
        assert torch.equal(moved, expected)


def slow_histograms(image: np.ndarray, cell: int, bins: int, offset: np.ndarray) -> np.ndarray:
    """(cells, 3 * bins) of an image (3, N, N): unsigned orientations, a magnitude goes whole to one bin."""
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    padded, n = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect"), image.shape[1] // cell
    found = np.zeros((n, n, 3, bins))
    for c, i, j in np.ndindex(image.shape):
        window = padded[c, i : i + 3, j : j + 3]
        gx, gy = (window * kernel).sum() + offset[0], (window * kernel.T).sum() + offset[1]
        angle = math.atan2(gx, gy) % math.pi
        found[i // cell, j // cell, c, int(angle / math.pi * bins) % bins] += math.hypot(gx, gy)
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    return found.reshape(n * n, 3 * bins)


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_is_that_of_a_loop_over_heads_images_and_cells(bias: bool) -> None:
    model = build(image_size=16, bins=6, hog_bias=bias)
    given = inputs(model, count=2)
    out = model(**given)
    total = 0.0
    for head, (scale, cell) in enumerate([(2, 2), (1, 4), (1, 4), (0.5, 8)]):
        offset = model.offsets[head].double().numpy() if bias else np.zeros(2)
        numerator = weights = 0.0
        for row in range(2):
            target = slow_histograms(given["images"][row].double().numpy(), cell, 6, offset)
            mask = out["mask"][row].reshape(4, 4).numpy()
            pixels = mask.repeat(4, axis=0).repeat(4, axis=1)
            for place, error in enumerate(((out[f"pred{head}"][row].detach().numpy() - target) ** 2).mean(1)):
                i, j = divmod(place, int(4 * scale))
                weight = pixels[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].mean()
                numerator, weights = numerator + weight * error, weights + weight
        total += numerator / weights
    assert out["loss"].item() == pytest.approx(total, rel=1e-5)


def test_pixels_are_standardised_within_each_cell() -> None:
    model = build(target="pixels", scales=[4.0, 2.0, 1.0, 0.5])
    given = inputs(model)
    out = model(**given)
    for head, cell in enumerate([1, 2, 4, 8]):
        target = out[f"target{head}"]
        assert target.shape == out[f"pred{head}"].shape == (3, (32 // cell) ** 2, 3 * cell**2)
        side = 32 // cell
        i, j = side // 2, side - 1
        own = given["images"][1, :, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
        own = own.permute(1, 2, 0).flatten().numpy()
        expected = (own - own.mean()) / np.sqrt(own.var(ddof=1) + 1e-6)
        np.testing.assert_allclose(target[1, i * side + j], expected, rtol=1e-4, atol=1e-5)


def test_an_image_without_gradients_has_finite_losses() -> None:
    model = build()
    out = model(**inputs(model) | {"images": torch.ones(3, 3, 32, 32)})
    assert not out["target0"].any()
    out["loss"].backward()
    assert torch.isfinite(out["loss"])
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_offsets_are_fixed_stored_and_known_to_the_authors() -> None:
    model, plain = build(hog_bias=True), build()
    assert "offsets" not in plain.state_dict()
    assert "offsets" not in dict(model.named_parameters())
    stored = model.state_dict()["offsets"]
    assert stored.shape == (4, 2)
    assert stored.abs().max() <= 1 / 3
    assert stored.unique().numel() == 8
    given = inputs(model)
    assert not torch.allclose(model(**given)["target3"], plain(**given)["target3"])
    official = registry.load_method("localmim", "official")
    theirs = {f"hog_enc.{head}.conv.bias": stored[head] for head in (2, 0, 3, 1)}
    assert torch.equal(official.from_official(theirs, model.config)["offsets"], stored)


@pytest.mark.parametrize("setting", [{"layers": [-1], "scales": [1.0]}, {"scales": [1.0] * 4}])
def test_the_ablations_build_and_compute(setting: dict[str, Any]) -> None:
    model = build(**setting)
    out = model(**inputs(model))
    assert {f"pred{head}" for head in range(len(setting["scales"]))} <= out.keys()
    assert all(out[f"pred{head}"].shape == (3, 64, 27) for head in range(len(setting["scales"])))


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"image_size": 30}, "multiple of the patch size"),
        ({"bins": 0}, "bins"),
        ({"layers": []}, "layers is an empty list"),
        ({"layers": [1, 2, 4]}, "differ in length"),
        ({"layers": [1, 2, 3, 5]}, "of 4"),
        ({"layers": [0, 2, 3, 4]}, "of 4"),
        ({"layers": [1, 3, 2, 4]}, "rising order"),
        ({"layers": [1, 2, 2, 4]}, "rising order"),
        ({"layers": [1, 2, 3, -2]}, "rising order"),
        ({"layers": [1, 2, -2, 3]}, "rising order"),
        ({"scales": [3.0, 1.0, 1.0, 0.5]}, "do not fit"),
        ({"scales": [4.0, 2.0, 1.0, 0.5]}, "one pixel"),
        ({"image_size": 28}, "do not fit"),
        (
            {
                "image_size": 36,
                "backbone": {"patch_size": 6},
                "target": "pixels",
                "scales": [4.0, 2.0, 1.0, 0.5],
            },
            "do not fit",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(**setting)
    assert problem in f"{refused.value}"


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    assert learning_rate(40, 1, paper.recipe) == pytest.approx(1.6e-3)
    assert learning_rate(1600, 1, paper.recipe) == pytest.approx(1e-6)
    model = build()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, model.config.recipe)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    assert {"decoders.0.mask_token", "decoders.0.head.0.weight", "backbone.cls_token"} <= decayed
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
