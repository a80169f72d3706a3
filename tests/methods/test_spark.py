"""What is special to SparK: layers that see visible positions only, densified maps, and a dense network afterwards."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mimbench import config, registry
from mimbench.compat import torchvision
from mimbench.encoder import Encoder
from mimbench.errors import ConfigError
from mimbench.models.resnet import ResNet
from mimbench.optim import parameter_groups

MODULE = registry.load_method("spark")
NETWORKS = registry.load_method("spark", "model")
CONVNEXT = {"architecture": "convnext", "convnext": {"depths": [1, 2, 1], "widths": [8, 12, 16], "stem": 2}}
SMALL = {"layers": [1, 1, 1, 1], "widths": [4, 4, 8, 8], "stem": "imagenet"}
BASIC = {"image_size": 96, "resnet": {"block": "basic", **SMALL}}
BOTTLENECK = {"image_size": 96, "resnet": {"block": "bottleneck", **SMALL}}
EVERY = pytest.mark.parametrize("overrides", [{}, BASIC, BOTTLENECK, CONVNEXT])


def build(**overrides: Any) -> Any:
    table = config.merge(registry.method("spark").preset("smoke"), overrides)
    torch.manual_seed(0)
    return randomised(MODULE.Model(config.build(MODULE.Config, table)))


def randomised(model: Any) -> Any:
    """No scale at 0 or 1e-6 and no bias at 0, behind which a leak could hide."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5)
    return model


def inputs(model: Any, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    size = model.config.image_size
    return {"images": torch.randn(count, 3, size, size), "noise": torch.rand(count, model.grid**2)}


def hidden(mask: torch.Tensor, size: int) -> torch.Tensor:
    """The mask of cells (B, f * f) as (B, 1, size, size) bool."""
    side = round(mask.shape[1] ** 0.5)
    cells = mask.reshape(-1, 1, side, side).bool()
    return cells.repeat_interleave(size // side, 2).repeat_interleave(size // side, 3)


def latents(out: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [out[name] for name in sorted(out) if name.startswith("latent")]


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_no_stage_hears_of_hidden_pixels_or_writes_to_hidden_cells(
    overrides: dict[str, Any], training: bool
) -> None:
    model = build(**overrides).train(training)
    given = inputs(model)
    with torch.no_grad():
        out = model(**given)
        where = hidden(out["mask"], model.config.image_size)
        other = model(images=torch.where(where, 7.0, given["images"]), noise=given["noise"])
    for x, y in zip(latents(out), latents(other), strict=True):
        assert torch.equal(x, y)
        assert not x[hidden(out["mask"], x.shape[2]).expand_as(x)].any()
        assert x[~hidden(out["mask"], x.shape[2]).expand_as(x)].any()


@EVERY
def test_a_visible_cell_hears_of_its_visible_neighbours(overrides: dict[str, Any]) -> None:
    """The other half of sparse convolution: cells are not encoded one by one."""
    model = build(**overrides).eval()
    given = inputs(model, 1)
    active = torch.zeros(1, 1, model.grid, model.grid)
    active[0, 0, 0, :2] = 1.0
    changed = given["images"].clone()
    changed[..., : model.stride, model.stride : 2 * model.stride] += 1.0
    with torch.no_grad():
        before, after = (model.encode(x, active)[-1] for x in (given["images"], changed))
    assert not torch.equal(before[0, :, 0, 0], after[0, :, 0, 0])


def test_a_dense_network_smears_visible_pixels_into_hidden_cells() -> None:
    model = build(sparse=False).train()
    with torch.no_grad():
        out = model(**inputs(model))
    assert all(x[hidden(out["mask"], x.shape[2]).expand_as(x)].any() for x in latents(out))


@pytest.mark.parametrize("training", [True, False])
def test_the_norm_is_torchs_on_gathered_positions(training: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.BatchNorm2d(5), nn.BatchNorm1d(5)
    for norm in (ours, theirs):
        torch.manual_seed(1)
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        norm.train(training)
    x = torch.randn(2, 5, 8, 8, dtype=torch.float32) + 3
    x, copy = x.clone().requires_grad_(), x.clone().requires_grad_()
    active = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]]).reshape(2, 1, 2, 2)
    seen = ~hidden(1 - active.flatten(1), 8)[:, 0]
    out = NETWORKS.batch_norm(ours, x, active)
    expected = torch.zeros(2, 8, 8, 5)
    expected[seen] = theirs(copy.permute(0, 2, 3, 1)[seen])
    torch.testing.assert_close(out, expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected.permute(0, 3, 1, 2) * weight).sum().backward()
    torch.testing.assert_close(x.grad, copy.grad, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert not x.grad.permute(0, 2, 3, 1)[~seen].any()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "visible"), [({}, 6), ({"image_size": 64}, 26), ({**BASIC, "image_size": 224}, 20)]
)
def test_the_number_of_visible_cells_is_rounded_as_in_the_authors_code(
    overrides: dict[str, Any], visible: int
) -> None:
    model = build(**overrides).eval()
    given = inputs(model, 2)
    with torch.no_grad():
        mask = model(**given)["mask"]
    assert (mask == 0).sum(1).tolist() == [visible, visible]
    assert given["noise"][mask == 0].max() < given["noise"][mask == 1].max()
    for noise, row in zip(given["noise"], mask, strict=True):
        assert noise[row == 0].max() < noise[row == 1].min()


