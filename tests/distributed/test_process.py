"""Where several processes decide together whether to stop."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from gardo.distributed.process import Runtime
from gardo.distributed.signals import StopRequested


@pytest.fixture
def runtime(monkeypatch):
    """One of two processes, whose collectives the tests make up."""
    monkeypatch.setattr(Runtime, "world_size", 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    return Runtime("cpu")


def test_a_signal_during_the_decision_waits_for_the_next_one(runtime, monkeypatch):
    # The other process has been told that none came, and goes on to its next collective.
    def came_meanwhile(value):
        os.kill(os.getpid(), signal.SIGTERM)
        return value

    with runtime.stop.listening():
        monkeypatch.setattr(runtime, "max", came_meanwhile)
        runtime.stop_together()
        assert runtime.stop.signal == "SIGTERM"
        monkeypatch.setattr(runtime, "max", lambda value: value)
        with pytest.raises(StopRequested, match="SIGTERM"):
            runtime.stop_together()


def test_a_signal_to_another_process_stops_this_one_and_may_still_come(runtime, monkeypatch):
    monkeypatch.setattr(
        runtime, "max", lambda value: torch.maximum(value, torch.tensor(int(signal.SIGUSR1)))
    )
    with runtime.stop.listening():
        with pytest.raises(StopRequested, match="SIGUSR1"):
            runtime.stop_together()
        os.kill(os.getpid(), signal.SIGUSR1)  # by the launcher: not a second one, which would kill


def test_nothing_came(runtime, monkeypatch):
    monkeypatch.setattr(runtime, "max", lambda value: value)
    runtime.stop_together()
    assert runtime.stop.signal is None
