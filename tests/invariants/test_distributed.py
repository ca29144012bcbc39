"""Evaluations that ranks make together are those of one process, over loopback."""

from __future__ import annotations

import itertools
import json

import pytest

from mlx_sora.runtime.parallel import cut
from tests.launching import launch

#: In standard deviations: products of fewer rows may be added up in another order.
TOLERANCE = 1e-5


@pytest.mark.parametrize("ranks", [2, 4])
def test_together_as_alone(ranks: int) -> None:
    made = launch(ranks, ["-m", "tests.invariants.shared_evaluations"])
    assert [each.returncode for each in made] == [0] * ranks, [each.stderr for each in made]
    for each in made:
        found = json.loads(each.stdout)
        assert {name: case["difference"] < TOLERANCE for name, case in found.items()} == (
            dict.fromkeys(found, True)
        ), found
        sent = {name: case["sent"] for name, case in found.items()}
        assert sent == {name: case["foretold"] for name, case in found.items()}


@pytest.mark.parametrize("stride", [1, 2])
def test_cuts_cover_everything_once_and_evenly(stride: int) -> None:
    for total, parts in itertools.product(range(1, 20), range(1, 9)):
        runs = cut(total, parts, stride)
        own = list(dict.fromkeys(runs))
        assert len(runs) == parts
        assert [i for run in own for i in run] == list(range(total))
        assert all(run.start % stride == 0 for run in own)
        lengths = [len(run) // stride for run in own]
        assert max(lengths) - min(lengths) <= 1
