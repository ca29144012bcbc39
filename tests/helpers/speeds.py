"""Speeds of a machine that no one has."""

from __future__ import annotations

from mlx_sora.memory.speeds import MachineSpeeds, NetworkSpeed

SPEEDS = MachineSpeeds(
    machine={"device": "Apple M9"},
    products={"float32": 2e12, "bfloat16": 4e12},
    bandwidth=100e9,
    disk=2e9,
    latency=1e-4,
    networks={
        "text_encoder": {"float32": NetworkSpeed(1e12, 1e-11)},
        "transformer": {"float32": NetworkSpeed(1e12, 1e-11), "bfloat16": NetworkSpeed(2e12)},
        "vae": {"float32": NetworkSpeed(5e11)},
    },
)
