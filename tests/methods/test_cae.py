"""What is special to CAE: who sees which patches, the regressor's layer, both targets, the tokenizer before it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mimbench import config, data, registry, seeds
from mimbench.checkpoint import load_tensors, save_tensors
from mimbench.errors import CheckpointError, ConfigError
from mimbench.models.vit import patchify, unpatchify
from mimbench.optim import learning_rate, make_optimizer, parameter_groups
from mimbench.progress import quiet

MODULE = registry.load_method("cae")
SMALL: dict[str, Any] = {
    "image_size": 16,
    "backbone": {"width": 16, "depth": 2},
    "decoder": {"width": 16, "depth": 1},
    "smallest_block": 2,
    "tokenizer": {"codes": 16, "code_width": 4, "width": 8, "recipe": {"epochs": 1, "compile": False}},
    "recipe": {"epochs": 1, "warmup_epochs": 0, "compile": False},
}


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("cae").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def stirred(model: Any) -> Any:
    """The model with all weights redrawn, so that no norm, bias or scale is trivial."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(model: Any, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    patches = model.backbone.tokens
    return {
        "images": torch.randn(count, 3, *(model.config.image_size,) * 2),
        "mask": torch.rand(count, patches).argsort(1).argsort(1) < model.hidden,
        "tokens": torch.randint(model.config.tokenizer.codes, (count, patches)),
    }


