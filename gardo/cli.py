"""What all entry points share: arguments to a configuration, errors to exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gardo.argument_parser import ArgumentParser
from gardo.config import (
    Config,
    iter_keys,
    load_config,
    on_resume,
    recipe_description,
    recipe_names,
    type_name,
)
from gardo.distributed.signals import STOPPED, Stopped, leave
from gardo.types import UserError

if TYPE_CHECKING:  # not needed for --help
    from gardo.checkpointing.resume import ResumePoint

DONE, FAILED, USER_ERROR = 0, 1, 2


@dataclass(frozen=True)
class Arguments:
    """A parsed command line: the configuration and what to do with it.

    Attributes:
        resume: whether ``--resume`` was given.
        resume_point: the checkpoint to go on from; None if there is none yet.
    """

    config: Config
    print_config: bool
    resume: bool = False
    resume_point: ResumePoint | None = None


def parse(
    argv: Sequence[str], program: str, description: str, resumable: bool = False
) -> Arguments | None:
    """Parse ``[RECIPE] [--config FILE] [--KEY VALUE ...]``, if ``resumable`` with ``--resume``.

    Returns None when ``--list`` printed what was asked for. ``--help`` exits by itself.

    Raises:
        UserError: unknown option, recipe or key, wrong value, nothing to resume where a path says
            so, or a run to resume that has other settings.
    """
    parser = ArgumentParser(
        prog=program,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=keys_help(),
    )
    parser.add_argument(
        "recipe",
        nargs="?",
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
    known = {"--config": 1, "--list": 0, "--print-config": 0, "--help": 0, "-h": 0}
    if resumable:
        parser.add_argument(
            "--resume",
            metavar="auto|PATH",
            help="go on with the run in output_dir, if there is one (auto, the default), or with "
            "that of a run folder or checkpoint, by its own settings where no RECIPE is given",
        )
        known["--resume"] = 0
    positional, overrides = _split(argv, known)
    options = parser.parse_args(positional)
    if options.list:
        names = recipe_names()
        width = max(map(len, names)) + 2
        for name in names:
            print(f"{name:<{width}}{recipe_description(name)}")
        return None
    if resumable and options.resume is not None:
        return _resume(options, overrides)
    config = load_config(options.recipe or "tiny", options.config, overrides)
    return Arguments(config, options.print_config)


def _resume(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> Arguments:
    """Find the checkpoint and load the configuration to go on with."""
    from gardo.checkpointing import resume

    given = dict(overrides)
    if given.get("overwrite", "false").lower() == "true":
        raise UserError("--resume: goes on with a run, which --overwrite true would delete")
    if options.resume == "auto":
        config = load_config(options.recipe or "tiny", options.config, overrides)
        point = resume.find_in_output_dir(config, tell)
        if point is None:
            tell(f"nothing to resume in '{config.output_dir}': starting from the beginning")
    else:
        point = resume.find_resume_point(Path(options.resume).expanduser(), tell)
        recipe = options.recipe or str(point.checkpoint.path / "config.yaml")
        config = load_config(recipe, options.config, overrides)
        asked = Path(config.output_dir).expanduser()
        if "output_dir" in given and asked.resolve() != point.folder.resolve():
            raise UserError(
                f"output_dir: --resume goes on in the run's own folder '{point.folder}', "
                f"got '{asked}'"
            )
        config = config.model_copy(update={"output_dir": str(point.folder)})
    if point is not None:
        for key in resume.check_resumable(point, config):
            tell(f"{key} differs from the run's: results are equal up to rounding")
    return Arguments(config, options.print_config, True, point)


def tell(text: str) -> None:
    """Print a line for the user; of several processes only the first one does."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


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
            if name == "--resume":  # its value may be left out
                if not equals and (not rest or rest[0].startswith("--")):
                    own[-1] = "--resume=auto"
                elif not equals:
                    own[-1] = f"--resume={rest.pop(0)}"
            elif name in known and not equals:
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
    lines = [
        "keys (defaults of the schema; recipes set their own). One that is not said to change",
        "nothing or rounding on resume changes results, and a run goes on with the value it has:",
    ]
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
        effect = on_resume(field)
        resume = "" if effect == "results" else f"; on resume changes {effect}"
        lines.append(f"    --{dotted} {type_name(field.annotation)}  (default: {shown}{resume})")
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
    except Stopped as stopped:
        tell(str(stopped))
        code = STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = FAILED
    except BrokenPipeError:  # such as `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    leave(code)
