"""The peak footprint of macOS, read from a fake library and, on macOS, from the system."""

from __future__ import annotations

import ctypes
import os
import platform
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_sora.cli.bench.measure import peak_footprint, read_peak

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


def test_read_peak_reads_the_lifetime_maximum() -> None:
    assert read_peak(library(0), 7) == 1000 + FIELDS.index("lifetime_max_phys_footprint")


def test_read_peak_of_an_ended_process_is_none() -> None:
    assert read_peak(library(-1), 7) is None


def test_peak_footprint_of_this_process() -> None:
    peak = peak_footprint(os.getpid())
    if platform.system() == "Darwin":
        assert peak is not None
        assert 1 << 20 < peak < 1 << 40
    else:
        assert peak is None


def test_peak_footprint_loads_no_library_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert peak_footprint(os.getpid()) is None
