"""Resolution buckets, frame counts and latent sizes against Open-Sora's tables: exact."""

from __future__ import annotations

import pytest

from mlx_sora import geometry
from mlx_sora.errors import UsageError
from tests.helpers.golden import Case


@pytest.mark.golden("text_sizes")
def test_buckets(case: Case) -> None:
    rows = [row for row in case.config["rows"] if row["resolution"] in geometry.RESOLUTIONS]
    for row in rows:
        for column in ("open_sora", "on_device"):
            if row["aspect_ratio"] in geometry.BUCKET_RATIOS:
                width, height = geometry.bucket_size(row["resolution"], row["aspect_ratio"])
                assert row[column]["out"] == [height, width], (row, column)
            else:
                assert "out" not in row[column], (row, column)
    assert len(rows) >= len(geometry.RESOLUTIONS) * len(geometry.BUCKET_RATIOS)


@pytest.mark.golden("text_sizes")
def test_areas_and_keys(case: Case) -> None:
    for resolution in geometry.RESOLUTIONS:
        pixels = case.config["num_pixels"][resolution]
        assert geometry.get_num_pixels(resolution) == pixels
    named = dict(zip(geometry.BUCKET_RATIOS, geometry.aspect_ratios(), strict=True))
    for ratio, key in case.config["aspect_ratio_keys"].items():
        width, height = map(int, named[ratio].split(":"))
        assert f"{height / width:.2f}" == key, "the name that users see has the table's value"


@pytest.mark.golden("text_sizes")
def test_frame_counts(case: Case) -> None:
    for row in case.config["num_frames"]:
        if "out" in row:
            assert geometry.get_num_frames(row["in"]) == row["out"]
        else:
            with pytest.raises(ValueError, match="invalid literal"):
                geometry.get_num_frames(row["in"])
            with pytest.raises(UsageError):
                geometry.parse_frames(row["in"])


@pytest.mark.golden("text_sizes")
def test_latent_sizes(case: Case) -> None:
    for row in case.config["latent_size"]:
        # The reference passes an unknown side (None) through; the axes do not depend on each other.
        frames, height, width = (1 if known is None else known for known in row["input"])
        size, micro_frame = geometry.Size(width, height), row["micro_frame_size"]
        shape = geometry.latent_shape(frames, size, micro_frame)
        pairs = zip(row["input"], shape, strict=True)
        assert [None if n is None else cells for n, cells in pairs] == row["latent"], row
        if row["input"][0] is not None:
            assert geometry.latent_frames(frames, None) == row["temporal_only"][0], row
