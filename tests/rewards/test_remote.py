"""The client of reward servers: exact scores, failover, retries, missing scores, clear ends."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch

from gardo.config import load_config
from gardo.config.schema import RewardClientConfig
from gardo.rewards.base import RewardUnavailable
from gardo.rewards.registry import build_reward
from gardo.rewards.remote import RemoteReward
from gardo.rewards.scoring import RewardSet
from gardo.types import Prompt, UserError
from tests.rewards import images as im
from tests.rewards import toys
from tests.rewards.toys import toy

QUICK = {"timeout": 5.0, "connect_timeout": 2.0, "retries": 2, "backoff": 0.05}
RECORD = [{}] * 8


def client(*servers: str, name: str = toy("corner"), **changes) -> RemoteReward:
    return RemoteReward(name, servers, RewardClientConfig(**{**QUICK, **changes}))


def batch(count: int = 4, side: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def corners(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, 0].float()


@pytest.fixture(scope="module")
def server():
    names = [toy("corner"), toy("length"), toy("brittle"), toy("sleepy"), toy("batch_size")]
    with toys.serving(",".join([*names, "count", "judge"]), "--max-images", "3") as server:
        yield server


@contextmanager
def unused_port():
    """A port that refuses connections: bound, but nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


class Stub:
    """A server in this process that answers scores with what ``script`` says, in turn.

    An entry is a status, a body, or None to hang up; the last one is repeated.
    """

    SPEC: ClassVar[dict] = {
        "higher_is_better": True,
        "value_range": [0, None],
        "needs_prompt": True,
    }

    def __init__(self, *script) -> None:
        self.script, self.asked, self.headers = list(script), 0, []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                limits = {"images": 100, "body_bytes": 10**9}
                rewards = {toy("corner"): stub.SPEC}
                self.answer(200, json.dumps({"rewards": rewards, "limits": limits}).encode())

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                step = stub.script[min(stub.asked, len(stub.script) - 1)]
                stub.asked += 1
                stub.headers.append(dict(self.headers))
                if step is None:
                    self.close_connection = True
                elif isinstance(step, int):
                    self.answer(step, b'{"error": "scripted"}')
                else:
                    self.answer(200, step if isinstance(step, bytes) else json.dumps(step).encode())

            def answer(self, status, body):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))

    def __enter__(self) -> Stub:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def scores(*values) -> dict:
    return {"scores": list(values), "details": {}}


# --- scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_those_of_the_reward_itself(server, dtype: torch.dtype) -> None:
    images = im.draw()[:7].to(dtype)
    prompts = [scene.prompt for scene in im.SCENES[:7]]
    metadata = [scene.metadata for scene in im.SCENES[:7]]
    local = build_reward("count").score(images, prompts, metadata)
    remote = client(server.url, name="count").score(images, prompts, metadata)
    assert torch.equal(remote.scores, local.scores)  # in requests of three, bit for bit
    assert remote.scores.dtype == torch.float32
    sizes = client(server.url, name=toy("batch_size")).score(images, prompts, metadata)
    assert sizes.details.keys() == {"twice"}
    assert torch.equal(sizes.details["twice"], 2 * sizes.scores)


def test_png_costs_the_last_bits_only(server) -> None:
    images = batch(5)
    got = client(server.url, encoding="png").score(images, ["a"] * 5, RECORD[:5]).scores
    torch.testing.assert_close(got, corners(images), rtol=0, atol=0.5 / 255 + 1e-6)
    assert not torch.equal(got, corners(images))


def test_the_spec_is_the_servers(server) -> None:
    spec = client(server.url, name=toy("batch_size")).spec
    assert (spec.higher_is_better, spec.value_range, spec.remote) == (False, (1.0, 8.0), True)


def test_missing_scores_stay_missing_and_alone(server) -> None:
    images, prompts = batch(6), ["a", "bad", "b", "none", "c", "d"]
    got = client(server.url, name=toy("brittle")).score(images, prompts, RECORD[:6]).scores
    assert got.isnan().tolist() == [False, True, False, True, False, False]
    assert torch.equal(got[~got.isnan()], corners(images)[~got.isnan()])


