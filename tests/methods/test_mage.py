"""What is special to MAGE: what is masked and dropped, what the decoder reads, its frozen tokenizer, generation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from mimbench import config, data, registry, seeds
from mimbench.checkpoint import save_tensors
from mimbench.errors import CheckpointError, ConfigError
from mimbench.fit import Recipe
from mimbench.models.vq import Tokenizer
from mimbench.optim import parameter_groups
from mimbench.progress import quiet

MODULE = registry.load_method("mage")


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("mage").preset("smoke"), overrides)
    torch.manual_seed(0)
    return MODULE.Model(config.build(MODULE.Config, table)).eval()


def inputs(model: Any, ratio: float = 0.6, count: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "tokens": torch.randint(model.config.tokenizer.codes, (count, model.length)),
        "noise": torch.rand(count, model.length),
        "ratio": torch.full((count,), ratio, dtype=torch.float64),
    }


def seen_by(module: nn.Module, call: Any) -> Tensor:
    """The first argument of a module's last call while ``call`` runs."""
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    call()
    handle.remove()
    return caught[-1]


def test_shares_follow_the_cut_off_normal() -> None:
    model = build()
    uniform = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    expected = stats.truncnorm((0.5 - 0.55) / 0.25, (1 - 0.55) / 0.25, loc=0.55, scale=0.25).ppf(
        uniform.numpy()
    )
    np.testing.assert_allclose(model.mask_ratio(uniform).numpy(), expected, atol=1e-12)
    fixed = build(mask_mean=0.75, mask_std=0.0).mask_ratio(uniform)
    assert torch.equal(fixed, torch.full_like(uniform, 0.75))


def test_neighbours_in_a_batch_share_their_ratio() -> None:
    model = build(ratio_images=8)
    batch = data.load("digits").train.batch(torch.arange(20))
    ratio = model.views(batch, seeds.generator("cpu", 0))["ratio"]
    assert [len(part.unique()) for part in ratio.split(8)] == [1, 1, 1]
    assert len(ratio.unique()) == 3


@pytest.mark.parametrize(("ratio", "masked"), [(0.5, 32), (0.501, 33), (0.75, 48), (1.0, 64)])
def test_as_many_are_masked_as_drawn_and_half_are_dropped_from_among_them(ratio: float, masked: int) -> None:
    model = build()
    given = inputs(model, ratio)
    out = model.complete(**given)
    assert out["mask"].sum(1).tolist() == [masked] * 4
    assert out["drop_mask"].sum(1).tolist() == [32] * 4
    assert (out["drop_mask"] <= out["mask"]).all()
    assert torch.isfinite(out["loss"])
    # the encoder reads the class and the places that stay, in order, with positions from before the dropping
    x = seen_by(model.backbone, lambda: model.complete(**given))
    words = model.backbone.words(given["tokens"].masked_fill(out["mask"].bool(), model.backbone.mask))
    whole = model.backbone.embed(words, model.grid)
    for row in range(4):
        stays = 1 + torch.nonzero(out["drop_mask"][row] == 0)[:, 0]
        assert torch.equal(x[row], whole[row, torch.cat([torch.zeros(1, dtype=torch.int64), stays])])
    # so codes that are masked reach neither the latents nor the predictions
    changed = (given["tokens"] + 1) % model.config.tokenizer.codes
    other = given | {"tokens": torch.where(out["mask"].bool(), changed, given["tokens"])}
    assert torch.equal(model.complete(**other)["pred"], out["pred"])


def test_the_loss_is_the_smoothed_cross_entropy_of_masked_places() -> None:
    model = build()
    given = inputs(model)
    given["ratio"][2:] = 0.9
    out = model.complete(**given)
    logits, codes = out["pred"].double().detach().numpy(), model.config.tokenizer.codes
    assert logits.shape == (4, 65, codes)
    images = []
    for row in range(4):
        errors = []
        for place in range(64):
            if out["mask"][row, place]:
                scores = logits[row, 1 + place]
                log_p = scores - np.log(np.exp(scores).sum())
                target = np.full(codes, 0.1 / codes)
                target[given["tokens"][row, place]] += 0.9
                errors.append(-(target * log_p).sum())
        assert len(errors) == math.ceil(64 * float(given["ratio"][row]))
        images.append(np.mean(errors))
    assert out["loss"].item() == pytest.approx(np.mean(images), rel=1e-5)
    assert out["loss"].item() == pytest.approx(math.log(codes), rel=0.1)


