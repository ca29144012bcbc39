"""`generate --prompt-file`, and several seeds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.errors import MemoryBudgetError
from mlx_sora.video.metadata import read_metadata
from tests.helpers.dates import set_today
from tests.helpers.fake_pipeline import FakePipeline
from tests.unit.video.test_sequences import write_and_end

COMMAND = ["generate", "--prompt-file"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".mp4", ".png"))


def write(folder: Path, *lines: object, name: str = "many.jsonl") -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    return name


def test_text_lines_are_prompts(folder: Path, pipeline: FakePipeline) -> None:
    name = write(folder, "a cat", "", "# no prompt", '  a {"b"}  ', name="many.txt")
    assert main([*COMMAND, name, "--steps", "3"]) == 0
    assert files(folder) == ["0000-a-cat.mp4", "0001-a-b.mp4"]
    assert [(r.prompt, r.steps) for r in pipeline.requests] == [("a cat", 3), ('a {"b"}', 3)]


def test_json_lines_hold_any_option(folder: Path, pipeline: FakePipeline) -> None:
    one = {"prompt": "a", "seed": [4, 5], "num_frames": 1}
    (folder / "picture.jpg").touch()
    two = {"prompt": "b", "seed": 6, "steps": 9, "output": "own-{seed}.mp4"}
    two["images"] = ["picture.jpg"]
    assert main([*COMMAND, write(folder, one, two), "--steps", "3"]) == 0
    assert files(folder) == ["0000-a-4.png", "0001-a-5.png", "own-6.mp4"]
    assert [r.steps for r in pipeline.requests] == [3, 3, 9]
    assert pipeline.requests[2].images == (("picture.jpg", 0, 1.0),)


def test_existing_outputs_are_skipped(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(folder, {"prompt": "a"}, {"prompt": "b"})
    assert main([*COMMAND, name]) == 0
    (folder / "0000-a.mp4").unlink()
    capsys.readouterr()
    assert main([*COMMAND, name]) == 0
    assert [request.prompt for request in pipeline.requests] == ["a", "b", "a"]
    assert "skipped: 0001-b.mp4 exists already" in capsys.readouterr().err
    assert main([*COMMAND, name]) == 0
    assert len(pipeline.requests) == 3
    assert main([*COMMAND, name, "--overwrite"]) == 0
    assert len(pipeline.requests) == 5


def test_a_rerun_on_another_day_makes_only_what_is_missing(
    folder: Path, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*COMMAND, write(folder, {"prompt": "a"}, {"prompt": "b"}), "--model", "shapes"]
    words += ["-o", "{date}/{index}-{model}{{date}}.mp4"]
    set_today(monkeypatch, "2026-01-31")
    assert main(words) == 0
    first = folder / "2026-01-31"
    assert sorted(first.iterdir()) == [first / f"{i}-shapes{{date}}.mp4" for i in (0, 1)]
    (first / "0-shapes{date}.mp4").unlink()
    set_today(monkeypatch, "2026-02-01")
    assert main(words) == 0
    second = folder / "2026-02-01"
    assert sorted(second.iterdir()) == [second / "0-shapes{date}.mp4"]
    assert main([*words, "--overwrite"]) == 0
    assert len(list(second.iterdir())) == 2
    assert len(list(first.iterdir())) == 1, "another day's file is not replaced"


def test_what_is_no_finished_output_is_not_skipped(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = folder / "killed_%02d.png"
    assert write_and_end(killed, signal.SIGKILL, 1, "before") == -signal.SIGKILL
    (folder / "part_01.png").write_text("precious")
    os.mkfifo(folder / "pipe.mp4")
    names = ("killed_%02d.png", "part_%02d.png", "pipe.mp4")
    lines = [{"prompt": "a", "output": name} for name in names]
    assert main([*COMMAND, write(folder, *lines)]) == 2
    assert [request.output for request in pipeline.requests] == ["killed_%02d.png"]
    error = capsys.readouterr().err
    assert "skipped" not in error
    assert "line 2: part_01.png is part of an unfinished sequence" in error
    assert "line 3: pipe.mp4 is a pipe" in error
    assert (folder / "killed_00.png").exists()


def test_existing_output_of_another_prompt_is_an_error(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*COMMAND, write(folder, {"prompt": "a", "output": "x.mp4"})])
    assert main([*COMMAND, write(folder, {"prompt": "b", "output": "x.mp4"})]) == 2
    assert "another prompt" in capsys.readouterr().err
    assert read_metadata(folder / "x.mp4")["request"]["prompt"] == "a"


def test_dry_run_reports_errors_by_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write(folder, {"prompt": "a", "steps": 0}, {"prompt": "b", "num_frames": 1})
    assert main([*COMMAND, name, "--model", "shapes", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert "denoise" in captured.out
    assert "error: line 1: --steps" in captured.err


def test_failures_are_printed_last(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["{", {"prompt": "a", "stesp": 3}, {"prompt": " "}, {"prompt": "b"}, "[]"]
    assert main([*COMMAND, write(folder, *lines)]) == 2
    errors = capsys.readouterr().err.splitlines()[-4:]
    assert [line.split(":")[1].strip() for line in errors] == [
        "line 1",
        "line 2",
        "line 3",
        "line 5",
    ]
    assert "Did you mean steps?" in errors[1]
    assert files(folder) == ["0003-b.mp4"]


def test_failed_run_is_reported_by_line(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.failure = MemoryBudgetError("too much.", "Use less.")
    assert main([*COMMAND, write(folder, {"prompt": "a"}, {"prompt": "b"}), "--quiet"]) == 3
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "error: line 1: too much. Use less.",
        "error: line 2: too much. Use less.",
    ]
    assert files(folder) == []


def test_seeds_fail_independently(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.failure = MemoryBudgetError("too much.", "Use less.")
    assert main(["generate", "-p", "a", "-s", "1", "2", "--json-events"]) == 3
    captured = capsys.readouterr()
    failed = [json.loads(line) for line in captured.out.splitlines() if "request_failed" in line]
    assert [event["index"] for event in failed] == [0, 1]
    assert captured.err.splitlines()[-1].startswith("error: video 2: too much.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.txt"], "Cannot read none.txt"),
        (["empty.txt"], "contains no prompt"),
        (["one.txt", "-p", "a"], "exclude each other"),
        (["two.txt", "-o", "same.mp4"], "would be written to one file"),
        (["one.txt", "-o", "{nothing}.mp4"], "Cannot fill in"),
    ],
)
def test_bad_prompt_files_are_refused(
    folder: Path,
    pipeline: FakePipeline,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    write(folder, "", name="empty.txt")
    write(folder, "a", name="one.txt")
    write(folder, "a", "b", name="two.txt")
    assert main([*COMMAND, *words]) == 2
    assert says in capsys.readouterr().err
    assert pipeline.requests == []
