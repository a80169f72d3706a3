"""What a task runs as: ``python -m mimbench.sweep.task PARENT pretrain|evaluate ...``, a ``mimbench`` command that
stops when the process that started it is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

GRACE = 60.0  # seconds that a task has to save its state when it is to stop


def start(words: tuple[str, ...], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a task as a child of this process; what it prints is added to ``log``."""
    with open(log, "ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "mimbench.sweep.task", str(os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which then tells its tasks
        )


def variables(cpus: int, gpus: str | None) -> dict[str, str]:
    """The environment of a task with so many cores and these GPUs; None leaves the GPUs as they are."""
    found = {"OMP_NUM_THREADS": str(cpus)}
    return found if gpus is None else found | {"CUDA_VISIBLE_DEVICES": gpus}


def stop(processes: list[subprocess.Popen[bytes]], grace: float = GRACE) -> None:
    """Interrupts tasks, which save what they have, and kills those that are not done after ``grace`` seconds."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + grace
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C waits no longer
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def why(code: int) -> str:
    """What an exit code other than 0 says."""
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def last_line(log: Path, most: int = 4096) -> str:
    """The last line of a log that says something."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - most))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _watch(parent: int) -> None:
    """Stops this process when its parent is gone: as Ctrl-C would, then by force."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os._exit(1)


def main() -> None:
    """Runs the command that the arguments give."""
    parent = int(sys.argv[1])
    # A parent in the background of a shell ignores Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    from mimbench import cli

    sys.argv = ["mimbench", *sys.argv[2:]]
    cli.main()


if __name__ == "__main__":
    main()
