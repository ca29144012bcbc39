"""Run on every rank: videos of the bundled model on two ranks, compared with the same on one.

Rank 0 writes a JSON object of each rank: for each case the largest difference of the latents after
any step, in standard deviations, whether the notes are equal, and the largest difference of rank
0's frames.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core, so that the fast BLAS is in place)

# isort: split
import numpy as np

from mlx_sora import GenerationRequest, Pipeline, UsageError
from mlx_sora.accel import lpl, step_cache
from mlx_sora.runtime.events import Event, Finished, Noted, StepFinished
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.video import Video
from mlx_sora.video.output_path import checkpoint_path

SMALL = {"prompt": "a red circle", "seed": 3, "steps": 4, "width": 32, "height": 32}
SMALL |= {"num_frames": 17}

#: Further options: every technique, and all that changes the shape of an evaluation.
CASES: dict[str, dict[str, Any]] = {
    "two chunks and a half": {"num_frames": 40, "steps": 1},
    "no guidance": {"guidance": 1, "num_frames": 1},
    "midpoint": {"sampler": "midpoint", "steps": 2, "negative_prompt": "a text of another length"},
    "leap": {"lpl": "adaptive:patience=1,tolerance=2", "tdtm": 2, "sequential_guidance": True},
    "caches": {
        "step_cache": "every:2,warmup=1,order=1",
        "guidance_cache": "every:3,after=0",
        "guidance_interval": "30,900",
        "sampler": "ab2",
        "ci_dl": True,
    },
    "online": {"step_cache": "online:warmup=2,threshold=9"},
    "clips": {"loop": 2, "num_frames": 34, "steps": 1, "image_guidance": "joint"},
    "windows": {
        "loop": 2,
        "num_frames": 34,
        "long": "windows",
        "steps": 3,
        "prompt": "|0|a red circle|1|a blue square",
        "step_cache": "every:2,warmup=1",
    },
    "three windows": {
        "loop": 3,
        "num_frames": 34,
        "long": "windows",
        "steps": 4,
        "step_cache": "online:warmup=2,threshold=9",
        "guidance_cache": "every:2,after=0",
        "lpl": "adaptive:patience=1,tolerance=2",
        "tdtm": 2,
    },
}

#: Runs that end on another number of ranks, by the way to split them.
RESUMED: dict[str, dict[str, Any]] = {
    "sequence": {"step_cache": "every:2,warmup=2,order=1", "sampler": "ab2"},
    "windows": {
        "loop": 3,
        "num_frames": 34,
        "long": "windows",
        "step_cache": "every:2,warmup=2,order=1",
    },
}


@dataclass(frozen=True)
class Result:
    """Latents after each step, notes and video of a run."""

    latents: list[np.ndarray]
    notes: list[str]
    video: Video

    @classmethod
    def from_events(cls, events: Iterator[Event]) -> Result:
        """Run to the end."""
        latents, notes = [], []
        for event in events:
            if isinstance(event, StepFinished):
                latents.append(np.array(event.latents))
            if isinstance(event, Noted):
                notes.append(event.message)
            if isinstance(event, Finished):
                return cls(latents, notes, event.video)
        raise AssertionError("a run ends with Finished")


def stream(pipe: Pipeline, resume: Path | None = None, **options: object) -> Iterator[Event]:
    return pipe.stream(GenerationRequest.from_dict(SMALL | options), resume)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / a.std())


def compare(single: Result, shared: Result) -> dict[str, Any]:
    pairs = zip(single.latents, shared.latents, strict=True)
    one, other = single.video.decoded, shared.video.decoded
    assert one is not None, "with parallel=off every rank has the frames"
    return {
        "difference": max(difference(a, b) for a, b in pairs),
        "notes equal": single.notes == shared.notes,
        "frames": None if other is None else int(np.abs(one.astype(int) - other).max()),
        "parallel": shared.video.metadata["parallel"],
    }


def resume_elsewhere(pipe: Pipeline, folder: Path, mode: str, *, two_first: bool) -> dict[str, Any]:
    """Begin a run on two ranks and end it on one, or the other way round."""
    options = RESUMED[mode] | {"steps": 4}
    expected = Result.from_events(stream(pipe, **options, parallel="off"))
    modes = (mode, "off") if two_first else ("off", mode)
    output, copy = folder / f"{mode}{two_first}.mp4", folder / f"{mode}{two_first}.copy"
    options |= {"checkpoint_every": 1}
    if pipe.ranks.is_rank0 or two_first:
        for event in stream(pipe, **options, output=str(output), parallel=modes[0]):
            if isinstance(event, StepFinished) and event.step == 2 and pipe.ranks.is_rank0:
                shutil.copy(checkpoint_path(output), copy)
    pipe.ranks.broadcast_object(None)  # the file is written
    if not pipe.ranks.is_rank0 and two_first:
        return {}
    frames = str(output.with_suffix("")) + "/"
    result = Result.from_events(stream(pipe, copy, **options, output=frames, parallel=modes[1]))
    last = difference(expected.latents[-1], result.latents[-1])
    return {"steps": len(result.latents), "difference": last}


def rank0_decides(pipe: Pipeline) -> dict[str, Any]:
    """Run techniques that measure the latents while rank 1 measures something else."""
    options = {"steps": 8, "lpl": "adaptive:patience=1,tolerance=0.001"}
    options |= {"step_cache": "online:warmup=2,threshold=0.2"}
    single = Result.from_events(stream(pipe, **options, parallel="off"))
    seen = lpl.similarity, step_cache._size
    if not pipe.ranks.is_rank0:
        lpl.similarity = lambda v, previous, step: [float(step.index)]  # type: ignore[assignment]
        step_cache._size = lambda x: 1.0  # type: ignore[assignment]
    shared = Result.from_events(stream(pipe, **options, parallel="sequence"))
    lpl.similarity, step_cache._size = seen
    return {"single": single.notes, "shared": shared.notes}


def failing(pipe: Pipeline) -> dict[str, Any]:
    """Return the error that all ranks raise if rank 1 fails."""
    try:
        with pipe.ranks.collective_errors():
            if not pipe.ranks.is_rank0:
                raise UsageError("It went wrong.", "Mend it.")
    except UsageError as error:
        return {"message": str(error)}
    return {}


def main(folder: Path) -> None:
    # Read once: it is most of what such small runs take.
    Tokenizer.load = cache(Tokenizer.load)  # type: ignore[method-assign]
    pipe = Pipeline.from_pretrained("shapes")
    found = {
        f"started by {'two' if two_first else 'one'}, {mode}": resume_elsewhere(
            pipe, folder, mode, two_first=two_first
        )
        for two_first in (True, False)
        for mode in RESUMED
    }
    found["failing"] = failing(pipe)
    found["rank 0 decides"] = rank0_decides(pipe)
    for name, options in CASES.items():
        single = Result.from_events(stream(pipe, **options, parallel="off"))
        guided, windowed = options.get("guidance") != 1, "long" in options
        for mode in ("sequence", *["guidance"] * guided, *["windows"] * windowed):
            shared = Result.from_events(stream(pipe, **options, parallel=mode))
            found[f"{name}, {mode}"] = compare(single, shared)
    everything = pipe.ranks.all_gather_object(found)
    if pipe.ranks.is_rank0:
        sys.stdout.write(json.dumps(everything))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
