"""Command lines of the program, for tests that start it."""

from __future__ import annotations

import shlex


def generate(options: str) -> list[str]:
    """Return Python's arguments that run `generate` with options as they are typed."""
    return ["-m", "mlx_sora", "generate", *shlex.split(options)]


#: The quickest run: one image.
IMAGE = generate("--prompt red --num-frames 1 --steps 1 --seed 1 --output a.png")
