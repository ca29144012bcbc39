"""`bench`: measure this machine; one sub-command and one file for each bench."""

from __future__ import annotations

from typing import Any

from mlx_sora.cli.bench import link, memory

BENCHES = (memory, link)


def add_parser(commands: Any) -> None:
    """Add the command and its sub-commands."""
    text = "measure memory and speed on this machine"
    parser = commands.add_parser("bench", help=text, description=f"{text.capitalize()}.")
    benches = parser.add_subparsers(title="benches", metavar="BENCH", required=True)
    for bench in BENCHES:
        bench.add_parser(benches)
