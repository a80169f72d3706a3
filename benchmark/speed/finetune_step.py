"""A fine-tuning step, augmentation included, beside the loop that a user of timm and torchvision would write.

Random crop and flip of uint8 images, mixup or cutmix, forward, backward and AdamW on a ViT-Tiny/4 at 32 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import compat, config, machine, registry, seeds
from mimbench.compiling import compiled
from mimbench.data import Batch
from mimbench.encoder import InputSpec
from mimbench.errors import MimbenchError
from mimbench.models.vit import ViT, ViTEncoder, ViTShape
from mimbench.optim import make_optimizer
from mimbench.speed import Bar, Comparison, Limit, Timing, main, measure, version

CLASSES = 10
Step = Callable[[], Tensor]


def ours(model: nn.Module, batch: Batch, precision: str, compile_: bool, device: torch.device) -> Step:
    """What ``mimbench.fit`` does in a step of the protocol."""
    recipe = config.override(registry.load_protocol("finetune").Settings().training, {"base_lr": 1e-4})
    optimizer = make_optimizer(model, recipe)
    forward = compiled(model, device) if compile_ else model
    generator = seeds.generator(device, 0, "views")

    def step() -> Tensor:
        with torch.no_grad():
            views = model.views(batch, generator)  # type: ignore[operator]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss: Tensor = forward(**views)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def timm_loop(shape: ViTShape, batch: Batch, device: torch.device) -> Step:
    """torchvision's v2 transforms image by image on tensors, timm's Mixup, model and soft cross entropy."""
    compat.torchvision()
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.transforms import v2

    model = VisionTransformer(
        img_size=32,
        patch_size=shape.patch_size,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=CLASSES,
        global_pool="avg",
    ).to(device)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.5, 1.0), interpolation=3, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05)
    criterion = SoftTargetCrossEntropy()
    assert batch.labels is not None
    labels = batch.labels

    def step() -> Tensor:
        images = torch.stack([transform(image) for image in batch.images])
        mixed, targets = mixup(images, labels)
        loss: Tensor = criterion(model(mixed), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def run(options: argparse.Namespace) -> Iterator[Comparison]:
    device, count = torch.device(options.device), 16 if options.quick else 128
    shape = ViTShape(4, 192, 2 if options.quick else 12, 3)
    machine.keep_pages()  # as mimbench.fit does; all contenders gain by it
    draw = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw).to(device),
        None,
        torch.arange(count),
        torch.randint(0, CLASSES, (count,), generator=draw).to(device),
    )
    protocol = registry.load_protocol("finetune")
    settings = protocol.Settings(
        crop_scale=(0.5, 1.0), rand_augment=0, random_erasing=0, drop_path=0.0, mixup=0.8, cutmix=1.0
    )

    def classifier() -> nn.Module:
        torch.manual_seed(0)
        encoder = ViTEncoder(ViT(32, shape), InputSpec(32), "mean")
        model: nn.Module = protocol.Classifier(encoder, CLASSES, settings, 0)
        return model.to(device).train()

    steps: dict[str, Step] = {}
    agreement: list[str] = []
    skipped: dict[str, str] = {}
    with torch.no_grad():
        views = classifier().views(batch, seeds.generator(device, 0, "views"))  # type: ignore[operator]
        plain = classifier()
        logits = plain.logits(views["images"])  # type: ignore[operator]
        expected = F.cross_entropy(logits, views["targets"])
    for name, precision, compile_ in (
        ("mimbench, fp32", "fp32", False),
        ("mimbench, bf16", "bf16", False),
        ("mimbench", "bf16", True),
    ):
        if compile_ and options.quick:  # it takes a minute
            steps["mimbench"] = steps.pop("mimbench, bf16")
            continue
        step = ours(classifier(), batch, precision, compile_, device)
        try:
            loss = step()
        except Exception as fault:
            if not compile_:
                raise
            skipped["mimbench, compiled"] = str(fault).partition("\n")[0]
            steps["mimbench"] = steps.pop("mimbench, bf16")
            continue
        off = abs(float(loss) / float(expected) - 1)
        if off > (1e-5 if precision == "fp32" else 0.02):
            raise MimbenchError(f"the loss of '{name}' is {off:.1e} off torch's cross entropy")
        agreement.append(f"first loss of {name}: {off:.0e} off torch's soft cross entropy in fp32")
        steps[name] = step
    try:
        steps["timm and torchvision, fp32"] = timm_loop(shape, batch, device)
    except ImportError as fault:
        skipped["timm and torchvision, fp32"] = str(fault)
    found = measure(steps, options.rounds, options.device)
    tokens = 65
    per_image = shape.depth * tokens * (12 * shape.width**2 + 2 * tokens * shape.width)
    flops = 3 * 2 * count * per_image
    peak = machine.matmul_peak(device, "bf16").flops
    yield Comparison(
        name="finetune_step",
        title="Fine-tuning step",
        work=f"{shape.name}, 32-pixel images, batch {count}, crop, flip, mixup or cutmix, AdamW:"
        f" {flops / 1e9:.0f} GFLOP",
        ours="mimbench",
        timings=[
            Timing(
                name,
                seconds,
                version("timm") if "timm" in name else "",
                "bf16, compiled" if name == "mimbench" and "mimbench, bf16" in found else "",
            )
            for name, seconds in found.items()
        ],
        agreement=agreement,
        limit=Limit(f"its arithmetic at the bf16 peak, {peak / 1e9:.0f} GFLOP/s", flops / peak),
        bars=[Bar("timm and torchvision, fp32", 2.0)],
        skipped=skipped,
    )


if __name__ == "__main__":
    main(run, __doc__)
