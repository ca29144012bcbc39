"""Several ranks compute what one process computes, over loopback."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from mlx_sora.distributed.partition import split_evenly
from tests.helpers.ranks import launch

#: In standard deviations: products of fewer rows may be added up in another order.
TOLERANCE = 1e-5


@pytest.mark.parametrize("ranks", [2, 4])
def test_evaluations_on_ranks_match_one_process(ranks: int) -> None:
    made = launch(ranks, ["-m", "tests.helpers.programs.forward_on_ranks"])
    assert [each.returncode for each in made] == [0] * ranks, [each.stderr for each in made]
    found = [json.loads(each.stdout) for each in made]
    for name, case in found[0].items():
        assert max(each[name]["difference"] for each in found) < TOLERANCE, name
        assert max(each[name]["sent"] for each in found) == case["estimated"], name
        messages = [each[name]["messages"] for each in found]
        assert messages == [case["estimated messages"]] * ranks, name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What runs_on_ranks found, by rank."""
    folder = tmp_path_factory.mktemp("shared")
    made = launch(2, ["-m", "tests.helpers.programs.runs_on_ranks", str(folder)])
    assert [each.returncode for each in made] == [0, 0], [each.stderr for each in made]
    return [json.loads(each.stdout) for each in made]


@pytest.mark.parametrize("begun", ["begun by two", "begun by one"])
def test_a_run_goes_on_with_another_number_of_ranks(
    runs: list[dict[str, dict[str, Any]]], begun: str
) -> None:
    case = runs[0][begun]
    assert case["steps"] == 1
    assert case["difference"] < TOLERANCE


def test_what_fails_on_one_rank_fails_on_all(runs: list[dict[str, dict[str, Any]]]) -> None:
    told = [found["failing"]["message"] for found in runs]
    assert told == ["rank 1: It went wrong. Mend it.", "It went wrong. Mend it."]


def test_what_the_first_rank_sees_decides(runs: list[dict[str, dict[str, Any]]]) -> None:
    told = [found["of two minds"]["together"] for found in runs]
    assert told[0] == told[1] == runs[0]["of two minds"]["alone"]
    assert "leapt to the end" in str(told)
    assert "; 0 saved" not in str(told)


def test_a_video_made_together_is_that_of_one_process(
    runs: list[dict[str, dict[str, Any]]],
) -> None:
    for rank, everything in enumerate(runs):
        found = {name: case for name, case in everything.items() if "done alike" in case}
        assert len(found) == 13
        for name, case in found.items():
            assert case["difference"] < TOLERANCE, name
            assert case["done alike"], name
            # Bytes are rounded: the least difference may tip one. Only the first rank has any.
            assert (case["frames"] is None) == (rank > 0), name
            assert (case["frames"] or 0) <= 1, name
            assert case["parallel"] == {"ranks": 2, "mode": name.rpartition(", ")[2]}


@pytest.mark.parametrize("stride", [1, 2])
def test_cuts_cover_everything_once_and_evenly(stride: int) -> None:
    for total, parts in itertools.product(range(1, 20), range(1, 9)):
        runs = split_evenly(total, parts, stride)
        own = list(dict.fromkeys(runs))
        assert len(runs) == parts
        assert [i for run in own for i in run] == list(range(total))
        assert all(run.start % stride == 0 for run in own)
        lengths = [len(run) // stride for run in own]
        assert max(lengths) - min(lengths) <= 1
