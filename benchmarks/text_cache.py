"""What the text cache saves at full size: the text stage of a first and of a second video.

    python -m benchmarks.text_cache [--runs 3] [--budget 3.3GB] [--json FILE]

T5-XXL of random bfloat16 weights (9.5 GB on disk, deleted afterwards) and a transformer of one
block. Each run is the text stage of one prompt under a memory budget; weights are dropped from the
system's cache of files before it, as a video in between would do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, alternate, markdown, write_json
from benchmarks.full_model import write_model
from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.distributed.group import Ranks
from mlx_sora.memory.limits import release
from mlx_sora.pipeline.stages import encode_text
from mlx_sora.utils.files import CACHE_VARIABLE

PROMPT = "a red circle moving right on a black background"


def forget_files(folder: Path) -> None:
    """Drop the files of a folder from the system's cache of files."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="default 3")
    parser.add_argument("--budget", default="3.3GB", help="memory budget; default 3.3GB")
    parser.add_argument("--json", type=Path, default=RESULTS / "text_cache.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = f"{folder}/cache"
        write_model(Path(folder, "model"), depths={"transformer": 1})
        release()
        pipe = Pipeline.from_pretrained(f"{folder}/model")
        read = dict.fromkeys((False, True), 0)

        def encode(cached: bool) -> None:
            forget_files(pipe.model.text_encoder)
            request = GenerationRequest(
                prompt=PROMPT,
                seed=1,
                num_frames=1,
                resolution="144p",
                memory_budget=options.budget,
                text_cache=cached,
            )
            run = pipe.prepare(request)
            read[cached] = run.plan.stage("encode").read
            list(encode_text([run], {}, Ranks()))

        encode(cached=True)  # fills the cache
        times = alternate(options.runs, lambda: encode(False), lambda: encode(True))
        stored = sum(file.stat().st_size for file in Path(folder, "cache", "text").iterdir())
    rows = [
        {"video": name, "seconds": statistics.median(column), "bytes_read": read[cached]}
        for name, cached, column in zip(
            ("first", "second"), (False, True), zip(*times, strict=True), strict=True
        )
    ]
    write_json(options.json, {"budget": options.budget, "bytes_stored": stored, "rows": rows})
    cells = [
        (str(row["video"]), f"{row['seconds']:.2f} s", f"{row['bytes_read']:,}") for row in rows
    ]
    print(markdown(["video of a prompt", "text stage", "bytes read"], cells))


if __name__ == "__main__":
    main()