def test_a_non_finite_image_is_judged_by_the_server(server) -> None:
    images = im.draw()[:3].clone()
    images[1, 0, 0, 0] = torch.nan
    got = client(server.url, name="count").score(
        images, [s.prompt for s in im.SCENES[:3]], RECORD[:3]
    )
    assert got.scores.isnan().tolist() == [False, True, False]


def test_no_images_need_no_server(server) -> None:
    assert client(server.url).score(batch(4)[:0], [], []).scores.shape == (0,)


def test_prompts_are_checked_by_the_server(server) -> None:
    remote = client(server.url, name="count")
    problems = remote.check_prompts(["a cat"] + ["two red circles"] * 1500, [{}] * 1501)
    assert "a cat" in problems[0]
    assert problems[1:] == [None] * 1500
    assert remote.check_prompt("one blue square", {}) is None


def test_metadata_that_json_cannot_hold(server) -> None:
    with pytest.raises(UserError, match=r"corner': metadata must be JSON values"):
        client(server.url).score(batch(1), ["a"], [{"x": {1, 2}}])


def test_several_threads_may_use_one_client(server) -> None:
    remote, found = client(server.url), {}

    def work(number: int) -> None:
        images = batch(number + 1)
        prompts = ["a"] * len(images)
        found[number] = torch.equal(
            remote.score(images, prompts, [{}] * len(images)).scores, corners(images)
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)


# --- failures that pass


@pytest.mark.parametrize("failure", [None, 408, 429, 502, 503, 504])
def test_what_passes_is_tried_again(failure, caplog: pytest.LogCaptureFixture) -> None:
    with Stub(failure, failure, scores(0.5)) as stub:
        assert client(stub.url).score(batch(1), ["a"], [{}]).scores.tolist() == [0.5]
        assert stub.asked == 3
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 2
    assert stub.url in caplog.text


def test_pauses_grow_and_rounds_are_bounded() -> None:
    with Stub(503) as stub:
        remote = client(stub.url, retries=3, backoff=0.2)
        started = time.monotonic()
        with pytest.raises(RewardUnavailable, match="no server answers after 4 rounds") as caught:
            remote.score(batch(1), ["a"], [{}])
        seconds = time.monotonic() - started
        assert stub.asked == 4
    assert 0.5 * (0.2 + 0.4 + 0.8) <= seconds < 0.2 + 0.4 + 0.8 + 1.0
    assert isinstance(caught.value, UserError)
    assert caught.value.reward == toy("corner")
    assert "status 503: scripted" in str(caught.value)


def test_another_server_stands_in() -> None:
    with unused_port() as dead, Stub(503) as busy, Stub(scores(0.25)) as good:
        remote = client(dead, busy.url, good.url, retries=0)
        for _ in range(3):
            assert remote.score(batch(1), ["a"], [{}]).scores.tolist() == [0.25]
        assert good.asked == 3
        assert busy.asked == 1  # after a failure it is the last to be asked for a while


def test_several_servers_share_a_batch_in_order() -> None:
    with Stub(scores(1.0, 2.0)) as first, Stub(scores(3.0, 4.0)) as second:
        got = client(first.url, second.url).score(batch(4), ["a"] * 4, RECORD[:4]).scores
        assert got.tolist() == [1.0, 2.0, 3.0, 4.0]
        assert (first.asked, second.asked) == (1, 1)


def test_an_answer_that_does_not_come_in_time(server) -> None:
    remote = client(server.url, name=toy("sleepy"), timeout=0.3, retries=1)
    started = time.monotonic()
    with pytest.raises(RewardUnavailable, match="ReadTimeout"):
        remote.score(batch(1), ["a"], [{"seconds": 1.0}])
    assert time.monotonic() - started < 2.0


