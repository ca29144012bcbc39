"""Flags made from the fields of GenerationRequest, and requests made from flags."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mlx_sora.errors import UsageError, shell_words
from mlx_sora.request.generation import GenerationRequest, options, options_of, preset_values
from mlx_sora.request.options import Option
from mlx_sora.request.presets import PRESETS

#: Giving one of these drops the other set from a replayed record.
_NAMED_SIZE, _PIXELS = {"resolution", "aspect_ratio"}, {"width", "height"}

#: Characters read from standard input.
MAX_STDIN = 1_000_000

#: Options that a preset may have filled in, which another preset replaces.
_PRESET_OPTIONS = {name for preset in PRESETS for name in preset_values(preset)}


class Parser(argparse.ArgumentParser):
    """argparse with errors as UsageErrors, hints for misspelt flags, and help in two levels."""

    def __init__(self, **more: Any) -> None:
        super().__init__(allow_abbrev=False, **more)
        self._argv: list[str] = []
        #: Help of the flags that only --help-all shows.
        self._advanced: dict[argparse.Action, str | None] = {}

    def hide(self, *actions: argparse.Action) -> None:
        """Leave flags to --help-all."""
        if not self._advanced:
            self.add_argument("--help-all", action=_HelpAll, help="show all options and exit")
        for action in actions:
            self._advanced[action], action.help = action.help, argparse.SUPPRESS
        self.epilog = f"{len(self._advanced)} more options: {self.prog} --help-all"

    def show_all(self) -> None:
        """Put hidden flags back into the help."""
        for action, text in self._advanced.items():
            action.help = text
        self.epilog = None

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        self._argv = list(sys.argv[1:] if args is None else args)
        found: argparse.Namespace = super().parse_args(self._argv, namespace)
        return found

    def error(self, message: str) -> NoReturn:
        raise UsageError(message + ".", self._hint(message))

    def _hint(self, message: str) -> str:
        parser = self
        for word in self._argv:
            parser = parser._commands().get(word, parser)
        see = f"See {parser.prog} --help."
        wrong = re.match(r"unrecognized arguments: (\S+)", message)
        if not wrong:
            return near_choice(message) or see
        flag = wrong[1].partition("=")[0]
        own = parser._visible_flags()
        if not flag.startswith("-"):
            if "--prompt" not in own:
                return see
            if {"--prompt", "-p"} & set(self._argv):
                return (
                    "Put text in quotes; leave out Open-Sora's config, and the number of --verbose."
                )
            return f"Give the prompt so: --prompt {shell_words(message.partition(': ')[2])}"
        near = difflib.get_close_matches(flag, own, n=1, cutoff=0.7)
        parsers = self._commands().items()
        if others := [name for name, each in parsers if flag in each._option_string_actions]:
            return f"It is an option of {', '.join(others)}. {see}"
        return f"Did you mean {near[0]}?" if near else see

    def _visible_flags(self) -> list[str]:
        visible = (a for a in self._actions if a.help != argparse.SUPPRESS or a in self._advanced)
        return [flag for action in visible for flag in action.option_strings]

    def _commands(self) -> dict[str, Parser]:
        """Return the parsers of the commands by name."""
        found = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return dict(found[0].choices) if found else {}


def near_choice(message: str) -> str:
    """Return the choice that argparse's message about an invalid one may have meant, if any."""
    refused = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    names = re.findall(r"[\w.:-]+", refused[2]) if refused else []
    near = difflib.get_close_matches(refused[1].lower(), names, n=1) if refused else []
    return f"Did you mean {near[0]}?" if near else ""


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **more)

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        assert isinstance(parser, Parser)
        parser.show_all()
        parser.print_help()
        parser.exit()


def add_quiet_flag(parser: argparse._ActionsContainer) -> None:
    """Add --quiet."""
    parser.add_argument("--quiet", action="store_true", help="print only the path")


def add_prompts_flag(parser: argparse._ActionsContainer, text: str) -> None:
    """Add --prompt of a command that calibrates, as list `prompts`. text: its help."""
    parser.add_argument(
        "--prompt", "-p", action="append", default=[], dest="prompts", metavar="TEXT", help=text
    )


def add_debug_flag(parser: argparse._ActionsContainer) -> argparse.Action:
    """Add --debug, which `cli.main` reads."""
    return parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )


