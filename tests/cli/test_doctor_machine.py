"""`doctor --machine`: a table, JSON, and exit code 4 where something is wrong."""

from __future__ import annotations

import json

import pytest

from mlx_sora.cli.main import main
from mlx_sora.manage import machine_report
from mlx_sora.manage.machine_check import CheckResult
from mlx_sora.manage.machine_report import MachineReport

OK = CheckResult("rope, float32", "ok", "error 1.0e-07", 1e-7, 1e-6, 0.25)
SLOW = CheckResult("SiLU, float16", "slow", "takes 3 s", 1e-4, 1e-3, 3.0, "Update MLX.")
WRONG = CheckResult("GELU, float16", "wrong", "NaN or Inf", None, 1e-3, 0.5, "Use float32.")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[CheckResult]:
    """The results that the command shows."""
    shown = [OK, SLOW]
    monkeypatch.setattr(machine_report, "CHECKS", {"all": lambda _: iter(shown)})
    monkeypatch.setattr(MachineReport, "_measure", lambda self, on_progress: iter(()))
    return shown


def test_a_row_says_what_is_slow_and_what_to_do(
    results: list[CheckResult], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--machine"]) == 0
    first, second, summary = capsys.readouterr().out.splitlines()
    assert first.split() == ["ok", "rope,", "float32", "0.25", "s", "error", "1.0e-07"]
    assert second.startswith("SLOW")
    assert second.endswith("takes 3 s. Update MLX.")
    assert summary == "1 ok, 0 skipped, 1 slow, 0 wrong."


def test_exit_code_4_where_something_is_wrong(results: list[CheckResult]) -> None:
    results.append(WRONG)
    assert main(["doctor", "--machine"]) == 4


def test_json_is_one_object_for_a_bug_report(
    results: list[CheckResult],
    capsys: pytest.CaptureFixture[str],
) -> None:
    results.append(WRONG)
    assert main(["doctor", "--machine", "--json"]) == 4
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["results"] == [result.to_dict() for result in results]
    assert report["results"][2] == {
        "name": "GELU, float16",
        "status": "wrong",
        "message": "NaN or Inf",
        "error": None,
        "bound": 1e-3,
        "seconds": 0.5,
        "advice": "Use float32.",
    }
    assert {"backend", "device", "memory", "versions", "mlx_switches"} <= report["machine"].keys()
    assert "WRONG" in printed.err


@pytest.mark.parametrize("more", [["shapes"], ["--quick"], ["shapes", "--quick"]])
def test_a_machine_is_no_model(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--machine", *more]) == 2
    assert capsys.readouterr().err == (
        "error: --machine checks this machine, not a model. Leave MODEL and --quick out.\n"
    )


def test_a_model_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "shapes", "--quick", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert {result["level"] for result in results} <= {"ok", "note"}
    assert {"folder", "transformer", "machine"} <= {result["subject"] for result in results}
