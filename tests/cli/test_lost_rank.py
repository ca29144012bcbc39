"""If one of several ranks fails, all end, with one line that names the rank and the cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_sora.video.writer import save_frames
from tests.helpers.ranks import ROOT, launch

FAULTY = ROOT / "tests" / "helpers" / "programs" / "faulty_rank.py"
WORDS = ["-p", "a red circle", "--seed", "3", "--steps", "4", "--num-frames", "1", "-o", "a.png"]


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        ("dies", 1, "Rank 1 has died."),
        ("first-dies", 1, "Rank 0 has died."),
        ("stops", 1, "Rank 1 sent no heartbeat for 8 s."),
        ("hangs", 1, "Rank 1 hangs: no progress for 9 s."),
        ("hangs-gpu", 1, "Rank 1 hangs: no progress for 15 s."),
        ("weights", 4, "Rank 1 stopped: block 3 of the transformer is damaged."),
        ("interrupt", 130, "Rank 1 was interrupted."),
        ("other-version", 2, "Rank 1 has mlx 0.1, rank 0 has "),
        ("other-weights", 2, "Rank 1 has weights abc, rank 0 has "),
    ],
)
def test_one_line_names_the_rank_and_the_cause(
    fault: str, code: int, line: str, tmp_path: Path
) -> None:
    ranks = launch(
        2,
        [str(FAULTY), fault, "generate", *WORDS, "--checkpoint-every", "1"],
        cwd=tmp_path,
        timeout=150,
        linger=2 if fault == "stops" else 30,
    )
    survivor = ranks[1] if fault.startswith("first-") else ranks[0]
    errors = [each for rank in ranks for each in rank.stderr.splitlines() if "error:" in each]
    assert survivor.returncode == code, survivor.stderr
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"error: {line}")
    assert not (tmp_path / "a.png").exists()
    # A process that is killed leaves an empty lock file, which the next run takes over.
    files = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    started = not fault.startswith("other")
    assert files == ({"a.png.checkpoint.safetensors"} if started else set())


def test_a_rank_whose_gpu_computes_is_waited_for(tmp_path: Path) -> None:
    """It sleeps in place of its GPU, for longer than the 9 s that a rank may be idle."""
    ranks = launch(2, [str(FAULTY), "computes-gpu", "generate", *WORDS], cwd=tmp_path, timeout=150)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    assert (tmp_path / "a.png").exists()


def test_different_options_are_named(tmp_path: Path) -> None:
    program = (
        "import os; from mlx_sora import Pipeline, GenerationRequest\n"
        "steps = 4 + int(os.environ['MLX_RANK'])\n"
        "try: Pipeline.from_pretrained('shapes')('a red circle', steps=steps, seed=1)\n"
        "except Exception as error: print(error)"
    )
    for rank in launch(2, ["-c", program], timeout=150):
        assert rank.stdout.startswith("Rank 1 has --steps 5, rank 0 has 4. Give all ranks"), rank


def test_different_edits_are_named(tmp_path: Path) -> None:
    save_frames(tmp_path / "a.png", np.full((1, 32, 32, 3), 90, np.uint8), 24, None, False)
    program = (
        "import os; from mlx_sora import Pipeline\n"
        "pipe = Pipeline.from_pretrained('shapes')\n"
        "word = ['red', 'blue'][int(os.environ['MLX_RANK'])]\n"
        "try: pipe.edit('a.png', source_prompt=word, prompt='green', width=32, height=32)\n"
        "except Exception as error: print(error)"
    )
    for rank in launch(2, ["-c", program], cwd=tmp_path, timeout=150):
        assert rank.stdout.startswith("Rank 1 has source_prompt blue, rank 0 has red. Give"), rank


def test_one_process_resumes_the_checkpoint_of_lost_ranks(tmp_path: Path) -> None:
    words = ["generate", *WORDS, "--checkpoint-every", "1", "--json-events"]
    launch(2, [str(FAULTY), "dies", *words], cwd=tmp_path, timeout=150)
    result = subprocess.run(
        [sys.executable, "-m", "mlx_sora", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    events = [json.loads(text) for text in result.stdout.splitlines() if text.startswith("{")]
    steps = [event["step"] for event in events if event["event"] == "step_finished"]
    assert steps == [2, 3]
