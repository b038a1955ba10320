"""What is printed while an evaluation goes, on a terminal and in a log."""

from __future__ import annotations

import io

from gardo.evaluation.progress import SILENCE, StageProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_rates_and_the_time_left():
    now = [0.0]
    log = io.StringIO()
    progress = StageProgress(log, clock=lambda: now[0])
    with progress.stage("base: images", 40, cached=8) as advance:
        now[0] = 5.0
        advance(10)  # too soon for a line
        now[0] = SILENCE
        advance(10)
        now[0] = 50.0
        advance(20)
    assert log.getvalue().splitlines() == [
        "base: images: 20/40 (8 are there), 0.7 img/s, ETA 0:30",
        "base: images: 40 images (8 are there) in 0:50, 0.8 img/s",
    ]


def test_nothing_to_do():
    log = io.StringIO()
    with StageProgress(log).stage("base: images", 0, cached=3) as advance:
        advance(0)
    assert log.getvalue() == "base: images: nothing to do (3 are there)\n"


def test_a_terminal_gets_a_bar():
    terminal = Terminal()
    progress = StageProgress(terminal)
    with progress.stage("base: images", 4) as advance:
        advance(4)
        progress.write("a note")
    shown = terminal.getvalue()
    assert "base: images: 100%" in shown
    assert "4/4" in shown
    assert "img/s" in shown
    assert "a note\n" in shown
