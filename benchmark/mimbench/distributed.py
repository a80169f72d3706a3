"""One training by several processes: each has its rows of every batch, and what they find is added up.

``torchrun`` starts the processes and ``together`` connects them, by NCCL between GPUs and by gloo between CPUs.
Whatever is computed over the images of a batch goes through here, so that it is computed over all of them. In a
process of its own every function returns what it is given.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mimbench.errors import ConfigError, ProcessLost

T = TypeVar("T")

BUCKET = 25 * 2**20  # bytes of gradients that are sent at once
# The first process may wait for another training's lock, and the rest wait for it. A process that ends is noticed
# at once, whatever this is.
PATIENCE = datetime.timedelta(days=7)
ARRIVAL = datetime.timedelta(minutes=30)  # between the start of the first process and of the last

_size, _rank = 1, 0  # plain numbers, which a compiled forward may read


def launched() -> int:
    """How many processes torchrun has started for this command; 1 without it."""
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return int(os.environ["WORLD_SIZE"]) if named else 1


def launched_as() -> int:
    """The number of this process among those, from 0."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


def local_rank() -> int:
    """The number of this process among those on this machine, from 0; it names the GPU."""
    return int(os.environ.get("LOCAL_RANK", launched_as())) if launched() > 1 else 0


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Connects the processes that torchrun has started, for as long as it lasts; does nothing for a single one."""
    global _size, _rank
    if launched() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _telling_of_loss():
        store, number, count = next(dist.rendezvous("env://", timeout=ARRIVAL))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(_meeting(store, number, count), store),
            rank=number,
            world_size=count,
            timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
    _size, _rank = count, number
    try:
        yield
        wait_for_all()
    finally:
        _size, _rank = 1, 0
        dist.destroy_process_group()


def _meeting(store: dist.Store, number: int, count: int) -> str:
    """A name that the processes which are there now agree on, for what they tell each other through the store.

    torchrun keeps the store when it restarts them, and processes that find the addresses of those before them there
    wait for these for ever (pytorch issue 135712). So each must be greeted by the first one, under its own new name.
    """
    own = secrets.token_hex(8)
    if number == 0:
        store.set("mimbench", own)
        for other in range(1, count):
            store.set(f"{own}/greeted/{other}", store.get(f"{own}/came/{other}").decode())
        return own
    while True:
        name = store.get("mimbench").decode()
        store.set(f"{name}/came/{number}", own)
        with contextlib.suppress(dist.DistStoreError):  # it has waited for long enough
            store.wait([f"{name}/greeted/{number}"], datetime.timedelta(seconds=1))
            if store.get(f"{name}/greeted/{number}").decode() == own:
                return name
        time.sleep(0.01)


def size() -> int:
    """How many processes train together."""
    return _size


def rank() -> int:
    """The number of this one, from 0."""
    return _rank


def first() -> bool:
    """Whether this process is the one that writes files and speaks for all."""
    return _rank == 0


@contextlib.contextmanager
def _telling_of_loss() -> Iterator[None]:
    """Turns what torch raises where another process has ended into one line."""
    try:
        yield
    except RuntimeError as fault:
        reason = str(fault).strip().partition("\n")[0]
        raise ProcessLost(
            f"the processes that train together lost each other: {reason:.200}",
            "See what the others said. The same command goes on from the last checkpoint; torchrun does so by "
            "itself with --max-restarts",
        ) from None


def _sum(tensor: Tensor) -> Tensor:
    with _telling_of_loss():
        dist.all_reduce(tensor)
    return tensor


def _spread(tensor: Tensor) -> Tensor:
    with _telling_of_loss():
        dist.broadcast(tensor, 0)
    return tensor


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if _size > 1:
        _sum(torch.zeros(1))


def share(value: T) -> T:
    """What the first process holds, in all of them: a JSON value."""
    if _size == 1:
        return value
    text = json.dumps(value).encode() if _rank == 0 else b""
    length = int(_spread(torch.tensor(len(text))))
    content = torch.frombuffer(bytearray(text or bytes(length)), dtype=torch.uint8)
    found: T = json.loads(_spread(content).numpy().tobytes())
    return found


def share_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the first process, on the CPU, in all of them. What the others pass does not matter."""
    if _size == 1:
        return dict(tensors)
    layout = share(
        [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    )
    found = {}
    for name, shape, kind in layout:
        if _rank == 0:
            found[name] = tensors[name].detach().cpu().contiguous()
        else:
            found[name] = torch.empty(shape, dtype=getattr(torch, kind))
        if found[name].numel():
            _spread(found[name].reshape(-1).view(torch.uint8))  # gloo knows bytes, but not every dtype
    return found


def any_of(flags: Sequence[bool]) -> list[bool]:
    """Each flag, raised where any process raises it."""
    if _size == 1:
        return list(flags)
    return (_sum(torch.tensor(flags, dtype=torch.int32)) > 0).tolist()


def one_after_the_first(work: Callable[[], T]) -> T:
    """``work`` done by one process of each machine and then by the others, which find in the cache what it left."""
    if local_rank() == 0:
        found = work()
    wait_for_all()
    if local_rank() != 0:
        found = work()
    wait_for_all()
    return found


def own_rows(count: int, parts: int) -> list[range]:
    """This process's rows of each of ``parts`` parts of a batch of ``count`` images.

    Raises ConfigError where a part has fewer images than there are processes.
    """
    rows = []
    for chunk in torch.arange(count).chunk(parts):
        if len(chunk) < _size:
            of = (
                f"a part of {len(chunk)} of the {count} images" if parts > 1 else f"a batch of {count} images"
            )
            raise ConfigError(
                f"{of} cannot be shared by {_size} processes",
                "Use fewer processes, a larger recipe.batch_size or a smaller recipe.accumulate",
            )
        mine = chunk.tensor_split(_size)[_rank]
        rows.append(range(int(mine[0]), int(mine[-1]) + 1))
    return rows


class DrawnForAll(TorchFunctionMode):
    """Lets what is drawn from a generator for some rows of a batch be what the whole batch would draw for them.

    A draw whose first dimension counts the ``rows`` is made for all ``count`` and cut to them. Others are left alone.
    """

    def __init__(self, rows: Tensor, count: int) -> None:
        super().__init__()
        self.rows, self.count = rows, count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.rand, torch.randn, torch.randint) or kwargs.get("generator") is None:
            return func(*args, **kwargs)
        if func is torch.randint or (args and not isinstance(args[0], int)):
            *limits, shape = args
        else:
            limits, shape = [], args
        if not len(shape) or shape[0] != len(self.rows):
            return func(*args, **kwargs)
        drawn = func(*limits, (self.count, *shape[1:]), **kwargs)
        return drawn[self.rows.to(drawn.device)]


