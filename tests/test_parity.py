"""Our methods against golden vectors from their authors' code, and the comparison itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mimbench import certificate, parity, registry, weights
from mimbench.errors import CheckpointError, DataError

CASES = Path(os.environ.get("MIMBENCH_PARITY") or Path(__file__).parents[2] / "shared" / "parity")
FOUND = parity.cases_of(CASES) if CASES.is_dir() else []


@pytest.mark.skipif(not FOUND, reason="no golden vectors: set MIMBENCH_PARITY to a folder of cases")
@pytest.mark.parametrize("case", FOUND, ids=lambda file: file.stem)
def test_same_weights_and_noise_give_the_authors_outputs(case: Path) -> None:
    rows = parity.compare(parity.slug_of(case), case)
    assert {"loss", "grad_norm"} <= {row.name for row in rows}
    assert not [row for row in rows if not row.passed]


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A case of ``mae`` made with our own code, so that it must pass until something is changed."""
    options = {
        "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0,
        "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2, "mask_ratio": 0.75, "norm_pix_loss": True,
    }  # fmt: skip
    official = registry.load_method("mae", "official")
    torch.manual_seed(0)
    model = registry.load_method("mae").Model(official.config_from_official(options))
    inputs = {"images": torch.randn(2, 3, 16, 16), "noise": torch.rand(2, 16)}
    outputs = official.replay(model, inputs)
    outputs["loss"].backward()
    names = {k.removeprefix("backbone."): p for k, p in model.named_parameters()}
    arrays = {f"weights/{k.removeprefix('backbone.')}": v for k, v in model.state_dict().items()}
    arrays |= {f"grad_norms/{k}": p.grad.norm() for k, p in names.items()}
    arrays |= inputs | {"loss": outputs["loss"], "pred": outputs["pred"]}
    arrays["grad_norm"] = torch.stack([p.grad.norm() for p in names.values()]).norm()
    file = tmp_path / "mae.npz"
    np.savez(file, **{k: v.detach().numpy() for k, v in arrays.items()})
    roles = {"images": "input", "noise": "input", "loss": "output", "pred": "output", "grad_norm": "output"}
    described = {"slug": "mae", "config": options, "arrays": {k: {"role": r} for k, r in roles.items()}}
    file.with_suffix(".json").write_text(json.dumps(described))
    return file


def test_an_unchanged_case_passes(case: Path) -> None:
    assert all(row.passed for row in parity.compare("mae", case))


@pytest.mark.parametrize(
    ("array", "row"),
    [
        ("pred", "pred"),
        ("loss", "loss"),
        ("grad_norm", "grad_norm"),
        ("grad_norms/cls_token", "grad_norms/* (worst)"),
    ],
)
def test_a_difference_of_a_thousandth_fails_its_row_alone(case: Path, array: str, row: str) -> None:
    with np.load(case) as stored:
        arrays = dict(stored)
    # Relative to the total norm for gradients, so a single parameter's share is raised by it.
    shift = 1e-3 * (arrays["grad_norm"] if array.startswith("grad_norms/") else np.abs(arrays[array]).max())
    arrays[array] = arrays[array] + shift
    np.savez(case, **arrays)
    failed = [found.name for found in parity.compare("mae", case) if not found.passed]
    assert failed == [row]


def test_another_shape_is_a_clear_error(case: Path) -> None:
    described = json.loads(case.with_suffix(".json").read_text())
    described["config"]["depth"] = 2
    case.with_suffix(".json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"lacks.*blocks\.1"):
        parity.compare("mae", case)


def test_a_damaged_or_missing_case_is_named(case: Path, tmp_path: Path) -> None:
    case.write_bytes(case.read_bytes()[:200])
    with pytest.raises(DataError, match=r"mae\.npz"):
        parity.compare("mae", case)
    with pytest.raises(DataError, match="nothing"):
        parity.compare("mae", tmp_path / "nothing.npz")


def test_what_was_found_is_kept_and_known_to_be_of_todays_code(case: Path, tmp_path: Path) -> None:
    found = parity.certify("mae", case)
    assert found.passed
    assert found.worst < 1e-6
    parity.write_certificate(found, tmp_path)
    (kept,), faults = certificate.scan(tmp_path)
    assert not faults
    assert kept == found
    assert kept.fresh
    assert not dataclasses.replace(kept, code="older").fresh
    assert not dataclasses.replace(kept, method="gone").fresh
    (tmp_path / "parity" / "other.json").write_text("{")
    found, (fault,) = certificate.scan(tmp_path)
    assert found == [kept], "one damaged file hides the others"
    assert re.search(r"other\.json cannot be read", str(fault))


@pytest.mark.skipif(not FOUND, reason="no golden vectors: set MIMBENCH_PARITY to a folder of cases")
@pytest.mark.parametrize("case", FOUND, ids=lambda file: file.stem)
def test_the_authors_state_dicts_load_however_they_are_wrapped(case: Path, tmp_path: Path) -> None:
    info, arrays = parity.read_case(case)
    slug = parity.slug_of(case)
    official, module = registry.load_method(slug, "official"), registry.load_method(slug)
    settings = official.config_from_official(info["config"])
    state = {
        f"module.{k.removeprefix('weights/')}": torch.from_numpy(np.array(v))
        for k, v in arrays.items()
        if k.startswith("weights/")
    }
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "theirs.pth")
    model = module.Model(settings)
    if slug == "mage":  # its encoder reads the codes of a VQGAN, which is not ours
        with pytest.raises(CheckpointError, match=r"lacks of the encoder tokenizer\."):
            weights.load(tmp_path / "theirs.pth", slug, settings, model)
        return
    match = weights.load(tmp_path / "theirs.pth", slug, settings, model)
    assert all(name.startswith("module.") for name in match.names.values())
    assert match.names.keys() == match.state.keys()
    for name, value in match.state.items():
        assert torch.equal(model.state_dict()[name], value)
    # without one tensor of the encoder it is refused
    lost = next(match.names[n] for n in match.state if n in weights._encoder_names(model))
    torch.save({key: value for key, value in state.items() if key != lost}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        weights.load(tmp_path / "less.pth", slug, settings, module.Model(settings))
