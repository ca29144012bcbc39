"""Clips of a long video: where they begin, and how long it is."""

from __future__ import annotations

import pytest

from mlx_sora.conditioning.clips import Clips
from mlx_sora.errors import UsageError


def test_shared_frames_are_counted_once() -> None:
    assert Clips(51, 3, 17).total == 51 + 2 * 34
    assert Clips(51).total == 51
    assert Clips(68, 4, 34).total == 68 + 3 * 34


@pytest.mark.parametrize("clips", [Clips(51, 3, 17), Clips(68, 3, 34), Clips(20), Clips(34, 5)])
def test_every_frame_is_made_by_one_clip(clips: Clips) -> None:
    placed = [clips.locate(frame) for frame in range(clips.total)]
    made = [
        (clip, frame)
        for clip in range(clips.count)
        for frame in range(clips.frames_to_skip(clip), clips.num_frames)
    ]
    assert placed == made


def test_shared_latents() -> None:
    assert Clips(51, 2, 34).shared_latents == 10


@pytest.mark.parametrize(
    ("clips", "says"),
    [
        (Clips(20, 2), "--num-frames 20"),
        (Clips(51, 2, 10), "--condition-frames 10"),
        (Clips(51, 2, 0), "--condition-frames 0"),
        (Clips(17, 2, 17), "add nothing"),
        (Clips(1, 2), "--num-frames 1"),
    ],
)
def test_clips_that_cannot_be_joined(clips: Clips, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        clips.check()


def test_one_clip_may_have_any_length() -> None:
    Clips(20, 1, 3).check()
