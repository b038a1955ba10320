"""A reward that is scored by one or several servers (``python -m gardo.rewards.serve``).

What can pass (no connection, no answer in time, status 408, 429, 502, 503 or 504) is tried on the
next server and, after all of them, again with growing pauses. Where a server answers but cannot
score some images, only these are missing. A request that is refused is a mistake and ends the run.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from torch import Tensor

from gardo.config.schema import RewardClientConfig
from gardo.rewards.base import Reward, RewardSpec, RewardUnavailable
from gardo.rewards.outputs import concatenate, missing
from gardo.rewards.serve import protocol
from gardo.rewards.serve.token import read_token
from gardo.types import RewardOutput, UserError

_log = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0
"""Seconds; pauses between rounds do not grow beyond it, and so long a failed server comes last."""
CHUNK_BYTES = 64 * 2**20
"""Images of a request are at most this much, and at least one image."""
PROMPTS_PER_CHECK = 1000
_PASSING = (408, 429, 502, 503, 504)


class _Passing(Exception):
    """A failure that a later attempt may not have."""


class _CannotScore(Exception):
    """A live server that cannot score these images."""


class RemoteReward(Reward):
    """Scores by asking servers; several share the work and stand in for each other.

    Args:
        name: under which the servers know the reward.
        servers: base URLs.
        config: timeouts, retries, encoding, token.
        parameters: with which the servers must have built the reward.

    Raises:
        UserError: a server that refuses the token, does not know the reward, has other parameters
            or is no reward server; the package httpx is missing.
        RewardUnavailable: no server can be reached, or none is ready after
            ``config.startup_timeout`` seconds.
    """

    def __init__(
        self,
        name: str,
        servers: Sequence[str],
        config: RewardClientConfig,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise UserError(
                f"rewards.servers.{name}: needs the package 'httpx': pip install 'gardo[rewards]'"
            ) from None
        self.name = name
        self._servers = [server.rstrip("/") for server in servers]
        self._config = config
        self._token = token = read_token(config.token_env, config.token_file)
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(config.timeout, connect=config.connect_timeout),
            trust_env=False,  # reward servers are near: no proxies
        )
        self._failed_at = dict.fromkeys(self._servers, float("-inf"))
        self._path = quote(name, safe="")
        self._max_images, self._max_bytes = 2**31, 2**63  # until the servers tell
        self._stop = threading.Event()
        self.spec = self._introduce(parameters or {})  # type: ignore[misc]  # the server's

    # --- scoring

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """See `Reward.score`. Raises `RewardUnavailable` when all servers stay down."""
        size, stop = self._chunk_size(images), self._stop
        chunks = [slice(i, i + size) for i in range(0, len(images), size)]

        def ask(number: int) -> RewardOutput:
            rows = chunks[number]
            return self._score_chunk(number, images[rows], prompts[rows], metadata[rows], stop)

        if len(chunks) == 1:
            outputs = [ask(0)]
        else:
            with ThreadPoolExecutor(len(self._servers)) as threads:
                outputs = list(threads.map(ask, range(len(chunks))))
        return concatenate(outputs).map(lambda values: values.to(images.device))

    def _chunk_size(self, images: Tensor) -> int:
        share = -(-len(images) // len(self._servers))
        one = max(images[:1].numel() * images.element_size(), 1)
        by_bytes = max(1, min(CHUNK_BYTES, self._max_bytes // 2) // one)
        return max(1, min(share, by_bytes, self._max_images))

    def _score_chunk(
        self,
        number: int,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        stop: threading.Event,
    ) -> RewardOutput:
        try:
            body, kind = protocol.encode_request(images, prompts, metadata, self._config.encoding)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward '{self.name}': metadata must be JSON values: {error}"
            ) from None
        try:
            answer = self._ask_any(f"/v1/score/{self._path}", body, kind, len(images), number, stop)
        except _CannotScore as error:
            _log.warning("reward '%s': %d images are missing: %s", self.name, len(images), error)
            return missing(len(images))
        return protocol.scores_from_json(answer, len(images))

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> str | None:
        return self.check_prompts([prompt], [metadata])[0]

    def check_prompts(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[str | None]:
        problems: list[str | None] = []
        for start in range(0, len(prompts), PROMPTS_PER_CHECK):
            rows = slice(start, start + PROMPTS_PER_CHECK)
            texts = list(prompts[rows])
            request = {"prompts": texts, "metadata": [dict(m) for m in metadata[rows]]}
            try:
                body = protocol.to_json(request)
                path = f"/v1/check/{self._path}"
                answer = self._ask_any(path, body, protocol.JSON, None, 0, self._stop)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"reward '{self.name}': metadata must be JSON values: {error}"
                ) from None
            except _CannotScore as error:
                raise RewardUnavailable(self.name, str(error)) from None
            found = answer.get("problems")
            if not isinstance(found, list) or len(found) != len(texts):
                raise UserError(f"reward '{self.name}': its server gave no answer about prompts")
            problems += [None if problem is None else str(problem) for problem in found]
        return problems

    def interrupt(self) -> None:
        """End the retries of calls under way: they fail after their present attempt."""
        self._stop.set()
        self._stop = threading.Event()

    # --- asking

    def _ask_any(
        self,
        path: str,
        body: bytes,
        kind: str,
        count: int | None,
        first: int,
        stop: threading.Event,
    ) -> dict[str, Any]:
        """Ask the servers in turn, in several rounds; ``count`` scores are expected if not None."""
        problems: dict[str, str] = {}
        unable: dict[str, str] = {}
        rounds = self._config.retries + 1
        for round_number in range(rounds):
            for server in self._in_order(first):
                if server in unable or stop.is_set():
                    continue
                try:
                    return self._ask(server, path, body, kind, count)
                except _Passing as error:
                    self._failed_at[server] = time.monotonic()
                    problems[server] = str(error)
                    _log.warning("reward '%s': %s: %s", self.name, server, error)
                except _CannotScore as error:
                    unable[server] = str(error)
            if unable or stop.is_set():
                break
            if round_number + 1 < rounds:
                pause = min(self._config.backoff * 2**round_number, LONGEST_PAUSE)
                stop.wait(pause * random.uniform(0.5, 1.0))  # not all clients at the same time
        if unable:
            raise _CannotScore("; ".join(f"{s}: {e}" for s, e in unable.items()))
        found = "; ".join(f"{s}: {e}" for s, e in problems.items()) or "interrupted"
        raise RewardUnavailable(
            self.name, f"no server answers after {rounds} rounds of attempts ({found})"
        )

    def _in_order(self, first: int) -> list[str]:
        """Servers beginning with the ``first``, those that failed a moment ago at the end."""
        first %= len(self._servers)
        turned = [*self._servers[first:], *self._servers[:first]]
        now = time.monotonic()
        return sorted(turned, key=lambda server: now - self._failed_at[server] < LONGEST_PAUSE)

    def _ask(
        self, server: str, path: str, body: bytes | None, kind: str, count: int | None
    ) -> dict[str, Any]:
        """One attempt: the answer's JSON object."""
        import httpx

        try:
            if body is None:
                response = self._client.get(server + path)
            else:
                headers = {"Content-Type": kind}
                response = self._client.post(server + path, content=body, headers=headers)
        except httpx.RequestError as error:
            raise _Passing(f"{type(error).__name__} {error}".strip()) from None
        status = response.status_code
        try:
            answer = protocol.parse_json(response.content)
            if status == 200 and count is not None:
                protocol.scores_from_json(answer, count)
        except (protocol.ProtocolError, ValueError) as error:
            if status == 200:  # not what was asked for: perhaps another server does better
                raise _CannotScore(f"unexpected answer: {error}") from None
            answer = {}
        if status == 200:
            return answer
        text = self._shown(f"status {status}: {answer.get('error', response.reason_phrase)}")
        if status in _PASSING:
            raise _Passing(text)
        if status >= 500:
            raise _CannotScore(text)
        raise UserError(f"reward '{self.name}': {server} refuses with {text}")

    def _shown(self, text: str) -> str:
        """A server's words: one line, not too long, without the token, which it may repeat."""
        if self._token:
            text = text.replace(self._token, "***")
        return "".join(c if c.isprintable() else " " for c in text)[:500]

    # --- the first contact

    def _introduce(self, parameters: Mapping[str, Any]) -> RewardSpec:
        """Wait for the servers that are loading, check all that answer, and take their limits."""
        deadline = time.monotonic() + self._config.startup_timeout
        attempts = 0
        while True:
            known, problems = self._ask_all()
            attempts += 1
            loading = any("status 503" in problem for problem in problems.values())
            patience = loading or attempts <= self._config.retries
            if known or not patience or time.monotonic() > deadline:
                break
            time.sleep(min(self._config.backoff, 2.0))
        found = "; ".join(f"{server}: {problem}" for server, problem in problems.items())
        if not known:
            raise RewardUnavailable(self.name, f"no server is ready ({found})")
        if problems:
            _log.warning("reward '%s': not all servers are ready (%s)", self.name, found)
        specs = [self._read_introduction(server, answer) for server, answer in known.items()]
        if len(set(specs)) > 1:
            raise UserError(f"reward '{self.name}': its servers describe it differently: {specs}")
        if parameters:
            for server in known:
                self._check_parameters(server, parameters)
        return specs[0]

    def _check_parameters(self, server: str, parameters: Mapping[str, Any]) -> None:
        path, body = f"/v1/parameters/{self._path}", protocol.to_json(parameters)
        try:
            different = self._ask(server, path, body, protocol.JSON, None).get("different")
        except (_Passing, _CannotScore) as error:
            raise RewardUnavailable(self.name, f"{server}: {error}") from None
        if different:
            raise UserError(
                f"rewards.parameters.{self.name}: {server} was started with other values of "
                f"{', '.join(map(str, different))}; start it with the recipe's (--set "
                f"{self.name}.KEY=VALUE)"
            )

    def _ask_all(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """What each server serves, and the problems with those that do not answer."""
        known, problems = {}, {}
        for server in self._servers:
            try:
                known[server] = self._ask(server, "/v1/rewards", None, "", None)
            except (_Passing, _CannotScore) as error:
                problems[server] = str(error)
        return known, problems

    def _read_introduction(self, server: str, answer: dict[str, Any]) -> RewardSpec:
        rewards, limits = answer.get("rewards"), answer.get("limits")
        if not isinstance(rewards, dict) or not isinstance(limits, dict):
            raise UserError(f"rewards.servers.{self.name}: {server} is no reward server")
        if self.name not in rewards:
            raise UserError(
                f"rewards.servers.{self.name}: {server} does not serve it, but "
                f"{', '.join(map(str, rewards))}"
            )
        try:
            self._max_images = min(self._max_images, int(limits["images"]))
            self._max_bytes = min(self._max_bytes, int(limits["body_bytes"]))
            return protocol.spec_from_json(rewards[self.name])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"rewards.servers.{self.name}: {server} describes it wrongly: {error}"
            ) from None