def test_the_class_output_fills_what_is_masked_and_masked_outputs_are_not_read() -> None:
    model = build()
    for ratio, read in [(1.0, 1), (0.75, 17), (0.5, 33)]:
        given = inputs(model, ratio)
        latent = model.complete(**given)["latent"].detach().requires_grad_()
        order = given["noise"].argsort(1)
        masked = order.argsort(1) < math.ceil(64 * ratio)
        model.scores(latent, order[:, 32:].sort(1).values, masked)[:, 1:].square().sum().backward()
        used = latent.grad.abs().sum(2) > 0
        assert used[:, 0].all()
        assert used.sum(1).tolist() == [read] * 4


def test_the_words_get_no_gradient_from_the_scores_that_they_give() -> None:
    model = build()
    latent = torch.randn(2, 65, 64)
    everywhere = torch.arange(64).expand(2, -1)
    model.scores(latent, everywhere, torch.ones(2, 64, dtype=torch.bool)).square().sum().backward()
    assert model.backbone.words.weight.grad is None
    assert model.decoder.fc.weight.grad.abs().sum() > 0
    model.complete(**inputs(model))["loss"].backward()
    assert model.backbone.words.weight.grad.abs().sum() > 0


def test_dropout_acts_in_training_alone() -> None:
    model = build()
    given = inputs(model)
    assert torch.equal(model.complete(**given)["loss"], model.complete(**given)["loss"])
    model.train()
    assert not torch.equal(model.complete(**given)["loss"], model.complete(**given)["loss"])


