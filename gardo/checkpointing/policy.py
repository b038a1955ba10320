"""Decides when a run is saved, and what is saved when it ends before its time."""

from __future__ import annotations

import difflib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gardo.checkpointing.checkpoint import CheckpointFolder, TrainingState
from gardo.checkpointing.parts import Stateful, separate
from gardo.checkpointing.state_tensors import to_host
from gardo.config import Config, to_yaml
from gardo.distributed.failure_notice import FailureNotice
from gardo.distributed.process import Runtime
from gardo.distributed.signals import Stopped, StopRequested
from gardo.run.faults import explain
from gardo.run.folder import RunFolder
from gardo.run.metrics import EVALUATION, MetricsWriter
from gardo.types import UserError


class CheckpointPolicy:
    """Holds the state of the last complete epoch and writes it when that is due.

    Checkpoints are states between two epochs: all randomness is a function of the seed and the
    epoch, so an epoch that was left in the middle is repeated exactly.

        with policy.rescue():
            for epoch in ...:
                with policy.updates():
                    ...                # the weights change
                policy.mark(epoch + 1, row)
                policy.save_if_due()
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        folder: RunFolder,
        files: Sequence[MetricsWriter],
        parts: Mapping[str, Stateful],
        say: Callable[[str], None],
    ) -> None:
        """Save to ``folder``.

        Args:
            files: what must be on the disk before a checkpoint is.
            parts: of the trainer's state.
            say: tells the user something.
        """
        self.config, self.runtime, self.folder = config, runtime, folder
        self._files, self._parts, self._say = files, parts, say
        settings = config.checkpoint
        self.store = CheckpointFolder(
            folder.checkpoints, settings.keep_last, settings.keep_best, settings.best
        )
        self._state: TrainingState | None = None
        self._has_tensors = False
        self._moved = False  # the live weights are no longer those of the state
        self._scores: dict[str, Any] = {}
        self._saved = folder.done if folder.resumed else None
        self._lock = threading.Lock()  # the state is also saved when another process fails
        self._failing = False
        self._notice = FailureNotice(
            runtime.rank, runtime.world_size, runtime.stop, self._end_after, self._save_early
        )

    def mark(self, epoch: int, row: Mapping[str, Any]) -> None:
        """An epoch is complete: this is the state that is saved from now on.

        Args:
            epoch: number of epochs done.
            row: its metrics.

        Raises:
            UserError: ``checkpoint.keep_best`` is not among the metrics.
        """
        tensors, values = separate(self._parts)
        state = TrainingState(epoch, {}, {**values, "evaluated": None})
        if self.config.checkpoint.snapshot:
            state.tensors = self._on_host(tensors)
        with self._lock:
            self._state, self._scores = state, dict(row)
            self._has_tensors, self._moved = self.config.checkpoint.snapshot, False
        best = self.config.checkpoint.keep_best
        if row and best is not None and not best.startswith(EVALUATION):
            _check_metric(best, row)

    def evaluated(self, name: str, row: Mapping[str, Any]) -> None:
        """The evaluation ``name`` after the marked epoch is written; UserError as `mark`."""
        if self._state is not None:
            self._state.values["evaluated"] = name
        row = {EVALUATION + name: value for name, value in row.items()}
        self._scores |= row
        best = self.config.checkpoint.keep_best
        if best is not None and best.startswith(EVALUATION):
            _check_metric(best, row)

    @contextmanager
    def updates(self) -> Iterator[None]:
        """The block in which weights change; without a snapshot it is not left for a signal."""
        self._moved = True
        with self.runtime.stop.deferred(not self._has_tensors):
            yield

    def save_if_due(self) -> None:
        """Save the marked epoch if ``checkpoint.every`` says so, or if it is the last one.

        Raises:
            OSError: it could not be written; earlier checkpoints are as they were.
        """
        if self._state is None:
            return
        epoch, every = self._state.epoch, self.config.checkpoint.every
        if epoch == self.config.epochs or (every and epoch % every == 0):
            self.save()
            self.runtime.wait()

    def save(self) -> Path | None:
        """Save the last complete epoch, on all processes; its checkpoint, or None if it is lost."""
        state = self._state
        if state is None or self._has_tensors or self._saved == state.epoch:
            return self._write()
        if self._moved:
            return None
        state.tensors = self._on_host(separate(self._parts)[0])
        try:
            return self._write()
        finally:
            state.tensors = {}

    def _on_host(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies on the main process's host; all processes call this."""
        return {name: to_host(group, self.runtime.is_main) for name, group in tensors.items()}

    def _write(self) -> Path | None:
        with self._lock:
            state = self._state
            if state is None:
                return None
            path = self.store.path / f"epoch_{state.epoch:04d}"
            if self.folder.is_main and self._saved != state.epoch:
                for file in self._files:
                    file.sync()
                state.values["clock"] = self.folder.clock()
                score = self._scores.get(self.config.checkpoint.keep_best or "")
                number = isinstance(score, int | float) and math.isfinite(score)
                self.store.save(state, to_yaml(self.config), score if number else None)
            self._saved = state.epoch
            return path

    @contextmanager
    def rescue(self) -> Iterator[None]:
        """Save before a signal or a failure, of whichever process, ends the run.

        Raises:
            Stopped: a signal came and there is a checkpoint of the last complete epoch.
        """
        with self._notice:
            try:
                yield
            except StopRequested as request:
                path = self._save_or_explain()
                if path is None:  # cannot be: such a block defers signals
                    raise
                done = self._state.epoch if self._state is not None else 0
                raise Stopped(
                    f"stopped by {request} after {done} of {self.config.epochs} epochs, saved in "
                    f"'{path}'; continue with: python -m gardo.train --resume {self.folder.path}"
                ) from None
            except (UserError, RuntimeError, MemoryError):
                self._failing = True
                self._say_saved(self._save_alone())
                raise

    def _end_after(self, failure: str) -> None:
        """Another process has failed: save what needs no collective, and end this one.

        In a thread, because the main one may wait for that process for ever; so there is no other
        way to end than at once.
        """
        if self._failing:
            return
        try:
            if self.folder.is_main:
                self._say(failure)
                self._say_saved(self._save_alone())
                self._notice.answer()
            else:
                self._notice.await_answer()
        finally:
            os._exit(1)

    def _save_early(self) -> None:
        """A signal came to one of several processes, which go on to where they can stop together.

        That may be further than a launcher waits before it kills (torchrun: 30 seconds).
        """
        self._save_alone()

    def _save_alone(self) -> Path | None:
        """Save without other processes and without the GPU, which may wait for them."""
        if not self.folder.is_main:
            return None
        together = self.runtime.world_size > 1 or self._moved
        if not self._has_tensors and together:
            return None
        try:
            return self._save_or_explain()
        except (UserError, OSError, RuntimeError) as error:  # the message is what ended the run
            self._say(f"no checkpoint could be written: {error}")
            return None

    def _say_saved(self, path: Path | None) -> None:
        if path is not None:
            self._say(f"the last complete epoch is saved in '{path}'")

    def _save_or_explain(self) -> Path | None:
        try:
            return self.save()
        except OSError as error:
            explained = explain(error, self.config)
            if explained is None:
                raise
            raise explained from error


def _check_metric(name: str, row: Mapping[str, Any]) -> None:
    if name not in row:
        near = difflib.get_close_matches(name, row, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(
            f"checkpoint.keep_best: no metric '{name}'{hint} (there are: {', '.join(sorted(row))})"
        )
