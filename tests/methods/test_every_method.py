"""What must hold for every method that discovery finds."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import math
import re
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch
from small import evaluate, parts

from mimbench import config, data, registry, seeds
from mimbench.encoder import Encoder
from mimbench.errors import ConfigError
from mimbench.optim import make_optimizer
from mimbench.task import Task

SLUGS = list(registry.methods())
TRAINED = [slug for slug in SLUGS if hasattr(registry.load_method(slug).Model, "views")]


def smoke(slug: str) -> Any:
    """The method's model at the smoke preset, its weights drawn from a fixed seed."""
    module = registry.load_method(slug)
    settings = config.build(module.Config, registry.method(slug).preset("smoke"))
    if getattr(settings, "classes", 0) is None:
        settings = dataclasses.replace(settings, classes=10)
    seeds.seed_everything("floor test")
    return module.Model(settings)


def batch(model: Any, size: int = 16) -> Any:
    split = data.load("digit-scenes" if "frames" in model.needs else "digits").train
    return split.batch(torch.arange(size), needs=tuple(model.needs))


def step(model: Any) -> dict[str, torch.Tensor]:
    seeds.seed_everything("dropout")
    views = model.views(batch(model), seeds.generator("cpu", 0, "views"))
    outputs = model(**views)
    outputs["loss"].backward()
    return outputs


@pytest.mark.parametrize("slug", TRAINED)
def test_a_step_gives_a_finite_loss_and_reaches_every_trained_parameter(slug: str) -> None:
    model = smoke(slug).train()
    loss = step(model)["loss"]
    assert loss.ndim == 0
    assert torch.isfinite(loss)
    untouched = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    # A convolution before a norm whose scale starts at zero gets its gradient from the second step on.
    optimizer = make_optimizer(model, model.config.recipe)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    optimizer.zero_grad()
    step(model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    still = [n for n in untouched if gradients[n] is None or not gradients[n].abs().sum() > 0]
    assert not still
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("slug", TRAINED)
def test_the_same_seed_gives_the_same_views_loss_and_gradients(slug: str) -> None:
    first, second = smoke(slug).train(), smoke(slug).train()
    assert torch.equal(step(first)["loss"], step(second)["loss"])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("slug", TRAINED)
def test_another_generator_gives_other_views(slug: str) -> None:
    model = smoke(slug)
    first = model.views(batch(model), seeds.generator("cpu", 0))
    second = model.views(batch(model), seeds.generator("cpu", 1))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_encoder_meets_the_contract(slug: str) -> None:
    encoder = smoke(slug).encoder().eval()
    assert isinstance(encoder, Encoder)
    size, stride = encoder.input.size, encoder.stride
    images = torch.randn(2, 3, size, size)
    last = encoder.depth - 1
    with torch.no_grad():
        found = encoder(images, layers=(0, last))
        wide = encoder(torch.randn(2, 3, size, 2 * size))
    assert found.pooled.shape == (2, encoder.dim)
    assert found.patches.shape == (2, encoder.dim, size // stride, size // stride)
    assert len(found.layers) == 2
    assert wide.patches.shape[2:] == (size // stride, 2 * size // stride)
    # What one image gives must not depend on its neighbours in the batch.
    with torch.no_grad():
        alone = encoder(images[:1])
    torch.testing.assert_close(alone.pooled, found.pooled[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("protocol", list(registry.protocols()))
@pytest.mark.parametrize("slug", SLUGS)
def test_the_encoder_passes_the_protocols_that_its_card_names(
    slug: str, protocol: str, tmp_path: Path
) -> None:
    if protocol not in registry.method(slug).protocols:
        pytest.skip("the card does not name it")
    encoder = smoke(slug).encoder().eval().requires_grad_(False)
    recipe = next(iter(registry.load_protocol(protocol).RECIPES))
    result = evaluate(encoder, protocol, recipe, Task(*parts(protocol)), tmp_path)
    score = result.metrics[result.primary]
    assert math.isfinite(score.value)
    if score.low is not None:
        assert score.low <= score.value <= score.high


@pytest.mark.parametrize("slug", TRAINED)
def test_memory_does_not_grow_over_fifty_steps(slug: str) -> None:
    """Counted in bytes of tensors that are alive, which no allocator hides."""
    model = smoke(slug).train()
    optimizer = make_optimizer(model, model.config.recipe)
    few = batch(model, 8)

    def train(first: int, last: int) -> int:
        for number in range(first, last):
            with torch.no_grad():
                few.progress = number / 50
                if before_step := getattr(model, "before_step", None):
                    before_step(few.progress)
                views = model.views(few, seeds.generator("cpu", number))
            loss = model(**views)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                if after_step := getattr(model, "after_step", None):
                    after_step(few.progress)
            assert torch.isfinite(loss)
        del views, loss
        gc.collect()
        return sum(o.nbytes for o in gc.get_objects() if issubclass(type(o), torch.Tensor))

    early = train(0, 3)
    assert train(3, 50) <= early


@pytest.mark.parametrize("slug", [slug for slug in TRAINED if slug not in ("simsiam", "supervised")])
def test_an_image_that_patches_do_not_tile_is_refused_before_training(slug: str) -> None:
    module = registry.load_method(slug)
    settings = config.build(module.Config, registry.method(slug).preset("smoke"))
    with pytest.raises(ConfigError, match=r"\b30\b"):
        module.Model(dataclasses.replace(settings, image_size=30))


@pytest.mark.parametrize("slug", SLUGS)
def test_finetuning_works_on_a_copy_and_reaches_every_parameter(slug: str) -> None:
    encoder = smoke(slug).encoder()
    before = copy.deepcopy(encoder.state_dict())
    tuned = encoder.for_finetuning(drop_path=0.0).train()
    tuned(torch.randn(4, 3, encoder.input.size, encoder.input.size)).pooled.square().sum().backward()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    layers = {name: tuned.layer_of(name) for name, _ in tuned.named_parameters()}
    assert min(layers.values()) == 0
    assert max(layers.values()) in (encoder.depth, encoder.depth + 1)
    tokens = [n for n, p in tuned.named_parameters() if p.grad is None and "cls_token" not in n]
    assert not tokens


@pytest.mark.parametrize("slug", SLUGS)
def test_the_card_is_complete_and_its_presets_build(slug: str) -> None:
    card = registry.method(slug)
    module = registry.load_method(slug)
    assert {"paper", "cifar", "smoke"} <= set(card.presets)
    assert card.summary
    assert set(card.protocols) <= set(registry.protocols())
    for name in card.presets:
        config.build(module.Config, card.preset(name))
    if card.family not in registry.FAMILIES:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv)
        assert card.presets["paper"] == {}, "the defaults of Config are the paper's"
        assert (card.folder / "reported.csv").is_file()
        assert (card.folder / "official.py").is_file() or not card.code
    assert (card.folder / "README.md").is_file()


@pytest.mark.parametrize("slug", SLUGS)
def test_every_setting_says_what_it_means(slug: str) -> None:
    source = (registry.method(slug).folder / "method.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    module = registry.load_method(slug)
    own = [
        c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == module.__name__
    ]
    for cls in own:
        for field in dataclasses.fields(cls):
            place = next(n for n, line in enumerate(lines, 1) if re.match(rf"    {field.name}: ", line))
            assert place in commented, f"{cls.__name__}.{field.name} has no comment"


@pytest.mark.parametrize("slug", SLUGS)
def test_a_method_stays_one_readable_file(slug: str) -> None:
    lines = (registry.method(slug).folder / "method.py").read_text(encoding="utf-8").count("\n")
    assert lines <= 400
