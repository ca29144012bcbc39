"""`doctor --machine`: streams, reading ahead, memory and limits, each broken once."""

from __future__ import annotations

import queue
import shutil
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_sora.accel import cidl
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.loading.blocks import BlockSource
from mlx_sora.manage import machine_engine, machine_report
from mlx_sora.manage.machine_check import Allowance, CheckResult
from mlx_sora.manage.machine_engine import (
    check_device,
    check_limits,
    check_memory,
    check_streaming,
)

TINY = Allowance(flops=1e6, memory=1e9)


def rows(check: Callable[[Allowance], Iterator[CheckResult]]) -> dict[str, CheckResult]:
    """Return the results of a check by name."""
    return {result.name: result for result in check(TINY)}


def test_streams_are_right() -> None:
    found = rows(check_streaming)
    assert list(found) == ["streams", "reading ahead"]
    assert found["streams"].status == "ok"
    assert found["reading ahead"].status in ("ok", "slow")  # others use the machine, too


def test_a_stream_that_loads_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: BlockSource[Any], index: int, stream: mx.Stream | None = None) -> Any:
        weights = real(self, index, stream)
        if stream is not None:
            weights = {name: mx.abs(x, stream=stream) for name, x in weights.items()}
            mx.eval(weights)
        return weights

    real = BlockSource.load
    monkeypatch.setattr(BlockSource, "load", load)
    found = rows(check_streaming)
    assert list(found) == ["streams"]
    assert found["streams"].status == "wrong"
    assert "--memory-budget off" in found["streams"].advice


def test_a_thread_that_may_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "new_thread_unsafe_stream", mx.new_stream)
    monkeypatch.setattr(cidl, "_idle_streams", queue.SimpleQueue())
    monkeypatch.setattr(machine_report, "CHECKS", {"streams": check_streaming})
    found = next(machine_report.MachineReport(0.001).run())
    assert (found.name, found.status) == ("streams", "wrong")
    assert "no Stream" in found.message


def test_a_disk_without_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    (found,) = rows(check_streaming).values()
    assert (found.name, found.status) == ("streams", "skipped")
    assert "TMPDIR" in found.advice


def test_loading_that_is_not_hidden_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockStream, "_request_ahead", lambda self, index: None)
    found = rows(check_streaming)["reading ahead"]
    assert found.status == "slow"
    assert found.message.startswith("0% of loading")
    assert "--memory-budget" in found.advice


def test_memory_is_read_right() -> None:
    found = rows(check_memory)
    assert list(found) == ["memory readings", "memory of the process"]
    assert {result.status for result in found.values()} <= {"ok", "skipped"}


@pytest.mark.parametrize(
    ("name", "broken", "fault"),
    [
        ("get_active_memory", lambda: 7, "active memory does not show an array"),
        ("get_peak_memory", lambda: 7, "the peak does not show an array"),
        ("get_cache_memory", lambda: 0, "a freed array is not in the cache"),
        ("clear_cache", lambda: None, "clear_cache leaves a cache"),
        ("reset_peak_memory", lambda: None, "reset_peak_memory leaves the peak"),
    ],
)
def test_a_reading_that_is_wrong(
    name: str, broken: Callable[[], Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, name, broken)
    found = rows(check_memory)["memory readings"]
    assert found.status == "wrong"
    assert fault in found.message.split("; ")
    assert found.advice.startswith("Memory budgets may not hold")


@pytest.mark.parametrize(("reading", "status"), [(None, "skipped"), (10**8, "wrong")])
def test_the_memory_of_the_process(
    reading: int | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_engine, "process_memory", lambda: reading)
    assert rows(check_memory)["memory of the process"].status == status


def test_an_array_in_memory_that_the_process_holds_already(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([10**8, 10**8, 2 * 10**8])
    monkeypatch.setattr(machine_engine, "process_memory", lambda: next(readings))
    assert rows(check_memory)["memory of the process"].status == "ok"


def test_limits_are_obeyed() -> None:
    assert {name: r.status for name, r in rows(check_limits).items()} == {
        "cache limit": "ok",
        "memory limit": "ok",
    }


@pytest.mark.parametrize(
    ("name", "row", "fault"),
    [
        ("set_cache_limit", "cache limit", "set_cache_limit does not return the limit before"),
        ("set_memory_limit", "memory limit", "set_memory_limit does not hold back"),
    ],
)
def test_a_limit_that_is_ignored(
    name: str, row: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, name, lambda limit: 1 << 40)
    found = rows(check_limits)[row]
    assert found.status == "wrong"
    assert fault in found.message


def test_limits_are_as_before_afterwards() -> None:
    before = mx.set_cache_limit(123 << 20), mx.set_memory_limit(9 << 30)
    try:
        rows(check_limits)
        rows(check_memory)
        rows(check_streaming)
        assert (mx.set_cache_limit(1), mx.set_memory_limit(1 << 30)) == (123 << 20, 9 << 30)
    finally:
        mx.set_cache_limit(before[0])
        mx.set_memory_limit(before[1])


@pytest.mark.parametrize(
    ("backend", "platform", "status"),
    [
        ("metal", "darwin", "ok"),
        ("cuda", "linux", "ok"),
        ("cpu", "linux", "skipped"),
        ("cpu", "darwin", "slow"),
    ],
)
def test_a_gpu_and_its_absence(
    backend: str, platform: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_engine, "backend", lambda: backend)
    monkeypatch.setattr(sys, "platform", platform)
    found = rows(check_device)["GPU"]
    assert found.status == status
    assert bool(found.advice) == (status == "slow")
