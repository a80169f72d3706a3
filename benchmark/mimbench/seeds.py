"""Random numbers that depend on what they are for, not on what was drawn before.

Every draw names its purpose (seed, stage, step), so an interrupted run continues with the numbers that
an uninterrupted one would have drawn and no generator state needs to be saved.
"""

from __future__ import annotations

import hashlib

import torch


def derive(*purpose: int | str) -> int:
    """A 63-bit seed from a purpose such as ``(seed, "views", step)``."""
    text = "/".join(map(str, purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(device: torch.device | str, *purpose: int | str) -> torch.Generator:
    """A generator on ``device`` seeded for a purpose."""
    return torch.Generator(device=device).manual_seed(derive(*purpose))


def seed_everything(*purpose: int | str) -> None:
    """Seeds torch's global generators (used by dropout and drop path) for a purpose."""
    torch.manual_seed(derive(*purpose))
