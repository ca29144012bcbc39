"""The command line: run a command, and turn every failure into one line and an exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from mlx_sora import __version__
from mlx_sora.cli import (
    bench,
    calibrate,
    completion,
    convert,
    doctor,
    download,
    edit,
    generate,
    info,
    models,
    reconstruct,
    serve,
)
from mlx_sora.cli.awake import stay_awake
from mlx_sora.cli.flags import Parser, parse_args
from mlx_sora.cli.streams import prepare_streams
from mlx_sora.distributed.launch import launch_backend, launch_rank
from mlx_sora.errors import (
    INTERRUPTED,
    MAX_MESSAGE,
    MlxSoraError,
    RankLostError,
    UsageError,
    printable,
)
from mlx_sora.runtime.compile_cache import ensure_compile_cache
from mlx_sora.utils.leftovers import signals_as_exceptions, sweep_temporary_folders

COMMANDS = (
    *(generate, edit, reconstruct, serve, download, convert, models),
    *(doctor, info, bench, calibrate, completion),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    0 success, 1 failed run, 2 usage, 3 memory, 4 weights, 130 interrupted.
    """
    prepare_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["help"]:  # mlx_sora help [COMMAND]
        argv = [*argv[1:], "--help"]
    debug = "--debug" in argv
    try:
        parser = build_parser()
        completion.complete_words(parser)
        args = parse_args(parser, argv)
        if launch_backend() is not None and not hasattr(args, "parallel_run"):
            raise UsageError(
                f"{argv[0]} runs in one process, not in several.", "Start it without mlx.launch."
            )
        with (
            signals_as_exceptions(lambda number: KeyboardInterrupt()),
            log_to_stderr(args),
            stay_awake(args),
        ):
            ensure_compile_cache()
            sweep_temporary_folders()
            return int(args.run(args))
    except MlxSoraError as error:
        if debug:
            traceback.print_exc()
        _report_error(error, argv)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        if launch_backend() is None:
            _print_error(f"interrupted. {interrupt}".strip(), INTERRUPTED, argv)
        elif launch_rank() == 0:
            text = f"Rank 0 on {socket.gethostname()} was interrupted. {interrupt}"
            _print_error(text.strip(), INTERRUPTED, argv)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader is gone. Without this, the interpreter fails again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        text = f"{type(error).__name__}: {reason} Add --debug for a traceback."
        plain = MlxSoraError(text)
        plain.on_rank = getattr(error, "on_rank", "")
        _report_error(plain, argv)
        return 1


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="mlx_sora",
        description="Text to video with Open-Sora 1.2 on Apple MLX.",
        epilog="mlx_sora COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mlx_sora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


@contextmanager
def log_to_stderr(args: argparse.Namespace) -> Iterator[None]:
    """Send the log of the package to stderr inside the block, at the level of the flags."""
    level = logging.WARNING
    if launch_rank():
        level = logging.CRITICAL
    elif getattr(args, "verbose", False):
        level = logging.INFO
    elif getattr(args, "quiet", False):
        level = logging.ERROR
    logger, handler = logging.getLogger("mlx_sora"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLineFormatter())
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _OneLineFormatter(logging.Formatter):
    """Log messages in one line, without control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _report_error(error: MlxSoraError, argv: Sequence[str]) -> None:
    """Print an error, on one of several ranks."""
    if isinstance(error, RankLostError):
        if error.reported:  # on stderr, at once
            _print_event(error.flag_text, error.exit_code, argv)
        return
    if launch_rank() != 0:
        from mlx_sora.distributed.watchdog import launched_watchdog

        watchdog = launched_watchdog()
        if watchdog is not None and watchdog.leave(error):
            return
    named = error.flag_text
    if error.on_rank:
        named = f"{error.on_rank} ended with an error: {named}"
    _print_error(named, error.exit_code, argv)


def _print_error(message: str, code: int, argv: Sequence[str]) -> None:
    """Print one line on stderr, and an event if --json-events is given."""
    message = printable(message, 2 * MAX_MESSAGE)
    _print_event(message, code, argv)
    with suppress(OSError):  # the terminal is gone
        print(f"error: {message}", file=sys.stderr, flush=True)


def _print_event(message: str, code: int, argv: Sequence[str]) -> None:
    if "--json-events" in argv:
        with suppress(OSError):
            print(json.dumps({"event": "error", "message": message, "exit_code": code}), flush=True)
