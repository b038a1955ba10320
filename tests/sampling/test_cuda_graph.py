"""Trajectories as CUDA graphs: what a capture needs, and how graphs are kept and fed.

A graph that runs its function again at every replay stands in for CUDA's; tests marked gpu use the
real one.
"""

from __future__ import annotations

import random

import pytest
import torch

from gardo.config import load_config
from gardo.families import FAMILIES
from gardo.models.adapters import POLICY, REFERENCE
from gardo.models.embeddings import EmbeddingTable
from gardo.models.loading import load_model
from gardo.models.sd3 import SD3Model
from gardo.rng import generator
from gardo.sampling.graph import GraphedTrajectories, copy_inputs, use_graphs
from gardo.sampling.rollout import Sampler
from gardo.sampling.steps import step_table
from gardo.sampling.trajectory import Trajectory, like, sample_trajectory
from gardo.types import UserError
from tests.models.test_models import perturb
from tests.support.capture_recorder import CaptureRecorder, NotCapturable
from tests.support.tiny import PROMPTS, save_pipeline

CPU = torch.device("cpu")


class ReplayedFunctions(GraphedTrajectories):
    runs_to_record = 1

    def _record(self, function, device):
        class Graph:
            def replay(self):
                self.before = getattr(self, "before", 0) + 1
                rows = model.rows
                function()
                model.rows = rows  # a real replay runs no Python

        function()
        model = self.model
        return Graph()

    def run(self, model, *args):
        self.model = model
        super().run(model, *args)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.randn(2),
        lambda x: x.normal_(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x * random.random(),
    ],
)
def test_the_recorder_catches_what_a_capture_refuses(function):
    x = torch.ones(3)
    with pytest.raises(NotCapturable), CaptureRecorder():
        function(x)
    with CaptureRecorder():
        x.mul_(2).sum()


def trajectory_of(sampler, table, seed=0):
    batch = len(PROMPTS)
    latents = torch.empty(table.num_steps + 1, batch, *sampler.latent_shape)
    sources = [generator(seed, "noise", i) for i in range(batch)]
    latents[0] = sampler.initial_latents([("x", i) for i in range(batch)], seed)
    noise = sampler._noise(table, latents, sources)
    log_prob = torch.zeros(table.num_steps, batch)
    return Trajectory(latents, log_prob, noise, sampler.condition(PROMPTS), table)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", [None, "sdpa"])
def test_the_captured_region_needs_no_host(family, backend, tmp_path):
    save_pipeline(family, tmp_path)
    overrides = [("model.path", str(tmp_path))]
    overrides += [("model.attention_backend", backend)] if backend else []
    model = load_model(load_config("tiny", overrides=overrides).model, CPU, "fp32")
    sampler = Sampler(model, EmbeddingTable(model, PROMPTS), 24, 2.5, batch_size=2)
    schedule = model.schedule(3, 24)
    for window in (None, range(1, 2)):
        table = step_table(schedule, CPU, kind="flow", noise_level=0.7, window=window)
        trajectory = trajectory_of(sampler, table)
        with torch.no_grad(), CaptureRecorder():
            sample_trajectory(model, trajectory, 2.5)
        assert trajectory.latents.isfinite().all()
        assert trajectory.log_prob[list(table.stochastic)].isfinite().all()


@pytest.fixture
def sampled(make_sampler, model, adapters):
    """Draw a batch with new noise by a sampler; a table and prompts may be given."""
    perturb(adapters.parameters(POLICY))
    schedule = model.schedule(4, 24)
    default = step_table(schedule, CPU, kind="flow", noise_level=0.7)

    def draw(sampler, seed, table=default, prompts=PROMPTS):
        sources = [generator(seed, "noise", i) for i in range(len(prompts))]
        latents = torch.empty(table.num_steps + 1, len(prompts), *sampler.latent_shape)
        latents[0] = sampler.initial_latents([("x", i) for i in range(len(prompts))], seed)
        log_prob = torch.zeros(table.num_steps, len(prompts))
        sampler.run(table, prompts, latents, log_prob, sources)
        return latents, log_prob

    draw.table = lambda **options: step_table(schedule, CPU, **options)
    return draw


