"""The training loop: prompts, rollout, score, shape, reference pass, update, refresh, track."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from gardo.algorithms.adaptive_reference import AdaptiveReference
from gardo.algorithms.ema import EMA
from gardo.algorithms.grpo import GRPO
from gardo.algorithms.nft import NFT
from gardo.algorithms.nonfinite import update_if_finite
from gardo.algorithms.parity import check_parity, ratio_deviation
from gardo.algorithms.shaping import Shaper
from gardo.algorithms.stats import UpdateStats
from gardo.algorithms.update import Algorithm
from gardo.checkpointing.checkpoint import TrainingState
from gardo.checkpointing.policy import CheckpointPolicy
from gardo.checkpointing.resume import ResumePoint, reopen
from gardo.checkpointing.state_tensors import pack_optimizer, to_host, unpack_optimizer
from gardo.config import Config
from gardo.data.prompts import PromptSampler, load_prompts
from gardo.distributed.process import Runtime
from gardo.distributed.sharding import refuse_with_sharding
from gardo.evaluation.heldout import HeldOutEvaluator
from gardo.models.adapters import BEHAVIOUR, POLICY, REFERENCE, build_adapters
from gardo.models.embeddings import EmbeddingTable, embedding_cache
from gardo.models.loading import load_model
from gardo.rewards.overlap import ScoringWorker
from gardo.rewards.scoring import RewardSet, ScoreBook
from gardo.rng import derive_seed, seed_everything
from gardo.run.card import write_model_card
from gardo.run.folder import RunFolder, peak_memory_bytes
from gardo.run.health import Health
from gardo.run.images import image_grid, save_grid
from gardo.run.metrics import EVALUATION, read_metrics
from gardo.run.progress import EpochProgress
from gardo.run.trackers import Trackers
from gardo.sampling.graph import GraphedTrajectories, use_graphs
from gardo.sampling.plan import plan_epoch
from gardo.sampling.rollout import Rollout, Sampler
from gardo.sampling.steps import sde_window, step_table
from gardo.types import Prompt, UserError


class Trainer:
    """Fine-tunes one model with one recipe; everything it needs is built here and checked."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config = config
        self.runtime = runtime
        if runtime.sharded:
            refuse_with_sharding(config.model.compile)
        graphs = use_graphs(config.sampling.cuda_graph, runtime.device, runtime.sharded)
        prompts = load_prompts(config.prompts)
        self.rewards = RewardSet(config.rewards, runtime.device)
        self.rewards.check_prompts(prompts)
        self.model = load_model(config.model, runtime.device, config.precision)
        self.resolution = config.sampling.resolution or self.model.default_resolution
        self.prompt_sampler = PromptSampler(prompts, config.prompts.per_epoch, config.seed)
        self.embeddings = EmbeddingTable(
            self.model, [p.text for p in prompts], cache=embedding_cache(config)
        )
        self.model.release_text_encoders(place_transformer=not runtime.sharded)

        algorithm: type[Algorithm] = NFT if config.algorithm.name == "nft" else GRPO
        names = (POLICY, REFERENCE, BEHAVIOUR)[: 3 if algorithm is NFT else 2]
        self.adapters = build_adapters(
            self.model, config.model, derive_seed(config.seed, "lora"), names
        )
        train = config.train
        self.optimizer = torch.optim.AdamW(
            self.adapters.parameters(POLICY).values(),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            fused=train.fused_optimizer or None,
        )
        self.model.module, self.optimizer = runtime.prepare(self.model.transformer, self.optimizer)
        if runtime.sharded:
            self.adapters.take_shards(runtime.shard)
        self.ema = EMA(self.adapters.parameters(POLICY), train) if train.ema else None
        self.graphs = GraphedTrajectories(self.adapters) if graphs else None
        self.sampler = Sampler(
            self.model,
            self.embeddings,
            self.resolution,
            config.sampling.guidance_scale,
            config.sampling.batch_size,
            graphs=self.graphs,
            offload=config.sampling.offload_trajectories,
        )
        self.parity_checked = False
        self.start_epoch, self.resumed, self.evaluated = 0, False, False
        self.schedule = self.model.schedule(config.sampling.num_steps, self.resolution)
        self.shaper = Shaper(config.algorithm, self.rewards)
        self.algorithm = algorithm(
            config.algorithm, train, self.sampler, self.adapters, self.optimizer, runtime
        )
        self.health = Health(config, runtime)
        self.adaptive_reference = AdaptiveReference(config.algorithm.reference)
        self.evaluator = HeldOutEvaluator(
            config,
            self.model,
            self.embeddings,
            self.rewards,
            prompts,
            self.resolution,
            self.graphs,
            runtime,
        )

    def train(self, folder: RunFolder) -> None:
        """Run all epochs; metrics, pictures and the export go to the run folder as they come.

        Raises:
            Stopped: a signal came; the last complete epoch is saved.
        """
        config, start = self.config, self.start_epoch
        with (
            EpochProgress(
                config.epochs, config.rewards.proxy_name, start, enabled=self.runtime.is_main
            ) as self.progress,
            folder.metrics() as metrics,
            folder.evaluations() as self.evaluations,
            Trackers(config, folder, start, self.progress.write) as self.trackers,
        ):
            self.health.attach(folder.path, self.progress.write)
            self.checkpoints = CheckpointPolicy(
                config,
                self.runtime,
                folder,
                (metrics, self.evaluations),
                self.state_values,
                self.state_tensors,
                self.progress.write,
            )
            with self.checkpoints.rescue():
                self.finish_epoch(folder, start, {})
                for epoch in range(start, config.epochs):
                    row = {"epoch": epoch, **self.run_epoch(epoch)}
                    row = self.progress.finish_epoch(epoch, row)
                    metrics.write(row)
                    self.trackers.log(row)
                    self.finish_epoch(folder, epoch + 1, row)
                with self.progress.stage("save"):
                    self.export(folder)

    def finish_epoch(self, folder: RunFolder, done: int, row: dict[str, Any]) -> None:
        """What happens between two epochs: evaluation and checkpoint, where they are due."""
        resumed = self.resumed and done == self.start_epoch
        self.checkpoints.mark(done, row, saved=resumed)
        self.runtime.stop_together()
        self.health.stop_if_alarmed()
        due = evaluation_due(self.config, done)
        if due is not None and not (resumed and self.evaluated):
            self.evaluate(folder, done, due)
        if done > self.start_epoch:
            with self.progress.stage("save"):
                self.checkpoints.save_if_due()

    def run_epoch(self, epoch: int) -> dict[str, Any]:
        """One rollout and its updates; returns the epoch's metrics."""
        config, stage = self.config, self.progress.stage
        seed_everything(config.seed, "epoch", epoch, self.runtime.rank)
        rows_before = self.model.rows
        with stage("prompts"):
            prompts = self.prompt_sampler.epoch(epoch)
            self.embeddings.stage([p.text for p in prompts])
        with stage("rollout"):
            rollout, book = self.roll_out_and_score(epoch, prompts)
        self.runtime.stop_together()
        with stage("shape"):
            shaped = self.shaper(book, rollout.plan, self.runtime)
        with stage("reference"):
            data = self.algorithm.prepare(rollout, shaped, self.schedule, config.seed, epoch)
        self.runtime.stop_together()
        with stage("update"), self.checkpoints.updates():
            if isinstance(self.algorithm, GRPO):
                self.check_parity(rollout, data.steps)
            stats = UpdateStats(config.algorithm.reference.judged_by)
            updates = config.train.updates_per_epoch
            for index in range(updates):
                self.runtime.stop_together()
                made = update_if_finite(self.algorithm, self.health, epoch, data, index, stats)
                if made and self.ema is not None:
                    self.ema.step()
            update_metrics, kl = stats.metrics(self.runtime)
            update_metrics |= self.algorithm.finish_epoch((epoch + 1) * updates)
            # without a KL term nothing looks at the reference
            reset = config.algorithm.kl_coef > 0 and self.adaptive_reference.update(
                kl, shaped.scores
            )
            if reset:
                self.adapters.copy(POLICY, REFERENCE)
        rows_per_sample = 2 if self.sampler.guided else 1
        samples = config.prompts.per_epoch * config.prompts.group_size
        metrics = shaped.metrics | update_metrics
        return {
            **metrics,
            **self.health.observe(epoch, metrics, shaped.scores),
            "reference/reset": int(reset),
            "reference/refused": int(self.adaptive_reference.refused),
            "forwards/policy": self.model.rows - rows_before - data.reference_rows,
            "forwards/reference": data.reference_rows,
            "forwards/reference_ungated": len(rollout) * len(data.steps) * rows_per_sample,
            "images_per_second": samples / self.progress.timer.metrics()["time/epoch"],
        }

    def roll_out_and_score(self, epoch: int, prompts: list[Prompt]) -> tuple[Rollout, ScoreBook]:
        """Sample the epoch's images, each batch scored while the next one is drawn."""
        config, sampling = self.config, self.config.sampling
        plan = plan_epoch(
            config.prompts.per_epoch,
            config.prompts.group_size,
            config.train.updates_per_epoch,
            self.runtime.rank,
            self.runtime.world_size,
        )
        table = step_table(
            self.schedule,
            self.runtime.device,
            kind="ode" if isinstance(self.algorithm, NFT) else sampling.sde,
            noise_level=sampling.noise_level,
            kl_scale=config.algorithm.kl_scale,
            window=sde_window(sampling, config.seed, epoch),
            solver=sampling.solver,
        )
        rollout, filled = self.sampler.rollout(
            plan, [p.text for p in prompts], table, config.seed, epoch, sampling.same_latent
        )
        index, names = plan.prompt_index.tolist(), self.rewards.training_names
        with (
            self.adapters.use(self.algorithm.sampled_by),
            ScoringWorker(self.rewards, names, self.runtime.device) as worker,
        ):
            for rows in filled:
                images = self.model.decode(rollout.latents_at(-1, rows))
                self.runtime.stop_point()
                # only the waiting: scoring overlaps sampling
                with self.progress.stage("score"), self.runtime.waiting():
                    worker.submit(images, [prompts[i] for i in index[rows]])
                self.progress.within_stage(rows.stop, len(rollout))
            with self.progress.stage("score"), self.runtime.waiting():
                return rollout, worker.collect()

    def check_parity(self, rollout: Rollout, steps: Sequence[int]) -> None:
        """Once per run: do sampling and training agree on the log-probs? UserError if not."""
        if self.parity_checked:
            return
        batch_size, bound = self.config.train.batch_size, self.config.sampling.max_ratio_deviation
        deviation = ratio_deviation(self.sampler, rollout, steps, batch_size)
        worst = check_parity(deviation, bound, self.runtime)
        self.progress.write(f"before the first update: max |ratio - 1| = {worst:.1e}")
        self.parity_checked = True

    def resume(self, point: ResumePoint) -> RunFolder:
        """Take over the state of a checkpoint and cut its run's files back to it.

        Raises:
            UserError: the checkpoint does not fit the model or the recipe; nothing was changed.
        """
        state = point.checkpoint.load()
        due = evaluation_due(self.config, state.epoch)
        try:
            self.load_state(state)
            self.evaluated = state.value("evaluated") == due
            clock = state.value("clock")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"checkpoint '{point.checkpoint.path}': {error}") from error
        self.runtime.wait()  # until all processes have read what one of them may now cut back
        folder = reopen(self.config, state.epoch, self.evaluated, self.runtime.is_main)
        folder.set_clock(clock, state.epoch)
        self.runtime.wait()
        return folder

    def state_values(self) -> dict[str, Any]:
        """The part of the state that is no tensor, as JSON values."""
        scaler = self.runtime.accelerator.scaler
        return {
            "health": self.health.state_dict(),
            "shaper": self.shaper.state_dict(),
            "adaptive_reference": self.adaptive_reference.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "model_rows": self.model.rows,
        }

    def state_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of the state, copied to the main process's host; all processes call this."""
        groups: dict[str, Mapping[str, torch.Tensor]] = {
            name: self.adapters.parameters(name) for name in self.adapters.names
        }
        if self.ema is not None:
            groups["ema"] = self.ema.state_dict()
        keep, names = self.runtime.is_main, list(self.adapters.parameters())
        return {
            **{name: to_host(tensors, keep) for name, tensors in groups.items()},
            "optimizer": pack_optimizer(self.optimizer, names, keep),
        }

    def load_state(self, state: TrainingState) -> None:
        """Load what `state_values` and `state_tensors` returned; ValueError if it does not fit."""
        average = [] if self.ema is None else ["ema"]
        state.check_groups([*self.adapters.names, *average, "optimizer"])
        for name in self.adapters.names:
            self.adapters.load_state_dict(name, state.tensors[name])
        if self.ema is not None:
            self.ema.load_state_dict(state.tensors["ema"])
        names = list(self.adapters.parameters())
        unpack_optimizer(self.optimizer, names, state.tensors["optimizer"])
        self.health.load_state_dict(state.value("health"))
        self.shaper.load_state_dict(state.value("shaper"))
        self.adaptive_reference.load_state_dict(state.value("adaptive_reference"))
        if self.runtime.accelerator.scaler is not None and state.value("scaler") is not None:
            self.runtime.accelerator.scaler.load_state_dict(state.value("scaler"))
        self.model.rows = int(state.value("model_rows"))
        self.start_epoch, self.resumed = state.epoch, True

    def evaluate(self, folder: RunFolder, epoch: int, name: str) -> None:
        """Held-out evaluation after ``epoch`` epochs, with a grid of the same seeds."""
        started = time.perf_counter()
        seed_everything(self.config.seed, "evaluation", epoch, self.runtime.rank)
        with self.progress.stage("evaluate"):
            result = self.evaluator()
            row = {"epoch": epoch, "name": name, "weights": "live", **result.metrics}
            self.evaluations.write({**row, "time/evaluate": time.perf_counter() - started})
            self.trackers.log(row, EVALUATION)
            if len(result.images) and folder.is_main:
                columns = max(1, round(len(result.images) ** 0.5 * 1.3))
                grid = image_grid(result.images, result.captions, columns)
                save_grid(folder.images, grid, epoch, f"{name}, after {epoch} epochs")
        self.checkpoints.evaluated(name, row)
        self.progress.timer.reset()

    def export(self, folder: RunFolder) -> None:
        """Write the policy (its average, if there is one) for plain diffusers, and the summary."""
        averaged = nullcontext() if self.ema is None else self.ema.swapped_in()
        with averaged:
            self.adapters.export(self.model, str(folder.export), folder.is_main)
        if not folder.is_main:
            return
        rows = read_metrics(folder.path / "evaluation.jsonl", ignore_unfinished=True)
        write_model_card(folder.export, self.config, self.model.family, rows)
        trainable = sum(p.numel() for p in self.adapters.parameters().values())
        folder.write_summary(
            recipe=self.config.recipe,
            hardware=self.runtime.hardware(),
            world_size=self.runtime.world_size,
            sharded=self.runtime.sharded,
            trainable_parameters=trainable,
            peak_memory_bytes=peak_memory_bytes(),
        )


def evaluation_due(config: Config, done: int) -> str | None:
    """Name of the evaluation that follows ``done`` epochs; None if there is none."""
    if done == 0:
        return "start" if config.evaluation.at_start else None
    if done == config.epochs:
        return "end"
    every = config.evaluation.every
    return "during" if every and done % every == 0 else None
