"""`completion`: commands, flags, models and files that the Tab key completes, by argcomplete."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from typing import Any

from mlx_sora.cli.flags import Parser

SHELLS = ("bash", "zsh", "fish")

#: Names of the program that shells complete.
PROGRAMS = ("mlx_sora", "mlx-sora")

#: Metavars of values that are the paths of files or folders.
_PATHS = ("FILE", "PATH", "VIDEO", "FOLDER", "DST")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="let the Tab key complete commands, flags, models and files",
        description="Print what lets a shell complete mlx_sora. For bash and zsh, put "
        'eval "$(mlx_sora completion zsh)" into ~/.bashrc or ~/.zshrc (there behind compinit); '
        "for fish: mlx_sora completion fish > ~/.config/fish/completions/mlx_sora.fish",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the code of a shell and return 0."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(PROGRAMS, True, args.shell))
    return 0


def complete_words(parser: Parser, **more: Any) -> None:
    """End the process with completions if a shell asks for them. more: for argcomplete."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    for command in _parsers(parser):
        command.show_all()
        for action in command._actions:
            if action.choices is None and action.nargs != 0:
                action.completer = _completer(action)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, **more)


def _parsers(parser: Parser) -> Iterator[Parser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)


def _completer(action: argparse.Action) -> Any:
    """Return the completer of an action's values."""
    from argcomplete.completers import (
        ChoicesCompleter,
        DirectoriesCompleter,
        FilesCompleter,
    )

    from mlx_sora.geometry import RESOLUTIONS, aspect_ratios
    from mlx_sora.loading.model_folder import MODEL_NAMES
    from mlx_sora.memory.profiles import PROFILES

    names: dict[str, Iterable[str]] = {
        "resolution": RESOLUTIONS,
        "refine": RESOLUTIONS,
        "aspect_ratio": aspect_ratios(),
        "device_profile": PROFILES,
    }
    metavar = action.metavar[0] if isinstance(action.metavar, tuple) else action.metavar
    if action.dest in names:
        return ChoicesCompleter(dict.fromkeys(names[action.dest], ""))
    if metavar in ("MODEL", "SRC"):
        folders = DirectoriesCompleter()
        return lambda prefix, **_: [*MODEL_NAMES, *folders(prefix)]
    # SuppressCompleter would leave out the flag itself.
    return FilesCompleter() if metavar in _PATHS else ChoicesCompleter({})