def changed(given: dict[str, torch.Tensor], where: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same views with other pixels in some patches."""
    patches = patchify(given["images"], 4)
    patches[where] += torch.randn_like(patches[where])
    return given | {"images": unpatchify(patches, 4)}


def test_the_loss_is_that_of_a_loop_over_hidden_patches() -> None:
    model = stirred(build())
    given = inputs(model)
    out = model(**given)
    surprise, distance = [], []
    for image in range(3):
        for place, patch in enumerate(given["mask"][image].nonzero().flatten()):
            chances = out["pred"][image, place].softmax(-1)
            surprise.append(-chances[given["tokens"][image, patch]].log())
            distance.append(
                (out["latent_predict"][image, place] - out["latent_target"][image, place]).square()
            )
    assert len(surprise) == 3 * 32
    torch.testing.assert_close(out["loss_main"], torch.stack(surprise).mean())
    torch.testing.assert_close(out["loss_align"], 2 * torch.stack(distance).mean())
    torch.testing.assert_close(out["loss"], out["loss_main"] + out["loss_align"])
    torch.testing.assert_close(build(align_weight=0.0)(**given)["loss_align"], torch.tensor(0.0))


def test_the_encoder_sees_visible_patches_and_the_alignment_encoder_hidden_ones() -> None:
    model = stirred(build())
    given = inputs(model)
    out = model(**given)
    assert out["latent"].shape == (3, 1 + 32, 64)
    assert out["latent_target"].shape == (3, 32, 64)
    other_hidden = model(**changed(given, given["mask"]))
    assert torch.equal(other_hidden["latent"], out["latent"])
    assert torch.equal(other_hidden["pred"], out["pred"])
    assert not torch.allclose(other_hidden["latent_target"], out["latent_target"], atol=1e-2)
    other_visible = model(**changed(given, ~given["mask"]))
    assert torch.equal(other_visible["latent_target"], out["latent_target"])
    assert not torch.allclose(other_visible["pred"], out["pred"], atol=1e-2)


def test_the_target_is_the_encoder_on_the_hidden_patches_in_raster_order() -> None:
    model = build()
    given = inputs(model)
    target = model(**given)["latent_target"]
    for image in range(3):
        embedded = model.backbone.embed(given["images"][image : image + 1])
        expected = model.backbone(embedded[:, given["mask"][image]])[0, 1:]
        torch.testing.assert_close(target[image], expected, rtol=1e-4, atol=1e-5)


def test_the_target_has_no_momentum_and_passes_no_gradient() -> None:
    model = build().train()
    out = model(**inputs(model))
    assert not out["latent_target"].requires_grad
    optimizer = make_optimizer(model, model.config.recipe)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    out["loss"].backward()
    optimizer.step()
    pairs = list(zip(model.alignment.parameters(), model.backbone.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in pairs)
    with torch.no_grad():
        model.after_step(0.0)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(a.requires_grad or a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_the_decoder_knows_of_the_image_only_what_the_regressor_predicts() -> None:
    model = stirred(build())
    given = inputs(model)
    fixed = torch.randn(3, 32, 64)
    model.regressor.register_forward_hook(lambda *_: fixed)
    first, second = model(**given), model(**changed(given, ~given["mask"]))
    assert not torch.equal(first["latent"], second["latent"])
    assert torch.equal(first["pred"], second["pred"])


def test_the_class_token_of_the_encoder_is_not_read() -> None:
    model = build()
    (gradient,) = torch.autograd.grad((out := model(**inputs(model)))["loss"], out["latent"])
    assert not gradient[:, 0].any()
    assert gradient[:, 1:].abs().sum(-1).min() > 0


def test_the_regressor_changes_hidden_tokens_and_leaves_visible_ones() -> None:
    model = stirred(build(regressor_depth=3))
    read: list[torch.Tensor] = []
    for block in model.regressor.blocks:
        block.register_forward_pre_hook(lambda module, given: read.append(given[1]))
    out = model(**inputs(model))
    assert len(read) == 3
    for context in read:
        assert torch.equal(context[:, :32], out["latent"][:, 1:])
    torch.testing.assert_close(read[0][:, 32:], model.regressor.mask_token.expand(3, 32, -1))
    assert not torch.allclose(read[1][:, 32:], read[2][:, 32:], atol=1e-2)


def test_a_regressor_layer_is_the_papers_formula_with_torchs_attention() -> None:
    block = stirred(build()).regressor.blocks[0]
    x, context, place, context_place = (torch.randn(2, n, 64) for n in (5, 9, 5, 9))
    q, k, v = (getattr(block.attn, name) for name in "qkv")
    peer = nn.MultiheadAttention(64, block.attn.heads, batch_first=True)
    peer.in_proj_weight.data = torch.cat([q.weight, k.weight, v.weight])
    peer.in_proj_bias.data = torch.cat([q.bias, torch.zeros(64), v.bias])
    peer.out_proj.load_state_dict(block.attn.proj.state_dict())
    query, key, value = block.norm_q(x + place), block.norm_k(context + context_place), block.norm_v(context)
    read = peer(query, key, value, need_weights=False)[0]
    kept = block.norm2(x + block.gamma_1 * read)
    expected = kept + block.gamma_2 * block.mlp(kept)
    torch.testing.assert_close(block(x, context, place, context_place), expected, rtol=1e-4, atol=1e-4)


def test_positions_enter_queries_and_keys_but_not_values() -> None:
    block = stirred(build()).regressor.blocks[0]
    x, context, place, context_place = (torch.randn(2, n, 64) for n in (5, 9, 5, 9))
    assert not torch.allclose(
        block(x, context, place, context_place), block(x, context, place, 0 * context_place)
    )
    with torch.no_grad():  # even attention
        for name in ("q", "k"):
            getattr(block.attn, name).weight.zero_()
    even = block(x, context, place, context_place)
    assert torch.equal(even, block(x, context, 0 * place, torch.randn_like(context_place)))


def test_positions_are_sines_and_cosines_of_the_row_and_then_of_the_column() -> None:
    model = build()
    table = model.backbone.pos_embed[0]
    assert not table[0].any()
    for row, column, channel in [(0, 3, 5), (2, 7, 17), (5, 1, 40), (7, 6, 63)]:
        coordinate = row if channel < 32 else column
        angle = coordinate / 10000 ** ((channel % 16) / 16)
        expected = math.cos(angle) if channel % 32 >= 16 else math.sin(angle)
        assert table[1 + 8 * row + column, channel] == pytest.approx(expected, abs=1e-5)
    assert torch.equal(model.places[0], table[1:])


def test_half_of_the_patches_are_hidden_in_blocks_and_codes_are_of_the_same_crop() -> None:
    model = build()
    batch = data.load("digits").train.batch(torch.arange(256))
    views = model.views(batch, seeds.generator("cpu", 0))
    mask = views["mask"]
    assert (mask.sum(1) == 32).all()
    grid = mask.unflatten(1, (8, 8))
    together = (grid[:, :, 1:] & grid[:, :, :-1]).sum() / grid[:, :, 1:].sum()
    assert together > 0.7, "a random mask gives 0.5"
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.input.mean, model.input.std))
    tokens = model.tokenizer.tokens(views["images"] * std + mean)
    assert (tokens == views["tokens"]).float().mean() > 0.999  # but for rounding


def test_a_decoder_of_another_width_gets_projected_latents_and_targets() -> None:
    model = stirred(build(decoder={"width": 32, "heads": 4}, **{"drop_path": 0.0}))
    given = inputs(model)
    out = model(**given)
    assert out["latent"].shape == (3, 33, 32)
    hidden = given["mask"][0]
    latent = model.alignment(model.alignment.embed(given["images"][:1])[:, hidden])[0, 1:]
    linear, norm = model.project
    expected = F.layer_norm(linear(latent), (32,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(out["latent_target"][0], expected, rtol=1e-4, atol=1e-4)
    assert not out["latent_target"].requires_grad


def test_stochastic_depth_acts_on_the_target_too() -> None:
    model = build(drop_path=0.5).train()
    given = inputs(model)
    first, second = (model(**given)["latent_target"] for _ in range(2))
    assert not torch.allclose(first, second)
    assert [round(b.drop_path, 3) for b in model.regressor.blocks] == [0.0, 0.5]
    assert [round(b.drop_path, 3) for b in model.backbone.blocks] == [0.0, 0.167, 0.333, 0.5]


def test_matrices_are_xavier_uniform_and_tokens_are_cut_at_one_deviation() -> None:
    model = build()
    for matrix in (model.backbone.blocks[1].attn.qkv, model.regressor.blocks[0].attn.k, model.decoder.head):
        bound = math.sqrt(6 / sum(matrix.weight.shape))
        assert 0.97 * bound < matrix.weight.abs().max() <= bound
    for narrow in (
        model.backbone.patch_embed.proj.weight,
        model.backbone.cls_token,
        model.regressor.mask_token,
    ):
        assert 0.015 < narrow.abs().max() <= 0.02
    biases = [p for n, p in model.named_parameters() if n.endswith("bias") and not n.startswith("tokenizer.")]
    assert not any(bias.any() for bias in biases)


def test_the_tokenizer_comes_first_and_stays_as_it_was_trained(tmp_path: Path) -> None:
    split = data.load("digits").train.subset(torch.arange(256))
    model = build(**SMALL)
    options = {"seed": 0, "device": torch.device("cpu"), "progress": quiet(), "folder": tmp_path}
    history = MODULE.pretrain(model, split, model.config.recipe, **options)
    assert history.images == 2 * 256
    assert any("the tokenizer" in text for text in history.warnings)
    trained = load_tensors(tmp_path / "tokenizer" / "model.safetensors")
    state = model.tokenizer.state_dict()
    assert trained.keys() == state.keys()
    assert all(torch.equal(trained[name], state[name]) for name in trained)
    assert not any(p.requires_grad for p in model.tokenizer.parameters())
    again = build(**SMALL)
    assert MODULE.pretrain(again, split, again.config.recipe, **options) == history
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    file = tmp_path / "tokenizer" / "model.safetensors"
    third = build(**SMALL, tokenizer_weights=str(file))
    assert all(torch.equal(trained[n], v) for n, v in third.tokenizer.state_dict().items())
    history = MODULE.pretrain(third, split, third.config.recipe, **options | {"folder": None})
    assert history.images == 256, "no tokenizer is trained where one is given"
    assert all(torch.equal(trained[n], v) for n, v in third.tokenizer.state_dict().items())


def test_the_tokenizer_is_frozen_while_the_model_trains() -> None:
    model = build()
    assert model.train().training
    assert not any(module.training for module in model.tokenizer.modules())
    grouped = {p for g in parameter_groups(model, model.config.recipe) for p in g["params"]}
    assert not grouped & {*model.tokenizer.parameters(), *model.alignment.parameters()}


def test_a_file_that_is_no_tokenizer_of_this_size_is_refused_before_training(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    with pytest.raises(CheckpointError, match=r"tokenizer_weights: .* does not exist"):
        build(tokenizer_weights=str(file))
    save_tensors(file, build().state_dict())
    with pytest.raises(CheckpointError, match=r"tokenizer_weights: .* lacks encode.0.weight"):
        build(tokenizer_weights=str(file))
    save_tensors(file, build(tokenizer={"codes": 64}).tokenizer.state_dict())
    with pytest.raises(CheckpointError, match=r"quantise.codebook \(64, 16\) instead of \(256, 16\)"):
        build(tokenizer_weights=str(file))


def test_the_published_setting() -> None:
    paper = MODULE.Config()
    recipe = paper.recipe
    assert round(14 * 14 * paper.mask_ratio) == 98
    assert learning_rate(20 * 10, 10, recipe) == pytest.approx(1.5e-3)
    assert learning_rate(0, 10, recipe) == 0
    assert learning_rate(800 * 10, 10, recipe) == pytest.approx(1e-5)
    model = build()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, model.config.recipe)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    assert {"backbone.cls_token", "regressor.mask_token", "decoder.head.weight"} <= decayed
    assert not [n for n in decayed if n.endswith(("bias", "gamma_1", "gamma_2")) or "norm" in n]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio = 0.0 hides 0 of 64"),
        ({"mask_ratio": 1.0}, "mask_ratio = 1.0 hides 64 of 64"),
        ({"mask_ratio": 1.5}, "mask_ratio"),
        ({"image_size": 30}, "multiple of the patch size"),
        ({"decoder": {"heads": 5}}, "decoder's width 64 is not a multiple of its 5 heads"),
        ({"regressor_depth": 0}, "regressor_depth"),
        ({"tokenizer": {"codes": 1}}, "codes"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**wrong)


def test_the_decoder_may_be_a_single_layer() -> None:
    model = build(decoder={"depth": 0})
    assert model(**inputs(model))["pred"].shape == (3, 32, 256)
