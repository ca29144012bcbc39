"""Budgets: given, of a profile, and measured on this machine."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import psutil
import pytest

from mlx_sora import Pipeline
from mlx_sora.errors import MemoryBudgetError, UsageError
from mlx_sora.memory import budget as module
from mlx_sora.memory.budget import automatic_budget, available_memory, resolve_budget
from mlx_sora.memory.limits import process_memory, wired_memory
from mlx_sora.memory.profiles import PROFILES
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime import footprint
from mlx_sora.runtime.device import gpu_memory, total_memory
from mlx_sora.runtime.events import Noted
from tests.helpers.emulated_mac import DEVICE_INFO, emulate_mac
from tests.helpers.tolerance import on_real_gpu

GB = 10**9


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_mac(monkeypatch)


def test_given_budgets() -> None:
    assert resolve_budget("3.3GB", None) == 3_300_000_000
    assert resolve_budget("off", None) is None
    assert resolve_budget(None, "mac-16gb") == PROFILES["mac-16gb"]
    with pytest.raises(UsageError, match="exclude each other"):
        resolve_budget("auto", "mac-16gb")
    with pytest.raises(UsageError, match="'automatic' is not an amount of memory") as error:
        resolve_budget("automatic", None)
    assert "auto, or off" in error.value.fix


@pytest.mark.skipif(on_real_gpu(), reason="of CPUs")
def test_a_measured_budget_on_a_cpu_is_asked_for() -> None:
    budget = resolve_budget("auto", None)
    assert budget is not None
    assert (process_memory() or 0) < budget <= 0.9 * total_memory()


def test_on_a_gpu_it_is_the_default(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 100 * GB)
    expected = int(0.9 * int(DEVICE_INFO["max_recommended_working_set_size"]))
    assert resolve_budget(None, None) == resolve_budget("auto", None) == expected
    assert resolve_budget("off", None) is None
    monkeypatch.setattr(module, "available_memory", lambda: 5 * GB)
    assert resolve_budget(None, None) == 5 * GB


def test_without_an_answer_of_the_system(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer() -> None:
        raise OSError("no answer")

    monkeypatch.setattr(psutil, "virtual_memory", no_answer)
    assert automatic_budget() is None
    assert resolve_budget(None, None) is None
    with pytest.raises(UsageError, match="does not tell") as error:
        resolve_budget("auto", None)
    assert "--memory-budget with an amount such as 8GB, or off" in error.value.fix


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(footprint, "_CGROUP", tmp_path)
    plain = available_memory()
    assert plain is not None
    (tmp_path / "memory.max").write_text(str(3 * GB))
    (tmp_path / "memory.current").write_text(str(2 * GB))
    (tmp_path / "memory.stat").write_text(f"anon {GB}\ninactive_file {GB // 2}\n")
    limited = available_memory()
    assert limited is not None
    assert abs(limited - (process_memory() or 0) - 3 * GB // 2) < 50_000_000
    (tmp_path / "memory.max").write_text("max")
    assert (available_memory() or 0) > limited or plain <= limited


def test_memory_of_cuda_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"free_memory": 10 * GB, "total_memory": 80 * GB}
    monkeypatch.setattr(module, "backend", lambda: "cuda")
    monkeypatch.setattr("mlx_sora.runtime.device.backend", lambda: "cuda")
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert gpu_memory() == 80 * GB
    held = mx.get_active_memory() + mx.get_cache_memory()
    assert automatic_budget() == 10 * GB + held


def test_a_run_says_its_measured_budget(pipe: Pipeline) -> None:
    request = GenerationRequest("red", steps=1, num_frames=1, memory_budget="auto", seed=1)
    events = list(pipe.stream(request))
    notes = [event.message for event in events if isinstance(event, Noted)]
    assert any(note.startswith("Memory budget") for note in notes)
    video = events[-1].video  # type: ignore[union-attr]
    assert video.metadata["settings"]["memory_budget"] > 0
    given = list(pipe.stream(GenerationRequest("red", steps=1, num_frames=1, memory_budget="9GB")))
    assert not any(isinstance(e, Noted) and "Memory budget" in e.message for e in given)


def test_a_measured_budget_that_refuses_names_off(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 10_000_000)
    request = GenerationRequest("red", steps=1, num_frames=1, memory_budget="auto")
    with pytest.raises(MemoryBudgetError) as error:
        pipe.plan(request)
    assert 'memory_budget="off"' in error.value.fix


def test_an_array_that_the_gpu_refuses_is_not_tried_without_a_budget(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_sora.pipeline.engine.largest_array", lambda: 1000)
    request = GenerationRequest("red", steps=1, num_frames=1, memory_budget="auto")
    with pytest.raises(MemoryBudgetError, match="this GPU allows") as error:
        pipe.plan(request)
    assert error.value.fix == "Make a smaller video."


def test_a_profile_that_refuses_is_to_be_left_out(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROFILES, "ipad-8gb", 10_000_000)
    request = GenerationRequest("red", steps=1, num_frames=1, device_profile="ipad-8gb")
    with pytest.raises(MemoryBudgetError, match='device_profile="ipad-8gb"') as error:
        pipe.plan(request)
    assert error.value.fix.startswith("Instead of it use memory_budget=")


def test_wired_memory_is_bounded_and_given_back(mac: None) -> None:
    working_set = int(DEVICE_INFO["max_recommended_working_set_size"])
    most = int(min(working_set, 0.65 * total_memory()))
    for asked, limit in ((GB, GB), (100 * GB, most)):
        with wired_memory(asked):
            assert mx.set_wired_limit(limit) == limit
        assert mx.set_wired_limit(0) == 0
    with pytest.raises(KeyError), wired_memory(GB):
        raise KeyError
    assert mx.set_wired_limit(0) == 0


def test_wired_memory_does_nothing_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_sora.memory.limits.backend", lambda: "cpu")
    calls = list[int]()
    monkeypatch.setattr(mx, "set_wired_limit", calls.append)
    with wired_memory(GB):
        pass
    assert calls == []
