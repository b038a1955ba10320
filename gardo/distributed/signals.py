"""Ends a run in good order when a signal asks for it (Ctrl-C, preemption, end of a time limit)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

STOPPED = 75
"""Exit code of a run that a signal stopped and that left a checkpoint (EX_TEMPFAIL: try again)."""
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class StopRequested(Exception):
    """Raised in the training loop where it can be left; the text is the signal's name."""


class Stopped(Exception):
    """A run that stopped on a signal after writing a checkpoint; the text tells the user so."""


class StopRequest:
    """Remembers that a signal came until the training loop asks.

        stop = StopRequest()
        with stop.listening():
            for batch in batches:
                stop.check()         # raises StopRequested
                with stop.waiting(): # raised even from within a wait for others
                    wait()

    The first signal is remembered. The second one ends the process at once, in the way that it
    would have without this class.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._deferred = self._waiting = False
        self._came = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch `SIGNALS` inside the block; elsewhere than in the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread set handlers
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def tell(self, name: str) -> None:
        """This signal came to another process; the same one may be on its way to this one."""
        if self.signal is None:
            self.signal, self._came = name, time.monotonic()

    def check(self) -> None:
        """Raise StopRequested if a signal came."""
        if self.signal is not None and not self._deferred:
            raise StopRequested(self.signal)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block waits for others, a signal raises StopRequested within it."""
        self.check()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    @contextmanager
    def deferred(self, on: bool = True) -> Iterator[None]:
        """Inside the block `check` lets the run go on."""
        before, self._deferred = self._deferred, on
        try:
            yield
        finally:
            self._deferred = before

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal is not None:
            # A launcher passes on a signal that a terminal has already sent to every process.
            if _launched() and time.monotonic() - self._came < 1.0:
                return
            _end_by_default(number)
            return
        self.signal, self._came = name, time.monotonic()
        if not _launched():  # the kernel ends the process then, even where Python is not asked
            for other in SIGNALS:
                signal.signal(other, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            _tell(f"{name}: stops with a checkpoint; a second signal ends the run at once")
        if self._waiting and not self._deferred:
            raise StopRequested(name)


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _end_by_default(number: int) -> Any:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _tell(text: str) -> None:
    """Write past Python's buffers, which a handler may have interrupted in the middle."""
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())
    except (OSError, ValueError):  # closed
        return


def leave(code: int) -> NoReturn:
    """End the process with an exit code.

    One of several processes that is done ends without the interpreter's clean-up: threads of the
    process group may abort it there, and a launcher would call the run a failure. By then files
    are closed and the group is left.
    """
    if code != 0 or os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
