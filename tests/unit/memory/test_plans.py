"""Every resolution, aspect ratio and length of Open-Sora 1.2 can be planned at full size."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_sora import GenerationRequest, MemoryBudgetError, Pipeline
from mlx_sora.cli.main import main
from mlx_sora.geometry import RESOLUTIONS, aspect_ratios
from mlx_sora.memory.plan import Plan
from tests.helpers.full_size import write_published
from tests.helpers.golden import Case

LENGTHS = (1, 17, 51, 102, 204, 408)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


def plan(pipe: Pipeline, resolution: str, ratio: str, frames: int, **more: object) -> Plan:
    options = {"resolution": resolution, "aspect_ratio": ratio, "num_frames": frames, "seed": 1}
    limit = {"memory_budget": "off", "output": "a.mp4", "overwrite": True}
    return pipe.plan(GenerationRequest.from_dict({"prompt": "a cat", **options, **limit, **more}))


@pytest.mark.golden("text_sizes")
def test_aspect_ratios_equal_the_reference(case: Case) -> None:
    known = {row["aspect_ratio"] for row in case.config["rows"] if row["resolution"] == "240p"}
    assert len(known) >= len(aspect_ratios()) == 17


@pytest.mark.parametrize("ratio", aspect_ratios())
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_size_and_length_has_a_plan(pipe: Pipeline, resolution: str, ratio: str) -> None:
    plans = [plan(pipe, resolution, ratio, frames) for frames in LENGTHS]
    for found in plans:
        assert [stage.stage for stage in found.stages] == ["encode", "denoise", "decode"]
        assert all(stage.peak > 0 < stage.flops for stage in found.stages)
        assert all(stage.read > 0 for stage in found.stages)
        assert 0.7e9 < found.smallest < found.peak
    work = [[stage.flops for stage in found.stages[1:]] for found in plans]
    assert work == sorted(work)
    peaks = [found.stage("denoise").peak for found in plans]
    assert peaks == sorted(peaks)
    # A clip is decoded chunk by chunk: from one whole chunk on, only the latents grow.
    decoding = [found.stage("decode").peak for found in plans[1:]]
    assert max(decoding) <= 1.01 * min(decoding)


@pytest.mark.parametrize("frames", LENGTHS)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_size_stays_within_its_budget(pipe: Pipeline, resolution: str, frames: int) -> None:
    smallest = plan(pipe, resolution, "16:9", frames).smallest
    for budget in (smallest, 2 * smallest, 8 * smallest):
        found = plan(pipe, resolution, "16:9", frames, memory_budget=str(budget))
        assert max(stage.peak for stage in found.stages) <= budget
    with pytest.raises(MemoryBudgetError):
        plan(pipe, resolution, "16:9", frames, memory_budget=str(smallest - 1))


@pytest.mark.parametrize(("resolution", "frames"), [("144p", "1"), ("720p", "16s")])
def test_dry_run(
    folder: Path, capsys: pytest.CaptureFixture[str], resolution: str, frames: str
) -> None:
    words = ["generate", "-p", "a cat", "--model", str(folder), "--dry-run"]
    words += ["--memory-budget", "off"]
    assert main([*words, "--resolution", resolution, "--num-frames", frames]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["encode", "denoise", "decode"]
