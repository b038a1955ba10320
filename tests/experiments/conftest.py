"""Runs that the experiments start."""

from __future__ import annotations

import sys

import pytest

from experiments.training_runs import TrainingRun
from tests.support import warm


@pytest.fixture
def warm_runs(monkeypatch):
    """Runs start with the Python that has imported everything."""
    command = TrainingRun.command.fget
    replace = {sys.executable: warm.python()}
    monkeypatch.setattr(
        TrainingRun, "command", property(lambda run: [replace.get(a, a) for a in command(run)])
    )