@EVERY
def test_the_loss_is_a_mean_over_hidden_cells_standardised_one_by_one(overrides: dict[str, Any]) -> None:
    model = build(**overrides).eval()
    given = inputs(model)
    with torch.no_grad():
        out = model(**given)
    errors, side = [], model.stride
    for image, pred, mask in zip(given["images"].numpy(), out["pred"].numpy(), out["mask"], strict=True):
        for cell in np.flatnonzero(mask.numpy()):
            row, column = divmod(int(cell), model.grid)
            pixels = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            errors.append(((pred[cell].reshape(side, side, 3) - target.transpose(1, 2, 0)) ** 2).mean())
    assert float(out["loss"]) == pytest.approx(np.mean(errors), rel=1e-5)


def test_densified_maps_hold_the_mask_embedding_where_nothing_was_seen() -> None:
    layer = MODULE.Densify(NETWORKS.ChannelNorm(4, eps=1e-6), 4, 4, kernel=1).eval()
    assert isinstance(layer.proj, nn.Identity), "the authors project nothing where the widths agree"
    active = torch.tensor([[1.0, 0], [0, 0]]).reshape(1, 1, 2, 2)
    x = NETWORKS.visible(torch.randn(1, 4, 4, 4), active)
    out = layer(x, active, sparse=True)
    where = hidden(1 - active.flatten(1), 4).expand_as(out)
    tokens = layer.mask_token[:, None, None].expand_as(out)
    torch.testing.assert_close(out[where], tokens[where])
    torch.testing.assert_close(out[~where], layer.norm(x)[~where])
    out[where].sum().backward()
    assert layer.mask_token.grad is not None
    assert layer.norm.bias.grad is None or not layer.norm.bias.grad.any()


def test_the_decoder_halves_its_width_and_adds_each_map_before_its_block() -> None:
    with torch.device("meta"):
        decoder = MODULE.Decoder(768, 5)
    assert [block.up.in_channels for block in decoder.blocks] == [768, 384, 192, 96, 48]
    assert decoder.proj.in_channels == 24
    decoder = MODULE.Decoder(8, 2).eval()
    maps = [torch.randn(1, 8, 2, 2), torch.randn(1, 4, 4, 4)]
    first, second = decoder.blocks
    torch.testing.assert_close(decoder(maps), decoder.proj(second(first(maps[0]) + maps[1])))
    torch.testing.assert_close(decoder(maps[:1]), decoder.proj(second(first(maps[0]))))


@pytest.mark.parametrize(
    ("overrides", "widths"),
    [
        ({}, [64, 32, 16]),
        (BOTTLENECK, [32, 32, 16, 16]),
        (CONVNEXT, [16, 12, 8]),
        ({"hierarchy": False}, [64]),
    ],
)
def test_the_decoder_gets_a_map_for_each_of_its_scales(overrides: dict[str, Any], widths: list[int]) -> None:
    model = build(decoder_width=128, **overrides)
    assert [len(layer.mask_token) for layer in model.densify] == widths
    kernels = [layer.proj.kernel_size for layer in model.densify]
    assert kernels == [(1, 1)] + [(3, 3)] * (len(widths) - 1)


def test_what_is_left_is_the_plain_network_with_statistics_of_visible_positions() -> None:
    model = build(**BOTTLENECK).train()
    given = inputs(model)
    with torch.no_grad():
        mask = hidden(model(**given)["mask"], 48)[:, 0]
        first = model.backbone.conv1(given["images"] * ~hidden(model(**given)["mask"], 96))
    seen = first.permute(0, 2, 3, 1)[~mask]
    norm = model.backbone.bn1  # moved twice, by 0.1 each time, from 0 and 1
    torch.testing.assert_close(norm.running_mean, 0.19 * seen.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, 0.81 + 0.19 * seen.var(0), rtol=1e-4, atol=1e-5)
    plain = ResNet(model.config.resnet)
    plain.load_state_dict(model.backbone.state_dict())
    images = given["images"]
    found = model.eval().encoder()(images)
    torch.testing.assert_close(found.pooled, plain.eval()(images))
    # With everything visible the sparse network is the dense one.
    everything = torch.ones(3, 1, model.grid, model.grid)
    torch.testing.assert_close(model.encode(images, everything)[-1], found.patches)


