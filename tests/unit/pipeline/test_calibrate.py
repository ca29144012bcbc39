"""Searching schedules: the shortest way, what a segment costs, and the file that comes of it."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from mlx_sora import Pipeline
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.schedules import ScheduleTable, read_schedule, read_table, table_path
from mlx_sora.cli.main import main
from mlx_sora.errors import UsageError
from mlx_sora.pipeline.calibrate import Errors, calibrate, requests_for, schedules

SMALL = {"steps": 5, "num_frames": 17, "width": 32, "height": 32}
SIZE = (32, 32, 17)


def curved(steps: int, order: int) -> Errors:
    """Made-up errors: dear at first, cheap at last; a forecast depends on where it comes from."""
    errors: Errors = {}
    for now in range(steps):
        for before in range(now) if order and now else (now,):
            for then in range(now + 1, steps + 1):
                errors[before, now, then] = (then - now - 1) ** 2 / (1 + now) + 0.1 * (now - before)
    return errors


@pytest.mark.parametrize("order", [0, 1])
def test_no_schedule_is_better(order: int) -> None:
    steps, errors = 7, curved(7, order)

    def cost(way: tuple[int, ...]) -> float:
        earlier = (way[0], *way) if order else way
        ends = (*way[1:], steps)
        return sum(errors[key] for key in zip(earlier, way, ends, strict=False))

    found = dict(schedules(errors, steps, order))
    assert list(found) == [*range(1, steps)]
    for count, (way, error) in found.items():
        others = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
        assert error == pytest.approx(cost(tuple(way)))
        assert error == pytest.approx(min(map(cost, others)))


def test_segments_that_were_not_measured_are_not_used() -> None:
    errors = {key: e for key, e in curved(7, 0).items() if key[2] - key[1] <= 3}
    found = dict(schedules(errors, 7, 0))
    assert list(found) == [3, 4, 5, 6]
    assert all(
        b - a <= 3 for way, _ in found.values() for a, b in zip(way, [*way[1:], 7], strict=True)
    )


@pytest.fixture(scope="module")
def table() -> ScheduleTable:
    pipe = Pipeline.from_pretrained("shapes")
    return calibrate(pipe.engine, requests_for(["a red circle"], SMALL), reach=4)


def test_what_is_measured_on_a_model(table: ScheduleTable, tmp_path: Path) -> None:
    assert (table.steps, table.width, table.height, table.num_frames) == (5, *SIZE)
    for order in ("0", "1"):
        assert list(table.orders[order]) == ["2", "3", "4"]
        errors = list(table.errors[order].values())
        assert errors == sorted(errors, reverse=True)
        assert 0 < errors[-1] < errors[0] < 1
    table.write(tmp_path / "t.json")
    assert read_table(tmp_path / "t.json") == ScheduleTable(
        **json.loads((tmp_path / "t.json").read_text())
    )
    assert any('"3": [0, ' in line for line in (tmp_path / "t.json").read_text().splitlines())


def test_a_table_is_found_beside_the_model_or_by_name(tmp_path: Path) -> None:
    table = ScheduleTable(5, *SIZE, orders={"0": {"3": [0, 1, 3]}})
    schedule = ScheduleInfo(5, 1, 5, model=tmp_path, size=SIZE)
    table.write(table_path(tmp_path, 5, SIZE))
    assert read_schedule(3, 0, schedule) == {0, 1, 3}
    other = tmp_path / "Other, or not.json"
    table.write(other)
    assert read_schedule(
        3, 0, ScheduleInfo(5, 1, 5, model=Path("none"), size=SIZE), str(other)
    ) == {0, 1, 3}
    longer = ScheduleInfo(6, 1, 5, model=tmp_path, size=SIZE)
    for wrong, says in (
        ({"computed": 4, "order": 0, "schedule": schedule}, "It has 3."),
        ({"computed": 3, "order": 1, "schedule": schedule}, "It has none."),
        ({"computed": 3, "order": 0, "schedule": longer}, "calibrate"),
    ):
        with pytest.raises(UsageError, match=says):
            read_schedule(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="this is 6 steps at 32x32, 17 frames"):
        read_schedule(3, 0, longer, str(other))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"steps": 5}',
        '{"steps": 5, "width": 1, "height": 1, "num_frames": 1, "orders": []}',
        '{"steps": 5, "width": 1, "height": 1, "num_frames": 1, "orders": {"0": {"2": [0, 5]}}}',
        '{"steps": 5, "width": 1, "height": 1, "num_frames": 1, "orders": {"0": {"3": [0, 1]}}}',
        '{"steps": 5, "width": 1, "height": 1, "num_frames": 1, "orders": {"0": {"a": [0]}}}',
        '{"steps": "x", "width": 1, "height": 1, "num_frames": 1, "orders": {}}',
    ],
)
def test_anything_else_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not a table of schedules"):
        read_table(path)


def test_the_command_writes_what_generate_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "Table.json"
    size = ["--width=32", "--height=32", "--num-frames=17", "--steps=4"]
    words = ["calibrate", "--model=shapes", *size, "-p", "a red circle", "-o", str(path)]
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    video = Pipeline.from_pretrained("shapes")(
        "a red circle",
        seed=1,
        steps=4,
        width=32,
        height=32,
        num_frames=17,
        step_cache=f"table:2,file={path}",
    )
    done = video.metadata["accelerations"]["step_cache"]
    assert done["computed"] == json.loads(path.read_text())["orders"]["0"]["2"]
    assert done["evaluations_saved"] == 2
    assert video.metadata["settings"]["step_cache"] == f"table:2,order=0,file={path}"
    assert main([*words, "--reach", "0"]) == 2
    assert main([*words[:-1], str(path / "below a file.json"), "--quiet"]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_without_a_table_the_command_is_named() -> None:
    with pytest.raises(UsageError, match="mlx_sora calibrate"):
        Pipeline.from_pretrained("shapes")("a", steps=4, step_cache="table:2")
