"""Interrupting a run after each of its steps, and going on: the same latents, to the last bit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.request.generation import technique_names
from mlx_sora.runtime.events import Finished, StageStarted, StepFinished
from mlx_sora.video.output_path import checkpoint_path


@dataclass
class Made:
    """Latents after each step, over all clips, and the checkpoint each step left; the record."""

    latents: list[bytes] = field(default_factory=list)
    checkpoints: list[bytes] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    frames: bytes = b""


def make(pipe: Pipeline, output: Path, options: dict[str, Any], *, steps_only: bool) -> Made:
    """One run that keeps checkpoints; steps_only: ends where decoding begins."""
    made, request = Made(), {**options, "output": str(output), "checkpoint_every": 1}
    run = pipe.stream(GenerationRequest.from_dict(request))
    for event in run:
        if isinstance(event, StepFinished):
            made.latents.append(np.array(event.latents).tobytes())
            made.checkpoints.append(checkpoint_path(output).read_bytes())
        elif isinstance(event, StageStarted) and event.stage == "decode" and steps_only:
            break
        elif isinstance(event, Finished):
            made.record, made.frames = dict(event.video.metadata), output.read_bytes()
            assert not checkpoint_path(output).exists()
    run.close()
    return made


def check_resumes(
    pipe: Pipeline, folder: Path, options: dict[str, Any], after: tuple[int, ...], decode: bool
) -> Made:
    """Compare a run with those that go on after some of its steps, counted from 1 over all clips.

    decode: to the file, else to the latents.
    """
    output = folder / "a.webp"
    options = options | {"embed_metadata": False}
    whole = make(pipe, output, options, steps_only=not decode)
    assert len(whole.latents) >= max(after)
    for made in after:
        shutil.rmtree(folder)
        folder.mkdir()
        checkpoint_path(output).write_bytes(whole.checkpoints[made - 1])
        rest = make(pipe, output, options, steps_only=not decode)
        assert rest.latents == whole.latents[made:]
        if decode:
            assert rest.frames == whole.frames
            assert len(rest.record["resumed"]) == 1
            for name in ("settings", "warnings"):
                assert rest.record[name] == whole.record[name]
            for name in set(technique_names()) & whole.record["accelerations"].keys():
                assert rest.record["accelerations"][name] == whole.record["accelerations"][name]
    return whole
