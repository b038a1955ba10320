"""Processes that hear of each other's failure, here as threads around one store."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from gardo.distributed.failure_notice import FailureNotice
from gardo.distributed.signals import Stopped, StopRequest


@pytest.fixture
def store(monkeypatch):
    server = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=20))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


class Others:
    """The peers of a process that waits, and what it hears."""

    def __init__(self, rank, answers=True):
        self.heard, self.event = [], threading.Event()
        self.answers = answers
        self.stop, self.signals = StopRequest(), []
        self.peers = FailureNotice(rank, 2, self.stop, self._failed, lambda: self.signals.append(1))

    def _failed(self, text):
        if self.answers:
            time.sleep(0.3)  # it saves
            self.peers.answer()
        self.heard.append(text)
        self.event.set()


def fail(rank, error, stop=None, world_size=2):
    """Seconds that a process with an exception took to leave."""
    peers = FailureNotice(rank, world_size, stop or StopRequest(), pytest.fail, list)
    peers.__enter__()
    started = time.monotonic()
    peers.__exit__(type(error), error, None)
    return time.monotonic() - started


def test_who_fails_waits_until_the_main_process_has_saved(store):
    main = Others(0)
    with main.peers:
        assert 0.3 <= fail(1, ValueError("no such thing")) < 20
        assert main.event.wait(20)
    assert main.heard == ["process 1 failed: ValueError: no such thing"]


def test_the_main_process_waits_for_nobody(store):
    other = Others(1, answers=False)
    with other.peers:
        fail(0, RuntimeError("gone"))
        assert other.event.wait(20)
        other.peers.await_answer()
    assert other.heard == ["process 0 failed: RuntimeError: gone"]


def test_a_signal_ends_the_wait(store):
    stop = StopRequest()
    stop.signal = "SIGTERM"
    assert fail(1, RuntimeError("gone"), stop) < 20  # nobody answers


def test_a_signal_is_seen_to_once_while_the_process_goes_on(store):
    main = Others(0)
    with main.peers:
        main.stop.signal = "SIGUSR1"
        time.sleep(1)
    assert main.signals == [1]


def test_what_is_no_failure_is_not_told(store, monkeypatch):
    monkeypatch.setattr(
        "gardo.distributed.failure_notice._STOPPING_PATIENCE", 0.5
    )  # nobody answers
    main = Others(0)
    with main.peers:
        with FailureNotice(1, 2, StopRequest(), pytest.fail, pytest.fail):
            pass
        fail(1, Stopped("by a signal"))
        assert not main.event.wait(1)
    assert main.heard == []


def test_who_has_left_hears_nothing(store):
    main = Others(0)
    with main.peers:
        pass
    fail(0, RuntimeError("later"))
    assert not main.event.wait(0.6)


def test_one_process_needs_no_store(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert fail(0, ValueError("x"), world_size=1) < 1


def test_who_stops_on_a_signal_waits_until_the_main_process_leaves(store):
    stop = StopRequest()
    stop.signal = "SIGTERM"
    left = []
    waiting = threading.Thread(target=lambda: left.append(fail(1, Stopped("saved"), stop)))
    waiting.start()
    waiting.join(0.6)
    assert not left  # the main process may still be in a collective
    fail(0, Stopped("saved"))
    waiting.join(5)
    assert len(left) == 1
