"""The uncertainty that a reward states for its scores, on every way that scores take."""

from __future__ import annotations

import json
import math

import httpx
import pytest
import torch

from gardo.config import load_config
from gardo.config.schema import RewardClientConfig
from gardo.distributed.process import Runtime
from gardo.rewards.base import Reward, RewardSpec
from gardo.rewards.functions import FunctionReward
from gardo.rewards.outputs import check_output, concatenate, score_batch
from gardo.rewards.overlap import ScoringWorker
from gardo.rewards.remote import RemoteReward
from gardo.rewards.scoring import RewardSet, ScoreBook
from gardo.rewards.serve import protocol
from gardo.trainer import Trainer
from gardo.types import Prompt, RewardOutput, UserError
from tests.rewards import toys
from tests.rewards.toys import toy
from tests.support.forked import Runner, arguments

CPU = torch.device("cpu")
NAN = torch.nan
UNSURE = toy("unsure")


def images(count: int, side: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def same(got: torch.Tensor | None, expected) -> None:
    assert got is not None
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=0, atol=0, equal_nan=True)


def rewards_of(proxy: str, **overrides: str) -> RewardSet:
    settings = {"rewards.proxy": proxy, "rewards.aux": "count", "rewards.eval": "[]", **overrides}
    return RewardSet(load_config("tiny", overrides=list(settings.items())).rewards, CPU)


# --- the output itself


def test_a_function_is_applied_to_every_tensor() -> None:
    output = RewardOutput(torch.ones(2), {"x": torch.zeros(2)}, torch.full((2,), 0.5))
    doubled = output.map(lambda values: 2 * values + 1)
    assert doubled.scores.tolist() == [3.0, 3.0]
    assert doubled.details["x"].tolist() == [1.0, 1.0]
    same(doubled.sigma, [2.0, 2.0])
    assert RewardOutput(torch.ones(2)).map(torch.neg).sigma is None


def test_sigma_is_checked_as_scores_are() -> None:
    half = torch.tensor([0.5, math.inf, 0.0], dtype=torch.float16, requires_grad=True)
    sigma = check_output("w", RewardOutput(torch.zeros(3), sigma=half), 3).sigma
    same(sigma, [0.5, NAN, 0.0])
    assert not sigma.requires_grad
    assert check_output("w", RewardOutput(torch.zeros(3)), 3).sigma is None


@pytest.mark.parametrize("score", [NAN, math.inf])
def test_without_a_score_there_is_no_sigma(score: float) -> None:
    output = RewardOutput(torch.tensor([score, 1.0]), sigma=torch.tensor([0.5, NAN]))
    same(check_output("w", output, 2).sigma, [NAN, NAN])


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (
            torch.tensor([0.1, -0.25, NAN]),
            r"reward 'w': expected sigma to be at least 0, got -0.25",
        ),
        (torch.zeros(2), r"reward 'w/sigma': expected 3 scores.*got shape \[2\]"),
        (torch.zeros(3, dtype=torch.int64), "reward 'w/sigma': .*got a tensor of torch.int64"),
        (0.5, "reward 'w/sigma': .*got float"),
    ],
)
def test_a_wrong_sigma_is_named(sigma, message: str) -> None:
    output = RewardOutput(torch.zeros(3), sigma=sigma)
    with pytest.raises(UserError, match=message):
        check_output("w", output, 3)
    with pytest.raises(UserError, match=message):
        FunctionReward("w", lambda i, p, m: output, {}).score(images(3), ["a"] * 3, [{}] * 3)


def test_outputs_join_with_gaps_in_sigma() -> None:
    known = RewardOutput(torch.ones(2), sigma=torch.tensor([0.5, 0.25]))
    unknown = RewardOutput(torch.zeros(1))
    same(concatenate([unknown, known]).sigma, [NAN, 0.5, 0.25])
    assert concatenate([unknown, unknown]).sigma is None
    assert concatenate([]).sigma is None


class Sometimes(Reward):
    """States a sigma only for batches of two."""

    spec = RewardSpec(batch_size=2)

    def score(self, images, prompts, metadata):
        sigma = torch.full((2,), 0.5) if len(images) == 2 else None
        return RewardOutput(torch.ones(len(images)), sigma=sigma)


def test_batches_of_the_preferred_size() -> None:
    output = score_batch("s", Sometimes(), images(5), ["a"] * 5, [{}] * 5)
    same(output.sigma, [0.5, 0.5, 0.5, 0.5, NAN])
    assert score_batch("s", Sometimes(), images(4)[:0], [], []).sigma is None


# --- of a run


def test_the_set_and_the_worker_hand_it_on() -> None:
    rewards, some = rewards_of(UNSURE), images(6, side=24)
    texts = ["a", "none", "vague", "b", "c", "d"]
    prompts = [Prompt(text) for text in texts]
    expected = some[:, 0, 0, 0] / 10
    expected[[1, 2]] = NAN
    output = rewards.score_one(UNSURE, some, prompts)
    same(output.sigma, expected)
    assert output.scores.isnan().tolist() == [False, True, False, False, False, False]
    with ScoringWorker(rewards, [UNSURE, "count"], CPU) as worker:
        circles = [Prompt("one red circle")] * 4
        worker.submit(some[:2], circles[:2])
        worker.submit(some[2:], circles)
        book = worker.collect()
    same(book.sigma(UNSURE), some[:, 0, 0, 0] / 10)
    assert book.sigma("count") is None