def test_the_convnext_is_torchvisions() -> None:
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.convnext import ConvNeXt as Theirs

    torchvision()
    settings = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 1)]
    theirs = Theirs(settings, num_classes=1).eval()
    theirs.features[0][0] = nn.Conv2d(3, 8, 2, 2)
    ours = randomised(NETWORKS.ConvNeXt(NETWORKS.ConvNeXtShape((1, 2, 1), (8, 12, 16), stem=2))).eval()

    def name(key: str) -> str:
        key = re.sub(r"^downsample_layers\.(\d+)", lambda m: f"features.{2 * int(m[1])}", key)
        key = re.sub(r"^stages\.(\d+)", lambda m: f"features.{2 * int(m[1]) + 1}", key)
        for part, place in (("dwconv", 0), ("norm", 2), ("pwconv1", 3), ("pwconv2", 5)):
            key = key.replace(f".{part}.", f".block.{place}.")
        return key.replace("gamma", "layer_scale")

    state = {name(key): value for key, value in ours.state_dict().items()}
    state = {k: v[:, None, None] if k.endswith("layer_scale") else v for k, v in state.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("classifier") for key in missing)
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(ours.maps(images)[-1], theirs.features(images), rtol=1e-4, atol=1e-5)


def test_the_convnext_meets_the_contract_of_encoders() -> None:
    encoder = build(**CONVNEXT).encoder().eval()
    assert isinstance(encoder, Encoder)
    assert (encoder.depth, encoder.stride, encoder.dim) == (3, 8, 16)
    images = torch.randn(2, 3, 32, 64)
    found = encoder(images, layers=(0, 2))
    assert found.patches.shape == (2, 16, 4, 8)
    assert [x.shape[1:] for x in found.layers] == [(8, 16, 32), (16, 4, 8)]
    torch.testing.assert_close(found.pooled, found.patches.mean((2, 3)))
    tuned = encoder.for_finetuning(drop_path=0.3).train()
    rates = [m.drop_path for m in tuned.modules() if isinstance(m, NETWORKS.ConvNeXtBlock)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [m.drop_path for m in encoder.modules() if isinstance(m, NETWORKS.ConvNeXtBlock)] == [0] * 4
    pooled = tuned(images).pooled
    torch.testing.assert_close(pooled.mean(1), torch.zeros(2), rtol=0, atol=1e-5)  # a fresh norm
    (pooled * torch.randn_like(pooled)).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())
    layers = {tuned.layer_of(n) for n, _ in tuned.named_parameters()}
    assert layers == {0, 1, 2, 3, 4}
    assert tuned.layer_of("convnext.downsample_layers.1.1.weight") == 2


def test_stochastic_depth_rises_with_the_blocks_of_a_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def record(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
        rates.append(rate)
        return x

    monkeypatch.setattr(NETWORKS, "drop_path", record)
    model = build(drop_path=0.3)
    model(**inputs(model))
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_the_published_recipe() -> None:
    paper = MODULE.Config()
    recipe = paper.recipe
    peak = recipe.base_lr * recipe.batch_size / recipe.lr_batch
    assert peak == pytest.approx(3.2e-3)
    assert (recipe.warmup_lr / recipe.base_lr, recipe.min_lr / recipe.base_lr) == pytest.approx(
        (0.005, 0.001)
    )
    assert (paper.resnet.name, paper.convnext.name) == ("resnet-50", "convnext-s")


def test_mask_embeddings_and_layer_scales_do_not_decay() -> None:
    model = build(**CONVNEXT)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {
        names[p]
        for g in parameter_groups(model, model.config.recipe)
        if g["weight_decay"]
        for p in g["params"]
    }
    assert not [n for n in decayed if n.endswith(("mask_token", "gamma", "bias"))]
    assert {"backbone.stages.0.0.dwconv.weight", "densify.1.proj.weight", "decoder.proj.weight"} <= decayed


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio = 1.0 leaves 0 of 16"),
        ({"mask_ratio": 0.02}, "mask_ratio = 0.02 leaves 16 of 16"),
        ({"image_size": 36}, "not a multiple of the stride 8"),
        ({"image_size": 0}, "not a multiple of the stride 8"),
        ({"decoder_width": 36}, "decoder_width = 36 cannot be halved 3 times"),
        ({"decoder_width": 0}, "decoder_width = 0"),
        ({"recipe": {"batch_size": 1}, "mask_ratio": 0.95}, "one position to average over"),
        ({**CONVNEXT, "convnext": {"depths": [1, 1], "widths": [8, 8, 8]}}, "a depth and a width"),
        ({**CONVNEXT, "convnext": {"depths": [1], "widths": [8], "stem": 3}}, "stem = 3 is not a power"),
        ({**CONVNEXT, "convnext": {"depths": [1], "widths": [8], "stem": 1}}, "stride 1"),
        ({"drop_path": 1.0}, "drop_path = 1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        build(**overrides)
