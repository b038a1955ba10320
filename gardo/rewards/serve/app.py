"""The HTTP side of a reward server: who may ask, how much, and which status answers what.

| status | why |
|---|---|
| 400 | a body that cannot be parsed |
| 401, 403 | no bearer token, a wrong one |
| 404 | a reward that is not served |
| 408 | a body that does not arrive in time |
| 413 | body, number or size of images over the limit |
| 415 | a content type that is neither safetensors nor JSON |
| 422 | parsed, but with wrong values |
| 500 | the reward raised on every image of the request |
| 503 | loading, overloaded or shutting down; ``Retry-After`` is set |
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gardo.rewards.serve.protocol import (
    JSON,
    SAFETENSORS,
    Limits,
    ProtocolError,
    decode_request,
    parse_json,
    read_prompts,
    scores_to_json,
    spec_to_json,
)
from gardo.rewards.serve.service import Service

BODY_SECONDS = 60.0
"""A body that has not arrived after this time is given up."""
BODIES_IN_MEMORY = 4
"""Bodies of the largest size that may be held at once; further requests are refused with 503."""


def create_app(
    service: Service, limits: Limits, token: str | None, failed: Callable[[], None]
) -> FastAPI:
    """The application.

    Args:
        service: the rewards; started and stopped with the application.
        limits: what a request may bring.
        token: the bearer token that every request but ``/health`` needs; None for none.
        failed: called when a reward cannot be built.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        building = service.start()
        building.add_done_callback(lambda _: failed() if service.failure is not None else None)
        yield
        await service.stop()

    # no generated documentation: its pages load scripts from elsewhere
    app = FastAPI(openapi_url=None, lifespan=lifespan)
    bodies = _Bodies(limits.body_bytes)

    @app.exception_handler(ProtocolError)
    async def refuse(request: Request, error: ProtocolError) -> Response:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
        return JSONResponse({"error": str(error)}, error.status, headers.get(error.status))

    @app.exception_handler(HTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.get("/health")
    async def health() -> Response:
        rewards = {n: "ready" if n in service.batchers else "loading" for n in service.names}
        status = "ready" if service.ready else "loading"
        return JSONResponse({"status": status, "rewards": rewards}, 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _authorise(request, token)
        return PlainTextResponse(
            metrics_text(service), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get("/v1/rewards")
    async def rewards(request: Request) -> Response:
        _authorise(request, token)
        if not service.ready:
            raise ProtocolError(503, "still loading")
        return JSONResponse(
            {
                "rewards": {n: spec_to_json(b.reward.spec) for n, b in service.batchers.items()},
                "limits": {"body_bytes": limits.body_bytes, "images": limits.images},
            }
        )

    @app.post("/v1/score/{name}")
    async def score(name: str, request: Request) -> Response:
        _authorise(request, token)
        batcher = service.batcher(name)
        try:
            kind = _content_type(request, (SAFETENSORS, JSON))
            async with bodies.of(request) as body:
                decoded = await asyncio.to_thread(decode_request, body, kind, limits)
                output = await batcher.score(decoded)
        except ProtocolError as error:
            batcher.stats.count(error.status)
            raise
        batcher.stats.count(200)
        return JSONResponse(scores_to_json(output))

    @app.post("/v1/parameters/{name}")
    async def parameters(name: str, request: Request) -> Response:
        _authorise(request, token)
        _content_type(request, (JSON,))
        async with bodies.of(request) as body:
            different = service.different_parameters(name, parse_json(body))
        return JSONResponse({"different": different})

    @app.post("/v1/check/{name}")
    async def check(name: str, request: Request) -> Response:
        _authorise(request, token)
        batcher = service.batcher(name)
        _content_type(request, (JSON,))
        async with bodies.of(request) as body:
            prompts, metadata = read_prompts(parse_json(body))
        return JSONResponse({"problems": await batcher.check(prompts, metadata)})

    return app


def _authorise(request: Request, token: str | None) -> None:
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise ProtocolError(401, "expected a bearer token")
    if not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise ProtocolError(403, "wrong bearer token")


def _content_type(request: Request, expected: tuple[str, ...]) -> str:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in expected:
        raise ProtocolError(415, f"content type: expected {' or '.join(expected)}, got '{given}'")
    return given


class _Bodies:
    """Reads bodies, each and all together of limited size."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._free = BODIES_IN_MEMORY * largest

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request; its memory counts until the block is left."""
        length = request.headers.get("content-length", "")
        size = int(length) if length.isdecimal() else self._largest
        if size > self._largest:
            raise self._too_large()
        if size > self._free:
            raise ProtocolError(503, "overloaded: too many requests at once")
        self._free -= size
        try:
            try:
                body = await asyncio.wait_for(self._read(request), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise ProtocolError(408, "the body did not arrive in time") from None
            except ClientDisconnect:
                raise ProtocolError(400, "the client went away") from None
            yield body
        finally:
            self._free += size

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._largest:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ProtocolError:
        return ProtocolError(413, f"body: expected at most {self._largest} bytes")


_METRICS = (
    ("requests_total", "counter", "Answered requests to score."),
    ("images_total", "counter", "Images scored, with those that could not be."),
    ("missing_total", "counter", "Images that could not be scored."),
    ("batches_total", "counter", "Batches scored."),
    ("batch_seconds_total", "counter", "Time spent on batches."),
    ("pending_images", "gauge", "Images that wait or are being scored."),
)


def metrics_text(service: Service) -> str:
    """The counters in the text format of Prometheus."""
    values: dict[str, list[str]] = {name: [] for name, *_ in _METRICS}
    for name, batcher in service.batchers.items():
        stats, label = batcher.stats, f'reward="{_escape(name)}"'
        values["requests_total"] += [
            f'{{{label},status="{status}"}} {count}' for status, count in stats.requests.items()
        ]
        for key, value in (
            ("images_total", stats.images),
            ("missing_total", stats.missing),
            ("batches_total", stats.batches),
            ("batch_seconds_total", stats.seconds),
            ("pending_images", stats.pending),
        ):
            values[key].append(f"{{{label}}} {value}")
    lines = [
        "# HELP gardo_reward_ready Whether all rewards are loaded.",
        "# TYPE gardo_reward_ready gauge",
        f"gardo_reward_ready {int(service.ready)}",
    ]
    for name, kind, meaning in _METRICS:
        lines += [f"# HELP gardo_reward_{name} {meaning}", f"# TYPE gardo_reward_{name} {kind}"]
        lines += [f"gardo_reward_{name}{value}" for value in values[name]]
    return "\n".join(lines) + "\n"


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
