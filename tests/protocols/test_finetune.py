"""Fine-tuning: what is learnt, what is left alone, and what never happens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimbench import config, registry
from mimbench.data import Batch, InMemory, Split
from mimbench.encoder import InputSpec
from mimbench.errors import ConfigError, LabelLeak
from mimbench.models.resnet import ResNet, ResNetEncoder, ResNetShape
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.optim import parameter_groups
from mimbench.progress import quiet
from mimbench.task import Context, Task

finetune = registry.load_protocol("finetune")


def encoder(seed: int = 0) -> ViTEncoder:
    torch.manual_seed(seed)
    return ViTEncoder(ViT(16, ViTShape(patch_size=4, width=24, depth=2, heads=2)), InputSpec(16), "class")


def split(part: str, per_class: tuple[int, ...] = (40, 40, 40), seed: int = 0) -> Split:
    """Images whose class is the brightest colour channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 120, (len(labels), 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[torch.arange(len(labels)), labels % 3] += 100
    names = tuple(f"class {n}" for n in range(len(per_class)))
    return Split(
        "colours",
        part,
        InMemory(images),
        names,
        f"{part}{seed}",
        torch.arange(len(labels)),
        all_labels=labels,
    )


def settings(recipe: str = "light", **changes: Any) -> Any:
    quick = {"training": {"batch_size": 20}, "least_steps": 40}
    table = config.merge(config.merge(finetune.RECIPES[recipe], quick), changes)
    return config.build(finetune.Settings, table | {"recipe": recipe})


def context(tmp_path: Path, seed: int = 0) -> Context:
    return Context(torch.device("cpu"), seed, quiet(), tmp_path / "work")


def test_learns_and_leaves_the_encoder_alone(tmp_path: Path) -> None:
    backbone = encoder()
    before = copy.deepcopy(backbone.state_dict())
    task = Task(split("train"), split("test", (10, 10, 10), seed=1))
    result = finetune.evaluate(backbone, task, settings(), context(tmp_path))
    assert result.metrics["top1"].value > 90
    assert result.correct is not None
    assert result.metrics["top1"].value == pytest.approx(100 * result.correct.mean())
    assert "top5" not in result.metrics
    assert result.details["steps"] == 40
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    with pytest.raises(LabelLeak):
        task.unseal()


def test_predictions_know_nothing_of_test_labels(tmp_path: Path) -> None:
    test = split("test", (10, 10, 10), seed=1)
    shuffled = Split(**{**vars(test), "all_labels": test.labels.roll(1)})
    found = []
    for number, part in enumerate((test, shuffled)):
        result = finetune.evaluate(
            encoder(), Task(split("train"), part), settings(least_steps=4), context(tmp_path / str(number))
        )
        predicted = result.correct  # whether right, so compared through the labels below
        found.append((predicted, part.labels))
    (right, labels), (other, rolled) = found
    same = labels == rolled
    np.testing.assert_array_equal(right[same], other[same])
    assert not (right[~same] & other[~same]).any()  # one prediction cannot meet two labels


def test_repeats_to_the_last_digit_and_ignores_the_inference_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for number, size in enumerate((256, 256, 7)):
        monkeypatch.setattr(finetune, "INFERENCE_BATCH", size)
        task = Task(split("train"), split("test", (10, 10, 10), seed=1))
        result = finetune.evaluate(encoder(), task, settings(least_steps=4), context(tmp_path / str(number)))
        runs.append((result.details["curve"], result.correct.tolist()))
    assert runs[0] == runs[1] == runs[2]


def test_classes_missing_from_either_split(tmp_path: Path) -> None:
    train, test = split("train", (30, 30, 0, 0, 0, 0, 2)), split("test", (5, 0, 0, 5, 0, 0, 0), seed=1)
    result = finetune.evaluate(encoder(), Task(train, test), settings(least_steps=2), context(tmp_path))
    assert set(result.metrics) == {"top1", "top5"}
    assert result.metrics["top5"].value >= result.metrics["top1"].value
    accuracy = result.details["accuracy"]
    assert accuracy["class 3"] == 0  # never seen in train, so below the classes that were
    assert accuracy["class 1"] is None


def test_few_labels_are_balanced_fixed_and_never_none() -> None:
    train = split("train", (60, 30, 2, 300))
    part = finetune.labelled_part(train, 0.1)
    assert part.labels.bincount().tolist() == [10, 10, 2, 10]
    assert finetune.labelled_part(train, 0.001).labels.bincount().tolist() == [1, 1, 1, 1]
    assert finetune.labelled_part(train, 0.1).fingerprint == part.fingerprint
    smaller, larger = (set(finetune.labelled_part(train, s).index.tolist()) for s in (0.01, 0.1))
    assert smaller < larger
    assert finetune.labelled_part(train, 1.0) is train
    with pytest.raises(ConfigError, match="label_share"):
        settings(label_share=0.0)


def test_learning_rate_is_chosen_on_a_part_of_train(tmp_path: Path) -> None:
    task = Task(split("train"), split("test", (5, 5, 5), seed=1))
    chosen = settings(learning_rates=[1e-9, 1e-2], least_steps=40)
    result = finetune.evaluate(encoder(), task, chosen, context(tmp_path))
    assert result.details["chosen_learning_rate"] == 1e-2
    assert result.details["selection_top1"][1] > result.details["selection_top1"][0]
    assert result.metrics["top1"].value > 90


def test_head_starts_small_and_layers_decay() -> None:
    model = finetune.Classifier(encoder(), 1000, settings(drop_path=0.2), seed=0)
    assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.05)
    assert not model.head.bias.any()
    assert [block.drop_path for block in model.encoder.vit.blocks] == [0, 0.2]
    scales = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, settings().training):
        scales |= {names[p]: group["lr_scale"] for p in group["params"]}
    # two blocks: embedding 0, blocks 1 and 2, the fresh norm and the head 3
    assert scales["head.weight"] == scales["encoder.fc_norm.weight"] == 1
    assert scales["encoder.vit.blocks.1.mlp.fc1.weight"] == pytest.approx(0.75)
    assert scales["encoder.vit.blocks.0.mlp.fc1.weight"] == pytest.approx(0.75**2)
    assert scales["encoder.vit.cls_token"] == pytest.approx(0.75**3)