def test_an_interrupt_ends_the_retries() -> None:
    with Stub(503, 503, scores(0.5)) as stub:
        remote = client(stub.url, retries=5, backoff=20.0)
        timer = threading.Timer(0.3, remote.interrupt)
        timer.start()
        started = time.monotonic()
        with pytest.raises(RewardUnavailable):
            remote.score(batch(1), ["a"], [{}])
        assert time.monotonic() - started < 5
        timer.join()
    with Stub(scores(0.5)) as stub:
        remote = client(stub.url)
        remote.interrupt()
        assert remote.score(batch(1), ["a"], [{}]).scores.tolist() == [0.5]  # as before


# --- failures that do not


@pytest.mark.parametrize(
    "answer",
    [
        500,
        b"<html>",
        b"[]",
        {},
        scores(),
        scores(1.0, 2.0, 3.0),
        scores("0.5", 1.0),
        scores(True, 1.0),
        {"scores": [1.0, 2.0], "details": {"x": [1.0]}},
    ],
)
def test_what_a_live_server_cannot_score_is_missing(
    answer, caplog: pytest.LogCaptureFixture
) -> None:
    with Stub(answer) as stub:
        got = client(stub.url).score(batch(2), ["a"] * 2, RECORD[:2]).scores
        assert got.isnan().all()
        assert stub.asked == 1
    assert "2 images are missing" in caplog.text


def test_only_the_failed_part_of_a_batch_is_missing() -> None:
    with Stub(500) as bad, Stub(500, scores(3.0, 4.0)) as flaky:
        got = client(bad.url, flaky.url).score(batch(4), ["a"] * 4, RECORD[:4]).scores
    assert sorted(got.isnan().tolist()) == [False, False, True, True]
    assert got[~got.isnan()].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422])
def test_a_refusal_is_a_mistake_and_not_repeated(status: int) -> None:
    with Stub(status) as stub:
        with pytest.raises(UserError, match=f"refuses with status {status}: scripted") as caught:
            client(stub.url).score(batch(1), ["a"], [{}])
        assert not isinstance(caught.value, RewardUnavailable)
        assert stub.asked == 1


def test_no_server_at_the_start() -> None:
    with unused_port() as dead, pytest.raises(RewardUnavailable, match="ConnectError"):
        client(dead)


def test_what_is_no_reward_server_or_not_the_right_one(server) -> None:
    with pytest.raises(UserError, match=r"does not serve it, but .*count"):
        client(server.url, name="geneval")
    with pytest.raises(UserError, match="refuses with status 404"):
        client(server.url + "/elsewhere")


def test_servers_must_agree() -> None:
    class Other(Stub):
        SPEC: ClassVar[dict] = {**Stub.SPEC, "higher_is_better": False}

    with Stub() as first, Other() as second:
        with pytest.raises(UserError, match="its servers describe it differently"):
            client(first.url, second.url)


# --- tokens