def test_the_tokenizer_stays_frozen_and_reads_plain_pixels() -> None:
    model = build().train()
    assert not model.tokenizer.training
    assert not any(module.training for module in model.tokenizer.modules())
    trained = {id(p) for group in parameter_groups(model, model.config.recipe) for p in group["params"]}
    assert not trained & {id(p) for p in model.tokenizer.parameters()}
    before = {k: v.clone() for k, v in model.tokenizer.state_dict().items()}
    views = model.views(data.load("digits").train.batch(torch.arange(8)), seeds.generator("cpu", 0))
    assert 0 <= views["images"].min() < 0.1
    assert 0.9 < views["images"].max() <= 1
    model(**views)["loss"].backward()
    assert all(torch.equal(before[k], v) for k, v in model.tokenizer.state_dict().items())
    tokens = model.tokenizer.tokens(views["images"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.tokenizer.tokens(views["images"]), tokens)


def test_two_trainings_then_one_from_the_tokenizer_that_the_first_left(tmp_path: Path) -> None:
    short = {"epochs": 2, "warmup_epochs": 0, "batch_size": 32}
    split = data.load("digits").train.subset(torch.arange(64))
    options = {"seed": 0, "device": torch.device("cpu"), "progress": quiet()}
    model = build(recipe=short, tokenizer={"recipe": {"epochs": 2, "batch_size": 32}})
    blank = {k: v.clone() for k, v in model.tokenizer.state_dict().items()}
    history = MODULE.pretrain(model, split, model.config.recipe, folder=tmp_path, **options)
    assert history.images == 2 * 2 * 64
    assert "tokenizer" in history.warnings[-1]
    learned = {k: v.clone() for k, v in model.tokenizer.state_dict().items()}
    assert not torch.equal(learned["encode.0.weight"], blank["encode.0.weight"])
    assert not any(p.requires_grad for p in model.tokenizer.parameters())

    file = tmp_path / "tokenizer" / "model.safetensors"
    second = build(recipe=short, tokenizer_weights=str(file))
    history = MODULE.pretrain(second, split, second.config.recipe, folder=tmp_path / "second", **options)
    assert history.images == 2 * 64
    assert all(torch.equal(learned[k], v) for k, v in second.tokenizer.state_dict().items())


def test_tokenizers_that_do_not_fit_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        build(tokenizer_weights=str(tmp_path / "none.safetensors"))
    smoke = build().config.tokenizer
    save_tensors(tmp_path / "other.safetensors", Tokenizer(smoke, 32, 8, flip=False).state_dict())
    with pytest.raises(CheckpointError, match=r"another shape for encode\.0\.weight"):
        build(tokenizer_weights=str(tmp_path / "other.safetensors"))
    save_tensors(tmp_path / "mae.safetensors", {"pos_embed": torch.zeros(1, 65, 64)})
    with pytest.raises(CheckpointError, match="unexpected pos_embed"):
        build(tokenizer_weights=str(tmp_path / "mae.safetensors"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mask_min": 0.999}, "drops all 64 tokens"),
        ({"mask_min": 0.8, "mask_max": 0.7}, "is above mask_max"),
        ({"mask_max": 1.2}, "mask_max"),
        ({"image_size": 30}, "multiple"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build(**changes)


def test_generation_uncovers_tokens_by_a_cosine_and_keeps_what_it_has() -> None:
    model = build()
    asked: list[Tensor] = []
    embed = model.backbone.words
    embed.register_forward_pre_hook(lambda _, args: asked.append(args[0].clone()))
    images = model.generate(5, 8, 6.0, seeds.generator("cpu", 0))
    assert images.shape == (5, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    hidden = torch.stack(asked) == model.backbone.mask
    expected = [64] + [math.floor(64 * math.cos(math.pi / 2 * step / 8)) for step in range(1, 8)]
    assert hidden.sum(2).T.tolist() == [expected] * 5
    for before, after in itertools.pairwise(asked):
        known = before != model.backbone.mask
        assert torch.equal(after[known], before[known])
    model.train()
    again = model.generate(5, 8, 6.0, seeds.generator("cpu", 0))
    assert torch.equal(again, images), "without dropout"
    assert model.decoder.training
    assert not torch.equal(model.generate(5, 8, 6.0, seeds.generator("cpu", 1)), images)
    assert model.generate(2, 100, 6.0, seeds.generator("cpu", 0)).shape == (2, 3, 32, 32)
    with pytest.raises(ConfigError, match="in 0 steps"):
        model.generate(2, 0, 6.0, seeds.generator("cpu", 0))


def test_generation_gives_what_was_learned() -> None:
    """After training on two patterns of codes it draws one or the other, whole, and both about as often."""
    shapes = {"backbone": {"width": 32, "depth": 2}, "decoder": {"width": 32, "depth": 1}}
    model = build(image_size=16, tokenizer={"codes": 8}, dropout=0.0, label_smoothing=0.0, **shapes).train()
    for table in (model.backbone.words.weight, model.backbone.positions, model.decoder.positions):
        nn.init.normal_(table)  # learns faster
    patterns = torch.randint(8, (2, 16), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    draw = seeds.generator("cpu", 0)
    for _ in range(60):
        tokens = patterns[torch.randint(2, (32,), generator=draw)]
        ratio = model.mask_ratio(torch.rand(32, generator=draw, dtype=torch.float64))
        model.complete(tokens, torch.rand(32, 16, generator=draw), ratio)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    alike = (model.eval().draw(60, 8, 6.0, draw)[:, None] == patterns).float().mean(2)
    assert (alike.amax(1) > 0.9).float().mean() > 0.8
    assert (alike > 0.9).float().mean(0).min() > 0.2


def test_attackers_get_a_gradient_and_the_same_features() -> None:
    model = build(tokenizer={"code_width": 8})
    encoder = model.encoder()
    images = torch.rand(2, 3, 32, 32)
    leaf = images.clone().requires_grad_()
    found = encoder(leaf).pooled
    torch.testing.assert_close(found, encoder(images).pooled)
    found.square().sum().backward()
    assert leaf.grad.abs().sum((1, 2, 3)).min() > 0


def test_fine_tuning_leaves_the_tokenizer_and_generation_behind() -> None:
    model = build()
    tuned = model.encoder().for_finetuning(0.1).train()
    assert not [name for name, _ in tuned.named_parameters() if name.startswith("tokenizer.")]
    assert tuned.tokenizer.state_dict().keys() == model.tokenizer.state_dict().keys()
    assert not tuned.tokenizer.training
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(tuned.tokenizer.tokens(images), model.tokenizer.tokens(images))
    assert tuned.generate is None
    assert [block.drop_path for block in tuned.backbone.blocks] == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
    rates = [tuned.backbone.rate] + [block.rate for block in tuned.backbone.blocks]
    assert rates == [0.1, 0, 0, 0, 0]


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    recipe: Recipe = paper.recipe
    assert recipe.base_lr * recipe.batch_size / recipe.lr_batch == pytest.approx(2.4e-3)
    assert (paper.backbone.width, paper.backbone.depth) == (768, 12)
    assert (paper.decoder.width, paper.decoder.depth, paper.decoder.heads) == (768, 8, 16)
    model = build()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, model.config.recipe)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    assert {"backbone.words.weight", "backbone.positions", "decoder.positions"} <= decayed
    assert not {"decoder.bias", "backbone.embed_norm.weight", "decoder.fc.bias"} & decayed
