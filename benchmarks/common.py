"""Shared by all benchmarks: flags, alternating runs, transient memory, results as JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

#: Where figures that the documentation cites are kept.
RESULTS = Path(__file__).parent / "results"

Work = Callable[[], object]


def seconds(work: Work) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(runs: int, *works: Work) -> list[tuple[float, ...]]:
    """Seconds of each work, one tuple per run; every second run goes in reverse order.

    On a busy machine only runs side by side compare: take ratios run by run, then the median.
    """
    times: list[tuple[float, ...]] = []
    for run in range(runs):
        if run % 2 == 0:
            times.append(tuple([seconds(work) for work in works]))
        else:
            times.append(tuple([seconds(work) for work in reversed(works)][::-1]))
    return times


def transient_bytes(work: Work) -> int:
    """What MLX allocates during a run at most, beyond what was there before."""
    import mlx.core as mx

    from mlx_sora.memory.limits import release

    release()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    work()
    return mx.get_peak_memory() - before


def arguments(
    doc: str, runs: int, json_file: Path | None = None, *, depth: int | None = None
) -> argparse.Namespace:
    """`--runs`, `--json` and perhaps `--depth` of a script with docstring `doc`; the defaults."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--runs", type=int, default=runs, help=f"default {runs}")
    parser.add_argument("--json", type=Path, default=json_file, help="also write the figures here")
    if depth is not None:
        parser.add_argument(
            "--depth", type=int, default=depth, help=f"block pairs; default {depth}"
        )
    return parser.parse_args()


def scored_parser(doc: str, prompts: int, json_file: Path | None = None) -> argparse.ArgumentParser:
    """`--model`, `--prompts` and `--json` of a script with docstring `doc` that scores videos."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="shapes")
    text = f"held-out prompts; default {prompts}, at most 96"
    parser.add_argument("--prompts", type=int, default=prompts, help=text)
    parser.add_argument("--json", type=Path, default=json_file, help="also write the figures here")
    return parser


def write_json(path: Path, result: Mapping[str, object]) -> None:
    """The figures, and the machine and versions they were measured with."""
    from mlx_sora.runtime.device import describe_machine

    path.write_text(json.dumps({**result, "machine": describe_machine()}, indent=2) + "\n")


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
