"""The report of `doctor --machine`: checks and speeds in one list, and every error a row of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sora.errors import MlxSoraError
from mlx_sora.manage import machine_report
from mlx_sora.manage.machine_check import CheckResult
from mlx_sora.manage.machine_file import machine_identity
from mlx_sora.manage.machine_report import MachineReport
from mlx_sora.manage.video_report import VideoEstimate
from mlx_sora.memory.speeds import NETWORKS, MachineSpeeds, NetworkSpeed

RESULT = CheckResult("rope, float32", "ok", "error 1.0e-07")


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> MachineSpeeds:
    """Measured speeds; there is one check."""
    networks = {name: {"float32": NetworkSpeed(1e11)} for name in NETWORKS}
    speeds = MachineSpeeds(machine_identity(), {"float32": 1e11}, 1e10, 1e9, 1e-4, networks)
    monkeypatch.setattr(machine_report, "CHECKS", {"rope": lambda _: iter([RESULT])})
    monkeypatch.setattr(machine_report, "measure_speeds", lambda on_progress: speeds)
    video = VideoEstimate("240p, 51 frames", "--vae-tiles 2", 600.0, 240.0, 5 * 10**9)
    videos = [video, VideoEstimate("720p, 51 frames")]
    monkeypatch.setattr(machine_report, "estimate_videos", lambda speeds: iter(videos))
    return speeds


def fails(error: Exception) -> Callable[..., Any]:
    """Return a function that raises `error`."""

    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_results_come_before_speeds(
    speeds: MachineSpeeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "machine.json"
    monkeypatch.setattr(machine_report, "write_speeds", lambda speeds: file)
    report = MachineReport(0.001)
    found = list(report.run())
    assert found[0] == RESULT
    assert [result.name for result in found[1:]] == [
        "speed, matrix product, float32",
        "speed, memory",
        "speed, disk",
        *(f"speed, {name.replace('_', ' ')}, float32" for name in NETWORKS),
        "machine file",
        "estimate, 240p, 51 frames",
        "estimate, 720p, 51 frames",
    ]
    assert str(file) in found[-3].message
    assert found[-2].message == "10 min, 4 min with --preset fast, 5.00 GB, needs --vae-tiles 2"
    assert (found[-1].status, found[-1].message) == ("skipped", "does not fit into this memory")
    assert report.results == found
    assert json.loads(json.dumps(report.to_dict()))["speeds"] == speeds.to_dict()


def test_an_error_of_a_check_is_a_row(
    speeds: MachineSpeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = {"rope": fails(ValueError("not\nfound")), "SiLU": lambda _: iter([RESULT])}
    monkeypatch.setattr(machine_report, "CHECKS", checks)
    wrong, right, *_ = MachineReport(0.001).run()
    assert (wrong.name, wrong.status, wrong.message) == ("rope", "wrong", "fails: not found")
    assert right == RESULT


def test_speeds_that_cannot_be_measured_are_a_row(
    speeds: MachineSpeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_report, "measure_speeds", fails(RuntimeError("no kernel")))
    report = MachineReport(0.001)
    assert list(report.run())[1:] == report.results[1:]
    assert (report.results[1].name, report.results[1].status) == ("speeds", "wrong")
    assert report.to_dict()["speeds"] is None


def test_a_machine_file_that_cannot_be_written(
    speeds: MachineSpeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = MlxSoraError("Cannot write it: disk full.", "Free space.")
    monkeypatch.setattr(machine_report, "write_speeds", fails(error))
    *_, found, _, _ = MachineReport(0.001).run()
    assert (found.name, found.status) == ("machine file", "slow")
    assert (found.message, found.advice) == (error.message, error.fix)
