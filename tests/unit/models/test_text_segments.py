"""Texts by frame: each frame attends to its own, a frame between two gets both by its shares."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_sora.accel.tdtm import FramePairs, PairedFrames
from mlx_sora.models.hooks import Hooks, SiteMerging
from mlx_sora.models.stdit3 import Conditions, CrossAttention, STDiT3
from mlx_sora.models.text_segments import FrameTexts, SegmentedText
from mlx_sora.sampling.guidance import Guidance
from tests.helpers.tolerance import rounding
from tests.unit.models.test_stdit3 import CONFIG, GRID, difference, network, normal

TOLERANCE = rounding(1e-5)
FIRST, SECOND = normal(4, 12, seed=1), normal(7, 12, seed=2)
SHARES = ((1.0, 0.0), (1.0, 0.0), (0.25, 0.75), (0.0, 1.0), (0.0, 1.0))
TEXT = SegmentedText((FIRST, SECOND), SHARES)


@pytest.fixture(scope="module")
def model() -> STDiT3:
    return network()


def prepare(model: STDiT3, *text: mx.array | SegmentedText) -> Conditions:
    return model.prepare(text, GRID, height=48, width=56, fps=24)


def attend(model: STDiT3, x: mx.array, *text: mx.array | SegmentedText) -> mx.array:
    """Cross-attention of the first block."""
    cross: CrossAttention = model.spatial_blocks[0].cross_attn
    found = prepare(model, *text)
    return cross(x, cross.keys_values(found.text), found.text_mask)


def test_each_frame_attends_to_its_text(model: STDiT3) -> None:
    x = normal(1, 5, 12, 32, seed=3)
    out = attend(model, x, TEXT)
    first, second = attend(model, x, FIRST), attend(model, x, SECOND)
    assert difference(out[:, :2], first[:, :2]) <= TOLERANCE
    assert difference(out[:, 3:], second[:, 3:]) <= TOLERANCE
    bias = model.spatial_blocks[0].cross_attn.proj.bias
    mixed = 0.25 * (first[:, 2] - bias) + 0.75 * (second[:, 2] - bias) + bias
    assert difference(out[:, 2], mixed) <= TOLERANCE
    assert difference(first[:, :2], second[:, :2]) > 0.1, "the texts do not differ"


def test_samples_with_other_lengths_stay_apart(model: STDiT3) -> None:
    """As with a negative prompt: its length is that of neither segment."""
    x, other = normal(2, 5, 12, 32, seed=3), normal(6, 12, seed=4)
    out = attend(model, x, TEXT, replace(TEXT, texts=(other, other)))
    assert difference(out[:1], attend(model, x[:1], TEXT)) <= TOLERANCE
    assert difference(out[1:], attend(model, x[1:], other)) <= TOLERANCE
    with pytest.raises(ValueError, match="shorter"):
        prepare(model, TEXT, other)


def test_the_same_text_in_all_segments_changes_nothing(model: STDiT3) -> None:
    z, t = normal(1, *GRID, 4), mx.array([600.0])
    same = replace(TEXT, texts=(FIRST, FIRST))
    plain = model(z, t, prepare(model, FIRST))
    assert difference(model(z, t, prepare(model, same)), plain) <= TOLERANCE
    assert difference(model(z, t, prepare(model, TEXT)), plain) > 0.01


@pytest.mark.parametrize("merging", [PairedFrames(), FramePairs()])
def test_merged_frames_get_the_mean_of_their_shares(merging: SiteMerging) -> None:
    texts = FrameTexts(None, (4, 11), mx.array(SHARES)[None, :, None])
    found = texts.map_frames(merging.merge).shares[0, :, 0, 1].tolist()
    assert found == [0.0, 0.875, 1.0][: 2 if isinstance(merging, PairedFrames) else 3]


def test_segments_and_merging_compose(model: STDiT3) -> None:
    """The same text everywhere is that text, merged frames or not."""
    z, t = normal(1, *GRID, 4), mx.array([600.0])
    hooks = Hooks(token_merging=PairedFrames())
    same = replace(TEXT, texts=(FIRST, FIRST))
    plain = model(z, t, prepare(model, FIRST), hooks=hooks)
    assert difference(model(z, t, prepare(model, same), hooks=hooks), plain) <= TOLERANCE


def test_guidance_gives_each_segment_a_null_text_of_its_length() -> None:
    class Seen:
        text: list[SegmentedText]

        def prepare(self, text: list[SegmentedText]) -> None:
            self.text = text

    seen = Seen()
    Guidance(seen, [TEXT], lambda n: mx.zeros((n, 12)), 2.0)._conditions("both")  # type: ignore[arg-type]
    cond, uncond = seen.text
    assert cond is TEXT
    assert [len(text) for text in uncond.texts] == [4, 7]
    assert uncond.shares == SHARES
    assert not any(text.any().item() for text in uncond.texts)
    assert CONFIG.caption_channels == 12
