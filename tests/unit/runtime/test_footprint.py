"""The footprint of a process on macOS, read from a fake library and, on macOS, from the system."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_sora.runtime.footprint import current_footprint, peak_footprint

#: struct rusage_info_v4 of <sys/resource.h>, without the leading ri_uuid[16].
FIELDS = (
    "user_time",
    "system_time",
    "pkg_idle_wkups",
    "interrupt_wkups",
    "pageins",
    "wired_size",
    "resident_size",
    "phys_footprint",
    "proc_start_abstime",
    "proc_exit_abstime",
    "child_user_time",
    "child_system_time",
    "child_pkg_idle_wkups",
    "child_interrupt_wkups",
    "child_pageins",
    "child_elapsed_abstime",
    "diskio_bytesread",
    "diskio_byteswritten",
    "cpu_time_qos_default",
    "cpu_time_qos_maintenance",
    "cpu_time_qos_background",
    "cpu_time_qos_utility",
    "cpu_time_qos_legacy",
    "cpu_time_qos_user_initiated",
    "cpu_time_qos_user_interactive",
    "billed_system_time",
    "serviced_system_time",
    "logical_writes",
    "lifetime_max_phys_footprint",
    "instructions",
    "cycles",
    "billed_energy",
    "serviced_energy",
    "interval_max_phys_footprint",
    "runnable_time",
)


class Record(ctypes.Structure):
    _fields_ = (("uuid", ctypes.c_uint8 * 16), *((name, ctypes.c_uint64) for name in FIELDS))


def library(status: int) -> Any:
    """A libproc whose every field is its own place, but for process 7 only."""

    def proc_pid_rusage(pid: int, flavor: int, buffer: Any) -> int:
        assert (pid, flavor) == (7, 4)
        values = Record(**{name: 1000 + place for place, name in enumerate(FIELDS)})
        ctypes.memmove(buffer, ctypes.byref(values), ctypes.sizeof(Record))
        return status

    return SimpleNamespace(proc_pid_rusage=proc_pid_rusage)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Replace libproc by a fake that answers with `status`."""

    def answer(status: int) -> None:
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        monkeypatch.setattr(ctypes, "CDLL", lambda _: library(status))

    return answer


def test_fields(mac: Callable[[int], None]) -> None:
    mac(0)
    assert current_footprint(7) == 1000 + FIELDS.index("phys_footprint")
    assert peak_footprint(7) == 1000 + FIELDS.index("lifetime_max_phys_footprint")


def test_an_ended_process_has_none(mac: Callable[[int], None]) -> None:
    mac(-1)
    assert current_footprint(7) is None
    assert peak_footprint(7) is None


def test_this_process() -> None:
    current, peak = current_footprint(os.getpid()), peak_footprint(os.getpid())
    if platform.system() == "Darwin":
        assert current is not None
        assert peak is not None
        assert 1 << 20 < current <= peak < 1 << 40
    else:
        assert current is peak is None


def test_no_library_is_loaded_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert peak_footprint(os.getpid()) is None