@pytest.mark.parametrize("recipe", ["light", "mae"])
def test_label_smoothing_enters_once(recipe: str) -> None:
    model = finetune.Classifier(encoder(), 10, settings(recipe, label_smoothing=0.1), seed=0)
    part = split("train")
    batch = part.batch(torch.arange(8), needs=("labels",))
    views = model.views(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views["targets"].sum(1), torch.ones(8))
    assert float(views["targets"].min()) == pytest.approx(0.01)
    if recipe == "light":
        assert views["targets"].max(1).values.tolist() == pytest.approx([0.91] * 8)
        theirs = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(model.logits(views["images"]), batch.labels)
        torch.testing.assert_close(model(**views)["loss"], theirs)


def test_mae_recipe_is_that_of_the_paper() -> None:
    """He et al. (2022), table 9, for ViT-L but for the epochs, which are ViT-B's."""
    mae = config.build(finetune.Settings, finetune.RECIPES["mae"])
    recipe = mae.training
    assert (recipe.optimizer, recipe.betas, recipe.weight_decay) == ("adamw", (0.9, 0.999), 0.05)
    assert (recipe.base_lr, recipe.lr_batch, recipe.layer_decay) == (1e-3, 256, 0.75)
    assert (recipe.batch_size, recipe.epochs, recipe.warmup_epochs) == (1024, 100, 5)
    assert (mae.rand_augment, mae.rand_augment_std, mae.label_smoothing) == (9, 0.5, 0.1)
    assert (mae.mixup, mae.cutmix, mae.drop_path, mae.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert mae.least_steps == 0


def test_padding_is_cut_off_before_the_test_view() -> None:
    model = finetune.Classifier(encoder(), 3, settings(), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 20, 28), generator=generator, dtype=torch.uint8)
    padded = torch.nn.functional.pad(image, (0, 12, 0, 9))
    index = torch.tensor([0])
    plain = model.test_view(Batch(image, None, index))
    torch.testing.assert_close(model.test_view(Batch(padded, torch.tensor([[20, 28]]), index)), plain)
    assert plain.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mode_of_batch_norm_is_explicit(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = ResNetShape("basic", (1, 1, 1, 1), (8, 8, 16, 16), "cifar")
    backbone = ResNetEncoder(ResNet(shape), InputSpec(16))
    chosen = settings(batch_norm=mode, least_steps=3)
    model, _ = finetune.tuned(backbone, split("train"), 3, 1e-3, chosen, context(tmp_path))
    moved = not torch.equal(model.encoder.resnet.bn1.running_mean, backbone.resnet.bn1.running_mean)
    assert moved == (mode == "train")
    assert not model.encoder.resnet.bn1.training  # scored with the statistics it holds
    assert not torch.equal(model.encoder.resnet.conv1.weight, backbone.resnet.conv1.weight)
