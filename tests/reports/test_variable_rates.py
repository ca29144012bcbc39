"""Videos whose frames last differently long: phones, screen recordings, conferences.

rigaya/NVEnc 37, anrayliu/pyvidplayer 8, sitespeedio/browsertime 1123.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_sora import Pipeline
from mlx_sora.conditioning.clips import Clips
from mlx_sora.conditioning.latents import encode_tasks
from mlx_sora.conditioning.media import plan_media
from mlx_sora.geometry import Size
from mlx_sora.request.edit import EditRequest
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import Noted, Warned
from mlx_sora.text.prompt import PromptDirectives
from mlx_sora.video.reader import probe_video, read_video
from mlx_sora.video.timing import Timing
from tests.helpers.media import planes, shades, write_timed, write_yuv

NOTE = "variable frame rate, read as 30 frames at 25 fps"


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Frames at 25 a second, of which some were dropped, and one stands for a while."""
    times = [*range(0, 40, 4), 48, 52, 56, 96, *range(100, 120, 4)]
    return write_timed(tmp_path / "a.mkv", shades(len(times)), times)


@pytest.mark.parametrize(
    ("times", "fps", "repeats"),
    [
        ([0, 40, 80, 120, 400, 440, 480], 25, (1, 1, 1, 7, 1, 1, 1)),
        ([0, 17, 33, 50, 92, 133, 150, 167, 183], 60, (1, 1, 1, 3, 2, 1, 1, 1, 1)),
        ([0, 33, 67, 100, 133, 167, 200], 30, ()),
        ([0, 40, 81, 119, 160], 25, ()),
    ],
)
def test_times_become_ticks(times: list[int], fps: float, repeats: tuple[int, ...]) -> None:
    timing = Timing.from_starts([time / 1000 for time in times])
    assert timing.fps == pytest.approx(fps, rel=0.01)
    assert timing.repeats == repeats


@pytest.mark.parametrize("starts", [[0.0, 0.1, 0.05, 0.2], [None, 0.1, 0.2], [0.0, 0.0, 0.0]])
def test_times_that_tell_nothing(starts: list[float | None]) -> None:
    assert Timing.from_starts(starts, rate=30) == Timing(30)


def test_frames_are_shown_at_their_times(recording: Path) -> None:
    info = probe_video(recording)
    assert (info.num_frames, round(info.fps, 2)) == (30, 25)
    found = read_video(recording).frames[:, 8, 8, 0].astype(int)
    numbers = [*range(9), 9, 9, 9, 10, 11, *[12] * 10, *range(13, 19)]
    assert np.abs(found - shades(19)[numbers, 8, 8, 0]).max() <= 3


def test_a_generation_notes_it(recording: Path) -> None:
    request = GenerationRequest.from_dict({"prompt": "p", "videos": [str(recording)]})
    plan = plan_media(request, PromptDirectives(), Clips(51), Size(16, 16), 25)
    assert NOTE in plan.notes[0]
    assert plan.warnings == ()
    (task,) = encode_tasks(plan, Size(16, 16))
    last = shades(19)[[*[12] * 4, *range(13, 19)], 0, 0, 0].astype(int)
    assert np.abs(task.read()[7:17, 8, 8, 0] - last).max() <= 3


def test_an_edit_notes_it_and_warns_of_hdr(pipe: Pipeline, recording: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"source_prompt": "a", "prompt": "b", "width": 32, "height": 32}
    edit = EditRequest.from_options(recording, {**options, "num_frames": 17})
    opening = list(pipe.prepare_edit(edit).opening_events())
    assert any(isinstance(event, Noted) and NOTE in str(event) for event in opening)
    tags = {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 16}
    path = write_yuv(tmp_path / "b.mp4", planes((90, 90, 90), 9, False), tags)
    edit = EditRequest.from_options(path, {**options, "num_frames": 1})
    opening = list(pipe.prepare_edit(edit).opening_events())
    assert any(isinstance(event, Warned) and "HDR (PQ)" in str(event) for event in opening)
