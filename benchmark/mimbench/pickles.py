"""Checkpoints that ``torch.save`` made, looked at before torch opens them.

``weights_only=True`` runs no code of a checkpoint. It does do the sums that a checkpoint asks for, and a few bytes can
ask for more than a machine has: zeros packed in a zip archive, tuples of tuples of tuples, an array by its length.
Here the program of each pickle is read without being run, and such a file refused.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PACKED = 20  # times its size may be what a checkpoint unpacks to, where that is more than
LITTLE = 2**24  # bytes
PROGRAM = 2**26  # bytes of a pickle beside its tensors
LEAVES = 10**7  # values in all of a pickle, each counted as often as it stands there
KEY_LEAVES = 1000  # in a key of a table, which is hashed as a whole
FORBIDDEN = ("builtins bytearray", "__builtin__ bytearray")  # made by their length alone
NO_CHECKPOINT = "it is no PyTorch checkpoint"


class AsksTooMuch(ValueError):
    """A checkpoint that would take far more memory or time than it holds."""


def refuse_bomb(file: Path) -> None:
    """Raises AsksTooMuch, or another ValueError for what is no checkpoint."""
    with file.open("rb") as stream:
        if zipfile.is_zipfile(stream):
            _look_into(stream, file.stat().st_size)
            return
        stream.seek(0)
        for _ in range(5):  # of the older format: a number, a version, the machine, the content, its storages
            _read_program(stream)
            if not stream.peek(1):
                break


def _look_into(stream: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > max(PACKED * size, LITTLE):
            raise AsksTooMuch(f"its {size:,} bytes unpack to {unpacked:,}")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                if entry.file_size > PROGRAM:
                    raise AsksTooMuch(f"{entry.filename} has {entry.file_size:,} bytes")
                with archive.open(entry) as program:
                    _read_program(program)


def _read_program(stream: IO[bytes]) -> None:
    """Follows a pickle's program with numbers of leaves in place of values."""
    stack: list[
        list[int]
    ] = []  # each value as a list of its one number, so that one that grows does so everywhere
    marks: list[int] = []
    memo: dict[Any, list[int]] = {}

    def take(count: int) -> list[list[int]]:
        if count > len(stack):
            raise ValueError(NO_CHECKPOINT)
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def since_mark() -> list[list[int]]:
        if not marks:
            raise ValueError(NO_CHECKPOINT)
        return take(len(stack) - marks.pop())

    def push(parts: list[list[int]]) -> None:
        total = 1 + sum(part[0] for part in parts)
        if total > LEAVES:
            raise AsksTooMuch(f"it repeats itself: more than {LEAVES:,} values in all")
        stack.append([total])

    def grow(parts: list[list[int]]) -> None:
        (held,) = take(1)
        stack.append(held)
        held[0] += sum(part[0] for part in parts)
        if held[0] > LEAVES:
            raise AsksTooMuch(f"it repeats itself: more than {LEAVES:,} values in all")

    def fill(pairs: list[list[int]]) -> None:
        if any(key[0] > KEY_LEAVES for key in pairs[::2]):
            raise AsksTooMuch("a key of a table in it is a table itself")
        grow(pairs)

    effects: dict[str, Callable[[Any], object]] = {
        "MARK": lambda _: marks.append(len(stack)),
        "POP": lambda _: take(1),
        "POP_MARK": lambda _: since_mark(),
        "DUP": lambda _: stack.extend(take(1) * 2),
        **dict.fromkeys(("TUPLE", "LIST", "DICT", "FROZENSET", "OBJ"), lambda _: push(since_mark())),
        "INST": lambda _: push(since_mark()),
        "TUPLE1": lambda _: push(take(1)),
        **dict.fromkeys(("TUPLE2", "REDUCE", "NEWOBJ", "STACK_GLOBAL"), lambda _: push(take(2))),
        **dict.fromkeys(("TUPLE3", "NEWOBJ_EX"), lambda _: push(take(3))),
        "BINPERSID": lambda _: push(take(1)),
        "APPEND": lambda _: grow(take(1)),
        "BUILD": lambda _: grow(take(1)),
        **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda _: grow(since_mark())),
        "SETITEM": lambda _: fill(take(2)),
        "SETITEMS": lambda _: fill(since_mark()),
        **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda place: memo.__setitem__(place, _top(stack))),
        "MEMOIZE": lambda _: memo.__setitem__(len(memo), _top(stack)),
        **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda place: stack.append(memo[place])),
        **dict.fromkeys(("PROTO", "FRAME", "STOP", "READONLY_BUFFER"), lambda _: None),
    }
    count = 0
    try:
        for operation, argument, _ in pickletools.genops(stream):
            count += 1
            if count > LEAVES or len(memo) > LEAVES:
                raise AsksTooMuch("its program is too long")
            if operation.name == "GLOBAL" and argument in FORBIDDEN:
                raise AsksTooMuch(f"it asks for a {argument.partition(' ')[2]}")
            effect = effects.get(operation.name)
            if effect:
                effect(argument)
            else:  # a number, a text, a global or an empty container
                stack.append([1])
    except AsksTooMuch:
        raise
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError):
        raise ValueError(NO_CHECKPOINT) from None


def _top(stack: list[list[int]]) -> list[int]:
    return stack[-1]
