"""Calibrated merging: what pays first, the estimate of its error, and the file that holds it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.merging_table import FOLDER, MergingTable, Part, read_merging
from mlx_sora.accel.schedules import table_path
from mlx_sora.cli.main import main
from mlx_sora.errors import UsageError
from mlx_sora.pipeline.calibrate import requests_for
from mlx_sora.pipeline.calibrate_merging import (
    Savings,
    calibrate_merging,
    choose,
    measure,
    merging_parts,
)
from mlx_sora.pipeline.resume import identity
from mlx_sora.request.techniques import SITES
from mlx_sora.runtime.events import StepFinished
from mlx_sora.sampling.noise import Noise
from mlx_sora.video.similarity import motion

PROMPT = "a red circle moving right on a black background"
SMALL: dict[str, Any] = {"steps": 2, "num_frames": 17, "width": 32, "height": 32}
SIZE = (32, 32, 17)


def test_parts_cover_every_site_block_and_step_once() -> None:
    for depth, steps in ((28, 30), (4, 7), (2, 1)):
        covered = [
            (part.site, block, step)
            for part in merging_parts(depth, steps)
            for block in range(part.blocks[0], part.blocks[1] + 1)
            for step in range(part.steps[0], part.steps[1] + 1)
        ]
        assert len(covered) == len(set(covered)) == len(SITES) * depth * steps
        assert all(part.is_valid(depth, steps) for part in merging_parts(depth, steps))


SAVINGS = Savings(100, dict(zip(SITES, (8, 6, 4, 3, 7, 20), strict=True)))


def test_uncorrelated_parts_merge_in_the_order_of_error_per_saving() -> None:
    parts = [part for part in merging_parts(1, 5) if part.site in ("cross", "mlp")]
    errors = [float(n % 7 + 1) for n in range(len(parts))]
    found = list(choose(parts, np.diag(errors).tolist(), SAVINGS, 5, 1.2))
    cost = {
        part: error / SAVINGS.saved[part.site] for part, error in zip(parts, errors, strict=True)
    }
    plain = [replace(part, speed=1, error=0) for part in found]
    assert [cost[part] for part in plain] == sorted(cost.values())[: len(found)]
    assert found[-2].speed < 1.2 <= found[-1].speed
    saved = sum(SAVINGS.saved[part.site] for part in plain)
    assert found[-1].speed == pytest.approx(500 / (500 - saved), abs=1e-5)
    size = sum(errors[parts.index(part)] for part in plain) ** 0.5
    assert found[-1].error == pytest.approx(size, abs=1e-5)


def test_the_error_is_that_of_the_sum_of_all_that_merges() -> None:
    """Deviations that point the same way, and sites that replace their keys and values."""
    parts = merging_parts(2, 3)
    place = {(part.site, part.blocks, part.steps): n for n, part in enumerate(parts)}
    vectors = np.random.default_rng(1).normal(0.3, 1, (len(parts), 9))
    vectors[[part.site.endswith("-kv") for part in parts]] /= 3
    found = list(choose(parts, (vectors @ vectors.T).tolist(), SAVINGS, 3, 5))
    table = MergingTable("m", 2, 3, *SIZE, parts=found)
    replaced = 0
    for count in range(1, len(found) + 1):
        own = replace(table, parts=found[:count]).sites(9)
        merged = [
            place[site, (block, block), (step, step)]
            for step, blocks in own.items()
            for block, sites in enumerate(blocks)
            for site in sites
        ]
        replaced += len(merged) < count
        size = np.linalg.norm(vectors[merged].sum(axis=0))
        assert found[count - 1].error == pytest.approx(size, abs=1e-5)
        saved = sum(SAVINGS.saved[parts[n].site] for n in merged)
        assert found[count - 1].speed == pytest.approx(300 / (300 - saved), abs=1e-5)
    assert replaced


def test_a_speed_takes_the_first_parts_that_reach_it() -> None:
    parts = [
        Part("temporal-kv", (0, 1), (1, 1), 1.1, 0.1),
        Part("temporal", (1, 1), (1, 1), 1.2, 0.2),
        Part("mlp", (0, 0), (0, 1), 1.3, 0.3),
    ]
    table = MergingTable("m", 2, 2, *SIZE, parts=parts)
    assert table.sites(1.05) == {1: (("temporal-kv",), ("temporal-kv",))}
    assert table.sites(1.2) == {1: (("temporal-kv",), ("temporal",))}
    assert table.sites(1.25) == {
        0: (("mlp",), ()),
        1: (("temporal-kv", "mlp"), ("temporal",)),
    }


@pytest.fixture(scope="module")
def table(pipe: Pipeline) -> MergingTable:
    return calibrate_merging(pipe.engine, requests_for([PROMPT], SMALL), 1.1)


def last_latents(pipe: Pipeline, tdtm: str) -> mx.array:
    request = GenerationRequest(PROMPT, seed=0, **SMALL, tdtm=tdtm)
    steps = [event for event in pipe.stream(request) if isinstance(event, StepFinished)]
    return steps[-1].latents


def test_what_is_measured_is_the_error_of_a_run(pipe: Pipeline, tmp_path: Path) -> None:
    """Exactly so where the last step alone merges."""
    part = Part("temporal", (0, 3), (1, 1), 1.5)
    run = pipe.prepare(GenerationRequest(PROMPT, seed=0, **SMALL))
    squares: Any = measure(run, [part]).tolist()
    share = squares[0][0] ** 0.5
    table = MergingTable("shapes", 4, 2, *SIZE, parts=[part])
    path = table.write(tmp_path / "a.json")
    exact, merged = (last_latents(pipe, each) for each in ("off", f"table:1.2,file={path}"))
    way = exact - Noise([0], exact.shape[1:]).initial()
    norm = mx.linalg.norm
    assert share == pytest.approx((norm(merged - exact) / norm(way)).item(), rel=1e-3)
    assert share > 1e-3


def test_a_table_of_a_model(pipe: Pipeline, table: MergingTable, tmp_path: Path) -> None:
    assert (table.model, table.blocks, table.key) == ("shapes", 4, (2, *SIZE))
    assert all(part.is_valid(4, 2) for part in table.parts)
    speeds = [part.speed for part in table.parts]
    assert speeds == sorted(speeds)
    assert speeds[-2] < 1.1 <= speeds[-1]
    assert 0 < table.parts[0].error < table.parts[-1].error < 1
    path = table.write(tmp_path / "a.json")
    work = [
        pipe.plan(GenerationRequest(PROMPT, **SMALL, tdtm=tdtm)).stage("denoise").flops
        for tdtm in ("off", f"table:1.1,file={path}")
    ]
    assert work[0] / work[1] == pytest.approx(speeds[-1], rel=0.01)  # with preparation of the text


def schedule(model: Path, steps: int = 2, **more: object) -> ScheduleInfo:
    info = ScheduleInfo(steps, 1, 5, model=model, model_name="shapes", size=SIZE, blocks=4)
    return replace(info, **more)  # type: ignore[arg-type]


def test_a_table_is_found_beside_the_model_or_by_name(table: MergingTable, tmp_path: Path) -> None:
    own = schedule(tmp_path)
    with pytest.raises(UsageError, match="No table of token merging") as error:
        read_merging(1.05, own)
    assert "calibrate --tdtm 1.05 --prompt TEXT" in error.value.fix
    table.write(table_path(tmp_path, 2, SIZE, FOLDER))
    assert read_merging(1.05, own) == table.sites(1.05)
    other = table.write(tmp_path / "Other, or not.json")
    assert read_merging(1.1, schedule(Path("none")), str(other)) == table.sites(1.1)
    for info, speed, says in (
        (schedule(tmp_path, model_name="mine"), 1.05, "for the model shapes with 4 blocks, this"),
        (schedule(tmp_path, blocks=28), 1.05, "this is shapes with 28"),
        (schedule(tmp_path, 3), 1.05, "this is 3 steps at 32x32"),
        (own, 1.9, "not 1.9 times the speed"),
    ):
        with pytest.raises(UsageError, match=says) as error:
            read_merging(speed, info, str(other))
        assert "calibrate --tdtm" in error.value.fix


GOOD = {"model": "shapes", "blocks": 4, "steps": 2, "width": 32, "height": 32, "num_frames": 17}
PART = {"site": "mlp", "blocks": [0, 3], "steps": [0, 1], "speed": 1.3, "error": 0.1}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        GOOD,
        {**GOOD, "parts": [{**PART, "site": "text"}]},
        {**GOOD, "parts": [{**PART, "blocks": [0, 4]}]},
        {**GOOD, "parts": [{**PART, "steps": [1, 0]}]},
        {**GOOD, "parts": [{**PART, "steps": [True, 1]}]},
        {**GOOD, "parts": [{**PART, "blocks": 3}]},
        {**GOOD, "parts": [{**PART, "speed": "fast"}]},
        {**GOOD, "parts": [{**PART, "more": 1}]},
        {**GOOD, "parts": [PART], "blocks": "4"},
    ],
    ids=str,
)
def test_anything_else_is_refused_in_a_line(tmp_path: Path, content: object) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**GOOD, "parts": [PART]}))
    assert read_merging(1.3, schedule(tmp_path), str(path))
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is not a table of token merging"):
        read_merging(1.3, schedule(tmp_path), str(path))


def test_the_command_writes_what_generate_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "Table.json"
    size = ["--width=32", "--height=32", "--num-frames=17", "--steps=2"]
    words = ["calibrate", "--model=shapes", *size, "-p", PROMPT, "-o", str(path)]
    assert main([*words, "--tdtm", "1.05", "--motion-check", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{path}\n"
    found = re.search(r"on 1 prompt: PSNR ([\d.]+) dB, SSIM .*, motion ([\d.]+)% of exact", err)
    assert found, err
    exact, merged = (
        Pipeline.from_pretrained("shapes")(PROMPT, seed=0, **SMALL, tdtm=tdtm)
        for tdtm in ("off", f"table:1.05,file={path}")
    )
    assert exact.frames is not None
    assert merged.frames is not None
    assert float(found[2]) == pytest.approx(
        100 * motion(merged.frames) / motion(exact.frames), 0.01
    )
    done = merged.metadata["accelerations"]["tdtm"]
    assert done["merged_steps"] > 0
    assert "cross" in done["sites"]
    assert merged.metadata["settings"]["tdtm"] == f"table:1.05,file={path}"
    assert main([*words, "--tdtm", "1.05"]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--tdtm 1.9", "Merging everywhere makes the steps"),
        ("--tdtm 1", "--tdtm 1 is out of range"),
        ("--tdtm 1.1 --reach 3", "--reach has no effect"),
        ("--motion-check", "Add --tdtm 1.1"),
        ("--preview --tdtm 1.1", "--tdtm has no effect on the preview map"),
        ("--preview --motion-check", "--motion-check has no effect"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if "--preview" in words else ["-p", PROMPT, "--steps", "2"]
    line = ["calibrate", "--model", "shapes", "-o", str(tmp_path / "t.json"), *prompt]
    assert main([*line, *words.split()]) == 2
    assert says in capsys.readouterr().err


def test_motion_is_the_mean_change_from_frame_to_frame() -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[1], frames[2, :4] = 10, 250
    assert motion(frames) == pytest.approx((10 + (240 + 10) / 2) / 2)


def test_a_checkpoint_of_another_table_is_of_another_run(pipe: Pipeline, tmp_path: Path) -> None:
    """The file has the same name, and other content since."""
    found = []
    for blocks in ((0, 0), (0, 0), (0, 1)):
        table = MergingTable("shapes", 4, 2, *SIZE, parts=[Part("mlp", blocks, (0, 1), 1.5)])
        path = table.write(tmp_path / "a.json", overwrite=True)
        request = GenerationRequest(PROMPT, seed=0, **SMALL, tdtm=f"table:1.2,file={path}")
        found.append(identity(pipe.prepare(request)))
    assert found[0] == found[1] != found[2]
