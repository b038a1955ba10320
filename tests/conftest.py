"""Settings for all tests."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.support.tiny import PROMPTS

# workers of pytest-xdist share the cores; set before torch is imported, and seen by subprocesses
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# Long files whose tests share little: each test goes to the worker that is free.
INDEPENDENT = {"tests/gardo/test_recipe_paths.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file on one worker, which makes what they share once.

    Other modes of distribution can still be asked for with ``--dist``.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return nodeid if path in INDEPENDENT else path

    # In the order of the collection: the long files do not come last there.
    config.option.loadscopereorder = False
    return Scheduling(config, log)


# A tiny real pipeline with random weights, and a sampler on it. The imports take seconds, which the
# tests of the kernels need not wait for.


@pytest.fixture
def config():
    from gardo.config import load_config

    return load_config("tiny")


@pytest.fixture
def model(config):
    import torch

    from gardo.models.loading import load_model

    return load_model(config.model, torch.device("cpu"), "fp32")


@pytest.fixture
def embeddings(model):
    from gardo.models.embeddings import EmbeddingTable

    return EmbeddingTable(model, PROMPTS)


@pytest.fixture
def adapters(model, config):
    from gardo.models.adapters import build_adapters

    return build_adapters(model, config.model, seed=0)


@pytest.fixture
def make_sampler(model, embeddings):
    from gardo.sampling.rollout import Sampler

    def make(guidance_scale: float = 1.0, batch_size: int = 4) -> Sampler:
        return Sampler(model, embeddings, model.default_resolution, guidance_scale, batch_size)

    return make
