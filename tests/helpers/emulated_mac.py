"""A Mac with a Metal GPU in place of this machine, for `pytest --emulate-gpu`.

What MLX, Python and the system answer about the machine is that of an M2 with 16 GB; the engine
then takes its forms for GPUs, bfloat16 and the paths for macOS. MLX still computes on the CPU.
Answers are replaced where they come from, never functions of the engine, so new code is covered.
"""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import functools
import io
import os
import platform
import resource
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import psutil
import pytest

MEMORY = 16 << 30
PAGE = 16384

DEVICE_INFO: dict[str, str | int] = {
    "device_name": "Apple M2",
    "architecture": "applegpu_g14g",
    "max_buffer_length": 9534832640,
    "max_recommended_working_set_size": 12713115648,
    "memory_size": MEMORY,
    "resource_limit": 499000,
}

#: Files and functions of Linux that macOS does not have.
_ABSENT_FOLDERS = ("/proc", "/sys")
_ABSENT_FUNCTIONS = ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "memfd_create")

#: F_NOCACHE and F_FULLFSYNC, which Linux's fcntl refuses.
_MAC_COMMANDS = (48, 51)

#: rusage_info_v4 of proc_pid_rusage: after the UUID, number 7 is the physical footprint, number 28
#: its largest value.
_UUID, _FOOTPRINT, _LARGEST_FOOTPRINT = 16, 7, 28


def emulate_mac(patch: pytest.MonkeyPatch) -> None:
    """Replace what MLX, Python and the system answer, until `patch` is undone."""
    _REAL_SET_DEVICE(mx.cpu)  # also on a Mac
    _emulate_metal(patch)
    _emulate_platform(patch)
    _hide_linux(patch)
    _emulate_libraries(patch)


class _Device:
    """MLX's default device, which may be a GPU here. Work for the GPU goes to the CPU."""

    def __init__(self) -> None:
        self.default = mx.Device(mx.gpu)

    def stream(self, target: Any) -> _StreamContext:
        return _StreamContext(self, target)


class _StreamContext:
    """`with mx.stream(...)`: also changes the default device."""

    def __init__(self, device: _Device, target: Any) -> None:
        self._device, self._inner = device, _REAL_STREAM(_on_cpu(target))
        self._target = target.device if isinstance(target, mx.Stream) else target

    def __enter__(self) -> None:
        self._before = self._device.default
        self._inner.__enter__()
        self._device.default = _as_device(self._target)

    def __exit__(self, *error: Any) -> None:
        self._device.default = self._before
        self._inner.__exit__(*error)


_REAL_STREAM, _REAL_SET_DEVICE = mx.stream, mx.set_default_device


def _as_device(target: Any) -> mx.Device:
    return target if isinstance(target, mx.Device) else mx.Device(target)


def _on_cpu(target: Any) -> Any:
    return mx.cpu if target == mx.gpu else target


def _emulate_metal(patch: pytest.MonkeyPatch) -> None:
    device = _Device()
    patch.setattr(mx, "default_device", lambda: device.default)
    patch.setattr(mx, "set_default_device", lambda to: setattr(device, "default", _as_device(to)))
    patch.setattr(mx, "is_available", lambda _: True)
    patch.setattr(mx, "device_count", lambda _: 1)
    patch.setattr(mx.metal, "is_available", lambda: True)
    patch.setattr(mx, "stream", device.stream)
    real_info = mx.device_info

    def device_info(of: Any = None) -> dict[str, str | int]:
        on_gpu = (device.default if of is None else of) == mx.gpu
        return dict(DEVICE_INFO) if on_gpu else real_info(mx.cpu)

    patch.setattr(mx, "device_info", device_info)
    patch.setattr(mx.metal, "device_info", device_info)
    for name in ("default_stream", "new_stream", "new_thread_unsafe_stream", "synchronize"):
        patch.setattr(mx, name, _for_cpu(getattr(mx, name)))
    patch.setattr(mx, "set_wired_limit", _WiredLimit())


