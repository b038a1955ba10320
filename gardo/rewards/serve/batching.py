"""Joins the requests of all clients for one reward into batches and scores them in a thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from gardo.rewards.base import Reward
from gardo.rewards.outputs import concatenate, missing, score_batch
from gardo.rewards.serve.protocol import ProtocolError, ScoreRequest
from gardo.types import RewardOutput

_log = logging.getLogger(__name__)


@dataclass
class Stats:
    """Counters of one reward since the server's start."""

    requests: dict[int, int] = field(default_factory=dict)
    """Answered requests by status."""
    images: int = 0
    missing: int = 0
    batches: int = 0
    seconds: float = 0.0
    pending: int = 0
    """Images that wait or are being scored."""

    def count(self, status: int) -> None:
        self.requests[status] = self.requests.get(status, 0) + 1


@dataclass
class _Job:
    request: ScoreRequest
    answer: asyncio.Future[RewardOutput]

    @property
    def kind(self) -> tuple[torch.dtype, torch.Size]:
        """Only images of one kind fit into a tensor."""
        return self.request.images.dtype, self.request.images.shape[1:]


class Batcher:
    """Scores the requests for one reward.

    A batch begins with the oldest request and grows, for at most ``max_wait`` seconds, until it
    has the number of images that the reward prefers. A reward that raises on a batch is asked
    again with halves of it, down to single images, so that one bad image costs no other its score.

    Args:
        name: of the reward.
        reward: scores in ``threads``, with images on ``device``.
        max_wait: seconds that a request waits for others.
        max_pending: images that may wait; a request beyond them is refused with status 503.
        default_batch: images of a batch where the reward has no preference.
    """

    def __init__(
        self,
        name: str,
        reward: Reward,
        threads: ThreadPoolExecutor,
        device: torch.device,
        *,
        max_wait: float = 0.005,
        max_pending: int = 4096,
        default_batch: int = 64,
    ) -> None:
        self.name = name
        self.reward = reward
        self.stats = Stats()
        self._threads = threads
        self._device = device
        self._max_wait = max_wait
        self._max_pending = max_pending
        self._size = reward.spec.batch_size or default_batch
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())

    async def score(self, request: ScoreRequest) -> RewardOutput:
        """The request's scores; NaN for images on which the reward raised.

        Raises:
            ProtocolError: 503 when too many images wait, 500 when the reward raised on every image
                of the request.
        """
        pending = self.stats.pending
        if pending and pending + len(request) > self._max_pending:
            raise ProtocolError(503, f"{self.name}: overloaded, {pending} images wait")
        job = _Job(request, asyncio.get_running_loop().create_future())
        self.stats.pending += len(request)
        try:
            self._jobs.put_nowait(job)
            return await job.answer
        finally:
            self.stats.pending -= len(request)

    async def check(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[str | None]:
        """Why the reward cannot judge each of the prompts, or None."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, self.reward.check_prompts, prompts, metadata
        )

    async def stop(self) -> None:
        """End the task that makes batches; requests that still wait are refused with status 503."""
        self._task.cancel()
        await asyncio.wait([self._task])
        while not self._jobs.empty():
            _answer(self._jobs.get_nowait(), ProtocolError(503, f"{self.name}: shutting down"))

    async def _run(self) -> None:
        while True:
            jobs = await self._next_jobs()
            try:
                for kind in dict.fromkeys(job.kind for job in jobs):
                    some = [job for job in jobs if job.kind == kind]
                    # a task, because whatever goes wrong in it must not end this loop
                    task = asyncio.create_task(self._score_jobs(some))
                    await asyncio.wait([task])
                    error = task.exception()
                    if error is not None:
                        _log.error("%s: %s", self.name, error, exc_info=error)
                        for job in some:
                            _answer(job, ProtocolError(500, f"{self.name}: {error}"))
            finally:  # cancelled: whatever has no answer yet
                for job in jobs:
                    _answer(job, ProtocolError(503, f"{self.name}: shutting down"))

    async def _next_jobs(self) -> list[_Job]:
        jobs = [await self._jobs.get()]
        count, deadline = len(jobs[0].request), time.monotonic() + self._max_wait
        while count < self._size:
            # what waits already is taken even when the time is over
            if self._jobs.empty():
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                try:
                    job = await asyncio.wait_for(self._jobs.get(), left)
                except asyncio.TimeoutError:
                    break
            else:
                job = self._jobs.get_nowait()
            jobs.append(job)
            count += len(job.request)
        return jobs

    async def _score_jobs(self, jobs: Sequence[_Job]) -> None:
        started = time.monotonic()
        joined = ScoreRequest(
            torch.cat([job.request.images for job in jobs]),
            [prompt for job in jobs for prompt in job.request.prompts],
            [record for job in jobs for record in job.request.metadata],
        )
        output, errors = await self._isolated(joined)
        self.stats.batches += 1
        self.stats.seconds += time.monotonic() - started
        self.stats.images += len(joined)
        self.stats.missing += int(output.scores.isnan().sum())
        start = 0
        for job in jobs:
            stop = start + len(job.request)
            failed = [error for error in errors[start:stop] if error is not None]
            if failed and len(failed) == len(job.request):
                _answer(job, ProtocolError(500, f"{self.name}: {failed[0]}"))
            else:
                _answer(job, output.map(itemgetter(slice(start, stop))))
            start = stop

    async def _isolated(self, request: ScoreRequest) -> tuple[RewardOutput, list[str | None]]:
        """Scores with the error, if any, of each image."""
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, self._call, request.images, request.prompts, request.metadata
        )
        await asyncio.wait([future])
        error = future.exception()
        if error is None:
            return future.result(), [None] * len(request)
        text = f"{type(error).__name__}: {error}"
        if len(request) == 1:
            _log.warning("%s: %s", self.name, text, exc_info=error)
            return missing(1), [text]
        middle = len(request) // 2
        first, first_errors = await self._isolated(_part(request, slice(0, middle)))
        second, second_errors = await self._isolated(_part(request, slice(middle, None)))
        return concatenate([first, second]), first_errors + second_errors

    def _call(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        output = score_batch(self.name, self.reward, images.to(self._device), prompts, metadata)
        return output.map(Tensor.cpu)


def _answer(job: _Job, result: RewardOutput | ProtocolError) -> None:
    if job.answer.done():  # answered already, or its client has gone
        return
    if isinstance(result, ProtocolError):
        job.answer.set_exception(result)
    else:
        job.answer.set_result(result)


def _part(request: ScoreRequest, rows: slice) -> ScoreRequest:
    return ScoreRequest(request.images[rows], request.prompts[rows], request.metadata[rows])
