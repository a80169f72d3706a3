"""What is special to CrossMAE: which patches are decoded, that each is decoded alone, what a block reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mimbench import config, registry
from mimbench.errors import ConfigError
from mimbench.models.vit import Block, patchify, unpatchify
from mimbench.optim import parameter_groups

MODULE = registry.load_method("crossmae")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("crossmae").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(model: Any, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    size = model.config.image_size
    return {"images": torch.randn(count, 3, size, size), "noise": torch.rand(count, model.backbone.tokens)}


@pytest.mark.parametrize(
    ("side", "hidden", "decoded", "counts"),
    [
        (14, 0.75, 0.25, (49, 98, 49)),
        (14, 0.75, 0.75, (49, 0, 147)),
        (8, 0.75, 0.25, (16, 32, 16)),
        (8, 0.7, 0.45, (19, 15, 30)),  # 64 * (0.7 - 0.45) is 15.99.. and cut off
    ],
)
def test_seen_ignored_and_decoded_patches_are_counted_as_in_the_authors_code(
    side: int, hidden: float, decoded: float, counts: tuple[int, int, int]
) -> None:
    model = build(image_size=4 * side, mask_ratio=hidden, prediction_ratio=decoded)
    assert (model.keep, model.ignore, model.predict) == counts
    out = model(**inputs(model))
    assert out["maps"].shape[2] == 1 + counts[0]
    assert out["mask"].sum(1).tolist() == [counts[1] + counts[2]] * 3
    assert out["predicted"].sum(1).tolist() == [counts[2]] * 3
    assert not (out["predicted"] & ~out["mask"]).any()


def gradients(model: Any, images: torch.Tensor, noise: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(images=images, noise=noise)["loss"]
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_patches_neither_seen_nor_decoded_change_nothing() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    before = gradients(model, **given)

    def shifted(places: torch.Tensor) -> list[torch.Tensor]:
        patches = patchify(given["images"], 4)
        patches[places] += torch.randn(48)
        return gradients(model, unpatchify(patches, 4), given["noise"])

    ignored = out["mask"] & ~out["predicted"]
    assert all(torch.equal(a, b) for a, b in zip(before, shifted(ignored), strict=True))
    assert not torch.equal(before[0], shifted(~out["mask"])[0])
    assert not torch.equal(before[0], shifted(out["predicted"])[0])


def decode_some(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What is predicted at the first and last of four places: with all four as queries, and with these two."""
    places = torch.tensor([[3, 17, 40, 63]])
    memory = torch.randn(1, 3, 17, 64)
    with torch.no_grad():
        return model.decode(memory, places)[:, ::3], model.decode(memory, places[:, ::3])


def test_a_patch_is_decoded_without_regard_to_the_others() -> None:
    torch.testing.assert_close(*decode_some(build()), rtol=1e-5, atol=1e-6)
    together, apart = decode_some(build(decoder={"self_attention": True}))
    assert (together - apart).abs().max() > 1e-3, (
        "self-attention between mask tokens is what Table 3 adds back"
    )


def test_a_third_of_the_hidden_patches_gives_the_full_loss_on_average() -> None:
    """Three disjoint thirds of the 48 hidden patches, decoded in turn, average to the loss on all of them."""
    third, whole = build(), build(prediction_ratio=0.75)
    given = inputs(third)
    order = given["noise"].argsort(1)
    losses = []
    for turn in range(3):
        ranks = torch.cat([torch.arange(16), torch.arange(16, 64).roll(16 * turn)]) / 64
        noise = torch.empty(3, 64).scatter(1, order, ranks.expand(3, -1))
        losses.append(third(images=given["images"], noise=noise)["loss"])
    torch.testing.assert_close(torch.stack(losses).mean(), whole(**given)["loss"])
    assert losses[0] != losses[1]


def test_targets_and_loss_against_a_plain_loop() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    errors = []
    for image, noise, predictions in zip(given["images"], given["noise"], out["pred"], strict=True):
        decoded = sorted(noise.argsort().tolist()[-16:])
        for place, prediction in zip(decoded, predictions, strict=True):
            row, column = divmod(place, 8)
            pixels = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
            wanted = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors.append((prediction - wanted).square().mean())
    torch.testing.assert_close(out["loss"], torch.stack(errors).mean())
    plain = build(normalise_target=False)(**given)["target"]
    everywhere = patchify(given["images"], 4)
    assert torch.equal(plain, everywhere[out["predicted"]].reshape(plain.shape))


def test_each_decoder_block_reads_its_own_mixture_of_the_input_and_of_every_block() -> None:
    model = build()
    given = inputs(model)
    out = model(**given)
    visible = given["noise"].argsort(1)[:, :16]
    x = model.backbone.with_class_token(MODULE.take(model.backbone.embed(given["images"]), visible))
    maps = [x]
    for block in model.backbone.blocks:
        maps.append(block(maps[-1]))
    assert out["memory"].shape == (3, 3, 17, 64)
    for number, weights in enumerate(model.mixture.weight):
        mixed = sum(weight * layer for weight, layer in zip(weights, maps, strict=True))
        torch.testing.assert_close(out["memory"][:, number], mixed)
    assert len({id(norm) for norm in model.dec_norms}) == 3

    with torch.no_grad():
        places = torch.zeros(3, 1, dtype=torch.long)
        x = model.mask_token + model.decoder_pos_embed[:, 1:2]
        for block, norm, mixed in zip(
            model.decoder_blocks, model.dec_norms, out["memory"].unbind(1), strict=True
        ):
            x = block(x, norm(mixed))
        expected = model.decoder_pred(model.decoder_norm(x))
        torch.testing.assert_close(model.decode(out["memory"], places), expected)


