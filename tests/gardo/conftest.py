"""A tiny real pipeline with random weights, and a sampler on it."""

from __future__ import annotations

import pytest
import torch

from gardo.config import load_config
from gardo.models.adapters import build_adapters
from gardo.models.embeddings import EmbeddingTable
from gardo.models.loading import load_model
from gardo.sampling.rollout import Sampler

PROMPTS = ("three red circles", "two blue squares")


@pytest.fixture
def config():
    return load_config("tiny")


@pytest.fixture
def model(config):
    return load_model(config.model, torch.device("cpu"), "fp32")


@pytest.fixture
def embeddings(model):
    return EmbeddingTable(model, PROMPTS)


@pytest.fixture
def adapters(model, config):
    return build_adapters(model, config.model, seed=0)


@pytest.fixture
def make_sampler(model, embeddings):
    def make(guidance_scale: float = 1.0, batch_size: int = 4) -> Sampler:
        return Sampler(model, embeddings, model.default_resolution, guidance_scale, batch_size)

    return make
