"""What all entry points share: arguments to a configuration, errors to exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gardo.config import Config, iter_keys, load_config, recipe_description, recipe_names, type_name
from gardo.types import UserError

DONE, FAILED, USER_ERROR = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


@dataclass(frozen=True)
class Arguments:
    """A parsed command line: the configuration and what to do with it."""

    config: Config
    print_config: bool


def parse(argv: Sequence[str], program: str, description: str) -> Arguments | None:
    """Parse ``[RECIPE] [--config FILE] [--KEY VALUE ...]``.

    Returns None when ``--list`` printed what was asked for. ``--help`` exits by itself.

    Raises:
        UserError: unknown option, recipe or key, wrong value.
    """
    parser = _Parser(
        prog=program,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=keys_help(),
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        default="tiny",
        metavar="RECIPE",
        help="built-in recipe or path of a YAML file (default: tiny)",
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="YAML file whose keys win over the recipe's; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="list the built-in recipes")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the complete configuration as YAML and stop",
    )
    positional, overrides = _split(
        argv, {"--config": 1, "--list": 0, "--print-config": 0, "--help": 0, "-h": 0}
    )
    options = parser.parse_args(positional)
    if options.list:
        names = recipe_names()
        width = max(map(len, names)) + 2
        for name in names:
            print(f"{name:<{width}}{recipe_description(name)}")
        return None
    return Arguments(load_config(options.recipe, options.config, overrides), options.print_config)


def _split(argv: Sequence[str], known: dict[str, int]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separate the parser's own options from ``--key value`` and ``--key=value`` pairs."""
    own: list[str] = []
    pairs: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in known or not word.startswith("--"):
            own.append(word)
            if name in known and not equals:
                own += [rest.pop(0) for _ in range(min(known[name], len(rest)))]
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name}: expected a value, got none")
            value = rest.pop(0)
        pairs.append((name[2:], value))
    return own, pairs


def keys_help() -> str:
    """All configuration keys with type, default and meaning, for ``--help``."""
    lines = ["keys (defaults of the schema; recipes set their own):"]
    area = None
    for dotted, field in iter_keys():
        head = dotted.split(".")[0] if "." in dotted else "run"
        if head != area:
            area = head
            lines.append(f"\n  {area}")
        default = field.get_default(call_default_factory=True)
        shown = (
            "null"
            if default is None
            else str(default).lower()
            if isinstance(default, bool)
            else str(default)
        )
        lines.append(f"    --{dotted} {type_name(field.annotation)}  (default: {shown})")
        lines.append(f"        {field.description}")
    return "\n".join(lines)


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run an entry point; a user's mistake is one message and exit code 2."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their advice is not for our users
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = FAILED
    except BrokenPipeError:  # such as `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)
