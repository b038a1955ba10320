"""What a user sees while a run goes: one bar over the epochs, the stage at work, its times."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

STAGES = ("prompts", "rollout", "score", "shape", "reference", "update", "evaluate", "save")
"""The stages of an epoch, in their order."""


class StageTimer:
    """Wall time per stage, on the host's monotonic clock.

    Stages may nest; the outer one's clock stands still meanwhile, so the times of an epoch add
    up to at most its wall time. Use it from one thread.

    On a GPU this does not synchronise. Kernels run behind the host, so a stage's time is the time
    to *issue* its work plus the waits that its own code has (a copy to the host, a scorer that
    needs pixels). Work still queued when a stage ends is charged to the next stage that waits.
    Sums over an epoch are exact, because the epoch ends by reading its metrics; single stages
    that never wait (``update``) look shorter than their kernels are. Use a profiler for those.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = self._epoch_start = clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the time of the ``with`` block to `name`, one of `STAGES`.

        A stage that is entered several times in an epoch is summed. Raises ValueError for
        another name.
        """
        if name not in STAGES:
            raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {name!r}")
        self._charge()
        self._stack.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    @property
    def current(self) -> str | None:
        """The innermost stage at work, or None between stages."""
        return self._stack[-1] if self._stack else None

    def metrics(self) -> dict[str, float]:
        """``time/<stage>`` for the stages entered since the last reset, and ``time/epoch``.

        Seconds. ``time/epoch`` is the wall time since the reset, stages or not.
        """
        self._charge()
        seconds = {f"time/{name}": self._seconds[name] for name in STAGES if name in self._seconds}
        return {**seconds, "time/epoch": self._clock() - self._epoch_start}

    def reset(self) -> None:
        """Start a new epoch: forget all times. A stage at work goes on from zero."""
        self._seconds = dict.fromkeys(self._stack, 0.0)
        self._since = self._epoch_start = self._clock()

    def _charge(self) -> None:
        now = self._clock()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now


class EpochProgress:
    """A progress bar over epochs with the stage at work, the main metrics and the time left.

    On a terminal it is one tqdm bar. Elsewhere (a log file, CI) it is one plain line per epoch.
    With ``enabled=False``, for all ranks but the main one, it prints nothing; stages are timed
    all the same.

        with EpochProgress(epochs, proxy="count") as progress:
            for epoch in range(epochs):
                with progress.stage("rollout"):
                    ...
                progress.finish_epoch(epoch, metrics)   # adds time/<stage> to metrics

    Args:
        epochs: number of epochs of the whole run.
        proxy: name of the proxy reward, shown as ``reward``.
        start_epoch: epochs that are already done (resume).
        enabled: print at all.
        stream: where to print; standard error by default.
        clock: seconds, monotonic; for tests.
    """

    def __init__(
        self,
        epochs: int,
        proxy: str,
        start_epoch: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0 <= start_epoch <= epochs:
            raise ValueError(f"start_epoch: expected 0..{epochs} (epochs), got {start_epoch}")
        self.epochs = epochs
        self.proxy = proxy
        self.timer = StageTimer(clock)
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled
        self._recent: deque[float] = deque(maxlen=10)  # epoch times, for the time left
        self._summary = ""
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=epochs,
                initial=start_epoch,
                unit="epoch",
                file=self._stream,
                dynamic_ncols=True,
                miniters=1,
                mininterval=0.0,
                smoothing=0.1,
                bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}] {desc}",
            )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage (see `StageTimer.stage`) and show it while it runs."""
        with self.timer.stage(name):
            self._show(name)
            yield
        if self.timer.current is not None:
            self._show(self.timer.current)

    def within_stage(self, done: int, total: int) -> None:
        """Show how far the running stage is, e.g. ``rollout 3/8``."""
        if self.timer.current is not None:
            self._show(f"{self.timer.current} {done}/{total}")

    def finish_epoch(self, epoch: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Close an epoch (counted from 0): advance the bar, or print the epoch's line.

        What it shows of the metrics: `format_summary`. Returns them with ``time/<stage>`` and
        ``time/epoch`` added and starts the next epoch's times: stages run before the first epoch
        belong to it unless ``timer.reset()`` is called in between.
        """
        times = self.timer.metrics()
        self.timer.reset()
        self._recent.append(times["time/epoch"])
        parts = [format_summary(metrics, self.proxy), format_times(times)]
        self._summary = "  ".join(p for p in parts if p)
        if self._bar is not None:
            self._bar.set_description_str(self._summary, refresh=False)
            self._bar.update(1)
        elif self._enabled:
            left = (self.epochs - epoch - 1) * sum(self._recent) / len(self._recent)
            self.write(
                f"epoch {epoch + 1}/{self.epochs}  {self._summary}  ETA {format_seconds(left)}"
            )
        return {**metrics, **times}

    def write(self, text: str) -> None:
        """Print a line without tearing the bar; nothing when not enabled."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _show(self, stage: str) -> None:
        if self._bar is not None:
            # The stage stands first, in a fixed width: a narrow terminal cuts the line's end.
            self._bar.set_description_str(f"{stage:<14} {self._summary}", refresh=True)


def format_summary(metrics: Mapping[str, Any], proxy: str) -> str:
    """The main metrics of an epoch on one line; what is missing, null or NaN is left out."""
    shown = [
        (f"reward/{proxy}/mean", "reward {:.3f}"),
        ("gate/share", "gate {:.1%}"),
        ("kl", "kl {:.1e}"),
        ("kl/gradient_share", "grad share {:.2f}"),
        ("cap/share", "cap {:.0%}"),
        ("images_per_second", "{:.1f} img/s"),
    ]
    values = [(metrics.get(key), text) for key, text in shown]
    known = [(float(value), text) for value, text in values if value is not None]
    return "  ".join(text.format(value) for value, text in known if not math.isnan(value))


def format_times(times: Mapping[str, float]) -> str:
    """``time/epoch`` in seconds and, in brackets, the stages that take at least 5% of it."""
    whole = times["time/epoch"]
    stages = [(name, times.get(f"time/{name}", 0.0)) for name in STAGES]
    shown = ", ".join(f"{name} {t:.1f}" for name, t in stages if t > 0 and t >= 0.05 * whole)
    return f"{whole:.1f} s" + (f" ({shown})" if shown else "")


def format_seconds(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``, rounded."""
    total = round(seconds)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
