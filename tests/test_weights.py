"""Published checkpoints: whose they are, what they lack, and that they score as the networks they come from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimbench import checkpoint, config, progress, registry, runner, seeds, weights
from mimbench.errors import CheckpointError, ConfigError, MimbenchError, UnknownName
from mimbench.runner import Request

TINY = {
    "image_size": 16,
    "backbone": {"patch_size": 4, "width": 16, "depth": 2, "heads": 1},
    "decoder": {"width": 32, "depth": 1, "heads": 1},
}
SET = (
    *("image_size=16", "backbone.patch_size=4", "backbone.width=16", "backbone.depth=2", "backbone.heads=1"),
    *("decoder.width=32", "decoder.depth=1", "decoder.heads=1"),
)


def mae() -> tuple[Any, nn.Module]:
    module = registry.load_method("mae")
    seeds.seed_everything("weights")
    settings = config.build(module.Config, TINY)
    return settings, module.Model(settings)


def theirs(model: nn.Module, part: str = "") -> dict[str, Tensor]:
    """MAE's weights under the names of its authors."""
    named = {}
    for name, value in model.state_dict().items():
        if name.startswith("backbone."):
            named[name.removeprefix("backbone.")] = value
        elif part != "encoder":
            name = name.removeprefix("decoder.")
            named[name if name == "mask_token" else f"decoder_{name}"] = value
    return named


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("part", ["", "encoder"])
@pytest.mark.parametrize("prefix", ["", "module.", "teacher.backbone.", "module.encoder."])
@pytest.mark.parametrize("key", ["model", "state_dict", "teacher", None])
def test_a_checkpoint_is_recognised_however_it_is_wrapped(
    tmp_path: Path, part: str, prefix: str, key: str | None
) -> None:
    settings, model = mae()
    state = wrapped(theirs(model, part), prefix)
    file = tmp_path / "checkpoint.pth"
    torch.save({key: state, "epoch": 3} if key else state, file)
    (match,), _ = weights.recognise(file, ("mae",), {})
    # 'backbone.' may be read as ours
    assert match.prefix in (prefix, prefix.removesuffix("backbone."))
    assert match.whole == (part == "")
    assert match.config.backbone == settings.backbone
    assert match.config.image_size == 16
    if match.whole:
        assert match.config.decoder == settings.decoder
    assert match.names["backbone.blocks.1.attn.qkv.weight"] == f"{prefix}blocks.1.attn.qkv.weight"
    other = registry.load_method("mae").Model(settings)
    nn.init.zeros_(other.backbone.norm.weight)
    weights.load(file, "mae", settings, other)
    for name in match.state:
        assert torch.equal(other.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("slug", ["beitv2", "capi", "mae", "simsiam"])
def test_whose_weights_they_are_is_asked_without_making_any(slug: str) -> None:
    model = weights._sketch(slug, registry.load_method(slug).Config())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_our_own_checkpoints_are_recognised(tmp_path: Path) -> None:
    _, model = mae()
    checkpoint.save_tensors(tmp_path / "model.safetensors", model.state_dict())
    (match,), _ = weights.recognise(tmp_path / "model.safetensors", ("mae",), {})
    assert match.whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.bias"), r"it lacks of the encoder backbone\.norm\.bias"),
        (lambda s: s.pop("decoder_norm.bias"), r"a part of what is trained .* lacks decoder\.norm\.bias"),
        (lambda s: s.update({"head.weight": torch.zeros(10, 16)}), r"no place: .*head\.weight"),
        (
            lambda s: s.update({"cls_token": torch.zeros(1, 1, 8)}),
            r"cls_token \(1, 1, 8\) instead of \(1, 1, 16\)",
        ),
    ],
)
def test_a_partial_match_is_refused_and_says_why(tmp_path: Path, change: Any, message: str) -> None:
    settings, model = mae()
    state = theirs(model)
    change(state)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth does not fit mae .*{message}"):
        weights.load(tmp_path / "odd.pth", "mae", settings, registry.load_method("mae").Model(settings))
    found, others = weights.recognise(tmp_path / "odd.pth", ("mae", "simsiam"), {})
    assert not found
    assert next(iter(others)) == "mae"  # the nearest


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    module = registry.load_method("simsiam")
    model = module.Model(config.build(module.Config, registry.method("simsiam").preset("smoke")))
    checkpoint.save_tensors(tmp_path / "simsiam.safetensors", model.state_dict())
    settings, other = mae()
    with pytest.raises(CheckpointError, match="0 tensors fit"):
        weights.load(tmp_path / "simsiam.safetensors", "mae", settings, other)


def test_the_command_for_a_checkpoint_names_its_sizes(tmp_path: Path) -> None:
    _, model = mae()
    torch.save(theirs(model, "encoder"), tmp_path / "tiny.pth")
    (match,), _ = weights.recognise(tmp_path / "tiny.pth", ("mae",), {})
    text = weights.command(tmp_path / "tiny.pth", match)
    assert text.startswith("mimbench run --method mae --protocol linear,knn --preset paper --weights")
    assert "--set image_size=16" in text
    assert "--set backbone.width=16" in text