def add_request_flags(parser: Parser, task: str) -> None:
    """Add a flag for each option of `task`. A flag that is not typed is absent from the namespace.

    Options that are not common are shown by --help-all only.
    """
    groups: dict[str, Any] = {}
    for name, option in options_of(task).items():
        if option.python_only:
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        several = task == "generate" and name == "prompt"
        action = _add_flag(groups[option.group], name, option, several=several)
        if not option.common:
            parser.hide(action)


def explicit_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were typed, by field name. `seed` is a list, and so are prompts.

    A prompt of "-" is read from standard input.
    """
    typed = {name: value for name, value in vars(args).items() if name in options()}
    if isinstance(typed.get("prompt"), list):
        prompts = _read_prompts(typed["prompt"])
        typed["prompt"] = prompts if len(prompts) > 1 else prompts[0]
    if typed.get("prompt") == "-":
        if "MLX_RANK" in os.environ:
            raise UsageError(
                "--prompt - does not work with mlx.launch, which never ends standard input.",
                "Give the text itself, or a file with --prompt-file.",
            )
        if sys.stdin.isatty():
            raise UsageError("--prompt - reads standard input, which is a terminal.", "Pipe it in.")
        typed["prompt"] = _read_stdin()
    return typed


def build_requests(
    typed: dict[str, Any], recorded: dict[str, Any] | None = None
) -> list[GenerationRequest]:
    """Return a validated request for each seed. Typed options override recorded ones."""
    base = dict(recorded or {})
    if typed.keys() & _NAMED_SIZE:
        base = {name: value for name, value in base.items() if name not in _PIXELS}
    if typed.keys() & _PIXELS:
        base = {name: value for name, value in base.items() if name not in _NAMED_SIZE}
    if "preset" in typed:
        base = {name: value for name, value in base.items() if name not in _PRESET_OPTIONS}
    if typed.get("prompt", base.get("prompt")) != base.get("prompt"):
        base.pop("original_prompt", None)
    seeds = typed.get("seed", [base.get("seed")])
    requests = [GenerationRequest.from_dict(base | typed | {"seed": seed}) for seed in seeds]
    for request in requests:
        request.validate()
    return requests


def argument_type(option: Option) -> Callable[[str], Any]:
    """Return the reader of the option with its errors in the form of argparse."""

    def parse(text: str) -> Any:
        try:
            return option.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {error}, not {text[:80]!r}") from None

    return parse


def _add_flag(group: Any, name: str, option: Option, *, several: bool) -> Any:
    """Add the flag of an option to a group. several: each use may have several values."""
    more: dict[str, Any]
    if isinstance(option.default, bool):
        more = {"action": "store_false" if option.default else "store_true"}
    elif option.many:
        first, rest = option.metavar.split(" ", 1)
        more = {"nargs": "+", "action": "append", "metavar": (first, rest[1:-1])}
    else:
        more = {"type": argument_type(option), "metavar": option.metavar or None}
        more["choices"] = option.choices or None
    text = option.flag_help.replace("%", "%%")
    if name == "seed":
        more["nargs"], text = "+", text + "; several make several videos"
    if several:
        more |= {"nargs": "+", "action": "append"}
        text += "; several make several videos"
    return group.add_argument(
        *option.typed_flags, dest=name, default=argparse.SUPPRESS, help=text, **more
    )


def _read_prompts(uses: Sequence[Sequence[str]]) -> list[str]:
    """Return the prompts of all uses of --prompt. Raises UsageError for words without quotes."""
    for words in uses:
        if len(words) > 1 and not all(" " in word.strip() for word in words):
            raise UsageError(
                f"--prompt has {len(words)} texts, and some are single words: "
                f"{shell_words(*words)[:80]}.",
                "Put each prompt in quotes, or write --prompt before each.",
            )
    prompts = [prompt for words in uses for prompt in words]
    if len(prompts) > 1 and "-" in prompts:
        raise UsageError("--prompt - cannot be one of several prompts.", "Use --prompt-file.")
    return prompts


def _read_stdin() -> str:
    try:
        text = sys.stdin.read(MAX_STDIN + 1)
    except UnicodeDecodeError:
        raise UsageError("The prompt on standard input is not valid UTF-8.") from None
    if len(text) > MAX_STDIN:
        raise UsageError(f"Standard input has over {MAX_STDIN} characters.", "Give one prompt.")
    return text.strip()


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed arguments. Without a command, print the help and raise UsageError."""
    args = parser.parse_args(argv)
    if getattr(args, "run", None) is None:
        parser.print_help(sys.stderr)
        raise UsageError("No command given.", f"For instance: {parser.prog} generate --help.")
    return args
