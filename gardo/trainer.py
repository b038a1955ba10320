"""The training loop: prompts, rollout, score, shape, reference pass, update, refresh, track."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from gardo.algorithms.adaptive_reference import AdaptiveReference
from gardo.algorithms.ema import EMA
from gardo.algorithms.gradient_share import measure_strength
from gardo.algorithms.nonfinite import update_if_finite
from gardo.algorithms.parity import ParityCheck
from gardo.algorithms.registry import ALGORITHMS
from gardo.algorithms.shaping import Shaper
from gardo.algorithms.stats import UpdateStats
from gardo.checkpointing.parts import Counter, NamedOptimizer, Part, Stateful
from gardo.checkpointing.policy import CheckpointPolicy
from gardo.checkpointing.resume import ResumePoint, take_over
from gardo.config import Config
from gardo.data.prompts import PromptSampler, load_prompts
from gardo.distributed.process import Runtime
from gardo.distributed.sharding import refuse_with_sharding
from gardo.evaluation.heldout import HeldOutEvaluator
from gardo.models.adapters import POLICY, REFERENCE, build_adapters
from gardo.models.embeddings import EmbeddingTable, embedding_cache
from gardo.models.loading import load_model
from gardo.rewards.overlap import ScoringWorker
from gardo.rewards.scoring import RewardSet, ScoreBook
from gardo.rng import derive_seed, seed_everything
from gardo.run.folder import RunFolder
from gardo.run.health import Health
from gardo.run.metrics import EVALUATION
from gardo.run.progress import EpochProgress
from gardo.run.trackers import Trackers
from gardo.sampling.graph import GraphedTrajectories, use_graphs
from gardo.sampling.plan import plan_epoch
from gardo.sampling.rollout import Rollout, Sampler
from gardo.types import Prompt


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

        algorithm = ALGORITHMS[config.algorithm.name]
        self.adapters = build_adapters(
            self.model, config.model, derive_seed(config.seed, "lora"), algorithm.adapter_names
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
        self.parity = ParityCheck(config, self.sampler, runtime)
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
        self.state = self._state()

    def _state(self) -> dict[str, Stateful]:
        """Everything that the epochs to come depend on, by its name in a checkpoint."""
        adapters = self.adapters
        state: dict[str, Stateful] = {}
        for name in adapters.names:
            load = partial(adapters.load_state_dict, name)
            state[name] = Part(partial(adapters.parameters, name), load)
        if self.ema is not None:
            state["ema"] = self.ema
        if self.config.algorithm.needs_anchor:
            load = partial(self.shaper.load_anchor, device=self.runtime.device)
            state["anchor"] = Part(self.shaper.anchor_state, load)
        if self.config.algorithm.kl_target is not None:
            state["kl_strength"] = self.algorithm.strength
        return state | {
            "optimizer": NamedOptimizer(self.optimizer, list(adapters.parameters())),
            "health": self.health,
            "shaper": self.shaper,
            "adaptive_reference": self.adaptive_reference,
            "scaler": self.runtime,
            "model_rows": Counter(self.model, "rows"),
        }

    def train(self, folder: RunFolder) -> None:
        """Run all epochs; metrics, pictures and the export go to the run folder as they come.

        Raises:
            Stopped: a signal came; the last complete epoch is saved.
        """
        config, start = self.config, folder.done
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
                self.state,
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
        self.checkpoints.mark(done, row)
        self.runtime.stop_together()
        self.health.stop_if_alarmed()
        due = self.evaluator.due(done)
        if due is not None and not (done == folder.done and folder.evaluated):
            self.evaluate(folder, done, due)
        if done > folder.done:
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
            if self.algorithm.traits.ratios:
                self.parity(rollout, data.steps, self.progress.write)
            moved = self.adaptive_reference.steps_since_reset > 0
            strength = measure_strength(self.algorithm, data, epoch, moved)
            stats = UpdateStats(config.algorithm.reset_judged_by)
            updates = config.train.updates_per_epoch
            for index in range(updates):
                self.runtime.stop_together()
                made = update_if_finite(self.algorithm, self.health, epoch, data, index, stats)
                if made and self.ema is not None:
                    self.ema.step()
            update_metrics, kl = stats.metrics(self.runtime)
            update_metrics |= self.algorithm.finish_epoch((epoch + 1) * updates)
            # without a KL term nothing looks at the reference
            reset = config.algorithm.has_kl and self.adaptive_reference.update(
                kl, shaped.scores, shaped.uncertainty, steps=len(stats.grad_norm)
            )
            if reset:
                self.adapters.copy(POLICY, REFERENCE)
        rows_per_sample = 2 if self.sampler.guided else 1
        samples = config.prompts.per_epoch * config.prompts.group_size
        metrics = shaped.metrics | strength | update_metrics
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
        config = self.config
        plan = plan_epoch(
            config.prompts.per_epoch,
            config.prompts.group_size,
            config.train.updates_per_epoch,
            self.runtime.rank,
            self.runtime.world_size,
        )
        texts, same_latent = [p.text for p in prompts], config.sampling.same_latent
        steps = self.algorithm.rollout_steps(config, self.schedule, self.runtime.device, epoch)
        rollout, filled = self.sampler.rollout(plan, texts, steps, config.seed, epoch, same_latent)
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

    def resume(self, point: ResumePoint) -> RunFolder:
        """Take over the state of a checkpoint and cut its run's files back to it.

        Raises:
            UserError: the checkpoint does not fit the model or the recipe; no file was changed.
        """
        return take_over(point, self.config, self.state, self.evaluator.due, self.runtime)

    def evaluate(self, folder: RunFolder, epoch: int, name: str) -> None:
        """Held-out evaluation after ``epoch`` epochs, with a grid of the same seeds."""
        seed_everything(self.config.seed, "evaluation", epoch, self.runtime.rank)
        with self.progress.stage("evaluate"):
            result = self.evaluator()
            row = {"epoch": epoch, "name": name, "weights": "live", **result.metrics}
            seconds = self.progress.timer.metrics()["time/evaluate"]
            self.evaluations.write({**row, "time/evaluate": seconds})
            self.trackers.log(row, EVALUATION)
            if folder.is_main:
                result.save_grid(folder.images, epoch, f"{name}, after {epoch} epochs")
        self.checkpoints.evaluated(name, row)
        self.progress.timer.reset()

    def export(self, folder: RunFolder) -> None:
        """Write the policy (its average, if there is one) for plain diffusers, and the summary."""
        with nullcontext() if self.ema is None else self.ema.swapped_in():
            self.adapters.export(self.model, str(folder.export), folder.is_main)
        folder.finish(
            self.config,
            self.model.family,
            hardware=self.runtime.hardware(),
            world_size=self.runtime.world_size,
            sharded=self.runtime.sharded,
            trainable_parameters=sum(p.numel() for p in self.adapters.parameters().values()),
        )
