import io

import pytest

from gardo.run.progress import (
    STAGES,
    EpochProgress,
    StageTimer,
    format_seconds,
    format_summary,
    format_times,
)


class Clock:
    """A clock that only moves when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


METRICS = {
    "reward/count/mean": 0.6125,
    "reward/shape/mean": 9.0,
    "gate/share": 0.078125,
    "kl": 1.3e-4,
    "images_per_second": 41.26,
}


def test_stages_add_up_and_a_repeated_one_is_summed():
    clock = Clock()
    timer = StageTimer(clock)
    for seconds in (1.0, 2.5):
        with timer.stage("rollout"):
            clock.now += seconds
    clock.now += 0.25  # between stages
    with timer.stage("update"):
        clock.now += 4.0
    assert timer.metrics() == {"time/rollout": 3.5, "time/update": 4.0, "time/epoch": 7.75}


def test_the_outer_stage_stands_still_while_an_inner_one_runs():
    clock = Clock()
    timer = StageTimer(clock)
    with timer.stage("evaluate"):
        clock.now += 1.0
        with timer.stage("rollout"):
            assert timer.current == "rollout"
            clock.now += 10.0
        assert timer.current == "evaluate"
        clock.now += 2.0
    assert timer.current is None
    assert timer.metrics() == {"time/rollout": 10.0, "time/evaluate": 3.0, "time/epoch": 13.0}


def test_a_stage_that_raises_is_closed():
    clock = Clock()
    timer = StageTimer(clock)

    def fail():
        with timer.stage("score"):
            clock.now += 2.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 5.0
    assert timer.current is None
    assert timer.metrics() == {"time/score": 2.0, "time/epoch": 7.0}


def test_reset_starts_from_zero_inside_a_stage_too():
    clock = Clock()
    timer = StageTimer(clock)
    with timer.stage("save"):
        clock.now += 2.0
        timer.reset()
        clock.now += 3.0
    assert timer.metrics() == {"time/save": 3.0, "time/epoch": 3.0}


def test_unknown_stages_are_refused():
    stage = StageTimer().stage("sampling")
    with pytest.raises(ValueError, match=r"rollout.*got 'sampling'"), stage:
        pass
    assert STAGES == (
        "prompts",
        "rollout",
        "score",
        "shape",
        "reference",
        "update",
        "evaluate",
        "save",
    )


def run(stream, clock, **options):
    returned = []
    with EpochProgress(3, "count", stream=stream, clock=clock, **options) as progress:
        for epoch in range(3):
            with progress.stage("rollout"):
                clock.now += 60.0
                progress.within_stage(1, 2)
            with progress.stage("update"):
                clock.now += 10.0
            returned.append(progress.finish_epoch(epoch, {"epoch": epoch, **METRICS}))
    return returned


def test_without_a_terminal_each_epoch_is_one_line():
    stream = io.StringIO()
    run(stream, Clock())
    main = "reward 0.613  gate 7.8%  kl 1.3e-04  41.3 img/s  70.0 s (rollout 60.0, update 10.0)"
    assert stream.getvalue().splitlines() == [
        f"epoch 1/3  {main}  ETA 2:20",
        f"epoch 2/3  {main}  ETA 1:10",
        f"epoch 3/3  {main}  ETA 0:00",
    ]


def test_figures_that_a_run_may_have_are_on_the_line():
    row = {**METRICS, "kl/gradient_share": 0.2961, "cap/share": 0.1406}
    assert format_summary(row, "count") == (
        "reward 0.613  gate 7.8%  kl 1.3e-04  grad share 0.30  cap 14%  41.3 img/s"
    )
    for unknown in (None, float("nan")):
        row |= {"kl/gradient_share": unknown, "cap/share": 0.0}
        assert format_summary(row, "count").endswith("kl 1.3e-04  cap 0%  41.3 img/s")


def test_metrics_come_back_with_times_of_their_own_epoch():
    for epoch, metrics in enumerate(run(io.StringIO(), Clock())):
        assert metrics == {
            "epoch": epoch,
            **METRICS,
            "time/rollout": 60.0,
            "time/update": 10.0,
            "time/epoch": 70.0,
        }


def test_only_stages_that_matter_are_printed():
    times = {"time/prompts": 0.1, "time/rollout": 6.0, "time/update": 0.5, "time/epoch": 10.0}
    assert format_times(times) == "10.0 s (rollout 6.0, update 0.5)"
    assert format_times({"time/shape": 0.0, "time/epoch": 0.0}) == "0.0 s"


def test_missing_and_null_metrics_are_left_out():
    stream, clock = io.StringIO(), Clock()
    progress = EpochProgress(1, "count", stream=stream, clock=clock)
    clock.now += 1.0
    progress.finish_epoch(0, {"epoch": 0, "kl": None})
    assert stream.getvalue() == "epoch 1/1  1.0 s  ETA 0:00\n"


def test_other_ranks_print_nothing_but_time_their_stages():
    for stream in (io.StringIO(), Terminal()):
        returned = run(stream, Clock(), enabled=False)
        assert stream.getvalue() == ""
        assert returned[0]["time/rollout"] == 60.0


def test_on_a_terminal_the_bar_shows_metrics_and_the_stage_at_work():
    stream, clock = Terminal(), Clock()
    with EpochProgress(4, "count", start_epoch=1, stream=stream, clock=clock) as progress:
        with progress.stage("rollout"):
            progress.within_stage(3, 8)
        progress.finish_epoch(1, METRICS)
        with progress.stage("reference"):
            pass
        progress.write("a message")
    shown = stream.getvalue()
    assert "rollout 3/8" in shown
    assert "reward 0.613  gate 7.8%" in shown
    assert "reference" in shown
    assert "a message\n" in shown
    assert "2/4" in shown  # one was done before, one now


def test_a_resumed_run_counts_on():
    stream = io.StringIO()
    progress = EpochProgress(5, "count", start_epoch=3, stream=stream, clock=Clock())
    progress.finish_epoch(3, {})
    assert stream.getvalue().startswith("epoch 4/5  ")
    with pytest.raises(ValueError, match="start_epoch"):
        EpochProgress(5, "count", start_epoch=6)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (3599.9, "1:00:00"), (3661, "1:01:01"), (360000, "100:00:00")],
)
def test_seconds_as_text(seconds, text):
    assert format_seconds(seconds) == text
