"""The measured speeds of a machine as rows of a table, with advice where one is far too low."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_sora.manage.machine_check import OK, SLOW, CheckResult
from mlx_sora.memory.estimate import DEVICES, Device
from mlx_sora.memory.speeds import MachineSpeeds
from mlx_sora.runtime.device import blas_notice

#: Shares below which a speed is slow: of the chip's published figure, and of the large product.
_PUBLISHED_SHARE, _PRODUCT_SHARE = 0.35, 0.25

#: Bytes per second of an SSD that is slow, far below any Mac's.
_SLOW_DISK = 0.5e9

_BUSY = (
    "Close other programs, connect the power supply, turn Low Power Mode off, and measure again."
)
_DISK = "Keep models on an internal SSD: MLX_SORA_WEIGHTS names their folder."


def speed_rows(speeds: MachineSpeeds) -> Iterator[CheckResult]:
    """Yield a row for each speed."""
    chip = published_chip(str(speeds.machine.get("device", "")))
    for dtype, speed in speeds.products.items():
        # Published figures are those of float32; half precision is at least as fast.
        advice = _BUSY if chip and speed < _PUBLISHED_SHARE * chip.flops else blas_notice()
        yield _row(f"matrix product, {dtype}", _operations(speed), advice)
    low = chip and speeds.bandwidth < _PUBLISHED_SHARE * chip.bandwidth
    yield _row("memory", f"{speeds.bandwidth / 1e9:.3g} GB/s", _BUSY if low else "")
    disk = _DISK if speeds.disk < _SLOW_DISK else ""
    yield _row("disk", f"{speeds.disk / 1e9:.2g} GB/s", disk)
    for network, types in speeds.networks.items():
        for dtype, found in types.items():
            share = found.flops / speeds.products.get(dtype, found.flops)
            message = f"{_operations(found.flops)}, {share:.0%} of a matrix product"
            advice = _BUSY if share < _PRODUCT_SHARE else ""
            yield _row(f"{network.replace('_', ' ')}, {dtype}", message, advice)


def published_chip(device: str) -> Device | None:
    """Return the published figures of a chip by MLX's name of it, such as "Apple M4 Pro"."""
    name = device.removeprefix("Apple ")
    return next((known for known in DEVICES if known.chip == name), None)


def _row(name: str, message: str, advice: str) -> CheckResult:
    return CheckResult(f"speed, {name}", SLOW if advice else OK, message, advice=advice)


def _operations(speed: float) -> str:
    if speed >= 1e12:
        return f"{speed / 1e12:.3g} TFLOP/s"
    return f"{speed / 1e9:.3g} GFLOP/s"
