"""The command line of the reward server."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gardo.argument_parser import ArgumentParser
from gardo.rewards.serve.token import TOKEN_VARIABLE, read_token
from gardo.types import UserError


def parser() -> argparse.ArgumentParser:
    """The options of ``python -m gardo.rewards.serve``."""
    options = ArgumentParser(
        prog="python -m gardo.rewards.serve",
        description="Serve rewards over HTTP, for runs with rewards.servers in their recipe.",
        allow_abbrev=False,
    )
    add = options.add_argument
    add("--rewards", required=True, metavar="NAMES", help="names or Python paths: geneval,ocr")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=18085, help="port, 0 for a free one (default: 18085)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where rewards run")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="a parameter of a reward, as in rewards.parameters; may be repeated",
    )
    add("--token-env", default=TOKEN_VARIABLE, help=f"variable with the token ({TOKEN_VARIABLE})")
    add("--token-file", type=Path, help="file with the token; wins over the variable")
    add("--max-body-mb", type=float, default=256.0, help="largest body in MiB (256)")
    add("--max-images", type=int, default=256, help="most images of a request (256)")
    add("--max-side", type=int, default=4096, help="largest side of an image in pixels (4096)")
    add("--max-pending", type=int, default=4096, help="most images that wait per reward (4096)")
    add("--max-wait-ms", type=float, default=5.0, help="longest wait for a fuller batch in ms (5)")
    return options


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the server until it is interrupted; a user's mistake is one message and exit code 2."""
    try:
        serve(parser().parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # the way to stop it
        sys.exit(0)
    sys.exit(0)


def serve(options: argparse.Namespace) -> None:
    """Bind, load the rewards and answer until a signal comes.

    Raises:
        UserError: a wrong option, an address that cannot be bound, a reward that cannot be built.
    """
    names = [name.strip() for name in options.rewards.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(f"--rewards: expected different names, got '{options.rewards}'")
    parameters = _parameters(options.set, names)
    for name in ("max_body_mb", "max_images", "max_side", "max_pending"):
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected > 0, got {value}")
    if not 0 <= options.max_wait_ms < math.inf:
        raise UserError(f"--max-wait-ms: expected >= 0, got {options.max_wait_ms}")
    token = read_token(options.token_env, options.token_file)
    if token is None and not is_loopback(options.host):
        raise UserError(
            f"--host: '{options.host}' can be reached from other machines, so a bearer token is "
            f"needed: put it into ${options.token_env} or a file (--token-file)"
        )
    try:
        import fastapi  # noqa: F401  # asked for here, used by the application
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError(
            f"the reward server needs the package '{error.name}': pip install 'gardo[serve]'"
        ) from None

    listener = _bind(options.host, options.port)
    from gardo.rewards.serve.app import create_app
    from gardo.rewards.serve.protocol import Limits
    from gardo.rewards.serve.service import Service

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    limits = Limits(int(options.max_body_mb * 2**20), options.max_images, options.max_side)
    service = Service(
        names,
        parameters,
        _device(options.device),
        max_wait=options.max_wait_ms / 1000,
        max_pending=options.max_pending,
    )

    def give_up() -> None:
        server.should_exit = True

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service, limits, token, give_up),
            http="h11",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=10,
            timeout_keep_alive=75,  # longer than clients keep idle connections
        )
    )
    address = f"[{options.host}]" if ":" in options.host else options.host
    port = listener.getsockname()[1]
    print(f"serving {', '.join(names)} on http://{address}:{port}", file=sys.stderr, flush=True)
    with listener:
        server.run(sockets=[listener])
    if isinstance(service.failure, UserError):
        raise service.failure
    if service.failure is not None:
        raise RuntimeError("a reward could not be built") from service.failure


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parameters(settings: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    from gardo.config.loading import parse_value

    parameters: dict[str, dict[str, Any]] = {}
    for setting in settings:
        target, equals, value = setting.partition("=")
        name, dot, key = target.rpartition(".")
        if not (equals and dot and key):
            raise UserError(f"--set: expected NAME.KEY=VALUE, got '{setting}'")
        if name not in names:
            raise UserError(f"--set: '{name}' is not among the rewards ({', '.join(names)})")
        parameters.setdefault(name, {})[key] = parse_value(value)
    return parameters


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise UserError(f"--port: expected 0 to 65535, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def _device(name: str) -> Any:
    import torch

    from gardo.distributed.process import resolve_device

    return torch.device(resolve_device(name))
