"""`bench link` prints flags that `generate --dry-run` reads."""

from __future__ import annotations

import re

import pytest

from mlx_sora.cli.main import main
from mlx_sora.distributed.cost_model import parse_chip, parse_link
from tests.helpers.ranks import launch


def test_bench_link_measures_two_ranks() -> None:
    made = launch(2, ["-m", "mlx_sora", "bench", "link", "--runs", "1"])
    assert made.codes == [0, 0], made.stderr
    (found,) = re.findall(r"^--ranks 2 --link (\S+) --chip (\S+)$", made.stdout, re.MULTILINE)
    assert parse_link(found[0]).bandwidth > 1e6
    assert parse_chip(found[1]).flops > 1e8


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "bench link needs at least two ranks. Run: mlx.launch"),
        (("--runs", "0"), "--runs must be at least 1, got 0."),
    ],
)
def test_bench_link_refuses_one_rank_and_no_runs(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "link", *words]) == 2
    assert line in capsys.readouterr().err
