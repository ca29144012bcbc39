"""`bench link` measures what ranks reach, in the words that `generate --dry-run` understands."""

from __future__ import annotations

import re

import pytest

from mlx_sora.cli.main import main
from mlx_sora.distributed.cost_model import read_chip, read_link
from tests.helpers.ranks import launch


def test_two_ranks_over_loopback() -> None:
    first, second = launch(2, ["-m", "mlx_sora", "bench", "link", "--runs", "1"])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    found = re.search(r"^--ranks 2 --link (\S+) --chip (\S+)$", first.stdout, re.MULTILINE)
    assert found, first.stdout
    assert read_link(found[1]).bandwidth > 1e6
    assert read_chip(found[2]).flops > 1e8


@pytest.mark.parametrize(
    ("words", "line"), [((), "A link has two ends. Run: mlx.launch"), (("--runs", "0"), "--runs 0")]
)
def test_what_cannot_be_measured(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "link", *words]) == 2
    assert line in capsys.readouterr().err
