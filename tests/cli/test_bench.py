"""`bench memory`, in real processes and with invented measurements."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.cli.bench import measure as measuring
from mlx_sora.cli.bench import memory
from mlx_sora.cli.bench.measure import ChildFailed, Measurement, measure
from mlx_sora.cli.bench.memory import draw_memory
from mlx_sora.cli.flags import Parser, add_request_flags, explicit_options
from mlx_sora.cli.main import main
from mlx_sora.errors import UsageError
from mlx_sora.manage.machine_file import machine_identity, write_speeds
from mlx_sora.request.generation import to_command_line
from tests.helpers.speeds import SPEEDS

COMMAND = [sys.executable, "-m", "mlx_sora", "bench", "memory"]
BENCH = ["bench", "memory", "--model", "shapes"]
IMAGE = ["--num-frames", "1", "--steps", "2", "--width", "32", "--height", "32"]
MB = 10**6


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Generations and pictures take no time; which flags were commands for."""
    commands: list[Sequence[str]] = []

    def fake_measure(words: Sequence[str]) -> Measurement:
        commands.append(words)
        stages = {"encode": 0.5, "denoise": 2.0, "decode": 1.0}
        stream = {"denoise": {"resident": 1, "blocks": 4, "bytes_read": 5 * MB}}
        budgeted = "--memory-budget=off" not in words
        return Measurement(3.5, 4.0, 150 * MB, 20 * MB, stages, stream if budgeted else {})

    monkeypatch.setattr(memory, "measure", fake_measure)
    monkeypatch.setattr(memory, "draw_memory", lambda result, path: path.write_bytes(b"a picture"))
    return commands


def smallest() -> int:
    request = GenerationRequest("a", output="video.mp4")
    return Pipeline.from_pretrained("shapes").plan(request).smallest


def test_bench_measures_in_new_processes(folder: Path) -> None:
    budget = 400 * MB
    words = ["--budgets", "100MB,400MB", *IMAGE, "-o", "results/here"]
    run = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    table = run.stdout.splitlines()
    assert [row.split()[0] for row in table] == [
        *("budget", "none", "100", "400", "results/here/memory.json", "results/here/memory.png")
    ]
    assert "refused" in table[2]
    result = json.loads((folder / "results/here/memory.json").read_text())
    free, refused, bounded = result["rows"]
    assert refused["measured"] is None
    assert [row["budget"] for row in (free, refused, bounded)] == [None, 100 * MB, budget]
    assert 50 * MB < bounded["measured"]["peak"] <= budget
    assert set(bounded["measured"]["stages"]) == {"encode", "denoise", "decode"}
    assert 0 < bounded["measured"]["seconds"] < bounded["measured"]["wall"]
    assert bounded["measured"]["processor"] > 0
    assert bounded["measured"]["stream"]["denoise"]["blocks"] == 4
    assert free["measured"]["stream"] == {}
    assert 0 < free["measured"]["mlx_peak"] < free["measured"]["peak"]
    assert (result["settings"]["steps"], result["settings"]["width"]) == (2, 32)
    with Image.open(folder / "results/here/memory.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert sorted(path.name for path in folder.rglob("*.*")) == ["memory.json", "memory.png"]


def test_default_budgets_span_the_possible_range(
    folder: Path, commands: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BENCH, "--steps", "3", "--tdtm", "2", "--sequential-guidance"]) == 0
    words = [word for command in commands for word in command if "memory-budget" in word]
    unbounded, *budgets = (word.split("=")[1] for word in words)
    assert len(commands) == len(words)
    assert unbounded == "off"
    assert len(budgets) == memory.NUM_BUDGETS
    options = {"steps": 3, "tdtm": "2", "sequential_guidance": True, "output": "video.mp4"}
    plan = Pipeline.from_pretrained("shapes").plan(GenerationRequest("a", **options))
    assert plan.smallest <= int(budgets[0]) < plan.smallest + MB
    assert all(
        {"--steps=3", "--tdtm=2", "--sequential-guidance"} <= set(words) for words in commands
    )
    row = capsys.readouterr().out.splitlines()[2]
    assert row.split()[2:6] == ["3.50", "0.50", "2.00", "1.00"]
    assert row.split()[-6:] == ["1", "of", "4", "5", "MB", "-"]