def negative(images, prompts, metadata):
    return RewardOutput(images[:, 0, 0, 0], sigma=-images[:, 0, 0, 0])


def test_the_book_fills_gaps() -> None:
    book = ScoreBook()
    book.add({"a": RewardOutput(torch.ones(2), sigma=torch.tensor([0.5, 0.25]))}, None)
    book.add({"a": torch.zeros(1), "b": torch.ones(1)}, None)  # as of a server that failed
    same(book.sigma("a"), [0.5, 0.25, NAN])
    assert book.sigma("b") is None
    assert book.sigma("c") is None  # a process without samples


def test_the_sigma_of_a_weighted_sum() -> None:
    name = toy("corner")
    rewards = rewards_of(f"{{{UNSURE}: 3.0, {name}: 2.0}}")
    sigmas = {UNSURE: torch.tensor([1.0, 0.5, NAN]), name: torch.tensor([2.0, 0.0, 1.0])}
    got = rewards.proxy_sigma({**sigmas, "count": None})  # auxiliary rewards do not matter
    same(got, [5.0, 1.5, NAN])
    assert rewards_of(UNSURE).proxy_sigma(sigmas).tolist()[:2] == [1.0, 0.5]
    for nothing in ({**sigmas, name: None}, {UNSURE: sigmas[UNSURE]}):
        with pytest.raises(UserError) as caught:
            rewards.proxy_sigma(nothing)
        assert str(caught.value).startswith("algorithm.gate.uncertainty: ")
        assert str(caught.value).endswith(
            "needs a proxy that reports its uncertainty (RewardOutput.sigma); "
            f"reward '{name}' reports none"
        )


def test_a_run_whose_proxy_states_none_ends_with_one_message(tmp_path) -> None:
    runner, mute = Runner(tmp_path / "stderr.txt"), toy("corner")
    keys = {"algorithm.gate.uncertainty": "sigma", "rewards.proxy": mute, "rewards.aux": "[]"}
    assert runner.run(arguments(tmp_path / "run", epochs=1, **keys)) == 2
    assert runner.said.strip().splitlines()[-1] == (
        "error: algorithm.gate.uncertainty: all but 'ensemble' needs a proxy that reports its "
        f"uncertainty (RewardOutput.sigma); reward '{mute}' reports none"
    )
    assert "Traceback" not in runner.said


# --- held-out evaluation


def test_the_metric_of_held_out_evaluation() -> None:
    settings = {
        "rewards.eval": f"[{UNSURE}, strict_count]",
        "device": "cpu",
        "threads": "1",
        "sampling.batch_size": "2",
        "evaluation.max_prompts": "3",
        "evaluation.samples_per_prompt": "2",
        "evaluation.num_steps": "2",
        "evaluation.grid_images": "0",
        "evaluation.reference_images": "null",
    }
    config = load_config("tiny", overrides=list(settings.items()))
    evaluation = Trainer(config, Runtime("cpu", "fp32", 1)).evaluator()
    metrics = evaluation.metrics
    sigma, mean = metrics[f"reward/{UNSURE}/sigma"], metrics[f"reward/{UNSURE}/mean"]
    assert sigma == pytest.approx(mean / 10, rel=1e-6)
    assert [key for key in metrics if key.endswith("/sigma")] == [f"reward/{UNSURE}/sigma"]


# --- the service


def test_answers_with_and_without_it() -> None:
    output = RewardOutput(torch.tensor([1.0, NAN]), {}, torch.tensor([0.1, NAN]))
    answer = protocol.scores_to_json(output)
    assert answer["sigma"] == [output.sigma[0].item(), None]
    same(protocol.scores_from_json(json.loads(json.dumps(answer)), 2).sigma, output.sigma)
    old = {"scores": [1.0, None], "details": {}}
    assert protocol.scores_to_json(RewardOutput(output.scores)) == old
    for without in (old, {**old, "sigma": None}):
        assert protocol.scores_from_json(without, 2).sigma is None
    for wrong in ([0.1], [0.1, "0"], 0.1, {}):
        with pytest.raises(ValueError, match="sigma: expected"):
            protocol.scores_from_json({**old, "sigma": wrong}, 2)


def test_there_and_back() -> None:
    names = f"{UNSURE},{__name__}:negative,{toy('corner')}"
    with toys.serving(names, "--max-images", "3") as server:
        config = RewardClientConfig(retries=2, backoff=0.05)
        remote = RemoteReward(UNSURE, [server.url], config)
        some, texts = images(7), ["a", "none", "vague", "bad", "b", "c", "d"]
        output = remote.score(some, texts, [{}] * 7)  # three requests
        expected = some[:, 0, 0, 0] / 10
        expected[[1, 2, 3]] = NAN
        same(output.sigma, expected)
        assert output.scores.isnan().tolist() == [False, True, False, True, False, False, False]
        certain = RemoteReward(toy("corner"), [server.url], config)
        assert certain.score(some, texts, [{}] * 7).sigma is None
        body, kind = protocol.encode_request(some[:1], ["a"], [{}])
        answer = httpx.post(
            f"{server.url}/v1/score/{__name__}:negative",
            content=body,
            headers={"Content-Type": kind},
        )
        assert answer.status_code == 500
        assert "expected sigma to be at least 0" in answer.json()["error"]
