"""An evaluation from start to end: draw, measure, score; each step leaves its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from gardo.distributed.process import resolve_device
from gardo.distributed.signals import Stopped, StopRequest, StopRequested
from gardo.evaluation.cache import FORMAT, EvaluationCache, Record
from gardo.evaluation.drawing import Draw, Painter
from gardo.evaluation.judging import Judge
from gardo.evaluation.policies import Policies, Policy
from gardo.evaluation.progress import StageProgress
from gardo.evaluation.request import Request
from gardo.evaluation.settings import Contender, resolve
from gardo.rewards.scoring import RewardSet
from gardo.sampling.steps import StepTable, step_table
from gardo.types import UserError


@dataclass(frozen=True)
class Collected:
    """What an evaluation has on disk.

    Attributes:
        images: a record per contender and draw, with its scores.
        kl: KL to the base per contender and draw, on the first ``kl_seeds`` seeds.
    """

    images: Mapping[str, Mapping[Draw, Record]]
    kl: Mapping[str, Mapping[Draw, float]]


class Evaluation:
    """Draws and scores what is missing; what an earlier, killed evaluation left is used."""

    def __init__(self, request: Request, progress: StageProgress | None = None) -> None:
        """Check everything that can be checked before a model is loaded.

        Raises:
            UserError: see `resolve`; also a reward that is unknown or cannot judge a prompt, a
                folder that cannot be written, or several processes.
        """
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError(
                "gardo.evaluate runs in one process: start it without torchrun or accelerate "
                "launch (evaluations of different contenders may share a --cache)"
            )
        self.request = request
        self.progress = progress or StageProgress()
        self.settings = settings = resolve(request)
        folder = request.cache or request.out / "cache"
        self.cache = EvaluationCache(folder.expanduser(), self.progress.write)
        self.device = torch.device(resolve_device(settings.config.device))
        if settings.config.precision == "fp16" and self.device.type == "cpu":
            raise UserError("--precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
        if settings.config.threads:
            torch.set_num_threads(settings.config.threads)
        self.rewards = RewardSet(settings.rewards, self.device)
        self.rewards.check_prompts(settings.prompts)
        for path in (request.out, folder):  # last, so that a mistake leaves nothing
            _make(path.expanduser())
        self.stop = StopRequest()

    @property
    def draws(self) -> list[Draw]:
        """All images of a contender; the first ones show every prompt."""
        prompts, seeds = range(len(self.settings.prompts)), range(len(self.settings.seeds))
        return [Draw(prompt, seed) for seed in seeds for prompt in prompts]

    def run(self) -> Collected:
        """Do what is missing.

        Raises:
            UserError: a model cannot be loaded, memory or disk do not suffice, or a reward fails.
            Stopped: a signal came; the same command goes on.
        """
        try:
            with self.stop.listening():
                return self._run()
        except StopRequested as stopped:
            raise Stopped(
                f"stopped on {stopped}: what is drawn and scored is kept, and the same command "
                "goes on from there"
            ) from None
        except torch.OutOfMemoryError as error:
            asked = str(error).split(". ", 1)[0]
            raise UserError(
                f"out of GPU memory: {asked}. Try a smaller --batch_size (it is "
                f"{self.settings.batch_size}) or --precision bf16; what is drawn is kept"
            ) from error

    def _run(self) -> Collected:
        settings = self.settings
        self.policies = Policies(
            settings.config,
            settings.contenders,
            settings.base,
            [prompt.text for prompt in settings.prompts],
            settings.guidance,
            settings.batch_size,
            self.device,
        )
        images, kl = {}, {}
        for contender in settings.contenders:
            images[contender.name], kl[contender.name] = self._draw(contender)
        judge = Judge(self.rewards, settings, self.cache, self.request.rescore, self.device)
        for name, records in images.items():
            judge.score(name, records, self.progress, self.stop.check)
        return Collected(images, kl)

    def _draw(self, contender: Contender) -> tuple[dict[Draw, Record], dict[Draw, float]]:
        draws, settings = self.draws, self.settings
        images = {draw: self.cache.find(self.image_key(contender, draw)) for draw in draws}
        measured: dict[Draw, Record | None] = {}
        if contender in settings.compared:
            some = [draw for draw in draws if draw.seed < settings.kl_seeds]
            measured = {draw: self.cache.find(self.kl_key(contender, draw)) for draw in some}
        to_draw = [draw for draw, record in images.items() if record is None]
        to_measure = [draw for draw, record in measured.items() if record is None]
        with self._policy(contender, needed=bool(to_draw or to_measure)) as policy:

            def draw_batch(some: Sequence[Draw]) -> None:
                painter, table = self._painter(policy), self._table(policy, noisy=False)
                for draw, image in zip(some, painter.images(table, some), strict=True):
                    self._check_finite(contender, draw, image)
                    images[draw] = self.cache.new(self.image_key(contender, draw), image)

            def measure_batch(some: Sequence[Draw]) -> None:
                painter, table = self._painter(policy), self._table(policy, noisy=True)
                values = painter.kl(_present(policy).base, table, some)
                for draw, value in zip(some, values.tolist(), strict=True):
                    record = self.cache.new(self.kl_key(contender, draw))
                    record.values["kl"] = value if value == value else None
                    self.cache.save(record)
                    measured[draw] = record

            self._in_batches(f"{contender.name}: images", to_draw, len(draws), draw_batch)
            if measured:
                title = f"{contender.name}: KL to the base"
                self._in_batches(title, to_measure, len(measured), measure_batch)
        return (
            {draw: record for draw, record in images.items() if record is not None},
            {draw: _kl_value(record) for draw, record in measured.items()},
        )

    @contextmanager
    def _policy(self, contender: Contender, needed: bool) -> Iterator[Policy | None]:
        """The contender's policy; no model is loaded where all is done."""
        if not needed:
            yield None
            return
        self.progress.write(f"{contender.name}: loading {contender.source.given}")
        with self.policies.use(contender) as policy:
            yield policy

    def _painter(self, policy: Policy | None) -> Painter:
        settings = self.settings
        return Painter(_present(policy).sampler, settings.prompts, settings.seeds)

    def _table(self, policy: Policy | None, noisy: bool) -> StepTable:
        sampling, sampler = self.settings.config.sampling, _present(policy).sampler
        resolution = sampling.resolution or sampler.model.default_resolution
        steps = sampling.num_steps if noisy else self.settings.steps
        return step_table(
            sampler.model.schedule(steps, resolution),
            self.device,
            kind=sampling.sde if noisy else "ode",
            noise_level=sampling.noise_level if noisy else 0.0,
        )

    def _in_batches(
        self, title: str, todo: Sequence[Draw], total: int, do: Callable[[Sequence[Draw]], None]
    ) -> None:
        size = self.settings.batch_size
        with self.progress.stage(title, len(todo), total - len(todo)) as advance:
            for start in range(0, len(todo), size):
                self.stop.check()
                some = todo[start : start + size]
                do(some)
                advance(len(some))

    def _check_finite(self, contender: Contender, draw: Draw, image: Tensor) -> None:
        if not bool(image.isfinite().all()):
            prompt = self.settings.prompts[draw.prompt].text
            raise UserError(
                f"'{contender.name}' drew an image that is not finite (prompt {prompt!r}, seed "
                f"{self.settings.seeds[draw.seed]}): its weights are damaged, or --precision "
                f"{self.settings.config.precision} is too coarse for it"
            )

    def image_key(self, contender: Contender, draw: Draw) -> dict[str, Any]:
        """Everything that an image depends on."""
        settings, config, model = self.settings, self.settings.config, contender.model
        return {
            "format": FORMAT,
            "what": "image",
            "weights": dict(contender.weights),
            "variant": model.variant,
            "max_sequence_length": model.max_sequence_length,
            "attention_backend": model.attention_backend,
            "precision": config.precision,
            "vae": [model.vae_dtype, model.vae_tiling],
            "device": self.device.type,
            "versions": {name: version(name) for name in ("torch", "diffusers")},
            "prompt": settings.prompts[draw.prompt].text,
            "seed": settings.seeds[draw.seed],
            "steps": settings.steps,
            "guidance": float(settings.guidance),
            "resolution": config.sampling.resolution,
        }

    def kl_key(self, contender: Contender, draw: Draw) -> dict[str, Any]:
        """Everything that the KL of a trajectory to the base depends on."""
        sampling, base = self.settings.config.sampling, self.settings.contenders[0]
        return {
            **self.image_key(contender, draw),
            "what": "kl",
            "base": dict(base.weights),
            "steps": sampling.num_steps,
            "sde": sampling.sde,
            "noise_level": float(sampling.noise_level),
        }


def _present(policy: Policy | None) -> Policy:
    if policy is None:
        raise ValueError("policy: expected one that is loaded, got None")
    return policy


def _kl_value(record: Record | None) -> float:
    value = None if record is None else record.values.get("kl")
    return float("nan") if value is None else float(value)


def _make(folder: Any) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UserError(
            f"--out '{folder}': expected a folder that can be written: {error.strerror}"
        ) from None
