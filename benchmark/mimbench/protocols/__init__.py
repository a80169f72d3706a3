"""Protocols, one file each. In a clone they live in ``protocols/`` at its top."""

from mimbench.paths import clone

if (_root := clone()) is not None:
    __path__.insert(0, str(_root / "protocols"))
