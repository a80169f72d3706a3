"""What is special to BEiT v2: the tokenizer and its teacher, codes as classes, and what trains the class token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mimbench import config, data, registry, seeds
from mimbench.checkpoint import save_tensors
from mimbench.encoder import InputSpec, normalise
from mimbench.errors import CheckpointError, ConfigError
from mimbench.models import vq
from mimbench.models.beit import RelativeViT, RelativeViTEncoder
from mimbench.models.vit import ViT, ViTEncoder, ViTShape, patchify, unpatchify
from mimbench.optim import learning_rate, parameter_groups
from mimbench.progress import quiet

MODULE = registry.load_method("beitv2")
SMALL: dict[str, Any] = {
    "image_size": 16,
    "backbone": {"width": 32},
    "hidden": 6,
    "smallest_block": 2,
    "teacher_backbone": {"width": 32, "depth": 1},
    "tokenizer": {"encoder": {"width": 32, "depth": 1}, "codes": 16},
}


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("beitv2").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def teacher(**changes: Any) -> ViTEncoder:
    shape = ViTShape(**{"patch_size": 4, "width": 32, "depth": 1, "heads": 2} | changes)
    vit = ViT(16, shape).requires_grad_(False).eval()
    return ViTEncoder(vit, InputSpec(16), "mean")


def inputs(model: Any, count: int = 3) -> dict[str, torch.Tensor]:
    batch = data.load("digits").train.batch(torch.arange(count))
    return model.views(batch, seeds.generator("cpu", "test"))


def test_both_losses_are_those_of_a_loop_over_hidden_patches() -> None:
    model = build()
    views = inputs(model)
    out, tokens = model(**views), model.tokens(views["images"])
    for latent, loss, pred in (("latent", "loss_main", "pred"), ("latent_cls", "loss_cls", "pred_cls")):
        logits, terms = [], []
        for image in range(3):
            for patch in range(64):
                if views["mask"][image, patch]:
                    logits.append(model.head(out[latent][image, 1 + patch]))
                    terms.append(-logits[-1].log_softmax(0)[tokens[image, patch]])
        torch.testing.assert_close(out[pred], torch.stack(logits))
        torch.testing.assert_close(out[loss], torch.stack(terms).mean())
    torch.testing.assert_close(out["loss"], out["loss_main"] + out["loss_cls"])


def test_the_encoder_does_not_see_what_is_hidden_but_the_tokenizer_does() -> None:
    model = build()
    views = inputs(model)
    tokens = model.tokens(views["images"])
    changed = patchify(views["images"], 4)
    changed[views["mask"]] = torch.rand_like(changed[views["mask"]])
    images = unpatchify(changed, 4)
    first, second = (model.predict(x, views["mask"], tokens) for x in (views["images"], images))
    assert torch.equal(first["latent"], second["latent"])
    assert torch.equal(first["latent_cls"], second["latent_cls"])
    assert not torch.equal(model.tokens(images), tokens)


@pytest.mark.parametrize("settings", [{}, {"image_size": 56, "hidden": 75, "smallest_block": 16}])
def test_exactly_the_asked_number_of_patches_is_hidden(settings: dict[str, Any]) -> None:
    model = build(**settings)
    batch = data.load("digits").train.batch(torch.arange(300))
    mask = model.views(batch, seeds.generator("cpu", 0))["mask"]
    assert (mask.sum(1) == model.config.hidden).all()


def test_the_tokenizer_sees_the_crop_of_the_encoder_from_minus_one_to_one() -> None:
    model, seen = build(), []
    model.tokenizer.encoder.patch_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pixels = torch.rand(2, 3, 32, 32)
    pixels[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    model(images=normalise(pixels, model.input), mask=inputs(model, 2)["mask"])
    torch.testing.assert_close(seen[0], pixels * 2 - 1, rtol=0, atol=1e-6)


def test_what_the_early_patches_lack_has_to_pass_through_the_last_class_token() -> None:
    model, kept = build(), {}

    def keep(number: int, output: torch.Tensor) -> None:
        output.retain_grad()
        kept[number] = output

    for number, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda _, __, output, number=number: keep(number, output))
    model(**inputs(model))["loss_cls"].backward()
    early, last = kept[model.config.early_layer - 1].grad, kept[model.config.backbone.depth - 1].grad
    assert last[:, 0].abs().sum() > 0
    assert not last[:, 1:].any()
    assert early[:, 1:].abs().sum() > 0
    assert model.backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.tokenizer.parameters())


def test_the_second_prediction_has_blocks_of_its_own_and_nothing_else() -> None:
    with_, without = build(), build(aggregation=False)
    added = with_.state_dict().keys() - without.state_dict().keys()
    assert added == {f"aggregate.{name}" for name in with_.aggregate.state_dict()}
    names = [n for n in with_.state_dict() if n.endswith("relative_position_bias_table")]
    assert names == ["backbone.rel_pos_bias.relative_position_bias_table"]
    table = with_.backbone.rel_pos_bias.relative_position_bias_table
    for block in with_.backbone.blocks:  # only the extra blocks read it any more
        block.attn.forward = lambda x, bias, forward=block.attn.forward: forward(x, None)
    views = inputs(with_)
    (gradient,) = torch.autograd.grad(with_(**views)["loss_cls"], table)
    assert gradient.any()
    out = without(**views)
    assert out["loss"] is out["loss_main"]
    assert "loss_cls" not in out


def test_initial_weights_of_deeper_blocks_are_smaller_and_the_extra_ones_count_on() -> None:
    model = build(backbone={"width": 192, "heads": 3})
    deviation = [block.mlp.fc2.weight.std() for block in [*model.backbone.blocks, *model.aggregate]]
    for number, found in zip([1, 2, 3, 4, 4], deviation, strict=True):  # the extra block follows the third
        cut_at_one = 0.02 * 0.5397  # deviation of a normal that is cut at one deviation
        assert found.item() == pytest.approx(cut_at_one / (2 * number) ** 0.5, rel=0.02)


def test_the_tokenizer_learns_the_direction_of_the_teachers_features() -> None:
    model, guide = build(**SMALL), teacher()
    model.load_teacher(guide)
    tokenizer = model.tokenizer.requires_grad_(True)
    images = torch.rand(2, 3, 16, 16)
    out = tokenizer(images)
    with torch.no_grad():
        expected = guide.vit(guide.vit.embed(normalise(images, InputSpec(16))))[:, 1:]
    cosine = [p @ t / p.norm() / t.norm() for p, t in zip(out["pred"][0], expected[0], strict=True)]
    cosine += [p @ t / p.norm() / t.norm() for p, t in zip(out["pred"][1], expected[1], strict=True)]
    torch.testing.assert_close(out["distance"], 1 - torch.stack(cosine).mean())
    z = F.normalize(tokenizer.encode(images).flatten(2).transpose(1, 2), dim=-1)
    numbers = (z @ tokenizer.quantise.codebook.T).argmax(-1)
    assert torch.equal(tokenizer.tokens(images), numbers)
    assert out["used"].item() == pytest.approx(len(numbers.unique()) / 16)
    torch.testing.assert_close(out["commitment"], (z - tokenizer.quantise.codebook[numbers]).square().mean())
    out["loss"].backward()
    still = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    assert not any("teacher" in name for name in model.state_dict())


def test_a_teacher_of_another_size_is_given_its_own_input_and_read_on_our_grid() -> None:
    model = build(**SMALL)
    spec = InputSpec(24, (0.5,) * 3, (0.25,) * 3)
    vit = RelativeViT(24, ViTShape(8, 32, 1, 2), 0.1, 0.0).requires_grad_(False).eval()
    model.load_teacher(RelativeViTEncoder(vit, spec))
    colour = torch.rand(2, 3, 1, 1)
    found = model.tokenizer.target(colour.expand(-1, -1, 16, 16))
    expected, _ = vit(vit.patch_embed(((colour - 0.5) / 0.25).expand(-1, -1, 24, 24)), (3, 3))
    assert found.shape == (2, 16, 32)
    torch.testing.assert_close(found, expected[:, 1:2].expand(-1, 16, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"width": 48}, {"depth": 2}])
def test_a_teacher_of_another_shape_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(
        ConfigError, match=r"teacher is ViTShape.* but teacher_backbone is ViTShape\(.*width=32"
    ):
        build(**SMALL).load_teacher(teacher(**wrong))
    vit = RelativeViT(16, ViTShape(4, 48, 1, 2), 0.1, 0.0)
    with pytest.raises(ConfigError, match="of width 48, but teacher_backbone"):
        build(**SMALL).load_teacher(RelativeViTEncoder(vit, InputSpec(16)))
    with pytest.raises(ConfigError, match="no teacher to learn from"):
        build(**SMALL).tokenizer.target(torch.rand(1, 3, 16, 16))


def test_two_stages_give_a_codebook_in_use_that_then_stays(tmp_path: Path) -> None:
    recipe = {"batch_size": 32, "warmup_epochs": 0, "compile": False}
    stages = {"recipe": recipe | {"epochs": 0.5}, "tokenizer": {"recipe": recipe | {"epochs": 4}}}
    split = data.load("digits", quiet()).train.subset(torch.arange(256))
    how: dict[str, Any] = {"seed": 0, "device": torch.device("cpu"), "progress": quiet()}

    def train(folder: Path) -> tuple[nn.Module, Any]:
        model = build(**config.merge(SMALL, stages))
        torch.manual_seed(0)
        model.load_teacher(teacher())
        history = MODULE.pretrain(model, split, model.config.recipe, folder=folder, name="test", **how)
        return model, history

    model, history = train(tmp_path)
    assert history.images == 4 * 256 + 128
    assert any("of 16 codes" in text for text in history.warnings)
    assert (tmp_path / "history.json").is_file()
    codebook = model.tokenizer.quantise.codebook
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(16))
    pixels = model.tokenizer.views(split.batch(torch.arange(256)), seeds.generator("cpu", 1))["images"]
    assert len(model.tokenizer.tokens(pixels).unique()) > 0.9 * 16
    # the second stage left the first's work as it was
    file = tmp_path / "tokenizer" / "model.safetensors"
    given = build(**SMALL, teacher="", tokenizer_weights=str(file))
    for name, value in model.tokenizer.state_dict().items():
        assert torch.equal(value, given.tokenizer.state_dict()[name]), name
    # the same again finds both stages finished
    again, found = train(tmp_path)
    assert found == history
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    # a tokenizer that is given is not trained
    recipe = replace(model.config.recipe, epochs=0.25)
    assert MODULE.pretrain(given, split, recipe, **how).images == 64


def test_the_tokenizer_is_frozen_in_the_second_stage() -> None:
    model = build().train()
    assert not model.tokenizer.training
    before = model.tokenizer.quantise.codebook.clone()
    model(**inputs(model))["loss"].backward()
    assert torch.equal(model.tokenizer.quantise.codebook, before)
    trained = {id(p) for group in parameter_groups(model, model.config.recipe) for p in group["params"]}
    assert not trained & {id(p) for p in model.tokenizer.parameters()}


def test_a_tokenizer_of_another_method_or_size_is_refused(tmp_path: Path) -> None:
    other, larger = tmp_path / "other.safetensors", tmp_path / "larger.safetensors"
    save_tensors(other, vq.Tokenizer(vq.TokenizerConfig(codes=16), 16, 4, False).state_dict())
    save_tensors(larger, build(**config.merge(SMALL, {"tokenizer": {"codes": 32}})).tokenizer.state_dict())
    for file, reason in ((other, "lacks encoder"), (larger, r"codebook \(32, 16\) instead of \(16, 16\)")):
        with pytest.raises(CheckpointError, match=reason):
            build(**SMALL, teacher="", tokenizer_weights=str(file))
    with pytest.raises(CheckpointError, match="does not exist"):
        build(**SMALL, teacher="", tokenizer_weights=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"hidden": 64}, "hidden = 64 leaves none of the 64 patches"),
        ({"hidden": 0}, "hidden = 0"),
        ({"image_size": 30}, "30 is not a multiple"),
        ({"early_layer": 5}, "early_layer = 5 is beyond the 4 blocks"),
        ({"tokenizer": {"encoder": {"patch_size": 8}}}, "patches of 8 pixels are not the backbone's of 4"),
        ({"tokenizer": {"codes": 1}}, "1 codes"),
        ({"teacher": ""}, "neither is given"),
        ({"tokenizer_weights": "file"}, "both are given"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build(**overrides)


def test_the_published_recipes() -> None:
    paper = MODULE.Config()
    first, second = paper.tokenizer.recipe, paper.recipe
    assert learning_rate(10 * 5, 5, first) == pytest.approx(2e-4)
    assert learning_rate(100 * 5, 5, first) == pytest.approx(1e-5)
    assert learning_rate(10 * 5, 5, second) == pytest.approx(1.5e-3)
    assert learning_rate(1600 * 5, 5, second) == pytest.approx(1e-5)
    model = build()
    for part, decaying in ((model, {"mask_token", "head.weight"}), (model.tokenizer, {"to_code.0.weight"})):
        names = {id(p): n for n, p in part.named_parameters()}
        groups = parameter_groups(part, part.config.recipe)
        decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
        assert decaying <= decayed
        assert not any(n.endswith(("bias", "cls_token", "pos_embed", "norm1.weight")) for n in decayed)
        model.tokenizer.requires_grad_(True)
