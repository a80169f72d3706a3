"""A pretraining step of MAE and CropMAE beside the authors' code and lightly's modules.

Forward, backward and AdamW on a batch in memory; no augmentation. The authors' code is used where
MIMBENCH_OFFICIAL names a folder with clones of facebookresearch/mae (as "mae") and alexandre-eymael/CropMAE (as
"CropMAE"), with timm's Block of today: the argument ``qk_scale``, which it no longer takes, is dropped.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimbench import compat, config, machine, registry
from mimbench.compiling import compiled
from mimbench.errors import MimbenchError
from mimbench.optim import make_optimizer
from mimbench.speed import Bar, Comparison, Limit, Timing, main, measure, version

Step = Callable[[], Tensor]
SIZES = {"full": (192, 12, 3, 128, 4, 4, 128), "quick": (48, 1, 3, 32, 1, 2, 4)}


def training(
    forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: str, bf16: bool = False
) -> Step:
    """A step of a loss; ``bf16`` by autocast."""

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, betas=(0.9, 0.95))


def ours(slug: str, options: dict[str, Any], device: str) -> tuple[Callable[[], nn.Module], Any]:
    """Makes equal models of a method at the authors' options; and the method's module for their names."""
    module = registry.load_method(slug)
    official = registry.load_method(slug, "official")
    settings = official.config_from_official(options)

    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = module.Model(settings)
        return model.to(device)

    return build, functools.partial(official.from_official, config=settings)


def authors(name: str) -> Path:
    """A clone of official code. Raises MimbenchError with what is missing."""
    folder = os.environ.get("MIMBENCH_OFFICIAL")
    if not folder:
        raise MimbenchError("MIMBENCH_OFFICIAL names no folder with clones of the authors' code")
    if not (Path(folder) / name).is_dir():
        raise MimbenchError(f"there is no clone '{name}' in MIMBENCH_OFFICIAL")
    return Path(folder) / name


def timm_blocks() -> None:
    """Lets timm's Block take the argument that it had when the authors wrote their code."""
    compat.torchvision()
    from timm.models import vision_transformer

    class Block(vision_transformer.Block):
        def __init__(self, *arguments: Any, qk_scale: None = None, **named: Any) -> None:
            super().__init__(*arguments, **named)

    vision_transformer.Block = Block
    import numpy as np

    np.float = float  # type: ignore[attr-defined]


def lightly_mae(options: dict[str, Any], images: Tensor, device: str) -> Step:
    """MAE from lightly's modules, put together as its documentation shows."""
    compat.torchvision()
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    size, patch = options["img_size"], options["patch_size"]
    tokens, batch = (size // patch) ** 2 + 1, len(images)
    vit = VisionTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=options["embed_dim"],
        depth=options["depth"],
        num_heads=options["num_heads"],
        num_classes=0,
    )
    encoder = MaskedVisionTransformerTIMM(vit=vit).to(device)
    decoder = MAEDecoderTIMM(
        num_patches=tokens - 1,
        patch_size=patch,
        embed_dim=options["embed_dim"],
        decoder_embed_dim=options["decoder_embed_dim"],
        decoder_depth=options["decoder_depth"],
        decoder_num_heads=options["decoder_num_heads"],
    ).to(device)
    criterion = nn.MSELoss()

    def forward() -> Tensor:
        keep, hide = utils.random_token_mask((batch, tokens), mask_ratio=options["mask_ratio"], device=device)
        visible = decoder.embed(encoder.encode(images=images, idx_keep=keep))
        everything = utils.repeat_token(decoder.mask_token, (batch, tokens))
        everything = utils.set_at_index(everything, keep, visible.type_as(everything))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(everything), hide))
        target = utils.get_at_index(utils.patchify(images, patch), hide - 1)
        loss: Tensor = criterion(predicted, target)
        return loss

    return training(forward, adamw(nn.ModuleList([encoder, decoder])), device)


def same_weights(theirs: nn.Module, build: Callable[[], nn.Module], names: Any) -> nn.Module:
    """Our model with the weights of the authors'."""
    model = build()
    model.load_state_dict(names(theirs.state_dict()), strict=True)
    return model


def their_steps(model: nn.Module, inputs: Tensor, mask_ratio: float, device: str) -> dict[str, Step]:
    """The authors' step as they wrote it, and by autocast."""

    def forward() -> Tensor:
        loss: Tensor = model(inputs, mask_ratio)[0]
        return loss

    optimizer = adamw(model)
    return {
        f"authors, {precision}": training(forward, optimizer, device, precision == "bf16")
        for precision in ("fp32", "bf16")
    }


