"""What users may ask for, what they get, and what is refused with a list of valid values."""

from __future__ import annotations

import pytest

from mlx_sora import geometry
from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size

SHAPES = Size(64, 64)
OPEN_SORA = Size(426, 240)


def test_ratios_are_width_to_height() -> None:
    assert geometry.get_image_size("240p", "16:9") == Size(426, 240)
    assert geometry.get_image_size("240p", "9:16") == Size(240, 426)
    assert geometry.get_image_size("720p") == Size(1280, 720)


@pytest.mark.parametrize("resolution", geometry.RESOLUTIONS)
@pytest.mark.parametrize("ratio", geometry.aspect_ratios())
def test_public_ratio_names_the_true_shape(resolution: str, ratio: str) -> None:
    size = geometry.get_image_size(resolution, ratio)
    width, height = (int(part) for part in ratio.split(":"))
    assert size.width / size.height == pytest.approx(width / height, rel=0.025)


@pytest.mark.parametrize(
    ("resolution", "ratio", "listed"), [("100p", "16:9", "144p"), ("240p", "27:50", "12:25")]
)
def test_unknown_names_list_the_valid_ones(resolution: str, ratio: str, listed: str) -> None:
    with pytest.raises(UsageError, match=listed):
        geometry.get_image_size(resolution, ratio)


@pytest.mark.parametrize(
    ("value", "frames"), [(1, 1), ("1", 1), (17, 17), (" 51 ", 51), ("2s", 51), ("16s", 408)]
)
def test_frames(value: int | str, frames: int) -> None:
    assert geometry.parse_frames(value) == frames


@pytest.mark.parametrize(
    "value", [0, -1, "0", "3x", "", "1.5", 20.5, True, None, "9" * 5000, 10**9, float("inf")]
)
def test_impossible_frames(value: object) -> None:
    with pytest.raises(UsageError):
        geometry.parse_frames(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", range(2, 17))
def test_two_to_sixteen_frames_are_refused_with_the_reason(frames: int) -> None:
    with pytest.raises(UsageError, match=r"schedule is undefined.*at least 17"):
        geometry.parse_frames(frames)


@pytest.mark.parametrize(
    ("frames", "latents"), [(1, 1), (8, 2), (9, 3), (17, 5), (42, 12), (51, 15), (204, 60)]
)
def test_latent_frames(frames: int, latents: int) -> None:
    assert geometry.latent_frames(frames) == latents


def test_resolve_size() -> None:
    assert geometry.resolve_size(SHAPES) == SHAPES
    assert geometry.resolve_size(SHAPES, width=80, height=50) == Size(80, 50)
    assert geometry.resolve_size(SHAPES, resolution="144p") == Size(256, 144)
    assert geometry.resolve_size(SHAPES, resolution="144p", aspect_ratio="1:1") == Size(192, 192)
    assert geometry.resolve_size(OPEN_SORA, aspect_ratio="1:1") == Size(320, 320)
    assert geometry.resolve_size(SHAPES, aspect_ratio="16:9") == Size(88, 48)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 64},
        {"height": 64},
        {"width": 64, "height": 64, "resolution": "240p"},
        {"width": 64, "height": 64, "aspect_ratio": "1:1"},
        {"width": 0, "height": 64},
        {"width": 64, "height": -8},
        {"width": 64, "height": 10**6},
        {"width": 64.5, "height": 64},
        {"resolution": "huge"},
        {"aspect_ratio": "16/9"},
    ],
)
def test_half_and_impossible_sizes(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        geometry.resolve_size(SHAPES, **options)  # type: ignore[arg-type]


def test_snapping_is_said() -> None:
    plan = geometry.plan_geometry(OPEN_SORA, 51)
    assert (plan.size, plan.decoded, plan.latent) == (OPEN_SORA, Size(424, 240), (15, 30, 53))
    assert len(plan.warnings) == 1
    assert "426x240" in plan.warnings[0]
    assert "424x240" in plan.warnings[0]
    assert geometry.plan_geometry(SHAPES, 17).warnings == ()


def test_finished_sides_are_even() -> None:
    for resolution in geometry.RESOLUTIONS:
        for ratio in geometry.aspect_ratios():
            size = geometry.plan_geometry(geometry.get_image_size(resolution, ratio), 1).decoded
            assert size.width % 2 == 0
            assert size.height % 2 == 0
