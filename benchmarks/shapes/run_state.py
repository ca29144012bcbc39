"""Small shared parts of the training phases: resumable state, learning rates, averaging, logs."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class RunState:
    """A resumable phase: one file with modules, optimisers, step and random states."""

    def __init__(self, folder: Path, name: str, parts: dict[str, Any], seed: int) -> None:
        self.path = folder / f"{name}.pt"
        self.log_path = folder / f"{name}.jsonl"
        self.parts, self.step, self.seconds = parts, 0, 0.0
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._load()
        self._since = time.monotonic()

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=False)
        for key, part in self.parts.items():
            part.load_state_dict(state["parts"][key])
        self.step, self.seconds = state["step"], state["seconds"]
        self.rng.bit_generator.state = state["numpy"]
        torch.set_rng_state(state["torch"])

    def save(self) -> None:
        """Write the state next to the old one, then replace it."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        state = {
            "parts": {key: part.state_dict() for key, part in self.parts.items()},
            "step": self.step,
            "seconds": self.seconds,
            "numpy": self.rng.bit_generator.state,
            "torch": torch.get_rng_state(),
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def log(self, **values: float) -> None:
        """Append one JSON line and show it."""
        seconds = self.seconds + time.monotonic() - self._since
        row = {"step": self.step, "seconds": round(seconds, 1)}
        row |= {key: round(float(value), 5) for key, value in values.items()}
        with self.log_path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(self.path.stem, row, flush=True)


def schedule(step: int, total: int, peak: float, warm: int = 50, floor: float = 0.0) -> float:
    """Linear warm-up to `peak`, then a cosine down to `floor * peak` at `total` steps."""
    if step < warm:
        return peak * (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, total - warm))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def steady_schedule(step: int, total: int, peak: float, warm: int = 50) -> float:
    """Linear warm-up to `peak`, which stays; over the last quarter linearly down to a hundredth.

    A run that is to go on gets more steps before that quarter begins.
    """
    down = min(1.0, (total - step) / max(1, total // 4))
    return peak * min(1.0, (step + 1) / warm) * max(0.01, down)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate; a group's `factor` multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


class Average:
    """Exponential moving average of a module's parameters and buffers."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Blend the module in; early steps use a shorter memory."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            self.values[key].lerp_(value, 1 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.values

    def load_state_dict(self, values: dict[str, torch.Tensor]) -> None:
        self.values = {k: v.clone() for k, v in values.items()}
