"""`generate` from the outside: flags, files, progress, exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.cli.progress import QuietRenderer
from mlx_sora.errors import MemoryBudgetError, MlxSoraError, WeightsError
from mlx_sora.runtime.events import Event, StageProgress
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.writer import write_sidecar
from tests.helpers.fake_pipeline import FakePipeline

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.strip()


def test_generate_prints_the_path(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-p", "A red circle", "-s", "7"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "a-red-circle-7.mp4\n"
    assert files(folder) == ["a-red-circle-7.mp4"]
    for text in ("seed 7", "a notice", "warning: this is a fake", "denoise 100% 2/2", "step/s"):
        assert text in captured.err, text


def test_stage_table_has_seconds_and_peaks(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["generate", "-p", "a"])
    rows = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["encode", "0.25", "2", "MB", "90", "MB"] in rows
    assert ["decode", "0.75", "2", "MB", "99", "MB"] in rows
    assert ["total", "1.50", "3", "MB", "99", "MB"] in rows


def test_one_frame_becomes_png(folder: Path, pipeline: FakePipeline) -> None:
    assert main(["generate", "-p", "a", "-s", "1", "--num-frames", "1"]) == 0
    assert files(folder) == ["a-1.png"]


@pytest.mark.parametrize("output", ["a.mp4", "a.gif", "a.webp", "f_%02d.png", "frames/"])
def test_output_formats_are_written(folder: Path, pipeline: FakePipeline, output: str) -> None:
    assert main(["generate", "-p", "a", "-o", output]) == 0
    assert len([path for path in folder.rglob("*") if path.is_file()]) == (
        17 if "png" in output or "/" in output else 1
    )


def test_seeds_make_one_video_each(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "-p", "a {b}", "-s", "3", "4", "-o", "{index}_{seed}_{{x}}.gif"]
    assert main(words) == 0
    assert capsys.readouterr().out == "0_3_{x}.gif\n1_4_{x}.gif\n"
    assert files(folder) == ["0_3_{x}.gif", "1_4_{x}.gif"]
    assert len(pipeline.loaded) == 1


def test_random_seeds_are_recorded(folder: Path, pipeline: FakePipeline) -> None:
    main(["generate", "-p", "a", "-o", "1.mp4"])
    main(["generate", "-p", "a", "-o", "2.mp4"])
    seeds = [read_metadata(folder / name)["settings"]["seed"] for name in ("1.mp4", "2.mp4")]
    assert seeds == [request.seed for request in pipeline.requests]
    assert seeds[0] != seeds[1]


def test_prompt_is_read_from_stdin(
    folder: Path, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert main(["generate", "--prompt", "-"]) == 0
    assert pipeline.requests[0].prompt == "from a pipe"


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "f_%02d.png"])
def test_replay_takes_recorded_options(folder: Path, pipeline: FakePipeline, name: str) -> None:
    main(["generate", "-p", "a cat", "-s", "9", "--steps", "3", "--fps", "12", "-o", name])
    source = files(folder)[0]
    assert main(["generate", "-C", source, "-o", "b.mp4", "--fps", "30"]) == 0
    first, second = pipeline.requests
    assert (second.prompt, second.seed, second.steps) == ("a cat", 9, 3)
    assert (first.fps, second.fps) == (12.0, 30.0)
    assert second.output == "b.mp4"


def test_replay_reads_a_sidecar(folder: Path, pipeline: FakePipeline) -> None:
    main(["generate", "-p", "a cat", "-s", "9", "-o", "a.mp4", "--metadata"])
    assert files(folder) == ["a.json", "a.mp4"]
    assert main(["generate", "-C", "a.json", "-s", "10"]) == 0
    assert [request.seed for request in pipeline.requests] == [9, 10]


def test_replay_size_is_replaced_by_flags(folder: Path, pipeline: FakePipeline) -> None:
    pixels = {"width": 64, "height": 64}
    write_sidecar(folder / "pixels.mp4", {"request": {"prompt": "a", **pixels}})
    write_sidecar(folder / "named.mp4", {"request": {"prompt": "a", "resolution": "240p"}})
    assert main(["generate", "-C", "pixels.json", "--resolution", "144p"]) == 0
    assert main(["generate", "-C", "named.json", "--width", "32", "--height", "32"]) == 0
    first, second = pipeline.requests
    assert (first.width, first.height, first.resolution) == (None, None, "144p")
    assert (second.width, second.height, second.resolution) == (32, 32, None)


def test_json_events_are_printed(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-p", "a", "-s", "7", "--json-events"]) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    step = {"event": "step_finished", "step": 1, "total": 2, "t": 500.0, "seconds": 0.125}
    assert step in events
    assert {"event": "warned", "message": "this is a fake"} in events
    preview = {"event": "preview_ready", "shape": [17, 16, 16, 3], "step": 1, "path": None}
    assert preview in events
    assert events[-1]["event"] == "finished"
    assert events[-1]["path"] == "a-7.mp4"
    assert captured.err == "log of level warning\nlog of level error\n"


def test_json_events_include_errors(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.failure = MemoryBudgetError("too small.", "Get more.")
    assert main(["generate", "-p", "a", "--json-events"]) == 3
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert last == {"event": "error", "message": "too small. Get more.", "exit_code": 3}
    assert captured.err.splitlines()[-1] == "error: too small. Get more."


def test_quiet_prints_only_the_path(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-p", "a", "-s", "7", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a-7.mp4\n", "log of level error\n")


@pytest.mark.parametrize(
    ("flag", "levels"),
    [("--quiet", "error"), ("--json-events", "warning error"), ("-v", "info warning error")],
)
def test_log_level_follows_the_flags(
    folder: Path,
    pipeline: FakePipeline,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    levels: str,
) -> None:
    before = logging.getLogger("mlx_sora").level
    assert main(["generate", "-p", "a", flag]) == 0
    shown = re.findall(r"^log of level (\w+)$", capsys.readouterr().err, re.MULTILINE)
    assert shown == levels.split()
    assert logging.getLogger("mlx_sora").level == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate", "prompt is empty"),
        ("generate -p p --stpes 3", "Did you mean --steps?"),
        ("generate -p p --ste 3", "unrecognized arguments"),
        ("generate -p p --sampler heun", "choose from"),
        ("generate -p p --dtype half", "choose from"),
        ("generate -p p --vae-dtype auto", "choose from"),
        ("generate -p p --steps many", "--steps: must be a whole number, not 'many'"),
        ("generate -p p --guidance nan", "must be a finite number"),
        ("generate -p p --steps 0", "--steps 0 is out of range. Give 1 to 1000."),
        ("generate -p p --seed -1", "--seed -1 is out of range"),
        ("generate -p p --num-frames 5", "Cannot make 5 frames"),
        ("generate -p p --num-frames 3s", "2s, 4s, 8s, 16s"),
        ("generate -p p --resolution 1p", "144p, 240p, 360p, 480p, 720p"),
        ("generate -p p --aspect-ratio 7:1", "Choose one of"),
        ("generate -p p --width 64", "missing"),
        ("generate -p p --width 4 --height 4", "impossible"),
        ("generate -p p -o taken.mp4/a.mp4", "is not a folder"),
        ("generate -p p -o a.avi", ".mp4, .mov, .webm, .gif, .webp, .png"),
        ("generate -p p -o {x}.mp4", "{prompt_slug}"),
        ("generate -p p -o taken.mp4", "exists already. Give --overwrite"),
        ("generate -p p -o new.mp4 -s 1 2", "{seed} or {index}"),
        ("generate -p p -o a.png --num-frames 17", "can hold one frame, not 17"),
        ("generate -C no.mp4", "No such file"),
        ("generate -p p --image no.png", "No such file: no.png. Give the path of an image"),
        ("generate -p p --video no.mp4", "No such file: no.mp4. Give the path of an image"),
        ("generate -C taken.mp4", "Cannot read taken.mp4"),
        ("generate -p p --quiet --verbose", "not allowed with"),
        ("generate -p", "expected at least one argument"),
        ("frobnicate", "invalid choice"),
        ("--nope", "unrecognized arguments"),
    ],
)
def test_usage_errors_are_one_line_and_change_no_file(
    folder: Path,
    pipeline: FakePipeline,
    capsys: pytest.CaptureFixture[str],
    words: str,
    message: str,
) -> None:
    (folder / "taken.mp4").write_text("precious")
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert message in one_line(captured.err)
    assert captured.out == ""
    assert pipeline.loaded == []
    assert files(folder) == ["taken.mp4"]
    assert (folder / "taken.mp4").read_text() == "precious"


def test_overwrite_replaces_the_output(folder: Path, pipeline: FakePipeline) -> None:
    (folder / "a.mp4").write_text("old")
    assert main(["generate", "-p", "a", "-o", "a.mp4", "--overwrite"]) == 0
    assert read_metadata(folder / "a.mp4")["request"]["prompt"] == "a"


def test_missing_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "generate" in captured.err
    assert "error: No command given." in captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (MlxSoraError("broken.", "Mend it."), 1, "error: broken. Mend it."),
        (MemoryBudgetError("too large."), 3, "error: too large."),
        (WeightsError("gone."), 4, "error: gone."),
        (KeyboardInterrupt(), 130, "error: interrupted."),
        (RuntimeError("line 1\nline 2"), 1, "error: RuntimeError: line 1 line 2 Add --debug"),
    ],
)
def test_failures_print_one_line_and_leave_no_file(
    folder: Path,
    pipeline: FakePipeline,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
    message: str,
) -> None:
    pipeline.failure = failure
    assert main(["generate", "-p", "a"]) == code
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
    assert files(folder) == []
    if code != 130:
        assert main(["generate", "-p", "a", "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


def run_python(code: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **more,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    result = run_python(f"""
        import sys
        from mlx_sora.cli.main import main
        try:
            main({words!r})
        except SystemExit as end:
            heavy = {{"mlx", "mlx.core", "numpy", "av", "PIL", "tqdm"}} & set(sys.modules)
            sys.exit(f"imports {{heavy}}" if heavy else end.code)
    """)
    assert (result.returncode, result.stderr) == (0, "")
    assert "mlx_sora" in result.stdout


def test_interrupt_of_the_renderer_ends_the_run(
    folder: Path, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while progress is drawn: the fake keeps its run alive, so only closing ends it."""

    def handle(self: QuietRenderer, event: Event) -> None:
        if isinstance(event, StageProgress):
            assert files(folder) == ["new"]
            raise KeyboardInterrupt

    monkeypatch.setattr(QuietRenderer, "handle", handle)
    assert main(["generate", "-p", "a", "-o", "new/", "--quiet"]) == 130
    assert files(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_no_partial_file(folder: Path, number: signal.Signals) -> None:
    """A real signal while frames are being written."""
    result = run_python(
        f"""
        import os, signal, sys
        from mlx_sora.cli import generate
        from mlx_sora.cli.main import main
        from mlx_sora.video import writer
        from tests.helpers.fake_pipeline import FakePipeline

        add = writer.SequenceWriter._write_frame
        def add_and_stop(self, frame):
            add(self, frame)
            if self.num_frames == 9:
                assert any(name.endswith(".partial") for name in os.listdir("new"))
                os.kill(os.getpid(), {int(number)})
        writer.SequenceWriter._write_frame = add_and_stop
        generate.load_pipeline = FakePipeline().load
        sys.exit(main(["generate", "-p", "a", "-o", "new/", "--quiet"]))
        """,
        cwd=folder,
    )
    assert result.returncode == 130, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: interrupted. Nothing was written.")
    assert files(folder) == []


def test_module_returns_the_exit_code(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mlx_sora", "generate"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2
    assert "prompt is empty" in one_line(result.stderr)


def test_a_replay_names_the_switches_of_the_record(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-p", "a", "-o", "a.png", "--num-frames", "1", "--metadata"]) == 0
    record = json.loads(Path("a.json").read_text())
    record["mlx_switches"]["MLX_ENABLE_TF32"] = "1"
    Path("b.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["generate", "-C", "a.json", "-o", "b.png"]) == 0
    assert "environment" not in capsys.readouterr().err
    assert main(["generate", "-C", "b.json", "-o", "c.png"]) == 0
    assert "b.json was made with MLX_ENABLE_TF32=1 in the environment" in capsys.readouterr().err
