"""What a user sees while an evaluation goes: what is under way, its rate and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from gardo.run.progress import format_seconds

SILENCE = 30.0
"""Seconds after which a log gets another line while a stage goes on."""


class StageProgress:
    """A bar per stage on a terminal; elsewhere a line at its end, and now and then in between."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock

    def write(self, text: str) -> None:
        """Print a line without tearing a bar."""
        tqdm.write(text, file=self._stream)

    @contextmanager
    def stage(self, title: str, total: int, cached: int = 0) -> Iterator[Callable[[int], None]]:
        """Show a stage of ``total`` images; the block calls what it is given with those done.

        ``cached`` of them were there before and are not part of ``total``.
        """
        kept = f" ({cached} are there)" if cached else ""
        if not total:
            self.write(f"{title}: nothing to do{kept}")
            yield lambda count: None
            return
        if self._stream.isatty():
            with tqdm(
                total=total,
                desc=title + kept,
                unit="img",
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.1,
            ) as bar:
                yield lambda count: _advance(bar, count)
            return
        started = told = self._clock()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            now = self._clock()
            if done < total and now - told < SILENCE:
                return
            told, seconds = now, max(now - started, 1e-9)
            rate = f"{done / seconds:.1f} img/s"
            if done < total:
                left = format_seconds((total - done) * seconds / done)
                self.write(f"{title}: {done}/{total}{kept}, {rate}, ETA {left}")
            else:
                self.write(f"{title}: {total} images{kept} in {format_seconds(seconds)}, {rate}")

        yield advance


def _advance(bar: tqdm, count: int) -> None:
    bar.update(count)
