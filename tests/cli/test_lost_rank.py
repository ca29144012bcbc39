"""Under mlx.launch, if one of several ranks fails, one line names it, its host and the cause."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_sora.video.writer import save_frames
from tests.helpers.ranks import ROOT, Launched, launch

FAULTY = ROOT / "tests" / "helpers" / "programs" / "faulty_rank.py"
WORDS = ["-p", "a red circle", "--seed", "3", "--steps", "4", "--num-frames", "1", "-o", "a.png"]
WORDS = ["generate", *WORDS, "--checkpoint-every", "1", "--json-events"]
HOST = socket.gethostname()
CHECKPOINT = "a.png.checkpoint.safetensors"


def visible(folder: Path) -> set[str]:
    """Files, but for the empty lock that a killed process leaves; the next run takes it over."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize(
    ("rank", "moment", "fault", "code", "line"),
    [
        (1, "start", "killed", 1, "was killed: its process ended without an error."),
        (0, "encode", "spins", 1, "hangs: it computes for 6 s without progress."),
        (0, "write", "killed", 1, "was killed: its process ended without an error."),
        (0, "denoise", "stopped", 1, "sent no heartbeat for 8 s: it is stopped or cut off."),
        (0, "decode", "interrupted", 130, "was interrupted."),
        (0, "encode", "breaks", 1, "ended with an error: RuntimeError: no such kernel Add"),
        (1, "denoise", "weights", 4, "ended with an error: block 3 is damaged. Download it again."),
    ],
)
def test_one_line_names_the_rank_and_the_cause(
    rank: int, moment: str, fault: str, code: int, line: str, tmp_path: Path
) -> None:
    made = launch(2, [str(FAULTY), str(rank), moment, fault, *WORDS], cwd=tmp_path, timeout=90)
    assert len(made.errors) == 1, made.stderr
    assert made.errors[0].startswith(f"error: Rank {rank} on {HOST} {line}")
    # By then it may have ended its work, and mlx.launch ends the process.
    assert made.codes[1 - rank] in (code, -signal.SIGTERM), made.stderr
    early = moment in ("start", "encode")
    assert visible(tmp_path) == (set() if early else {CHECKPOINT})


@pytest.mark.parametrize(
    ("fault", "line"), [("version", "Rank 1 has mlx 0.1,"), ("weights", "Rank 1 has weights abc,")]
)
def test_other_versions_and_weights_are_named(fault: str, line: str, tmp_path: Path) -> None:
    made = launch(2, [str(FAULTY), "1", "start", f"other-{fault}", *WORDS], cwd=tmp_path)
    assert len(made.errors) == 1, made.stderr
    assert made.errors[0].startswith(f"error: {line} rank 0 has ")
    assert made.codes == [2, 2]


def launch_shell(script: str, folder: Path) -> Launched:
    """Start ranks whose words contain $MLX_RANK."""
    program = f"import os; os.execvp('bash', ['bash', '-c', {script!r}])"
    return launch(2, ["-c", program], cwd=folder, variables={"PYTHON": sys.executable})


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--seed $MLX_RANK", "Rank 1 has --seed 1, rank 0 has 0. Give all ranks"),
        ("$(test $MLX_RANK = 0 || echo --colour)", "Rank 1 on {} ended with an error: unrecog"),
    ],
)
def test_other_options_are_named(words: str, line: str, tmp_path: Path) -> None:
    made = launch_shell(f"exec $PYTHON -m mlx_sora generate -p a -o a.png {words}", tmp_path)
    assert len(made.errors) == 1, made.stderr
    assert made.errors[0].startswith("error: " + line.format(HOST))
    # The launcher ends the other rank as soon as one has ended.
    assert 2 in made.codes, made.stderr
    assert set(made.codes) <= {2, -signal.SIGTERM}, made.stderr
    assert visible(tmp_path) == set()


def test_other_requests_in_python_are_named(tmp_path: Path) -> None:
    save_frames(tmp_path / "a.png", np.full((1, 32, 32, 3), 90, np.uint8), 24, None, False)
    program = (
        "import os, sys; from mlx_sora import Pipeline\n"
        "rank = int(os.environ['MLX_RANK'])\n"
        "pipe = Pipeline.from_pretrained('shapes')\n"
        "try: pipe('a red circle', steps=4 + rank, seed=1)\n"
        "except Exception as error: sys.stdout.write(f'{error}\\n')\n"
        "word = ['red', 'blue'][rank]\n"
        "try: pipe.edit('a.png', source_prompt=word, prompt='green', width=32, height=32)\n"
        "except Exception as error: sys.stdout.write(f'{error}\\n')\n"
    )
    made = launch(2, ["-c", program], cwd=tmp_path)
    lines = made.stdout.splitlines()
    assert sum(line.startswith("Rank 1 has steps=5, rank 0 has 4.") for line in lines) == 2
    edits = "Rank 1 has source_prompt blue, rank 0 has red."
    assert sum(line.startswith(edits) for line in lines) == 2


def test_one_process_resumes_the_checkpoint_of_lost_ranks(tmp_path: Path) -> None:
    launch(2, [str(FAULTY), "1", "denoise", "killed", *WORDS], cwd=tmp_path, timeout=90)
    result = subprocess.run(
        [sys.executable, "-m", "mlx_sora", *WORDS],
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
