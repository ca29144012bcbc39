"""A helper as the server starts it, that answers without reading media or models.

A video may have 100 frames; more do not fit. Files that begin with "video" are videos, with
"image" images; "break" ends the process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def plan(options: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Return the plan of a task."""
    frames = int(options.get("num_frames", 17))
    return {
        "model": options.get("model", "shapes"),
        "width": 64,
        "height": 64,
        "frames": frames,
        "fps": 24.0,
        "steps": int(options.get("steps", 4)),
        "peak": 1000 * frames,
        "smallest": 500 * frames,
        "fits": frames <= 100,
        "error": f"This needs {frames} frames.",
        "fix": "These would fit: num_frames 100.",
        "suffix": "." + options.get("output", "png" if frames == 1 else "mp4"),
        "shares": {"denoise": 1.0},
    }


def probe(path: str) -> dict[str, Any]:
    """Return facts about a file."""
    content = Path(path).read_text()
    if content.startswith("break"):
        os._exit(1)
    video = content.startswith("video")
    request = {"prompt": content} if "recorded" in content else None
    size = {"width": 64, "height": 64, "request": request}
    return {
        "kind": "video" if video else "image",
        "frames": 17 if video else 1,
        "fps": None,
        **size,
    }


def thumbnail(path: str, target: str) -> dict[str, Any]:
    """Copy the file."""
    Path(target).write_text(Path(path).read_text())
    return {}


def main() -> None:
    """Answer calls."""
    calls = {"plan": plan, "probe": probe, "thumbnail": thumbnail, "spritesheet": thumbnail}
    calls["record"] = lambda path: {"record": {"prompt": Path(path).read_text()}}
    calls["checkpoint"] = lambda path: {"request": {"prompt": "again"}, "model": "shapes"}
    calls["models"] = lambda: {"models": [{"id": "shapes", "name": "shapes"}]}
    for line in sys.stdin:
        arguments = json.loads(line)
        found = calls[arguments.pop("call")](**arguments)
        sys.stdout.write(json.dumps([found, None]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
