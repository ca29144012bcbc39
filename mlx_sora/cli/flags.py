"""Turns the fields of `GenerationRequest` into flags, and flags back into requests."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from mlx_sora.errors import UsageError
from mlx_sora.request.generation import GenerationRequest, options, preset_values
from mlx_sora.request.options import Option
from mlx_sora.request.presets import PRESETS

#: Asking for one of these drops the other set from a replayed record.
_NAMED_SIZE, _PIXELS = {"resolution", "aspect_ratio"}, {"width", "height"}

#: Characters read from standard input.
MAX_STDIN = 1_000_000

#: Options that a preset may have filled in, which another preset replaces.
_PRESET_OPTIONS = {name for preset in PRESETS for name in preset_values(preset)}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors, with the nearest flag for a misspelt one."""

    def __init__(self, **more: Any) -> None:
        super().__init__(allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message + ".", self._hint(message))

    def _hint(self, message: str) -> str:
        wrong = re.match(r"unrecognized arguments: (-[^\s=]+)", message)
        if wrong:
            # What is spelt well belongs to another command.
            flags = [flag for flag in self._all_flags() if flag != wrong[1]]
            near = difflib.get_close_matches(wrong[1], flags, n=1, cutoff=0.7)
            if near:
                return f"Did you mean {near[0]}?"
        return f"See {self.prog} --help."

    def _all_flags(self) -> list[str]:
        """Flags of this parser and of its commands."""
        found = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    found += parser._all_flags()
        return found


def add_quiet_flag(parser: argparse._ActionsContainer) -> None:
    """Say nothing while working."""
    parser.add_argument("--quiet", action="store_true", help="print nothing but the path")


def add_debug_flag(parser: argparse._ActionsContainer) -> None:
    """Show where an error comes from; `cli.main` reads it."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_request_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """One flag per field, but for those in `without`.

    A flag that is not given leaves no trace in the namespace.
    """
    groups: dict[str, Any] = {}
    defaults = {f.name: f.default for f in fields(GenerationRequest)}
    for name, option in options().items():
        if not option.flags or name in without:
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        group = groups[option.group]
        _add_flag(group, name, option, defaults[name])


def explicit_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the user typed, by field name; `seed` is a list, and a prompt of "-" is read."""
    typed = {name: value for name, value in vars(args).items() if name in options()}
    if typed.get("prompt") == "-":
        if sys.stdin.isatty():
            raise UsageError("--prompt - reads standard input, which is a terminal.", "Pipe it in.")
        typed["prompt"] = _read_stdin()
    return typed


def as_words(values: Mapping[str, Any]) -> list[str]:
    """The flags that `explicit_options` would read these values from."""
    words = []
    for name, value in values.items():
        flag = options()[name].flags[0]
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif options()[name].many:
            words += [word for item in value for word in (flag, *map(str, item))]
        else:
            words.append(f"{flag}={value}")
    return words


def build_requests(
    typed: dict[str, Any], recorded: dict[str, Any] | None = None
) -> list[GenerationRequest]:
    """One validated request per seed (None: none is known); typed options override recorded."""
    base = dict(recorded or {})
    if typed.keys() & _NAMED_SIZE:
        base = {name: value for name, value in base.items() if name not in _PIXELS}
    if typed.keys() & _PIXELS:
        base = {name: value for name, value in base.items() if name not in _NAMED_SIZE}
    if "preset" in typed:
        base = {name: value for name, value in base.items() if name not in _PRESET_OPTIONS}
    values = base | typed
    seeds = typed.get("seed", [base.get("seed")])
    requests = []
    for seed in seeds:
        request = GenerationRequest.from_dict(values | {"seed": seed})
        request.validate()
        requests.append(request)
    return requests


def seeded(request: GenerationRequest, index: int) -> GenerationRequest:
    """The request with a seed: its own, that of the checkpoint that it left, or drawn."""
    if request.checkpoint_every is None:
        return request.with_seed()
    from mlx_sora.pipeline.resume import with_seed

    return with_seed(request, index)


def _add_flag(group: Any, name: str, option: Option, default: Any) -> None:
    text = option.help.replace("%", "%%")
    common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
    if isinstance(default, bool):
        if default:
            off = [f"--no-{flag.removeprefix('--')}" for flag in option.flags]
            common["help"] = f"do not {text}"
            group.add_argument(*off, action="store_false", **common)
        else:
            group.add_argument(*option.flags, action="store_true", **common)
        return
    if option.many:
        first, rest = option.metavar.split(" ", 1)
        more = {"nargs": "+", "action": "append", "metavar": (first, rest[1:-1])}
        group.add_argument(*option.flags, **more, **common)
        return
    if name == "seed":
        common |= {"nargs": "+", "help": text + "; several make several videos"}
    group.add_argument(
        *option.flags,
        type=_parser_of(option),
        choices=option.choices or None,
        metavar=option.metavar or None,
        **common,
    )


def _parser_of(option: Option) -> Callable[[str], Any]:
    """The option's parser, with its complaint in argparse's form."""

    def parse(text: str) -> Any:
        try:
            return option.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {error}, not {text[:80]!r}") from None

    return parse


def _read_stdin() -> str:
    try:
        text = sys.stdin.read(MAX_STDIN + 1)
    except UnicodeDecodeError:
        raise UsageError("The prompt on standard input is not valid UTF-8.") from None
    if len(text) > MAX_STDIN:
        raise UsageError(f"Standard input has over {MAX_STDIN} characters.", "Give one prompt.")
    return text.strip()


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments; without a command, the help is shown and UsageError raised."""
    args = parser.parse_args(argv)
    if getattr(args, "run", None) is None:
        parser.print_help(sys.stderr)
        raise UsageError("No command given.", f"For instance: {parser.prog} generate --help.")
    return args