def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Sums the gradients of all processes; one that none of them has stays None."""
    if _size == 1:
        return
    wanted = any_of([p.grad is not None for p in parameters])
    buckets: list[list[Tensor]] = []
    room = 0
    for parameter in (p for p, needed in zip(parameters, wanted, strict=True) if needed):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        length = parameter.grad.numel() * parameter.grad.element_size()
        if length > room or parameter.grad.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = BUCKET
        room -= length
        buckets[-1].append(parameter.grad)
    with _telling_of_loss():
        sent = []
        for bucket in buckets:
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in sent:
            work.wait()
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])


def batch_sum(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, with gradient: what is summed over a batch's images becomes global."""
    return x if _size == 1 else _batch_sum(x)


def batch_max(x: Tensor) -> Tensor:
    """The largest value over all processes, entry by entry, without gradient."""
    return x.detach() if _size == 1 else _batch_max(x)


@torch.compiler.disable
def _batch_sum(x: Tensor) -> Tensor:
    return _Sum.apply(x)


@torch.compiler.disable
def _batch_max(x: Tensor) -> Tensor:
    x = x.detach().clone(memory_format=torch.contiguous_format)
    with _telling_of_loss():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum(gradient.clone(memory_format=torch.contiguous_format))


def gather_rows(x: Tensor) -> Tensor:
    """The rows (N, ...) of all processes in their order, without gradient; N may differ between them."""
    if _size == 1:
        return x
    counts = torch.zeros(_size, dtype=torch.int64)
    counts[_rank] = len(x)
    ends = _sum(counts).cumsum(0).tolist()
    found = x.new_zeros(ends[-1], *x.shape[1:])
    found[ends[_rank] - len(x) : ends[_rank]] = x.detach()
    return _sum(found)


def copy_from_first(*tensors: Tensor) -> None:
    """Overwrites tensors by those of the first process."""
    if _size > 1:
        for tensor in tensors:
            _spread(tensor)
