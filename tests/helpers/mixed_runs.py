"""Runs of every kind with one pipeline, and the memory in use between them.

As a program, makes rounds of them, `python -m tests.helpers.mixed_runs ROUNDS`, and prints for each
the runs, the bytes in use, the objects of Python, and the next random number of the caller.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from mlx_sora import GenerationRequest, MlxSoraError, Pipeline

# isort: split
import mlx.core as mx

from tests.helpers.heap import malloc_in_use

PROMPT = "a red circle on a black background"
SMALL = {"seed": 1, "steps": 1, "num_frames": 1}


def bytes_in_use() -> int | None:
    """Return the bytes that are allocated, MLX's arrays included; None without mallinfo2."""
    mx.clear_cache()
    return malloc_in_use()


def kinds_of_runs(
    pipe: Pipeline, folder: Path, *, clips: bool = False
) -> Mapping[str, Callable[[], int]]:
    """Return functions that make runs in `folder` and return their number, by the kind of run.

    clips: also kinds that need several frames, which take longer.
    """

    def make(**options: object) -> Callable[[], int]:
        def run() -> int:
            pipe(PROMPT, **{**SMALL, **options})
            return 1

        return run

    def output(name: str) -> dict[str, object]:
        return {"output": str(folder / name), "overwrite": True}

    def edit() -> int:
        pipe.edit(source, source_prompt=PROMPT, prompt="a blue circle", steps=1)
        return 1

    def batch() -> int:
        prompts = ("a blue square", "a green triangle", " ")
        requests = [GenerationRequest.from_dict({**SMALL, "prompt": each}) for each in prompts]
        return sum(1 for event in pipe.stream_all(requests) if type(event).__name__ == "Finished")

    def refused() -> int:
        wrong = ({"width": 4}, {"memory_budget": "1MB"}, {"images": "none.png"}, {"quantize": 7})
        for options in wrong:
            try:
                pipe(PROMPT, **{**SMALL, **options})
            except MlxSoraError:
                continue
            raise AssertionError(options)
        return len(wrong)

    source = str(folder / "source.png")
    pipe(PROMPT, **SMALL, output=source)
    found = {
        "plain": make(),
        "file": make(**output("a.png")),
        "preview": make(steps=2, preview_every=1, **output("b.png")),
        "checkpoint": make(steps=2, checkpoint_every=1, **output("c.png")),
        "budget": make(memory_budget="1GB"),
        "streamed": make(ci_dl=True),
        "quantized": make(quantize=8),
        "techniques": make(steps=4, step_cache="every:2", guidance_interval="100,600"),
        "edit": edit,
        "batch": batch,
        "refused": refused,
    }
    if clips:
        found |= {
            "video": make(num_frames=17, **output("d.mp4")),
            "loop": make(num_frames=34, loop=2, condition_frames=17),
            "image": make(num_frames=17, images=source),
            "leap": make(num_frames=34, loop=2, long="windows", steps=4, lpl="fixed:2", tdtm="2"),
        }
    return found


def main(rounds: int) -> None:
    pipe = Pipeline.from_pretrained("shapes")
    with tempfile.TemporaryDirectory() as folder:
        kinds = kinds_of_runs(pipe, Path(folder), clips=True)
        for _ in range(rounds):
            mx.random.seed(7)
            runs = sum(make() for make in kinds.values())
            drawn = mx.random.uniform().item()
            row = (runs, bytes_in_use(), len(gc.get_objects()), drawn)
            print(json.dumps(row), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
