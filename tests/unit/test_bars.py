"""The rows by which editions of the bundled model are judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.shapes import bars, world
from benchmarks.shapes.scorer import read_video, shape_masks

CIRCLE = world.Attributes("red", "circle", "right", "black")


def draw(shape: str, frames: int = 17) -> np.ndarray:
    truth = world.Attributes("red", shape, "right", "black")
    path = world.random_path("right", np.random.default_rng(3))
    return world.render(truth, path, np.linspace(0, 1, frames))


def test_only_circles_overlap_with_their_disc() -> None:
    overlaps = {s: bars.overlap_with_disc(shape_masks(draw(s))[0]) for s in world.SHAPES}
    assert overlaps["circle"] > bars.ROUND > overlaps["square"] > overlaps["triangle"]
    assert bars.overlap_with_disc(np.zeros((4, 4), bool)) == 0.0


def test_a_change_where_chunks_meet_is_measured_against_the_usual_one() -> None:
    frames = np.zeros((51, 2, 2, 3), np.uint8)
    level = np.arange(51) * 2
    level[17:] += 4
    frames[:] = level[:, None, None, None]
    assert bars.meeting_ratio(frames) == ((6 / 2 + 2 / 2) / 2, 2.0)


@pytest.mark.parametrize("frames", [17, 34])
def test_a_drawn_video_meets_the_bars(frames: int) -> None:
    line = bars.describe(draw("circle", frames), CIRCLE)
    assert all(line[name] for name in ("colour", "shape", "motion", "background"))
    assert min(line["first"], line["round"]) > bars.ROUND
    assert ("meeting" in line) == (frames > 17)
    assert line.get("meeting", 1.0) == pytest.approx(1.0, abs=0.1)


def test_what_the_vae_alone_changes_has_rows_of_its_own(tmp_path: Path) -> None:
    line = bars.describe_frames(draw("circle", 34), CIRCLE) | {"psnr": 31.0}
    (tmp_path / "vae-34.jsonl").write_text(json.dumps(line) + "\n")
    found = {figure.name: figure.value for figure in bars.figures(tmp_path)}
    assert found["VAE alone, circles round in the first frame"] == 1
    assert found["VAE alone, change where chunks meet, moving"] == line["meeting"]
    assert len(found) == 4


def test_a_change_where_clips_meet_is_measured_for_each_sort(tmp_path: Path) -> None:
    frames = np.zeros((68, 2, 2, 3), np.uint8)
    level = np.arange(68) * 2
    level[34:] += 6
    frames[:] = level[:, None, None, None]
    assert bars.join_change(frames) == ((8 + 2) / 2, 2.0)
    assert [bars.long_truth(case).motion == "still" for case in range(4)] == [False, True] * 2
    right = dict.fromkeys(("colour", "shape", "motion", "background"), True)
    lines = [
        {**right, "joins": 5.0, "usual": 2.0, "meeting": 1.0, "still": False},
        {**right, "joins": 1.5, "usual": 1.0, "meeting": 1.0, "still": True, "shape": False},
    ]
    (tmp_path / "windows-68.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = [(figure.value, figure.met) for figure in bars.figures(tmp_path)]
    assert found == [(0.5, False), (2.5, False), (0.5, True)]


def test_a_stopped_run_goes_on_and_shows_what_misses_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def work(_: bars.Scored, case: int) -> bars.Line:
        made.append(case)
        return {"psnr": 28.0 + case}

    monkeypatch.setattr(bars, "works", lambda: {"vae-17": (3, work)})
    scored = bars.Scored("shapes")
    bars.run(scored, tmp_path / "old", ["vae-17"], 1)
    bars.run(scored, tmp_path / "old", ["vae-17"], None)
    assert made == [0, 1, 2]
    assert [row["psnr"] for row in bars.read_lines(tmp_path / "old", "vae-17")] == [28, 29, 30]
    new = tmp_path / "new"
    new.mkdir()
    (new / "vae-17.jsonl").write_text(json.dumps({"psnr": 31.0}) + "\n")
    table = bars.show([tmp_path / "old", new]).splitlines()
    assert table[-1] == "| VAE, 17 frames | 29.00 dB of 3 ! | 31.00 dB of 1 | ≥ 30.00 dB |"


def test_a_video_backwards_shows_the_motion_turned() -> None:
    for motion, back in world.BACKWARDS.items():
        truth = world.Attributes("red", "circle", motion, "black")
        path = world.random_path(motion, np.random.default_rng(4))
        video = world.render(truth, path, np.linspace(0, 1, 17))
        assert read_video(video[::-1]).motion == back
        assert world.BACKWARDS[back] == motion
