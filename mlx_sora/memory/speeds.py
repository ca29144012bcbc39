"""Measured speeds of a machine, as plain values; `manage/machine_speed.py` measures them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

#: Networks whose speed is measured.
NETWORKS = ("text_encoder", "transformer", "vae")


@dataclass(frozen=True)
class NetworkSpeed:
    """Speed of a network in one type.

    flops: operations per second. seconds_per_byte: what a byte of weights adds to a pass.
    """

    flops: float
    seconds_per_byte: float = 0.0

    def seconds(self, flops: float, weight_bytes: float = 0.0) -> float:
        """Return the seconds of an amount of work and of weights to pass through."""
        return flops / self.flops + weight_bytes * self.seconds_per_byte


@dataclass(frozen=True)
class MachineSpeeds:
    """Speeds of one machine.

    machine: facts that identify it (see `manage/machine_file.py`). products: operations per second
    of a large matrix product, by type. bandwidth: bytes of memory per second, read and written.
    disk: bytes per second, read through MLX. latency: seconds that a block takes whatever its size.
    networks: speeds by network and type.
    """

    machine: Mapping[str, Any]
    products: Mapping[str, float]
    bandwidth: float
    disk: float
    latency: float
    networks: Mapping[str, Mapping[str, NetworkSpeed]] = field(default_factory=dict)

    def network(self, name: str, dtype: str) -> NetworkSpeed:
        """Return the speed of a network in a type; that of float32 if this one is not measured."""
        known = self.networks[name]
        return known[dtype] if dtype in known else known["float32"]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MachineSpeeds:
        """Return the speeds of `to_dict`. Raises ValueError for values that it does not write."""
        try:
            networks = {
                name: {
                    dtype: NetworkSpeed(_speed(row["flops"]), _seconds(row["seconds_per_byte"]))
                    for dtype, row in values["networks"][name].items()
                }
                for name in NETWORKS
            }
            if not all("float32" in speeds for speeds in networks.values()):
                raise ValueError("a network lacks float32")
            return cls(
                machine=dict(values["machine"]),
                products={name: _speed(value) for name, value in values["products"].items()},
                bandwidth=_speed(values["bandwidth"]),
                disk=_speed(values["disk"]),
                latency=_seconds(values["latency"]),
                networks=networks,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a value is missing or of another kind ({error})") from None


def _speed(value: Any) -> float:
    """Return a number above 0."""
    number = _seconds(value)
    if number == 0:
        raise ValueError("a speed is 0")
    return number


def _seconds(value: Any) -> float:
    """Return a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e30:
        raise ValueError(f"{str(value)[:40]!r} is not a plausible number")
    return float(value)
