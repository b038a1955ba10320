"""Scores images in the background while the next ones are sampled.

Rewards that compute here share one thread, since they may share a backbone and its tokenizer,
and on a GPU one CUDA stream beside the sampler's. A remote reward waits in a thread of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from gardo.rewards.scoring import RewardSet, ScoreBook
from gardo.rewards.thumbnails import thumbnails
from gardo.types import Prompt, RewardOutput, UserError

T = TypeVar("T")

MAX_PENDING = 4
"""Batches whose images are kept for scoring; beyond them `ScoringWorker.submit` waits."""


class RewardFailed(RuntimeError):
    """A reward raised an exception, which is the cause of this one."""


class _Lane:
    """One thread, with its own stream on a GPU, that does its tasks in order."""

    def __init__(self, label: str, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"score-{label}")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(
        self, task: Callable[[], T], images: Tensor, drawn: torch.cuda.Event | None
    ) -> Future[tuple[T, float]]:
        """Do ``task`` once ``images`` are there; the result and the seconds that it took."""
        return self._pool.submit(self._timed, task, images, drawn)

    @torch.inference_mode()
    def _timed(
        self, task: Callable[[], T], images: Tensor, drawn: torch.cuda.Event | None
    ) -> tuple[T, float]:
        with self._beside(images, drawn):
            started = time.perf_counter()
            result = task()
            if self._stream is not None:  # this thread waits, the sampler's goes on
                self._stream.synchronize()
            return result, time.perf_counter() - started

    @contextmanager
    def _beside(self, images: Tensor, drawn: torch.cuda.Event | None) -> Iterator[None]:
        if self._stream is None or drawn is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(drawn)
            # the sampler's stream must not reuse their memory before this one has read it
            images.record_stream(self._stream)
            drawn.synchronize()  # so that the time is the task's alone
            yield

    def stop(self, wait: bool) -> None:
        """Drop the tasks that have not begun; with ``wait``, return when the thread has ended."""
        self._pool.shutdown(wait=wait, cancel_futures=True)


@dataclass
class _Batch:
    thumbnails: Tensor
    scores: dict[str, Future[tuple[RewardOutput, float]]] = field(default_factory=dict)
    features: Future[tuple[Tensor, float]] | None = None

    def done(self) -> bool:
        features = [self.features] if self.features else []
        futures: list[Future[Any]] = [*self.scores.values(), *features]
        return all(future.done() for future in futures)


class ScoringWorker:
    """Scores batches with some rewards, and extracts features, in threads of its own.

        with ScoringWorker(rewards, names, device) as worker:
            for images, prompts in batches:
                worker.submit(images, prompts)
            book = worker.collect()

    The book has the batches in the order in which they came, whatever finished first. Leaving the
    block ends all threads; after an error the tasks that have not begun are dropped.
    """

    def __init__(
        self,
        rewards: RewardSet,
        names: Sequence[str],
        device: torch.device,
        max_pending: int = MAX_PENDING,
    ) -> None:
        """Score with the ``names`` among ``rewards`` images that lie on ``device``."""
        self._rewards = rewards
        self._device = device
        self._max_pending = max_pending
        self._pending: deque[_Batch] = deque()
        self._book = ScoreBook()
        self._local = _Lane("local", device)
        self._lanes = {
            name: _Lane(name, device) if rewards[name].spec.remote else self._local
            for name in names
        }

    def submit(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """Score a batch in the background; waits while ``max_pending`` others are not done.

        Args:
            images: ``[B, 3, H, W]`` float in [0, 1]; not to be written to afterwards.
            prompts: ``B`` prompts.

        Raises:
            RewardFailed, UserError: an earlier batch could not be scored (see `collect`).
        """
        while self._pending and self._pending[0].done():
            self._book_oldest()
        while len(self._pending) >= self._max_pending:
            self._book_oldest()
        drawn = None
        if self._device.type == "cuda":
            drawn = torch.cuda.Event()
            drawn.record(torch.cuda.current_stream(self._device))
        batch = _Batch(thumbnails(images))
        for name, lane in self._lanes.items():
            batch.scores[name] = lane.submit(self._task(name, images, prompts), images, drawn)
        extract = self._rewards.features
        if extract is not None:
            batch.features = self._local.submit(lambda: extract(images), images, drawn)
        self._pending.append(batch)

    def _task(
        self, name: str, images: Tensor, prompts: Sequence[Prompt]
    ) -> Callable[[], RewardOutput]:
        return lambda: self._rewards.score_one(name, images, prompts)

    def collect(self) -> ScoreBook:
        """Wait for all batches and return their scores, features and times.

        Raises:
            UserError: as a reward raised it (`RewardUnavailable` among them).
            RewardFailed: another exception of a reward, which it names.
        """
        while self._pending:
            self._book_oldest()
        book, self._book = self._book, ScoreBook()
        return book

    def _book_oldest(self) -> None:
        batch = self._pending[0]
        outputs, seconds = {}, {}
        for name, future in batch.scores.items():
            output, seconds[name] = self._result(f"reward '{name}'", future)
            outputs[name] = output.map(self._use_here)
        features = None
        if batch.features is not None:
            features = self._use_here(self._result("feature extractor", batch.features)[0])
        self._book.add(outputs, features, seconds, batch.thumbnails)
        self._pending.popleft()

    def _use_here(self, made: Tensor) -> Tensor:
        if made.is_cuda:  # made on a side stream, used on the caller's from now on
            made.record_stream(torch.cuda.current_stream(made.device))
        return made

    def _result(self, what: str, future: Future[tuple[T, float]]) -> tuple[T, float]:
        error = future.exception()
        if isinstance(error, UserError):
            if what in str(error):
                raise error
            raise UserError(f"{what}: {error}") from error
        if error is not None:
            raise RewardFailed(f"{what} failed: {type(error).__name__}: {error}") from error
        return future.result()

    def __enter__(self) -> ScoringWorker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        lanes = {self._local, *self._lanes.values()}
        for lane in lanes:
            lane.stop(wait=False)
        for name in self._lanes:
            self._rewards[name].interrupt()
        for lane in lanes:
            lane.stop(wait=True)
        self._pending.clear()
