"""The reward server as a process: what it answers, what it refuses, and that it stays alive."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import pickle
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from gardo.rewards.serve import protocol
from tests.rewards import toys
from tests.rewards.toys import toy
from tests.support import warm

TOKEN = "correct-horse"
REWARDS = ",".join([toy("corner"), toy("length"), toy("brittle"), toy("sleepy"), toy("batch_size")])
OPTIONS = "--max-body-mb 1 --max-images 8 --max-side 64 --max-pending 12 --max-wait-ms 50".split()


@pytest.fixture(scope="module")
def server():
    with toys.serving(f"{REWARDS},count", *OPTIONS, env={"GARDO_REWARD_TOKEN": TOKEN}) as server:
        wait_ready(server.url)
        yield server
        assert not any(TOKEN in line for line in server.log)


@pytest.fixture
def client(server):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as client:
        yield client
    assert server.alive
    assert httpx.get(server.url + "/health").status_code == 200


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(url + "/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def batch(count: int = 2, side: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def post(client: httpx.Client, name: str, body: bytes, kind: str) -> httpx.Response:
    return client.post(f"/v1/score/{name}", content=body, headers={"Content-Type": kind})


def ask(client, name, images, prompts=None, metadata=None, encoding="safetensors"):
    prompts = ["a"] * len(images) if prompts is None else prompts
    metadata = [{}] * len(prompts) if metadata is None else metadata
    body, kind = protocol.encode_request(images, prompts, metadata, encoding)
    return post(client, name, body, kind)


def png(mode: str = "RGB", size: tuple[int, int] = (4, 4), kind: str = "PNG") -> str:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def json_request(**changes) -> bytes:
    request = {"images": [png()], "prompts": ["a"], "metadata": [{}], **changes}
    return json.dumps({k: v for k, v in request.items() if v is not None}).encode()


# --- scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_scores_are_exact_in_every_dtype(client: httpx.Client, dtype: torch.dtype) -> None:
    images = (batch(5) * 255).round().to(dtype) if dtype == torch.uint8 else batch(5).to(dtype)
    answer = ask(client, toy("corner"), images)
    assert answer.status_code == 200
    expected = images[:, 0, 0, 0].float() / (255 if dtype == torch.uint8 else 1)
    assert torch.equal(torch.tensor(answer.json()["scores"]), expected)


def test_png_is_rounded_to_eight_bits(client: httpx.Client) -> None:
    images = batch(3)
    got = ask(client, toy("corner"), images, encoding="png").json()["scores"]
    expected = (images[:, 0, 0, 0] * 255).round() / 255
    torch.testing.assert_close(torch.tensor(got), expected, rtol=0, atol=1e-7)


def test_prompts_metadata_and_details_arrive(client: httpx.Client) -> None:
    answer = ask(client, toy("length"), batch(3), ["", "é", "abc"], [{}, {"add": 5}, {"add": 0.5}])
    assert answer.json() == {"scores": [0.0, 6.0, 3.5], "details": {}}
    answer = ask(client, toy("batch_size"), batch(3))
    assert answer.json() == {"scores": [3.0] * 3, "details": {"twice": [6.0] * 3}}


def test_an_empty_request_has_no_scores(client: httpx.Client) -> None:
    for encoding in ("safetensors", "png"):
        answer = ask(client, toy("corner"), torch.zeros(0, 3, 4, 4), [], encoding=encoding)
        assert (answer.status_code, answer.json()["scores"]) == (200, [])


def test_a_bad_image_costs_no_other_its_score(client: httpx.Client) -> None:
    images, prompts = batch(7), ["a", "b", "bad", "c", "none", "d", "bad"]
    got = ask(client, toy("brittle"), images, prompts).json()["scores"]
    expected = images[:, 0, 0, 0].tolist()
    for i in (2, 4, 6):
        expected[i] = None
    assert got == expected


def test_a_request_that_fails_as_a_whole_is_an_error(client: httpx.Client) -> None:
    answer = ask(client, toy("brittle"), batch(2), ["bad", "bad"])
    assert answer.status_code == 500
    assert "ValueError: a bad prompt" in answer.json()["error"]


def test_a_neighbours_failure_in_the_same_batch_is_not_shared(client: httpx.Client) -> None:
    def one(prompt: str) -> httpx.Response:
        return ask(client, toy("brittle"), batch(2), [prompt, prompt])

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        bad, good = threads.map(one, ["bad", "good"])
    assert bad.status_code == 500
    assert good.json()["scores"] == batch(2)[:, 0, 0, 0].tolist()


def test_requests_of_several_clients_share_a_batch(client: httpx.Client) -> None:
    def one(side: int) -> list[float]:
        return ask(client, toy("batch_size"), batch(1, side)).json()["scores"]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        # the first warms up; images of another size cannot share
        list(threads.map(one, [4] * 8))
        sizes = [s for scores in threads.map(one, [4] * 7 + [5]) for s in scores]
    assert max(sizes) > 1
    assert sizes[-1] == 1
    assert max(sizes) <= 8


def test_prompts_can_be_checked_without_images(client: httpx.Client) -> None:
    request = {"prompts": ["a cat", "two red circles"], "metadata": [{}, {}]}
    problems = client.post("/v1/check/count", json=request).json()["problems"]
    assert "a cat" in problems[0]
    assert problems[1] is None


def test_specs_and_limits_are_told(client: httpx.Client) -> None:
    answer = client.get("/v1/rewards").json()
    assert answer["limits"] == {"images": 8, "body_bytes": 2**20}
    assert answer["rewards"][toy("batch_size")] == {
        "higher_is_better": False,
        "value_range": [1.0, 8.0],
        "needs_prompt": True,
        "batch_size": 8,
        "dtype": None,
    }


def test_metrics_count_what_was_done(client: httpx.Client) -> None:
    def value(line: str) -> float:
        text = client.get("/metrics").text
        return sum(
            float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line)
        )

    name = f'{{reward="{toy("brittle")}"'
    before = {k: value(f"gardo_reward_{k}{name}") for k in ("images_total", "missing_total")}
    ask(client, toy("brittle"), batch(3), ["a", "bad", "none"])
    assert value(f"gardo_reward_images_total{name}") == before["images_total"] + 3
    assert value(f"gardo_reward_missing_total{name}") == before["missing_total"] + 2
    assert value(f"gardo_reward_pending_images{name}") == 0
    assert value("gardo_reward_ready ") == 1
    refused = f'gardo_reward_requests_total{name},status="415"'
    before_refused = value(refused)
    post(client, toy("brittle"), b"", "text/plain")
    assert value(refused) == before_refused + 1


# --- refusals, each with its own status; the fixture checks that the server lives on


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/octet-stream", 415),
        ("application/x-pickle", 415),
        ("application/python-pickle", 415),
        ("", 415),
        (protocol.JSON, 400),
        (protocol.SAFETENSORS, 400),
    ],
)
def test_pickles_are_refused_and_not_opened(
    client: httpx.Client, tmp_path: Path, kind: str, status: int
) -> None:
    marker = tmp_path / "executed"
    body = pickle.dumps(Evil(marker))
    assert post(client, toy("corner"), body, kind).status_code == status
    torch_file = io.BytesIO()
    torch.save({"images": Evil(marker)}, torch_file)
    assert post(client, toy("corner"), torch_file.getvalue(), kind).status_code == status
    assert not marker.exists()
    pickle.loads(body)  # it would have
    assert marker.exists()


def test_a_pickle_in_place_of_a_png_is_refused(client: httpx.Client, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    text = base64.b64encode(pickle.dumps(Evil(marker))).decode()
    assert (
        post(client, toy("corner"), json_request(images=[text]), protocol.JSON).status_code == 400
    )
    assert not marker.exists()


def header(value) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


META = {"request": json.dumps({"prompts": ["a"], "metadata": [{}]})}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 0),
        header(b"{"),
        header(b"[]"),
        header(b"[" * 100_000),
        header({"images": {"dtype": "F32", "shape": [1, 3, 2, 2], "data_offsets": [0, 48]}}),
        header({"__metadata__": META, "images": {"dtype": "F32", "shape": [1, 3, 2, 2]}}),
        header(
            {
                "__metadata__": META,
                "images": {"dtype": "F32", "shape": [1, 3, 2, 2], "data_offsets": [0, 48]},
            }
        ),
        save({"images": torch.zeros(1, 3, 2, 2)}),
        save({"images": torch.zeros(1, 3, 2, 2)}, metadata={"request": "{"}),
    ],
)
def test_malformed_safetensors(client: httpx.Client, body: bytes) -> None:
    answer = post(client, toy("corner"), body, protocol.SAFETENSORS)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"images": ' + b"9" * 5000 + b"}",
        json_request(images=["!!!"]),
        json_request(images=[base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()]),
        json_request(images=[png()[:60]]),
        json_request(images=[png(kind="JPEG")]),
    ],
)
def test_malformed_json_and_pngs(client: httpx.Client, body: bytes) -> None:
    assert post(client, toy("corner"), body, protocol.JSON).status_code == 400


@pytest.mark.parametrize(
    "changes",
    [
        {"images": None},
        {"images": "text"},
        {"images": [1]},
        {"prompts": None},
        {"prompts": [1]},
        {"prompts": ["a", "b"], "metadata": [{}, {}]},
        {"metadata": [1]},
        {"metadata": []},
        {"images": [png(), png(size=(5, 4))], "prompts": ["a"] * 2, "metadata": [{}] * 2},
        {"images": [png("I;16")]},
    ],
)
def test_wrong_values_in_json(client: httpx.Client, changes: dict) -> None:
    answer = post(client, toy("corner"), json_request(**changes), protocol.JSON)
    assert answer.status_code == 422, answer.text


@pytest.mark.parametrize(
    "tensors",
    [
        {"images": torch.zeros(3, 2, 2)},
        {"images": torch.zeros(1, 4, 2, 2)},
        {"images": torch.zeros(1, 3, 2, 0)},
        {"images": torch.zeros(1, 3, 2, 2, dtype=torch.int64)},
        {"images": torch.full((1, 3, 2, 2), 1.5)},
        {"images": torch.full((1, 3, 2, 2), -0.1)},
        {"pictures": torch.zeros(1, 3, 2, 2)},
        {"images": torch.zeros(1, 3, 2, 2), "more": torch.zeros(1)},
        {"images": torch.zeros(2, 3, 2, 2)},
    ],
)
def test_wrong_tensors(client: httpx.Client, tensors: dict) -> None:
    answer = post(client, toy("corner"), save(tensors, metadata=META), protocol.SAFETENSORS)
    assert answer.status_code == 422, answer.text


def test_whatever_is_too_large(client: httpx.Client) -> None:
    def status(images: torch.Tensor, encoding: str = "safetensors") -> int:
        return ask(client, toy("corner"), images, encoding=encoding).status_code

    assert status(torch.zeros(9, 3, 4, 4)) == 413  # images
    assert status(torch.zeros(9, 3, 4, 4), "png") == 413
    assert status(torch.zeros(1, 3, 65, 4)) == 413  # side
    assert status(torch.zeros(1, 3, 4, 65), "png") == 413
    bomb = json_request(images=[png(size=(20_000, 20_000), mode="L")])
    assert len(bomb) < 2**20  # small on the way, 400 megapixels when opened
    assert post(client, toy("corner"), bomb, protocol.JSON).status_code == 413
    body = json_request(prompts=["a" * 2**20])
    assert post(client, toy("corner"), body, protocol.JSON).status_code == 413  # body
    huge = b"0" * 30_000_000
    assert post(client, toy("corner"), huge, protocol.JSON).status_code == 413

    def pieces():  # without a declared length
        for _ in range(30):
            yield b"0" * 100_000

    answer = client.post(
        f"/v1/score/{toy('corner')}", content=pieces(), headers={"Content-Type": protocol.JSON}
    )
    assert answer.status_code == 413


def test_a_declared_length_is_not_believed_blindly(server, client: httpx.Client) -> None:
    head = (
        f"POST /v1/score/{toy('corner')} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    )
    head += f"Content-Type: {protocol.JSON}\r\nContent-Length: 99999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.replace("99999999999", "1000").encode() + b"{")  # and goes away


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        (f"Basic {TOKEN}", 401),
        (f"Bearer {TOKEN}x", 403),
        (f"Bearer {TOKEN[:-1]}", 403),
        ("Bearer caf\xe9", 403),
        (f"bearer {TOKEN}", 200),
    ],
)
def test_the_token_is_needed(server, authorization: str | None, status: int) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        assert ask(client, toy("corner"), batch()).status_code == status
        for path in ("/metrics", "/v1/rewards"):
            assert client.get(path).status_code == status
        assert client.get("/health").status_code == 200


def test_unknown_rewards_and_paths(client: httpx.Client) -> None:
    answer = ask(client, "os:system", batch())
    assert answer.status_code == 404
    assert "no reward 'os:system'" in answer.json()["error"]
    assert client.get("/docs").status_code == 404
    assert client.get("/openapi.json").status_code == 404
    assert client.get(f"/v1/score/{toy('corner')}").status_code == 405


def test_overload_is_refused_and_passes(client: httpx.Client) -> None:
    def one(seconds: float) -> int:
        answer = ask(client, toy("sleepy"), batch(6), metadata=[{"seconds": seconds}] * 6)
        if answer.status_code == 503:
            assert answer.headers["Retry-After"]
        return answer.status_code

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        statuses = sorted(threads.map(one, [0.5] * 4))
    assert statuses == [200, 200, 503, 503]  # 12 images may wait
    assert one(0) == 200


# --- starting and ending


def test_a_reward_that_loads_is_not_there_yet() -> None:
    rewards = f"{toy('corner')},{toy('Slow')}"
    with toys.serving(rewards, "--set", f"{toy('Slow')}.seconds=1.5") as server:
        answer = httpx.get(server.url + "/health")
        assert answer.status_code == 503
        assert answer.json()["rewards"][toy("Slow")] == "loading"
        with httpx.Client(base_url=server.url) as client:
            assert ask(client, toy("Slow"), batch()).status_code == 503
            assert client.get("/v1/rewards").headers["Retry-After"]
            wait_ready(server.url)
            assert ask(client, toy("Slow"), batch()).status_code == 200


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [warm.python(), "-m", "gardo.rewards.serve", *arguments],
        cwd=toys.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--rewards"),
        ("--rewards ,", "--rewards: expected different names"),
        ("--rewards a,a", "--rewards: expected different names"),
        ("--rewards count --host 0.0.0.0", "a bearer token is needed"),
        ("--rewards count --set judge.path=x", "'judge' is not among the rewards (count)"),
        ("--rewards count --set nonsense", "expected NAME.KEY=VALUE"),
        ("--rewards count --port 99999", "--port: expected 0 to 65535"),
        ("--rewards count --max-images 0", "--max-images: expected > 0"),
        ("--rewards count --token-file nowhere", "token file 'nowhere' cannot be read"),
        ("--rewards coumt --port 0", "did you mean 'count'?"),
        ("--rewards count --port 0 --set count.x=1", "unexpected keyword argument 'x'"),
        (f"--rewards {toy('broken')} --port 0", "weights are missing"),
    ],
)
def test_mistakes_end_with_one_message(arguments: str, message: str) -> None:
    result = run(*arguments.split())
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_and_an_unusable_token(server) -> None:
    result = run("--rewards", "count", "--port", str(server.port))
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {server.port}" in result.stderr
    result = run("--rewards", "count", env={"GARDO_REWARD_TOKEN": "two secret\nwords"})
    assert result.returncode == 2
    assert "printable ASCII" in result.stderr
    assert "secret" not in result.stderr


def test_a_signal_ends_the_server() -> None:
    with toys.serving("count", python=sys.executable) as server:
        wait_ready(server.url)
        server.process.terminate()
        assert server.wait() in (0, -15)
        assert not any("Traceback" in line for line in server.log)