def authors_options(shape: tuple[int, ...], mask_ratio: float) -> dict[str, Any]:
    """What both papers' code calls the sizes."""
    width, depth, heads, decoder_width, decoder_depth, decoder_heads, _ = shape
    return {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "decoder_embed_dim": decoder_width,
        "decoder_depth": decoder_depth,
        "decoder_num_heads": decoder_heads,
        "mlp_ratio": 4,
        "norm_pix_loss": True,
        "mask_ratio": mask_ratio,
    }


def mae(options: argparse.Namespace, shape: tuple[int, ...]) -> Comparison:
    width, depth, _, decoder_width, decoder_depth, _, batch = shape
    arguments = authors_options(shape, 0.75)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=draw).to(options.device)
    noise = torch.rand(batch, 64, generator=draw).to(options.device)
    build, names = ours("mae", arguments, options.device)
    steps, agreement, skipped = our_steps(build, {"images": images, "noise": noise}, options)

    try:
        path = authors("mae")
        timm_blocks()
        sys.path.insert(0, str(path))
        import models_mae

        given = {key: value for key, value in arguments.items() if key != "mask_ratio"}
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        theirs = models_mae.MaskedAutoencoderViT(**given, norm_layer=norm).to(options.device)
        torch.manual_seed(1)
        expected = theirs(images, 0.75)[0].detach()
        torch.manual_seed(1)
        noise_drawn = torch.rand(batch, 64, device=options.device)
        found = same_weights(theirs, build, names)(images=images, noise=noise_drawn)["loss"].detach()
        agreement.append(
            equal_losses("the authors' fp32 loss with the same weights and mask", found, expected)
        )
        steps |= their_steps(theirs, images, 0.75, options.device)
    except (MimbenchError, ImportError) as fault:
        skipped |= dict.fromkeys(("authors, fp32", "authors, bf16"), str(fault))
    try:
        steps["lightly, fp32"] = lightly_mae(arguments, images, options.device)
    except ImportError as fault:
        skipped["lightly, fp32"] = str(fault)

    tokens, hidden = 17, 65
    flops = (
        3
        * 2
        * batch
        * (blocks_flops(width, depth, tokens) + blocks_flops(decoder_width, decoder_depth, hidden))
    )
    return comparison(
        "mae_step",
        "MAE pretraining step",
        f"ViT {width}x{depth}, decoder {decoder_width}x{decoder_depth}, 32-pixel images, patch 4, batch {batch},"
        f" AdamW: {flops / 1e9:.0f} GFLOP",
        *(steps, flops, agreement, skipped, options, 3.0),
    )


def cropmae(options: argparse.Namespace, shape: tuple[int, ...]) -> Comparison:
    width, depth, _, decoder_width, decoder_depth, _, batch = shape
    arguments = authors_options(shape, 0.95)
    draw = torch.Generator().manual_seed(0)
    views = torch.randn(batch, 2, 3, 32, 32, generator=draw).to(options.device)
    noise = torch.rand(batch, 64, generator=draw).to(options.device)
    more = {"decoder_dim_feedforward": 2048, "dropout": 0.1}
    build, names = ours("cropmae", arguments | more, options.device)
    inputs = {"images1": views[:, 0], "images2": views[:, 1], "noise": noise}
    steps, agreement, skipped = our_steps(build, inputs, options)
    try:
        path = authors("CropMAE")
        timm_blocks()
        sys.path[:0] = [str(path), str(path / "models" / "components" / "mae")]
        from models.SiamMAE import SiameseMAE

        given = {key: value for key, value in arguments.items() if key != "mask_ratio"}
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        theirs = SiameseMAE(**given, norm_layer=norm).to(options.device).eval()
        torch.manual_seed(1)
        expected = theirs(views, 0.95)[0].detach()
        torch.manual_seed(1)
        drawn = torch.rand(batch, 64, device=options.device)
        model = same_weights(theirs, build, names).eval()
        found = model(**inputs | {"noise": drawn})["loss"].detach()
        agreement.append(
            equal_losses("the authors' fp32 loss with the same weights and mask", found, expected)
        )
        theirs.train()
        steps |= their_steps(theirs, views, 0.95, options.device)
        del steps["authors, bf16"]  # for brevity: MAE's table shows what autocast alone gives
    except (MimbenchError, ImportError) as fault:
        skipped["authors, fp32"] = str(fault)
    decoder = (
        decoder_depth
        * 65
        * (
            8 * decoder_width**2
            + 4 * 65 * decoder_width
            + 2 * decoder_width * more["decoder_dim_feedforward"]
        )
    )
    encoder = blocks_flops(width, depth, 65) + blocks_flops(width, depth, 4)
    flops = 3 * 2 * batch * (encoder + decoder)
    return comparison(
        "cropmae_step",
        "CropMAE pretraining step",
        f"ViT {width}x{depth}, decoder {decoder_width}x{decoder_depth} with dropout, two 32-pixel views, patch 4,"
        f" batch {batch}, AdamW: {flops / 1e9:.0f} GFLOP",
        *(steps, flops, agreement, skipped, options, 2.5),
    )


