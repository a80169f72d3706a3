"""Golden vectors: the same weights, inputs and noise must give the authors' outputs.

A case is ``NAME.npz`` with ``weights/<official key>``, inputs and outputs, beside ``NAME.json``, which names
the official repository, the configuration, and how far float32 itself strays from float64.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimbench import foreign, npz, registry
from mimbench.certificate import Certificate, Comparison, code_of
from mimbench.checkpoint import load_strictly, save_json
from mimbench.errors import CheckpointError, DataError

OUTPUT_TOLERANCE = 1e-5  # largest difference over the largest magnitude of the official array
GRADIENT_TOLERANCE = 1e-4  # difference of a gradient's norm over the norm of all gradients
ROUNDING_FACTOR = 3  # where the case's own float32 strays further from float64, that much times this


def certify(slug: str, file: Path) -> Certificate:
    """Replays a case. Raises as ``compare`` does."""
    info = _description(file)
    return Certificate(
        case=file.stem,
        method=slug,
        code=code_of(slug),
        repository=str(info.get("official_repository", "")),
        commit=str(info.get("official_commit", "")),
        torch=torch.__version__,
        rows=compare(slug, file),
    )


def write_certificate(certificate: Certificate, results: Path) -> Path:
    """Keeps a certificate under ``results/parity/``."""
    file = results / "parity" / f"{certificate.case}.json"
    save_json(file, dataclasses.asdict(certificate))
    return file


def read_case(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the arrays of a case. Raises DataError for files that are missing or damaged."""
    info = _description(file)
    arrays = npz.read(file)
    expected = [name for name in info["arrays"] if "*" not in name] + ["grad_norm"]
    if missing := [name for name in expected if name not in arrays]:
        raise DataError(f"{file} lacks {', '.join(missing)}")
    return info, arrays


def cases_of(folder: Path, method: str | None = None) -> list[Path]:
    """The cases in a folder, of one method or of every method that is here."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    found = [f for f in sorted(folder.glob("*.npz")) if f.with_suffix(".json").is_file()]
    known = [f for f in found if slug_of(f) in registry.methods()]
    return [f for f in known if slug_of(f) == method] if method else known


def slug_of(file: Path) -> str:
    """The method that a case is of. ``spark_resnet`` is a second case of ``spark`` where no method has its name."""
    name = str(_description(file)["slug"])
    found = name
    while found and found not in registry.methods():
        found = found.rpartition("_")[0]
    return found or name


def _description(file: Path) -> dict[str, Any]:
    """The JSON beside a case. Raises DataError when either file is missing or the JSON is damaged."""
    place = file.with_suffix(".json")
    for needed in (file, place):
        if not needed.is_file():
            raise DataError(f"there is no {needed}", "A case is NAME.npz with NAME.json beside it")
    try:
        content = foreign.decode_json(foreign.read_text(place))
    except (ValueError, OSError) as fault:
        raise DataError(f"{place} cannot be read: {fault}") from None
    kinds = {"slug": str, "config": dict, "arrays": dict}
    given = content if isinstance(content, dict) else {}
    if missing := [key for key, kind in kinds.items() if not isinstance(given.get(key), kind)]:
        raise DataError(f"{place} lacks {', '.join(missing)}")
    return given


def compare(slug: str, file: Path) -> list[Comparison]:
    """Replays a case through our code and compares every output and every gradient norm."""
    info, arrays = read_case(file)
    official = registry.load_method(slug, "official")
    if slug_of(file) != slug:
        raise CheckpointError(f"{file} is a case of '{info['slug']}', not of '{slug}'")
    try:
        config = official.config_from_official(info["config"])
    except KeyError as fault:
        raise DataError(f"the config of {file.with_suffix('.json')} lacks {fault}") from None
    model: nn.Module = registry.load_method(slug).Model(config)
    weights = {k.removeprefix("weights/"): _tensor(v) for k, v in arrays.items() if k.startswith("weights/")}
    own = {k: v for k, v in model.state_dict().items() if k.startswith(getattr(official, "OURS", ()))}
    load_strictly(model, own | official.from_official(weights, config), file)

    roles = {name: meta.get("role") for name, meta in info["arrays"].items()}
    inputs = {name: _tensor(arrays[name]) for name, role in roles.items() if role == "input"}
    model.train()
    ours = official.replay(model, inputs)
    ours["loss"].backward()
    rounding = info.get("float32_rounding_against_float64_rerun", {})
    rows = []
    for name, role in roles.items():
        if role != "output" or "*" in name or name == "grad_norm":
            continue
        if name not in ours:
            raise CheckpointError(f"{slug}/official.py replays no output named '{name}' of {file.name}")
        theirs = _tensor(arrays[name])
        scale = float(theirs.abs().max()) or 1.0
        difference = float((ours[name].detach().double() - theirs.double()).abs().max()) / scale
        strays = rounding.get(f"{name}_relative", rounding.get(f"{name}_max_abs", 0.0) / scale)
        rows.append(Comparison(name, difference, max(OUTPUT_TOLERANCE, ROUNDING_FACTOR * strays)))
    return rows + _compare_gradients(model, official, config, arrays, rounding)


def _compare_gradients(
    model: nn.Module, official: Any, config: Any, arrays: dict[str, np.ndarray], rounding: dict[str, float]
) -> list[Comparison]:
    """The norm of every parameter's gradient, under the official names, and of all together."""
    names = {k.removeprefix("grad_norms/") for k in arrays if k.startswith("grad_norms/")}
    shapes = {n: _tensor(arrays[f"weights/{n}"]) for n in names}
    total = float(arrays["grad_norm"])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # A key that from_official splits or joins is compared through the norm over all its parts.
    worst = 0.0
    for name in names:
        parts = official.from_official({name: shapes[name]}, config)
        squares = sum(float(gradients[p].double().square().sum()) for p in parts if p in gradients)
        worst = max(worst, abs(squares**0.5 - float(arrays[f"grad_norms/{name}"])) / total)
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    each = ROUNDING_FACTOR * rounding.get("worst_parameter_grad_norm_difference_over_grad_norm", 0.0)
    whole = ROUNDING_FACTOR * rounding.get("grad_norm_relative", 0.0)
    return [
        Comparison("grad_norm", abs(norm - total) / total, max(GRADIENT_TOLERANCE, whole)),
        Comparison("grad_norms/* (worst)", worst, max(GRADIENT_TOLERANCE, each)),
    ]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))