def test_tokens(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with toys.serving(toy("corner"), env={"GARDO_REWARD_TOKEN": "right"}) as server:
        wait = {"startup_timeout": 30.0}
        with pytest.raises(UserError, match="refuses with status 401"):
            client(server.url, **wait, retries=100)
        monkeypatch.setenv("GARDO_REWARD_TOKEN", "wrong")
        with pytest.raises(UserError, match="refuses with status 403") as caught:
            client(server.url, **wait)
        assert "wrong" not in str(caught.value).replace("wrong bearer token", "")
        (tmp_path / "token").write_text("right\n")
        remote = client(server.url, token_file=str(tmp_path / "token"))
        assert torch.equal(remote.score(batch(2), ["a"] * 2, RECORD[:2]).scores, corners(batch(2)))
        monkeypatch.setenv("OTHER", "right")
        assert client(server.url, token_env="OTHER").spec.remote


# --- a real server that dies and comes back


def test_a_server_killed_in_mid_request_and_restarted() -> None:
    with toys.serving(f"{toy('sleepy')},{toy('corner')}") as server:
        remote = client(server.url, name=toy("sleepy"), retries=40, backoff=0.2)
        result: list[torch.Tensor] = []

        def score() -> None:
            metadata = [{"seconds": 1.5}] * 3
            result.append(remote.score(batch(3), ["a"] * 3, metadata).scores)

        thread = threading.Thread(target=score)
        thread.start()
        time.sleep(0.7)  # the request is being scored
        server.kill()
        assert not result
        server.start()
        thread.join(60)
        assert torch.equal(result[0], corners(batch(3)))


def test_a_server_that_stays_down_stops_the_run() -> None:
    with toys.serving(toy("corner")) as server:
        remote = client(server.url, retries=1)
        assert remote.score(batch(1), ["a"], [{}]).scores.shape == (1,)
        server.kill()
        with pytest.raises(RewardUnavailable, match="no server answers after 2 rounds"):
            remote.score(batch(1), ["a"], [{}])


def test_a_server_killed_in_mid_request_with_a_second_one() -> None:
    with toys.serving(toy("sleepy")) as first, toys.serving(toy("sleepy")) as second:
        remote = client(first.url, second.url, name=toy("sleepy"), retries=20, backoff=0.1)
        threading.Timer(0.5, first.kill).start()
        got = remote.score(batch(6), ["a"] * 6, [{"seconds": 1.0}] * 6).scores
        assert torch.equal(got, corners(batch(6)))
        assert not first.alive
        assert second.alive


# --- in a recipe


def test_a_recipe_says_what_is_scored_remotely(server) -> None:
    config = load_config("tiny", overrides=[("rewards.servers.judge", server.url)]).rewards
    config.eval = ["judge"]
    rewards = RewardSet(config, torch.device("cpu"))
    assert isinstance(rewards["judge"], RemoteReward)
    assert not isinstance(rewards["count"], RemoteReward)
    prompts, images = [Prompt(s.prompt, s.metadata) for s in im.SCENES[:5]], im.draw()[:5]
    expected = im.score(build_reward("judge"), images, im.SCENES[:5])
    got = rewards.score(["judge"], images, prompts)["judge"]
    # the server sees three images at once, and convolutions round differently for other batches
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    rewards.check_prompts(prompts)
    config.servers["count"] = [server.url]
    config.parameters = {"count": {"color_weight": 1.0}}
    with pytest.raises(UserError, match=r"parameters\.count: .* other values of color_weight"):
        RewardSet(config, torch.device("cpu"))


def test_parameters_must_be_the_servers(server) -> None:
    with toys.serving(
        "count", "--set", "count.color_weight=2", env={"GARDO_REWARD_TOKEN": ""}
    ) as other:
        same = RewardClientConfig(**QUICK)
        reward = RemoteReward("count", [other.url], same, {"color_weight": 2.0})
        blank = im.filled()[:1]
        expected = im.score(build_reward("count", color_weight=2.0), blank, im.SCENES[:1])
        assert torch.equal(im.score(reward, blank, im.SCENES[:1]), expected)
        RemoteReward("count", [other.url], same)  # no wishes, no check
        for wrong in ({"color_weight": 3.0}, {"color_weight": 2.0, "more": 1}):
            with pytest.raises(UserError, match=r"other values of (color_weight|more);"):
                RemoteReward("count", [other.url], same, wrong)


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        ("{count: 'localhost:80'}", "expected http://HOST:PORT"),
        ("{count: 'ftp://x'}", "expected http://HOST:PORT"),
        ("{count: 'http://me:secret@x'}", "without user"),
        ("{count: 'http://x:port'}", "rewards.servers"),
        ("{count: []}", "rewards.servers"),
        ("{count: 3}", "rewards.servers"),
        ("[1]", "rewards.servers"),
    ],
)
def test_wrong_servers_in_a_recipe(servers: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("tiny", overrides=[("rewards.servers", servers)])


def test_a_typo_in_the_name_of_a_remote_reward() -> None:
    config = load_config("tiny", overrides=[("rewards.servers", "{coumt: 'http://x'}")])
    with pytest.raises(UserError, match=r"rewards\.servers: 'coumt' is not among the rewards"):
        RewardSet(config.rewards, torch.device("cpu"))
