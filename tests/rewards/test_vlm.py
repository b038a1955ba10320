"""Rewards from a chat endpoint: a real HTTP server that answers, stumbles, refuses or is gone."""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gardo.rewards import chat
from gardo.rewards.base import RewardUnavailable
from gardo.rewards.registry import build_reward
from gardo.types import UserError
from tests.rewards import tiny_models as tm

Answer = Callable[[dict[str, Any]], tuple[int, str]]


class Endpoint:
    """Answers with what ``respond`` makes of each request, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.respond: Answer = lambda body: (200, completion("Final Score: 3"))
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.headers.append(dict(self.headers))
                endpoint.requests.append({"path": self.path, **body})
                status, text = endpoint.respond(body)
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the client has given up

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(chat, "LONGEST_PAUSE", 0.01)
    it = Endpoint()
    yield it
    it.server.shutdown()
    it.server.server_close()


def completion(text: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def picture_of(body: dict[str, Any]) -> np.ndarray:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    kind, data = url.split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def by_brightness(template: str) -> Answer:
    """An answer that depends on the image alone, so that mixed-up rows would show."""
    return lambda body: (200, completion(template.format(1 + 4 * picture_of(body).mean() / 255)))


def test_unifiedreward_asks_as_published_and_reads_the_rating(endpoint: Endpoint) -> None:
    endpoint.respond = by_brightness("The caption fits.\nFinal Score: {:.4f}")
    reward = build_reward("unifiedreward", url=endpoint.url, image_size=48)
    assert reward.spec.remote
    scores = tm.score(reward)
    expected = 1 + 4 * tm.images().double().mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    request = next(r for r in endpoint.requests if tm.PROMPTS[1] in str(r))
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"]) == ("UnifiedReward-7b-v1.5", 0)
    text = request["messages"][0]["content"][1]["text"]
    assert text.startswith("<image>\nYou are given a text caption")
    assert text.endswith(f"Text Caption: [{tm.PROMPTS[1]}]")
    sent = sorted(picture_of(r).tobytes() for r in endpoint.requests)
    assert sent == sorted(np.asarray(p).tobytes() for p in tm.pictures(tm.images()))


def test_images_are_sent_at_the_published_size(endpoint: Endpoint) -> None:
    tm.score(build_reward("unifiedreward", url=endpoint.url), tm.images(1), ["a {b} 100%"])
    sent = picture_of(endpoint.requests[0])
    expected = np.asarray(tm.pictures(tm.images(1))[0].resize((512, 512)))
    assert np.array_equal(sent, expected)
    assert "[a {b} 100%]" in str(endpoint.requests[0])


def test_every_batch_and_broken_images(endpoint: Endpoint) -> None:
    endpoint.respond = by_brightness("Final Score: {:.4f}")
    tm.check_reward(build_reward("unifiedreward", url=endpoint.url, concurrency=3, image_size=16))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 4", 4.0),
        ("Fine.\n**Final Score:** 3.5", 3.5),
        ("**Final Score: 2**", 2.0),
        ("Final Score: 4\nFinal Score: 4", 4.0),
        ("Final Score: 4 ... Final Score: 2", None),
        ("Final Score: 7", None),
        ("Final Score: 0", None),
        ("Score: 4", None),
        ("I would say four.", None),
        ("", None),
    ],
)
def test_answers_are_read_strictly(endpoint: Endpoint, answer: str, score: float | None) -> None:
    endpoint.respond = lambda body: (200, completion(answer))
    reward = build_reward("unifiedreward", url=endpoint.url, image_size=8)
    output = reward.score(tm.images(1), ["one"], [{}])
    assert output.details["unparsed"].tolist() == [float(score is None)]
    assert output.scores.isnan().item() if score is None else output.scores.item() == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [("11.25", 11.25), (" -0.5\n", -0.5), ("25e-2", 0.25), ("mu = 3", None), ("3 or 4", None)],
)
def test_hpsv3_takes_a_number_alone(endpoint: Endpoint, answer: str, score: float | None) -> None:
    endpoint.respond = lambda body: (200, completion(answer))
    reward = build_reward("hpsv3", url=endpoint.url)
    assert reward.spec.remote
    output = reward.score(tm.images(1), ["one"], [{}])
    assert output.details["unparsed"].tolist() == [float(score is None)]
    assert output.scores.isnan().item() if score is None else output.scores.item() == score
    assert endpoint.requests[0]["messages"][0]["content"][1]["text"] == "one"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(endpoint: Endpoint, status: int) -> None:
    good = by_brightness("Final Score: {:.4f}")
    endpoint.respond = lambda body: good(body) if len(endpoint.requests) > 2 else (status, "later")
    reward = build_reward("unifiedreward", url=endpoint.url, image_size=8)
    assert 1 < tm.score(reward, tm.images(1), ["one"]).item() < 5
    assert len(endpoint.requests) == 3


def test_an_endpoint_that_stays_down_ends_the_run(endpoint: Endpoint) -> None:
    endpoint.respond = lambda body: (503, "overloaded")
    reward = build_reward("unifiedreward", url=endpoint.url, retries=2, concurrency=1, image_size=8)
    with pytest.raises(RewardUnavailable, match=r"'unifiedreward': no answer .* 3 attempts \(stat"):
        tm.score(reward)
    assert len(endpoint.requests) <= 3 + 3  # the rest of the batch is not asked about

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    gone = build_reward("hpsv3", url=url, retries=1)
    with pytest.raises(RewardUnavailable, match="'hpsv3': no answer .*ConnectError"):
        tm.score(gone)


def test_an_answer_in_no_time_is_a_failure(endpoint: Endpoint) -> None:
    endpoint.respond = lambda body: (time.sleep(1.0), (200, completion("Final Score: 3")))[1]
    reward = build_reward("unifiedreward", url=endpoint.url, timeout=0.1, retries=1, image_size=8)
    start = time.monotonic()
    with pytest.raises(RewardUnavailable, match="ReadTimeout"):
        tm.score(reward, tm.images(1), ["one"])
    assert time.monotonic() - start < 0.9


def test_a_refusal_is_the_users_mistake_and_not_repeated(endpoint: Endpoint) -> None:
    endpoint.respond = lambda body: (404, "no such model")
    reward = build_reward("unifiedreward", url=endpoint.url, image_size=8)
    with pytest.raises(UserError, match="refuses with status 404: no such model") as caught:
        tm.score(reward, tm.images(1), ["one"])
    assert not isinstance(caught.value, RewardUnavailable)
    assert len(endpoint.requests) == 1
    endpoint.respond = lambda body: (200, "<html>")
    with pytest.raises(UserError, match="expected a chat completion from"):
        tm.score(reward, tm.images(1), ["one"])


def test_the_key_comes_from_the_environment(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"url": endpoint.url, "api_key_env": "GARDO_TEST_KEY", "image_size": 8}
    monkeypatch.delenv("GARDO_TEST_KEY", raising=False)
    with pytest.raises(UserError, match="environment variable GARDO_TEST_KEY is not set"):
        build_reward("unifiedreward", **options)
    monkeypatch.setenv("GARDO_TEST_KEY", "secret")
    tm.score(build_reward("unifiedreward", **options), tm.images(1), ["one"])
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url: expected http:// or https://"),
        ({"timeout": 0}, "timeout: expected a positive number"),
        ({"retries": -1}, "retries: expected at least 0"),
        ({"concurrency": 0}, "concurrency: expected at least 1"),
        ({"image_size": 0}, "image_size: expected at least 1"),
    ],
)
def test_refused_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_reward("unifiedreward", **options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r"'httpx': pip install 'gardo\[rewards\]'"):
        build_reward("unifiedreward")
    monkeypatch.setitem(sys.modules, "hpsv3", None)
    with pytest.raises(UserError, match="expected a parameter url .* or the package: pip install"):
        build_reward("hpsv3")


def test_hpsv3_in_process_through_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class HPSv3RewardInferencer:
        def __init__(self, device: str, checkpoint_path: str | None) -> None:
            self.made_with = (device, checkpoint_path)

        def reward(self, prompts: list[str], image_paths: list[Image.Image]) -> torch.Tensor:
            mu = [10 * np.asarray(p).mean() / 255 + len(t) for p, t in zip(image_paths, prompts)]  # noqa: B905
            return torch.tensor([[m, 1.0] for m in mu])  # mu, sigma

    module = types.ModuleType("hpsv3")
    module.HPSv3RewardInferencer = HPSv3RewardInferencer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hpsv3", module)
    reward = build_reward("hpsv3", path="w.safetensors")
    assert reward.package.made_with == ("cpu", "w.safetensors")  # type: ignore[attr-defined]
    expected = 10 * tm.images().mean(dim=(1, 2, 3)) + torch.tensor([len(p) for p in tm.PROMPTS])
    torch.testing.assert_close(tm.score(reward), expected, rtol=1e-5, atol=1e-4)
    tm.check_reward(reward, tolerance=1e-4)
    with pytest.raises(UserError, match="retries: is for an endpoint"):
        build_reward("hpsv3", retries=3)
