"""`bench`: measurements of a model on this machine, one sub-command and one file each."""

from __future__ import annotations

from typing import Any

from mlx_sora.cli.bench import link, memory

BENCHES = (memory, link)


def add_parser(commands: Any) -> None:
    """Register the command and its sub-commands."""
    parser = commands.add_parser(
        "bench",
        help="measure a model on this machine",
        description="Measure a model on this machine. Each bench prints a table and writes it as "
        "JSON and as a picture.",
    )
    benches = parser.add_subparsers(title="benches", metavar="BENCH", required=True)
    for bench in BENCHES:
        bench.add_parser(benches)
