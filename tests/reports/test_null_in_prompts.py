"""null in a prompt's settings replaces the request's own ones by nothing.

Open-Sora 1.2 does so (hpcaitech/Open-Sora, opensora/utils/inference_utils.py,
extract_json_from_prompts): the value of a key that is present wins, None means no mask.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mlx_sora.conditioning.clips import Clips
from mlx_sora.conditioning.media import plan_media
from mlx_sora.geometry import Size
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.text.prompt import split_directives


@pytest.mark.parametrize(
    ("settings", "references", "conditioned"),
    [
        ("", 1, True),
        ('{"mask_strategy": null}', 0, False),
        ('{"mask_strategy": ""}', 0, False),
        ('{"mask_strategy": null, "reference_path": null}', 0, False),
        ('{"mask_strategy": "", "reference_path": ""}', 0, False),
    ],
)
def test_null_is_nothing(tmp_path: Path, settings: str, references: int, conditioned: bool) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(path)
    request = GenerationRequest(prompt="a", references=(str(path),), mask_strategy="0")
    directives = split_directives("a" + settings)[1]
    media = plan_media(request, directives, Clips(17, 1), Size(64, 64), 24)
    assert len(media.references) == references
    assert (media.mask(0)[0] == 0) is conditioned
