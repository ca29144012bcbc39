"""Run on every rank: videos of the bundled model made together, against the same made alone.

Writes a JSON object: case to the largest difference of the latents after any step, in standard
deviations, whether the accelerations did alike, and how far the first rank's frames are apart.
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

#: What is asked for besides: every technique, and whatever changes what an evaluation looks like.
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
    "clips": {"loop": 2, "num_frames": 34, "steps": 1},
}


@dataclass(frozen=True)
class Made:
    """The latents after each step, and what came of them."""

    latents: list[np.ndarray]
    done: list[str]
    video: Video

    @classmethod
    def of(cls, run: Iterator[Event]) -> Made:
        """All of a run."""
        latents, done = [], []
        for event in run:
            if isinstance(event, StepFinished):
                latents.append(np.array(event.latents))
            if isinstance(event, Noted):
                done.append(event.message)
            if isinstance(event, Finished):
                return cls(latents, done, event.video)
        raise AssertionError("a run ends with Finished")


def begin(pipe: Pipeline, resume: Path | None = None, **options: object) -> Iterator[Event]:
    return pipe.stream(GenerationRequest.from_dict(SMALL | options), resume)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / a.std())


def compare(alone: Made, together: Made) -> dict[str, Any]:
    pairs = zip(alone.latents, together.latents, strict=True)
    one, other = alone.video.frames, together.video.frames
    assert one is not None, "off leaves every rank to itself"
    return {
        "difference": max(difference(a, b) for a, b in pairs),
        "done alike": alone.done == together.done,
        "frames": None if other is None else int(np.abs(one.astype(int) - other).max()),
        "parallel": together.video.metadata["parallel"],
    }


def resumed(pipe: Pipeline, folder: Path, *, first_together: bool) -> dict[str, Any]:
    """A run that two ranks begin and one process ends, or the other way round."""
    options = {"steps": 4, "step_cache": "every:2,warmup=2,order=1", "sampler": "ab2"}
    whole = Made.of(begin(pipe, **options, parallel="off"))
    modes = ("sequence", "off") if first_together else ("off", "sequence")
    output, kept = folder / f"{first_together}.mp4", folder / f"{first_together}.kept"
    options |= {"checkpoint_every": 1}
    if pipe.ranks.is_rank0 or first_together:
        for event in begin(pipe, **options, output=str(output), parallel=modes[0]):
            if isinstance(event, StepFinished) and event.step == 2 and pipe.ranks.is_rank0:
                shutil.copy(checkpoint_path(output), kept)
    pipe.ranks.broadcast_object(None)  # the file is written
    if not pipe.ranks.is_rank0 and first_together:
        return {}
    frames = str(output.with_suffix("")) + "/"
    made = Made.of(begin(pipe, kept, **options, output=frames, parallel=modes[1]))
    last = difference(whole.latents[-1], made.latents[-1])
    return {"steps": len(made.latents), "difference": last}


def of_two_minds(pipe: Pipeline) -> dict[str, Any]:
    """What techniques that look at the video did, where the second rank sees it otherwise."""
    options = {"steps": 8, "lpl": "adaptive:patience=1,tolerance=0.001"}
    options |= {"step_cache": "online:warmup=2,threshold=0.2"}
    alone = Made.of(begin(pipe, **options, parallel="off"))
    seen = lpl.similarity, step_cache._size
    if not pipe.ranks.is_rank0:
        lpl.similarity = lambda v, previous, step: [float(step.index)]  # type: ignore[assignment]
        step_cache._size = lambda x: 1.0  # type: ignore[assignment]
    together = Made.of(begin(pipe, **options, parallel="sequence"))
    lpl.similarity, step_cache._size = seen
    return {"alone": alone.done, "together": together.done}


def failing(pipe: Pipeline) -> dict[str, Any]:
    """What all ranks raise where the second fails."""
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
        f"begun by {'two' if together else 'one'}": resumed(pipe, folder, first_together=together)
        for together in (True, False)
    }
    found["failing"] = failing(pipe)
    found["of two minds"] = of_two_minds(pipe)
    for name, options in CASES.items():
        alone = Made.of(begin(pipe, **options, parallel="off"))
        for mode in ("sequence", *(["guidance"] if options.get("guidance") != 1 else [])):
            together = Made.of(begin(pipe, **options, parallel=mode))
            found[f"{name}, {mode}"] = compare(alone, together)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