def test_replays_equal_eager_sampling_without_another_capture(make_sampler, sampled, adapters):
    eager, graphed = make_sampler(2.5), make_sampler(2.5)
    graphed.graphs = graphs = ReplayedFunctions(adapters)

    def compare(seed, **options):
        expected = sampled(eager, seed, **options)
        rows = graphed.model.rows
        actual = sampled(graphed, seed, **options)
        assert graphed.model.rows - rows == 4 * 2 * len(options.get("prompts", PROMPTS))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        return actual[0]

    first, second = compare(1), compare(2)
    assert not torch.equal(first, second)  # fresh noise
    compare(3, prompts=PROMPTS[::-1])
    perturb(adapters.parameters(POLICY))  # as an optimizer does: in place
    assert not torch.equal(compare(1), first)
    compare(4, table=sampled.table(kind="flow", noise_level=0.9, window=range(1, 3)))
    with torch.inference_mode():
        compare(5)
    compare(6)
    assert graphs.captures == 1
    compare(1, prompts=PROMPTS * 2)  # another shape
    assert graphs.captures == 2
    with adapters.use(REFERENCE):
        assert not torch.equal(compare(2), second)
    assert graphs.captures == 3


def test_an_ode_has_a_graph_of_its_own(make_sampler, sampled):
    sampler = make_sampler()
    sampler.graphs = ReplayedFunctions()
    ode = sampled.table(kind="ode", noise_level=0.0)
    latents, log_prob = sampled(sampler, 1, table=ode)
    expected, _ = sampled(make_sampler(), 1, table=ode)
    assert torch.equal(latents, expected)
    assert (log_prob == 0).all()
    sampled(sampler, 1)
    assert sampler.graphs.captures == 2


def test_static_inputs_are_validated(make_sampler, model):
    sampler = make_sampler()
    table = step_table(model.schedule(3, 24), CPU, kind="flow", noise_level=0.7)
    target = like(trajectory_of(sampler, table))
    source = trajectory_of(sampler, table, seed=1)
    before = target.latents[0].clone()
    short = Trajectory(
        source.latents[:, :1], source.log_prob, source.noise, source.conditioning, table
    )
    with pytest.raises(ValueError, match=r"latents: expected \[2, .* got \[1, "):
        copy_inputs(short, target)
    without = Trajectory(source.latents, source.log_prob, None, source.conditioning, table)
    with pytest.raises(ValueError, match="expected inputs .*noise"):
        copy_inputs(without, target)
    assert torch.equal(target.latents[0], before)
    copy_inputs(source, target)
    assert torch.equal(target.latents[0], source.latents[0])
    assert torch.equal(target.noise, source.noise)


def test_where_graphs_are_used():
    assert not use_graphs("auto", CPU)
    assert not use_graphs("off", torch.device("cuda"))
    assert use_graphs("auto", torch.device("cuda"))
    with pytest.raises(UserError, match="'on' needs a CUDA device, and this run is on cpu"):
        use_graphs("on", CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_graph_equals_eager_sampling_to_the_bit(guidance_scale, precision):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    model = load_model(load_config("tiny").model, device, precision)
    assert isinstance(model, SD3Model)
    embeddings = EmbeddingTable(model, PROMPTS)
    model.release_text_encoders()
    graphs = GraphedTrajectories()
    table = step_table(model.schedule(6, 24), device, kind="flow", noise_level=0.7)

    def draw(seed, graphs):
        sampler = Sampler(model, embeddings, 24, guidance_scale, 2, graphs)
        latents = torch.empty(7, 2, *sampler.latent_shape, device=device)
        latents[0] = sampler.initial_latents([("x", 0), ("x", 1)], seed)
        log_prob = torch.zeros(6, 2, device=device)
        sources = [generator(seed, "noise", i, device=device) for i in range(2)]
        sampler.run(table, PROMPTS, latents, log_prob, sources)
        return latents, log_prob

    for seed in (1, 2, 3):
        for actual, expected in zip(draw(seed, graphs), draw(seed, None), strict=True):
            assert torch.equal(actual, expected)
    assert graphs.captures == 1