def test_the_papers_size() -> None:
    with torch.device("meta"):
        model = MODULE.Model(MODULE.Config())
    assert model.mixture.weight.shape == (12, 13)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm) and m.elementwise_affine]
    assert len(norms) == 2 * 12 + 12 + 2 * 12 + 1
    assert not any(isinstance(block, Block) for block in model.decoder_blocks)
    recipe = model.config.recipe
    assert recipe.base_lr * recipe.batch_size / recipe.lr_batch == pytest.approx(2.4e-3)
    assert (recipe.epochs, recipe.warmup_epochs) == (800, 40)


def test_chosen_maps_are_mixed_in_the_encoders_order() -> None:
    full = build()
    given = inputs(full)
    some = build(mixed_blocks=[3, 1], mix_input=False)
    some.backbone.load_state_dict(full.backbone.state_dict())
    assert torch.equal(some(**given)["maps"], full(**given)["maps"][:, [2, 4]])
    assert some.mixture.weight.shape == (3, 2)


def test_cross_attention_is_torchs() -> None:
    torch.manual_seed(0)
    ours = MODULE.CrossAttention(32, 48, heads=4)
    theirs = nn.MultiheadAttention(32, 4, kdim=48, vdim=48, batch_first=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=0.3)
        theirs.q_proj_weight.copy_(ours.q.weight)
        theirs.k_proj_weight.copy_(ours.kv.weight[:32])
        theirs.v_proj_weight.copy_(ours.kv.weight[32:])
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 48)
    torch.testing.assert_close(ours(x, memory), theirs(x, memory, memory)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("settings", "factor"), [({}, 1 / 3), ({"scale_lr": False}, 1.0)])
def test_the_learning_rate_falls_with_the_share_that_is_decoded(
    settings: dict[str, Any], factor: float
) -> None:
    model = build(**settings)
    groups = parameter_groups(model, model.config.recipe)
    assert [g["lr_scale"] for g in groups] == [pytest.approx(factor)] * 2
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {"mixture.weight", "mask_token", "backbone.cls_token"} <= decayed
    assert not any("norm" in name or name.endswith("bias") for name in decayed)


def test_probes_read_the_encoder_through_a_norm_with_nothing_to_load() -> None:
    model = build(pool="class")
    assert not [name for name in model.state_dict() if name.startswith("backbone.norm")]
    with torch.no_grad():
        pooled = model.encoder()(torch.randn(2, 3, 32, 32) * 3).pooled
    torch.testing.assert_close(pooled.mean(1), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled.var(1, correction=0), torch.ones(2), rtol=1e-4, atol=0)
    tuned = model.encoder().for_finetuning()
    assert isinstance(tuned.fc_norm, nn.LayerNorm)
    assert tuned.fc_norm.elementwise_affine


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.999}, "leaves 0 of 64 patches visible"),
        ({"mask_ratio": 0.0}, "leaves 64 of 64"),
        ({"prediction_ratio": 0.8}, "at most mask_ratio"),
        ({"prediction_ratio": 0.0}, "above 0"),
        ({"mask_ratio": 0.5, "prediction_ratio": 1e-17}, "decodes none of 64"),
        ({"mixed_blocks": []}, "blocks 0 to 3"),
        ({"mixed_blocks": [4]}, "blocks 0 to 3"),
        ({"mixed_blocks": [1, 1]}, "each once"),
        ({"decoder": {"depth": 0}}, "decoder.depth = 0"),
        ({"decoder": {"heads": 3}}, "not a multiple of the 3 heads"),
        ({"image_size": 30}, "multiple of the patch size"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_the_authors_options_become_ours() -> None:
    official = registry.load_method("crossmae", "official")
    options = {
        "img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0,
        "decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2, "norm_pix_loss": False,
        "weight_fm": True, "use_fm": [-1], "use_input": False, "self_attn": True,
        "mask_ratio": 0.75, "kept_mask_ratio": 0.5,
    }  # fmt: skip
    every = official.config_from_official(options)
    assert every.mixed_blocks is None, "a single -1 means all blocks"
    assert (every.prediction_ratio, every.mix_input, every.decoder.self_attention) == (0.5, False, True)
    assert official.config_from_official(options | {"use_fm": [0, -1]}).mixed_blocks == (0, 3)
    # Their checkpoint has these groups and no others.
    model = MODULE.Model(every)
    keys = [k.removeprefix("backbone.").replace("mixture.", "wfm.linear.") for k in model.state_dict()]
    assert (
        official.from_official(dict.fromkeys(keys, torch.zeros(())), every).keys()
        == model.state_dict().keys()
    )
    assert {k for k in keys if k.startswith(("norm", "decoder_embed"))} == set()
    assert {"decoder_blocks.0.norm0.weight", "decoder_blocks.0.self_attn.qkv.weight"} <= set(keys)
    with pytest.raises(ConfigError, match="weight_fm"):
        official.config_from_official(options | {"weight_fm": False})