def test_estimates_stand_beside_measurements(
    folder: Path,
    commands: list[Sequence[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLX_SORA_CACHE", str(folder))
    write_speeds(replace(SPEEDS, machine=machine_identity()))
    assert main([*BENCH, "--budgets", "1GB"]) == 0
    estimated = [
        row["estimated"] for row in json.loads((folder / "bench/memory.json").read_text())["rows"]
    ]
    assert all(value > 0 for value in estimated)
    table = capsys.readouterr().out.splitlines()
    assert table[0].endswith("estimated")
    assert [float(row.split()[-1]) for row in table[1:3]] == estimated


def test_default_budgets_are_evenly_spaced() -> None:
    assert memory.evenly_spaced_budgets(281_400_000, 315_000_000) == [
        n * MB for n in (282, 290, 298, 307, 315)
    ]
    assert memory.evenly_spaced_budgets(10**9, 16 * 10**9) == [n * 10**9 for n in (1, 2, 4, 8, 16)]
    assert memory.evenly_spaced_budgets(300 * MB, 200 * MB) == [300 * MB]


def test_budget_below_the_smallest_is_refused(
    folder: Path, commands: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    least = smallest()
    assert main([*BENCH, "--budgets", f"{least},{least - 1},{least}"]) == 0
    rows = json.loads((folder / "bench/memory.json").read_text())["rows"]
    assert [row["measured"] is None for row in rows] == [False, True, False]
    assert f"smallest possible budget is {-(-least // MB)} MB" in rows[1]["reason"]
    assert "refused" in capsys.readouterr().out


def test_budget_beyond_the_machine_is_not_run(
    folder: Path, commands: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    least = smallest()
    monkeypatch.setattr("mlx_sora.runtime.device.total_memory", lambda: least)
    assert main([*BENCH, "--budgets", str(least)]) == 0
    result = json.loads((folder / "bench/memory.json").read_text())
    free, bounded = result["rows"]
    assert free["measured"] is None
    assert "not run" in free["reason"]
    assert bounded["measured"] is not None
    assert len(commands) == 1
    draw_memory(result, folder / "picture")
    assert (folder / "picture").read_bytes().startswith(b"\x89PNG")


def test_chart_is_left_out_without_matplotlib(
    folder: Path,
    commands: list[Sequence[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    assert main([*BENCH, "--budgets", "1GB"]) == 0
    captured = capsys.readouterr()
    assert 'pip install "mlx_sora[bench]"' in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out.splitlines()[1].startswith("none")
    assert [path.name for path in (folder / "bench").iterdir()] == ["memory.json"]


def test_results_are_replaced_only_with_overwrite(
    folder: Path, commands: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bench").mkdir()
    for name in ("memory.json", "memory.png"):
        (folder / "bench" / name).write_text("precious")
        assert main([*BENCH, "--budgets", "1GB"]) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert (folder / "bench" / name).read_text() == "precious"
    assert commands == []
    assert main([*BENCH, "--budgets", "1GB", "--overwrite"]) == 0
    assert json.loads((folder / "bench/memory.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--budgets", "3 parsecs"], "3.3GB"),
        (["--budgets", "1GB,,2GB"], "not an amount"),
        (
            ["--memory-budget", "1GB"],
            "It is an option of generate, edit",
        ),
        (["--budgetss", "1GB"], "--budgets"),
        (["--num-frames", "5"], "17"),
        (["-o", "file/below"], "not a folder"),
    ],
    ids=str,
)
def test_usage_errors_are_one_line(
    folder: Path,
    commands: list[Sequence[str]],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    (folder / "file").touch()
    assert main([*BENCH, *words]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert commands == []
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_missing_bench_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert main(["bench", "memory2"]) == 2
    assert "memory" in capsys.readouterr().err


def test_failed_generation_fails_the_bench_with_its_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ChildFailed, match=r"gone.*") as error:
        measure(["-p", "a", "--model", "gone"])
    assert error.value.exit_code == 4

    def failing(words: Sequence[str]) -> Measurement:
        raise error.value

    monkeypatch.setattr(memory, "measure", failing)
    assert main([*BENCH, "--budgets", "1GB"]) == 4
    assert "gone" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_child_error_without_an_event() -> None:
    assert "signal 9" in measuring._child_error(-9, "", "").message
    assert measuring._child_error(1, "", "some\nlast line\n").message == "last line"


def test_interrupt_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def popen(*words: object, **more: object) -> subprocess.Popen[str]:
        started.append(real(*words, **more))  # type: ignore[call-overload]
        return started[0]

    def interrupt(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(measuring._ChildMonitor, "handle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(["-p", "a", "--model", "shapes", "--steps", "1000"])
    assert started[0].returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupt_leaves_no_file(folder: Path, number: signal.Signals) -> None:
    words = [*COMMAND, "--steps", "1000", "--budgets", "1GB"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # the heading: the first child is about to start
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted."
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "--a 'b' =c"},
        {"prompt": "a", "steps": 3, "guidance": 2.5, "sequential_guidance": True},
        {"prompt": "a", "embed_metadata": False, "num_frames": "2s", "aspect_ratio": "16:9"},
        {"prompt": "a", "images": [["a.png"], ["b.png", "-1", "0.5"]]},
    ],
    ids=str,
)
def test_command_line_round_trips(options: dict[str, object]) -> None:
    parser = Parser()
    add_request_flags(parser, "generate")
    assert explicit_options(parser.parse_args(to_command_line(options))) == options


def test_parse_budgets() -> None:
    assert memory.parse_budgets("3.3GB,2GB,2000MB") == [2 * 10**9, 3_300_000_000]
    with pytest.raises(UsageError):
        memory.parse_budgets("")