def _for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        named = {key: _on_cpu(value) for key, value in named.items()}
        return function(*(_on_cpu(a) for a in arguments), **named)

    return call


class _WiredLimit:
    """mx.set_wired_limit, which refuses more than the working set."""

    def __init__(self) -> None:
        self._limit = 0

    def __call__(self, limit: int) -> int:
        if limit > int(DEVICE_INFO["max_recommended_working_set_size"]):
            raise ValueError(
                "[metal::set_wired_limit] Setting a wired limit larger than the maximum working "
                "set size is not allowed."
            )
        before, self._limit = self._limit, limit
        return before


def _emulate_platform(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "platform", "darwin")
    for name, answer in {
        "system": "Darwin",
        "release": "25.1.0",
        "machine": "arm64",
        "processor": "arm",
        "mac_ver": ("26.1", ("", "", ""), "arm64"),
        "libc_ver": ("", ""),
    }.items():
        patch.setattr(platform, name, lambda *_, answer=answer: answer)
    real_sysconf, real_rusage, real_fcntl = os.sysconf, resource.getrusage, fcntl.fcntl

    def sysconf(name: str) -> int:
        answers = {"SC_PAGE_SIZE": PAGE, "SC_PAGESIZE": PAGE, "SC_PHYS_PAGES": MEMORY // PAGE}
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return answers.get(name) or real_sysconf(name)

    def getrusage(who: int) -> resource.struct_rusage:
        usage = list(real_rusage(who))
        usage[2] *= 1024  # ru_maxrss is in bytes there
        return resource.struct_rusage(usage)

    def control(file: Any, command: int, argument: Any = 0) -> Any:
        return 0 if command in _MAC_COMMANDS else real_fcntl(file, command, argument)

    patch.setattr(fcntl, "fcntl", control)
    patch.setattr(os, "sysconf", sysconf)
    patch.setattr(resource, "getrusage", getrusage)


def _hide_linux(patch: pytest.MonkeyPatch) -> None:
    for name in _ABSENT_FUNCTIONS:
        patch.delattr(os, name, raising=False)
    for module, name in (
        (builtins, "open"),
        (io, "open"),
        (os, "open"),
        (os, "stat"),
        (os, "listdir"),
        (os, "scandir"),
    ):
        patch.setattr(module, name, _hiding(getattr(module, name)))


def _hiding(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` of a path, to which the folders of Linux do not exist."""

    @functools.wraps(function)
    def call(path: Any = ".", *arguments: Any, **named: Any) -> Any:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(_ABSENT_FOLDERS):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(path, *arguments, **named)

    return call


class _MacLibrary:
    """libproc and libSystem: proc_pid_rusage, and no mallopt."""

    def proc_pid_rusage(self, pid: int, flavor: int, buffer: Any) -> int:
        with _REAL_OPEN(f"/proc/{pid}/status") as status:
            sizes = {line.split()[0]: line.split()[1] for line in status if line.startswith("Vm")}
        record = buffer._obj
        for index, name in ((_FOOTPRINT, "VmRSS:"), (_LARGEST_FOOTPRINT, "VmHWM:")):
            number = ctypes.c_uint64.from_buffer(record, _UUID + 8 * index)
            number.value = int(sizes[name]) * 1024
        return 0


_REAL_OPEN = open


def _emulate_libraries(patch: pytest.MonkeyPatch) -> None:
    real = ctypes.CDLL

    def load(name: str | None, *arguments: Any, **named: Any) -> Any:
        if name is None or str(name).startswith("/usr/lib/lib"):
            return _MacLibrary()
        return real(name, *arguments, **named)

    patch.setattr(ctypes, "CDLL", load)
    patch.setattr(psutil, "virtual_memory", _virtual_memory)


def _virtual_memory() -> SimpleNamespace:
    """Return what is available here, and no more than a Mac at rest has."""
    with _REAL_OPEN("/proc/meminfo") as file:
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    return SimpleNamespace(total=MEMORY, available=min(values["MemAvailable"], 3 * MEMORY // 4))
