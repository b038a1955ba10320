"""How one of several processes tells the others that it has failed, without a collective.

Who has failed takes part in no collective any more, and the others would wait for it in theirs, on
GPUs for minutes. So a thread of each process looks for a notice in the store by which the launcher
brought them together. Who failed stays until the main process has answered: as long as nobody is
gone, a launcher has no reason to end the main process while it saves.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

from gardo.distributed.signals import Stopped, StopRequest

_INTERVAL = 0.25
"""Seconds between two looks for a notice."""
_PATIENCE = 120.0
"""Seconds to wait for the main process's answer."""
_STOPPING_PATIENCE = 20.0
"""The same after a signal, when launchers kill after 30 seconds."""


class FailureNotice:
    """Inside the block, an exception of one process reaches all others, and a signal is seen to.

    with FailureNotice(rank, world_size, stop, failed):
        ...
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        stop: StopRequest,
        failed: Callable[[str], None],
        signalled: Callable[[], None],
    ) -> None:
        """Watch the other processes, if there are any.

        Args:
            rank: of this process; 0 is the main one.
            world_size: number of processes.
            stop: a signal ends the wait for an answer.
            failed: called with a sentence when another process has failed, in a thread of its own.
                It ends this process, or returns if this one fails by itself.
            signalled: called once, in that thread, when a signal asks this process to stop.
        """
        self.rank, self.world_size = rank, world_size
        self._stop, self._failed, self._signalled = stop, failed, signalled
        self._store: Any = None
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._left = threading.Event()

    def __enter__(self) -> FailureNotice:
        if self.world_size > 1:
            from torch.distributed import TCPStore

            # a connection of its own: one that waits for something would make others wait
            self._store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=60),
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._store is None:
            return
        self._left.set()
        self._thread.join()  # lest it hears of this process itself
        if error is None:
            return
        try:
            if isinstance(error, Stopped):  # nobody goes while the main one is in a collective
                self.answer() if self.rank == 0 else self.await_answer(stopping=True)
                return
            text = f"{type(error).__name__}: {error}".strip()
            self._store.compare_set(_key("failed"), "", f"process {self.rank} failed: {text}")
            if self.rank == 0:
                self.answer()
            else:
                self.await_answer()
        except RuntimeError:  # the store went with its process; the error is told anyway
            return

    def answer(self) -> None:
        """The main process has done what it can: the others may end."""
        self._store.set(_key("answer"), "done")

    def await_answer(self, stopping: bool = False) -> None:
        """Wait until the main process has answered, a signal came, or it has been long.

        With ``stopping`` the signal is what all end for, and there is less patience.
        """
        deadline = time.monotonic() + (_STOPPING_PATIENCE if stopping else _PATIENCE)
        while time.monotonic() < deadline and (stopping or self._stop.signal is None):
            if self._store.check([_key("answer")]):
                return
            time.sleep(_INTERVAL)

    def _watch(self) -> None:
        seen = False
        while not self._left.wait(_INTERVAL):
            if self._stop.signal is not None and not seen:
                seen = True
                self._signalled()
            try:
                if not self._store.check([_key("failed")]):
                    continue
                text = self._store.get(_key("failed")).decode()
            except RuntimeError:  # the store is gone, and with it what brought us together
                return
            self._failed(text)
            return


def _key(name: str) -> str:
    """Launchers that start a run again keep their store."""
    return f"gardo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
