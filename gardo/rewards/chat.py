"""A client of OpenAI-compatible chat endpoints (vLLM, SGLang, ...) for questions about images."""

from __future__ import annotations

import base64
import io
import os
import random
import time
from typing import Any

from torch import Tensor

from gardo.rewards.base import RewardUnavailable
from gardo.types import UserError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds between two attempts; doubled each time."""
_PASSING = (408, 429, 500, 502, 503, 504)


class ChatClient:
    """Asks one question about one image at a time; safe to call from several threads."""

    def __init__(
        self,
        reward: str,
        url: str,
        model: str,
        timeout: float = 60.0,
        retries: int = 4,
        api_key_env: str | None = None,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        """Prepare requests; nothing is sent yet.

        Args:
            reward: name in messages.
            url: base URL that ``/chat/completions`` is appended to.
            model: name of the model at the endpoint.
            timeout: seconds for one answer.
            retries: further attempts after a failure that may pass.
            api_key_env: environment variable that holds the key, or None.
            first_pause: seconds before the first further attempt.

        Raises:
            UserError: httpx is missing, or the variable is not set.
            ValueError: no HTTP URL, or a number out of range.
        """
        try:
            import httpx
        except ModuleNotFoundError:
            raise UserError(
                f"reward '{reward}': needs the package 'httpx': pip install 'gardo[rewards]'"
            ) from None
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http:// or https://, got {url!r}")
        if "@" in url.split("/")[2]:
            raise ValueError("url: expected no user and password in it (for a key: api_key_env)")
        if not timeout > 0:
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
        if retries < 0:
            raise ValueError(f"retries: expected at least 0, got {retries}")
        key = os.environ.get(api_key_env) if api_key_env else None
        if api_key_env and not key:
            raise UserError(f"reward '{reward}': the environment variable {api_key_env} is not set")
        if key and not all("!" <= c <= "~" for c in key):  # never shown: only what is wrong with it
            raise UserError(
                f"reward '{reward}': expected one word of printable ASCII characters in the "
                f"environment variable {api_key_env}"
            )
        self._key = key
        self.reward, self.model, self.retries = reward, model, retries
        self.first_pause = first_pause
        self.url = url.rstrip("/") + "/chat/completions"
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout,
            limits=httpx.Limits(max_connections=None),
            # no proxy stands between a machine and itself
            trust_env=httpx.URL(url).host not in ("127.0.0.1", "localhost", "::1"),
        )

    def ask(self, question: str, png: bytes, max_tokens: int) -> str:
        """The model's answer, decoded greedily.

        Raises:
            RewardUnavailable: no answer after all attempts.
            UserError: the endpoint refuses the request, or what it sends is no chat completion.
        """
        picture = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": question},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                pause = min(self.first_pause * 2 ** (attempt - 1), LONGEST_PAUSE)
                time.sleep(pause * random.uniform(0.5, 1.0))  # not all threads at the same time
            answer, problem = self._attempt(body)
            if answer is not None:
                return answer
        raise RewardUnavailable(
            self.reward,
            f"no answer from {self.url} after {self.retries + 1} attempts ({problem}); is the "
            "endpoint running?",
        )

    def _attempt(self, body: dict[str, Any]) -> tuple[str | None, str]:
        """The answer, or None and what went wrong but may pass."""
        import httpx

        try:
            response = self._client.post(self.url, json=body)
        except httpx.TransportError as error:
            return None, f"{type(error).__name__} {error}".strip()
        if response.status_code in _PASSING:
            return None, f"status {response.status_code}"
        if response.status_code != 200:
            raise UserError(
                f"reward '{self.reward}': {self.url} refuses with status {response.status_code}: "
                f"{self._shown(response.text)}"
            )
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            answer = None
        if not isinstance(answer, str):
            raise UserError(
                f"reward '{self.reward}': expected a chat completion from {self.url}, got "
                f"{self._shown(response.text)!r}"
            )
        return answer, ""

    def _shown(self, text: str) -> str:
        """The beginning of an answer, without the key, which an endpoint may repeat."""
        return (text.replace(self._key, "***") if self._key else text)[:300]


def encode_png(pixels: Tensor) -> bytes:
    """A PNG file of ``[H, W, 3]`` uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
