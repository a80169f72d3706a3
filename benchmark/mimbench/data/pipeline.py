"""Reading ahead, so that training does not wait for decoding."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _Fault:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yields ``items`` in order while a thread works out up to ``depth`` of the next ones.

    An exception of the source is raised here, after the items before it. The thread ends when the source
    does, or when the caller stops early (break, an exception, Ctrl-C).
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not offer(item):
                    return
            offer(_END)
        except BaseException as error:  # handed to the caller, who raises it
            offer(_Fault(error))

    thread = threading.Thread(target=work, name="mimbench-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Fault):
                raise item.error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
