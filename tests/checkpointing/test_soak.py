"""A long run of the smallest configuration keeps its memory, threads and files.

``GARDO_SOAK_EPOCHS=300`` runs the full form, in about two minutes.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from pathlib import Path

import pytest

from gardo.run.metrics import read_metrics
from tests.support.forked import Runner, arguments

EPOCHS = int(os.environ.get("GARDO_SOAK_EPOCHS", "45"))
FULL = EPOCHS >= 300
WARM_UP = EPOCHS // 3
LIMIT = 1.0 if FULL else 10.0
"""MB per 100 epochs; over few epochs a single page of the allocator weighs more."""


class Watch(threading.Thread):
    """Reads the metrics and the process's figures all the time, as a user's tools would."""

    def __init__(self, pid: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.folder = Path(f"/proc/{pid}"), folder
        self.problems: list[str] = []
        self.reads = 0
        # per number of epochs done: resident MB, threads, open files
        self.figures: dict[int, list[tuple[float, int, int]]] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        path, seen = self.folder / "metrics.jsonl", []
        while not self.ended.wait(0.005):
            if not path.exists():
                continue
            try:
                rows = read_metrics(path, ignore_unfinished=True)
                figures = self._measure()
            except ValueError as error:
                self.problems.append(str(error))
                continue
            except OSError:  # the process has just ended
                continue
            self.reads += 1
            if rows[: len(seen)] != seen:
                self.problems.append("rows that had been written changed")
            seen = rows
            self.figures.setdefault(len(rows), []).append(figures)

    def _measure(self) -> tuple[float, int, int]:
        # the second number is the resident set, in pages
        pages = int((self.process / "statm").read_text().split()[1])
        threads = len(list((self.process / "task").iterdir()))
        files = len(list((self.process / "fd").iterdir()))
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, threads, files


def slope(points: list[tuple[int, float]]) -> float:
    """Of the least-squares line."""
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.timeout(1500)
def test_memory_threads_and_files_stay_flat(tmp_path):
    runner = Runner(tmp_path / "stderr.txt")
    folder = tmp_path / "run"
    started = time.perf_counter()
    command = arguments(
        folder, epochs=EPOCHS, checkpoint__every=5, evaluation__every=10, train__ema="true"
    )
    watch = Watch(runner.start(command), folder)
    watch.start()
    code = runner.wait()
    watch.ended.set()
    watch.join()
    assert code == 0, runner.said

    assert watch.problems == []
    assert [row["epoch"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(EPOCHS))
    # the least of an epoch: what is freed within it is no growth
    least = {
        epoch: [min(values) for values in zip(*figures, strict=True)]
        for epoch, figures in watch.figures.items()
        if WARM_UP <= epoch < EPOCHS
    }
    assert len(least) > (EPOCHS - WARM_UP) / 2  # the reader kept up
    memory = [(epoch, megabytes) for epoch, (megabytes, _, _) in sorted(least.items())]
    threads = [values[1] for _, values in sorted(least.items())]
    files = [values[2] for _, values in sorted(least.items())]
    growth = 100 * slope(memory)
    print(
        f"{EPOCHS} epochs in {time.perf_counter() - started:.0f} s, {watch.reads} reads: resident "
        f"{memory[0][1]:.1f} -> {memory[-1][1]:.1f} MB, slope {growth:+.3f} MB per 100 epochs; "
        f"threads {threads[0]} -> {threads[-1]}, files {files[0]} -> {files[-1]}"
    )
    assert growth < LIMIT
    assert threads[-1] <= threads[0]
    assert files[-1] <= files[0]
