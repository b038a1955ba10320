"""Scoring in the background: order, errors by name, no thread left, and the time it saves."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest
import torch

from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.rewards.base import Reward, RewardSpec, RewardUnavailable
from gardo.rewards.overlap import RewardFailed, ScoringWorker
from gardo.rewards.scoring import RewardSet
from gardo.run.progress import EpochProgress
from gardo.train import train
from gardo.trainer import Trainer
from gardo.types import Prompt, RewardOutput, UserError
from tests.rewards.toys import toy

CPU = torch.device("cpu")


class Local(Reward):
    """The first pixel, after a pause; raises what the prompt names."""

    seconds: ClassVar[float] = 0.0
    threads: ClassVar[set[str]] = set()

    def __init__(self, device="cpu") -> None:
        pass

    def score(self, images, prompts, metadata):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        errors = {
            "value": ValueError("no idea"),
            "user": UserError("a mistake"),
            "down": RewardUnavailable("elsewhere", "stays down"),
        }
        for prompt in prompts:
            if prompt in errors:
                raise errors[prompt]
        return RewardOutput(images[:, 0, 0, 0].clone())


class Remote(Local):
    """As `Local`, but in a thread of its own; the later a batch the sooner it is done."""

    spec: ClassVar[RewardSpec] = RewardSpec(remote=True)
    interrupted: ClassVar[threading.Event] = threading.Event()

    def interrupt(self) -> None:
        self.interrupted.set()


LOCAL, REMOTE = f"{__name__}:Local", f"{__name__}:Remote"


@pytest.fixture(autouse=True)
def fresh():
    Local.seconds = 0.0
    Local.threads.clear()
    Remote.interrupted.clear()
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("score")]
    assert left == []


@pytest.fixture(scope="module")
def rewards() -> RewardSet:
    settings = {"rewards.proxy": LOCAL, "rewards.aux": REMOTE, "rewards.eval": "[]"}
    return RewardSet(load_config("tiny", overrides=list(settings.items())).rewards, CPU)


def batches(count: int, size: int = 3) -> list[torch.Tensor]:
    images = torch.rand(count * size, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return list(images.split(size))


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts or ("a",) * 3]


def test_scores_and_features_are_those_without_overlap(rewards: RewardSet) -> None:
    some = batches(7)
    with ScoringWorker(rewards, [LOCAL, REMOTE], CPU, max_pending=2) as worker:
        for images in some:
            worker.submit(images, prompts())
        book = worker.collect()
        assert book.features().shape[0] == 21
    together = torch.cat(some)
    for name in (LOCAL, REMOTE):
        assert torch.equal(book.scores(name), together[:, 0, 0, 0])
        assert book.seconds_per_image(name) >= 0
    assert rewards.features is not None
    expected = torch.cat([rewards.features(images) for images in some])
    assert torch.equal(book.features(), expected)


def test_order_is_restored_when_later_batches_finish_first(rewards: RewardSet) -> None:
    class Uneven(Local):
        spec: ClassVar[RewardSpec] = RewardSpec(remote=True)

        def score(self, images, prompts, metadata):
            time.sleep(float(prompts[0]))
            return super().score(images, prompts, metadata)

    config = load_config("tiny").rewards
    both = RewardSet(config, CPU)
    both._rewards = {"slow": Uneven(), "quick": Local()}
    some = batches(3)
    with ScoringWorker(both, ["slow", "quick"], CPU) as worker:
        for images, seconds in zip(some, ("0.3", "0.0", "0.1"), strict=True):
            worker.submit(images, prompts(*[seconds] * 3))
        book = worker.collect()
    for name in ("slow", "quick"):
        assert torch.equal(book.scores(name), torch.cat(some)[:, 0, 0, 0])
    assert book.seconds_per_image("slow") == pytest.approx(0.4 / 9, rel=0.3)


def test_a_remote_reward_has_its_own_thread(rewards: RewardSet) -> None:
    with ScoringWorker(rewards, [LOCAL, REMOTE], CPU) as worker:
        worker.submit(batches(1)[0], prompts())
        worker.collect()
    assert len(Local.threads) == 2
    assert threading.current_thread().name not in Local.threads


@pytest.mark.parametrize("name", [LOCAL, REMOTE])
def test_an_exception_surfaces_at_the_next_collect_with_the_name(
    rewards: RewardSet, name: str
) -> None:
    Local.seconds = 0.1
    with ScoringWorker(rewards, [name], CPU) as worker:
        worker.submit(batches(1)[0], prompts("a", "value", "a"))
        with pytest.raises(RewardFailed, match=f"'{name}' failed: ValueError: no idea") as got:
            worker.collect()
    assert isinstance(got.value.__cause__, ValueError)


def test_it_surfaces_at_a_later_submit_too(rewards: RewardSet) -> None:
    with ScoringWorker(rewards, [LOCAL], CPU, max_pending=1) as worker:
        worker.submit(batches(1)[0], prompts("value", "a", "a"))
        with pytest.raises(RewardFailed):
            worker.submit(batches(1)[0], prompts())


def test_user_errors_stay_user_errors(rewards: RewardSet) -> None:
    with ScoringWorker(rewards, [LOCAL], CPU) as worker:
        worker.submit(batches(1)[0], prompts("user", "a", "a"))
        with pytest.raises(UserError, match=f"reward '{LOCAL}': a mistake"):
            worker.collect()


def unavailable(images, prompts, metadata):
    raise RewardUnavailable(f"{__name__}:unavailable", "stays down")


def test_an_unavailable_reward_keeps_its_type() -> None:
    name = f"{__name__}:unavailable"
    settings = {"rewards.proxy": name, "rewards.aux": "clean", "rewards.eval": "[]"}
    rewards = RewardSet(load_config("tiny", overrides=list(settings.items())).rewards, CPU)
    with ScoringWorker(rewards, [name], CPU) as worker:
        worker.submit(batches(1)[0], prompts())
        with pytest.raises(RewardUnavailable, match="stays down") as caught:
            worker.collect()
    assert caught.value.reward == name


def test_an_error_of_the_caller_drops_what_has_not_begun(rewards: RewardSet) -> None:
    Local.seconds = 0.2

    def interrupted() -> None:
        with ScoringWorker(rewards, [LOCAL, REMOTE], CPU) as worker:
            for images in batches(4):
                worker.submit(images, prompts())
            raise KeyboardInterrupt

    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.perf_counter() - started < 0.7  # one of four tasks, not all
    assert Remote.interrupted.is_set()


def test_a_worker_can_be_used_again(rewards: RewardSet) -> None:
    with ScoringWorker(rewards, [LOCAL], CPU) as worker:
        assert worker.collect().features() is None
        for images in batches(2):
            worker.submit(images, prompts())
            assert torch.equal(worker.collect().scores(LOCAL), images[:, 0, 0, 0])


def test_only_so_many_batches_wait(rewards: RewardSet) -> None:
    Local.seconds = 0.1
    with ScoringWorker(rewards, [LOCAL], CPU, max_pending=2) as worker:
        started = time.perf_counter()
        for images in batches(6):
            worker.submit(images, prompts())
        assert time.perf_counter() - started > 0.3  # four of six are done
        assert len(worker.collect().scores(LOCAL)) == 18


# --- time


def test_an_epoch_with_a_reward_as_slow_as_sampling(rewards: RewardSet) -> None:
    sampling, count = 0.1, 8
    Local.seconds = sampling
    started = time.perf_counter()
    with ScoringWorker(rewards, [LOCAL, REMOTE], CPU) as worker:
        for images in batches(count):
            time.sleep(sampling)
            worker.submit(images, prompts())
        worker.collect()
    # one after the other it would take 3 x; only the last batch is waited for
    assert time.perf_counter() - started <= 1.25 * sampling * count


# --- in training


SHORT = {
    "epochs": "2",
    "device": "cpu",
    "threads": "1",
    "prompts.per_epoch": "4",
    "prompts.group_size": "8",
    "sampling.batch_size": "4",
    "sampling.num_steps": "3",
    "sampling.sde_window": "0",
    "train.batch_size": "8",
    "evaluation.max_prompts": "4",
    "evaluation.samples_per_prompt": "2",
    "evaluation.num_steps": "2",
    "evaluation.grid_images": "0",
    "rewards.eval": "[]",
}


def configured(**changes: str):
    return load_config("tiny", overrides=list({**SHORT, **changes}.items()))


def test_a_rollout_with_a_slow_reward_takes_as_long_as_sampling() -> None:
    config = configured(
        **{"rewards.proxy": LOCAL, "rewards.aux": REMOTE, "prompts.group_size": "16"}
    )
    trainer = Trainer(config, Runtime("cpu", "fp32", 1))
    trainer.progress = EpochProgress(1, "x", enabled=False)
    chosen = trainer.prompt_sampler.epoch(0)

    def seconds() -> float:
        started = time.perf_counter()
        trainer.roll_out_and_score(0, chosen)
        return time.perf_counter() - started

    seconds()
    alone = min(seconds(), seconds())
    Local.seconds = alone / 16  # 16 batches, each as long in the reward as in the sampler
    # other work on the machine may disturb a measurement, not all of them
    assert any(seconds() <= 1.25 * alone for _ in range(4))


def half_missing(
    images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]
) -> torch.Tensor:
    scores = images.mean((1, 2, 3))
    scores[::2] = torch.nan
    return scores


def test_a_run_with_missing_scores(tmp_path) -> None:
    import json

    name = f"{__name__}:half_missing"
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=rf"reward '{name}': could not score \d+ of \d+ images"):
        train(configured(**{"rewards.proxy": name, "output_dir": str(folder)}))
    allowed = {"rewards.max_missing_share": "0.5", "output_dir": str(tmp_path / "allowed")}
    report = train(configured(**{"rewards.proxy": name, **allowed}))
    rows = [json.loads(r) for r in (tmp_path / "allowed/metrics.jsonl").read_text().splitlines()]
    assert [row[f"reward/{name}/missing"] for row in rows] == [0.5, 0.5]
    assert all(row[f"time/reward/{name}"] > 0 for row in rows)
    assert all(row["loss/total"] is not None for row in rows)
    assert "50" in report.read_text()


def test_a_failing_reward_ends_a_run_by_name(tmp_path) -> None:
    changes = {"rewards.proxy": toy("brittle"), "output_dir": str(tmp_path / "run")}
    prompt_file = tmp_path / "prompts.txt"
    prompt_file.write_text("bad\none red circle\ntwo red circles\nthree red circles\n")
    with pytest.raises(RewardFailed, match=r"toys:brittle' failed: ValueError: a bad prompt"):
        train(configured(**changes, **{"prompts.path": str(prompt_file), "rewards.aux": LOCAL,
            "evaluation.reference_images": "null"}))  # fmt: skip


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_side_stream_sees_finished_images_and_gives_finished_scores(rewards: RewardSet) -> None:
    device = torch.device("cuda")
    settings = {"rewards.proxy": LOCAL, "rewards.aux": REMOTE, "rewards.eval": "[]"}
    on_gpu = RewardSet(load_config("tiny", overrides=list(settings.items())).rewards, device)
    expected = []
    with ScoringWorker(on_gpu, [LOCAL, REMOTE], device) as worker:
        for number in range(20):
            work = torch.randn(2048, 2048, device=device)
            for _ in range(10):  # the stream is busy when the images are handed over
                work = work @ work / 2048
            images = torch.full((3, 3, 24, 24), number / 20, device=device) + 0 * work[0, 0]
            expected.append(number / 20)
            worker.submit(images, prompts())
            del images, work
        book = worker.collect()
    want = torch.tensor(expected, device=device).repeat_interleave(3)
    for name in (LOCAL, REMOTE):
        assert torch.equal(book.scores(name), want)