def blocks_flops(width: int, depth: int, tokens: int) -> float:
    """Multiply-adds of a forward pass through transformer blocks, per image."""
    return depth * tokens * (12 * width**2 + 2 * tokens * width)


def our_steps(
    build: Callable[[], nn.Module], inputs: dict[str, Tensor], options: argparse.Namespace
) -> tuple[dict[str, Step], list[str], dict[str, str]]:
    """Our step in fp32, bf16, and bf16 compiled; each from the same weights, whose losses are compared."""
    steps: dict[str, Step] = {}
    agreement: list[str] = []
    skipped: dict[str, str] = {}
    recipe = config.override(registry.load_method("mae").RECIPE, {"base_lr": 1e-4})
    device, where = options.device, torch.device(options.device)
    reference: Tensor | None = None
    for name, precision, compile_ in (
        ("mimbench, fp32", "fp32", False),
        ("mimbench, bf16", "bf16", False),
        ("mimbench", "bf16", True),
    ):
        if compile_ and options.quick:  # it takes a minute
            steps["mimbench"] = steps.pop("mimbench, bf16")
            continue
        model = build().train()
        forward = compiled(model, where) if compile_ else model
        call = functools.partial(lambda forward: forward(**inputs)["loss"], forward)
        step = training(call, make_optimizer(model, recipe), device, precision == "bf16")
        try:
            torch.manual_seed(0)
            loss = step()
        except Exception as fault:
            if not compile_:
                raise
            skipped["mimbench, compiled"] = str(fault).partition("\n")[0]
            steps["mimbench"] = steps.pop("mimbench, bf16")
            continue
        if reference is None:
            reference = loss
        else:
            off = abs(float(loss) - float(reference)) / float(reference)
            if off > 0.02:
                raise MimbenchError(f"the loss of '{name}' is {off:.1%} off that in fp32")
            agreement.append(f"first loss of {name}{' compiled' * compile_}: {off:.1e} off fp32")
        steps[name] = step
    return steps, agreement, skipped


def equal_losses(what: str, found: Tensor, expected: Tensor) -> str:
    off = abs(float(found) - float(expected)) / abs(float(expected))
    if off > 1e-5:
        raise MimbenchError(f"our loss is {off:.1e} off {what}")
    return f"{what}: {off:.0e} relative difference"


def comparison(
    name: str,
    title: str,
    work: str,
    steps: dict[str, Step],
    flops: float,
    agreement: list[str],
    skipped: dict[str, str],
    options: argparse.Namespace,
    ratio: float,
) -> Comparison:
    found = measure(steps, options.rounds, options.device)
    peaks = {kind: machine.matmul_peak(torch.device(options.device), kind).flops for kind in ("fp32", "bf16")}
    notes = {"authors": f"timm {version('timm')}, fused attention", "lightly": ""}
    timings = [
        Timing(
            label,
            seconds,
            version("lightly") if "lightly" in label else "",
            notes.get(label.split(",")[0], ""),
        )
        for label, seconds in found.items()
    ]
    timings = [
        Timing("mimbench", t.seconds, "", "bf16, compiled" if "mimbench, bf16" in found else "bf16")
        if t.name == "mimbench"
        else t
        for t in timings
    ]
    bars = [
        Bar(against, ratio) for against in ("authors, fp32", "lightly, fp32") if against in found | skipped
    ]
    shares = ", ".join(
        f"{label}: {100 * flops / sorted(found[label])[len(found[label]) // 2] / peaks[kind]:.0f} % of the {kind} peak"
        for label, kind in (("mimbench", "bf16"), ("mimbench, fp32", "fp32"), ("authors, fp32", "fp32"))
        if label in found
    )
    return Comparison(
        name=name,
        title=title,
        work=work,
        ours="mimbench",
        timings=timings,
        agreement=[*agreement, shares],
        limit=Limit(
            f"its arithmetic at the bf16 peak, {peaks['bf16'] / 1e9:.0f} GFLOP/s", flops / peaks["bf16"]
        ),
        bars=bars,
        skipped=skipped,
    )


def run(options: argparse.Namespace) -> Iterator[Comparison]:
    shape = SIZES["quick" if options.quick else "full"]
    machine.keep_pages()  # as mimbench.fit does; all contenders gain by it
    yield mae(options, shape)
    yield cropmae(options, shape)


if __name__ == "__main__":
    main(run, __doc__)