def score(file: Path, **more: Any) -> runner.Outcome:
    request = Request(("mae",), ("knn",), overrides=SET, weights=file, **more)
    (outcome,) = runner.run(request, progress.quiet())
    return outcome


def test_a_checkpoint_is_scored_without_training_and_the_record_says_so(tmp_path: Path) -> None:
    _, model = mae()
    file = tmp_path / "tiny.pth"
    torch.save(theirs(model, "encoder"), file)
    made = score(file).record
    assert (made.pretrain.images, made.pretrain.steps, made.pretrain.epochs) == (0, 0, 0)
    assert made.pretrain.dataset == "tiny.pth"
    assert made.pretrain.data_fingerprint == weights.digest(file)
    assert f"--weights {file}" in made.command
    assert not score(file).repeated
    nn.init.zeros_(model.get_parameter("backbone.norm.weight"))  # now all features are alike
    torch.save(theirs(model, "encoder"), file)
    again = score(file)
    assert again.repeated
    assert again.record.score.value < made.score.value


def test_weights_need_one_method_and_a_file() -> None:
    with pytest.raises(ConfigError, match="weights are of one method"):
        list(runner.run(Request(("mae", "simmim"), ("knn",), weights=Path("x.pth")), progress.quiet()))
    with pytest.raises(CheckpointError, match=r"nowhere\.pth.*does not exist|cannot be read"):
        score(Path("nowhere.pth"))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_timm_encoder_gives_what_timm_gives(name: str, tmp_path: Path) -> None:
    module = registry.load_method("timm")
    model = module.Model(module.Config(name=name, pretrained=False)).eval()
    images = torch.randn(2, 3, 64, 96)
    encoder = model.encoder()
    with torch.no_grad():
        features = encoder(images, layers=(encoder.depth - 1, 0))
        torch.testing.assert_close(features.pooled, model.net(images))
        tokens = model.net.forward_features(images)
    grid = (64 // encoder.stride, 96 // encoder.stride)
    expected = tokens if tokens.ndim == 4 else tokens[:, 1:].mT.unflatten(2, grid)
    torch.testing.assert_close(features.patches, expected)
    last, first = features.layers
    assert last.shape == features.patches.shape
    assert first.shape[2:] >= last.shape[2:]
    # its own file, classifier and all, comes in through --weights
    net = __import__("timm").create_model(name, pretrained=False, num_classes=10)
    torch.save(net.state_dict(), tmp_path / "timm.pth")
    match = weights.load(tmp_path / "timm.pth", "timm", model.config, model)
    assert match.whole
    assert torch.equal(
        model.net.state_dict()[next(iter(net.state_dict()))], next(iter(net.state_dict().values()))
    )


def test_a_timm_encoder_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.load_method("timm")
    with pytest.raises(MimbenchError, match="timm model 'resnet1'"):
        module.create(module.Config(name="resnet1"))
    with pytest.raises(ConfigError, match="needs a model"):
        module.create(module.Config())
    with pytest.raises(ConfigError, match="'mae:x' has a name after the method"):
        list(runner.run(Request(("mae:x",), ("knn",)), progress.quiet()))
    import timm

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(MimbenchError, match=r"could not provide 'resnet18': no connection.*--weights"):
        module.create(module.Config(name="resnet18"))


class Harmful:
    """Unpickled by a reader that runs code, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_weights_that_anybody_published_cannot_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = registry.load_method("timm")
    import timm.models._hub as hub

    card = {"architecture": "resnet18", "num_classes": 0, "pretrained_cfg": {"num_classes": 0}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    torch.save({"x": Harmful(tmp_path / "harm")}, tmp_path / "pytorch_model.bin")
    asked = []

    def download(repo_id: str, filename: str, **_: Any) -> str:
        asked.append(filename)
        if not (tmp_path / filename).is_file():
            raise hub.EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(MimbenchError, match="weights_only=True blocked loading this checkpoint"):
        module.create(module.Config(name="hf-hub:somebody/something"))
    assert asked[-1] == "pytorch_model.bin"
    assert not (tmp_path / "harm").exists()
    with pytest.raises(UnknownName, match="unknown timm model"):
        module.create(module.Config(name=f"local-dir:{tmp_path}"))


def test_timm_is_a_method_on_the_command_line() -> None:
    request = Request(("timm:resnet18",), ("knn",), overrides=("pretrained=false", "image_size=32"))
    (outcome,) = runner.run(request, progress.quiet())
    made = outcome.record
    assert (made.method.slug, made.overrides["name"], made.backbone) == ("timm", "resnet18", "resnet18")
    assert "--method timm:resnet18" in made.command
