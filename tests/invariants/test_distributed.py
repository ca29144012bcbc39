"""Several ranks compute what one process computes, over loopback."""

from __future__ import annotations

import itertools
import json
import socket
from typing import Any

import pytest

from mlx_sora.distributed.partition import split_evenly
from tests.helpers.ranks import launch
from tests.helpers.tolerance import rounding

#: In standard deviations: products of fewer rows may be added up in another order.
TOLERANCE = rounding(1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_evaluations_on_ranks_match_one_process(ranks: int) -> None:
    made = launch(ranks, ["-m", "tests.helpers.programs.forward_on_ranks"])
    assert made.codes == [0] * ranks, made.stderr
    found = json.loads(made.stdout)
    for name, case in found[0].items():
        assert max(each[name]["difference"] for each in found) < TOLERANCE, name
        assert max(each[name]["sent"] for each in found) == case["estimated"], name
        messages = [each[name]["messages"] for each in found]
        assert messages == [case["estimated messages"]] * ranks, name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Results of runs_on_ranks, by rank."""
    folder = tmp_path_factory.mktemp("shared")
    made = launch(2, ["-m", "tests.helpers.programs.runs_on_ranks", str(folder)])
    assert made.codes == [0, 0], made.stderr
    return json.loads(made.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["sequence", "windows"])
@pytest.mark.parametrize("case", ["started by two", "started by one"])
def test_a_run_resumes_on_another_number_of_ranks(
    runs: list[dict[str, dict[str, Any]]], case: str, mode: str
) -> None:
    found = runs[0][f"{case}, {mode}"]
    assert found["steps"] == 1
    # A window is evaluated whole, as by one process.
    assert found["difference"] <= (0 if mode == "windows" else TOLERANCE)


def test_an_error_on_one_rank_is_raised_on_all(runs: list[dict[str, dict[str, Any]]]) -> None:
    messages = [found["failing"]["message"] for found in runs]
    where = f"Rank 1 on {socket.gethostname()} ended with an error: "
    assert messages == [f"{where}It went wrong. Mend it.", "It went wrong. Mend it."]


def test_rank_0_decides_for_all(runs: list[dict[str, dict[str, Any]]]) -> None:
    notes = [found["rank 0 decides"]["shared"] for found in runs]
    assert notes[0] == notes[1] == runs[0]["rank 0 decides"]["single"]
    assert "leapt to the end" in str(notes)
    assert "; 0 saved" not in str(notes)


def test_videos_on_two_ranks_match_one_process(
    runs: list[dict[str, dict[str, Any]]],
) -> None:
    for rank, everything in enumerate(runs):
        found = {name: case for name, case in everything.items() if "notes equal" in case}
        assert len(found) == 19
        for name, case in found.items():
            assert case["difference"] <= (0 if name.endswith(", windows") else TOLERANCE), name
            assert case["notes equal"], name
            # Pixels are rounded, so a tiny difference may change one. Only rank 0 has frames.
            assert (case["frames"] is None) == (rank > 0), name
            assert (case["frames"] or 0) <= 1, name
            assert case["parallel"] == {"ranks": 2, "mode": name.rpartition(", ")[2]}


@pytest.mark.parametrize("stride", [1, 2])
def test_split_evenly_covers_all_once(stride: int) -> None:
    for total, parts in itertools.product(range(1, 20), range(1, 9)):
        runs = split_evenly(total, parts, stride)
        own = list(dict.fromkeys(runs))
        assert len(runs) == parts
        assert [i for run in own for i in run] == list(range(total))
        assert all(run.start % stride == 0 for run in own)
        lengths = [len(run) // stride for run in own]
        assert max(lengths) - min(lengths) <= 1
