"""Makes the animated pictures of the README by its own commands.

    python -m benchmarks.pictures

Runs the commands of the README in order, and turns each video that the README shows into a picture
in `results/pictures`: every pixel as a square of 4 × 4, so that 64×64 can be seen. A picture holds
its command and a hash of the weights; tests/invariants/test_plots.py compares both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from benchmarks.common import RESULTS
from mlx_sora.loading.model_folder import BUNDLED, find_model
from mlx_sora.video.reader import read_video

README = Path(__file__).parents[1] / "README.md"
PICTURES = RESULTS / "pictures"
SCALE, FPS = 4, 24

#: Tag of EXIF for a description.
_DESCRIPTION = 0x010E


def commands() -> list[str]:
    """The commands of the README that write or read videos of the bundled model."""
    blocks = re.findall(
        r"^```bash\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    lines = [line for block in blocks for line in block.replace(" \\\n   ", "").splitlines()]
    return [line for line in lines if " -o " in line and "opensora" not in line]


def shown() -> Iterator[tuple[Path, str]]:
    """Pictures that the README shows, and the command of each."""
    names = re.findall(r"results/pictures/([\w-]+)\.webp", README.read_text("utf-8"))
    outputs = {Path(_output(command)).stem: command for command in commands()}
    for name in dict.fromkeys(names):
        yield PICTURES / f"{name}.webp", outputs[name]


def _output(command: str) -> str:
    words = shlex.split(command)
    return words[words.index("-o") + 1]


def description(command: str) -> str:
    """What a picture holds: its command, and a hash of the weights."""
    weights = find_model(BUNDLED).transformer / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    return json.dumps({"command": command, "weights": digest})


def recorded(picture: Path) -> str:
    """The description that a picture holds; empty without one."""
    if not picture.exists():
        return ""
    with Image.open(picture) as image:
        return str(image.getexif().get(_DESCRIPTION, ""))


def write(video: Path, picture: Path, command: str) -> None:
    """Enlarge a video to a picture."""
    frames = read_video(video).frames.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    first, *others = [Image.fromarray(frame) for frame in frames]
    exif = Image.Exif()
    exif[_DESCRIPTION] = description(command)
    # 1/24 s in whole milliseconds; the last frame stays, so that the end can be seen.
    durations = [round(1000 / FPS)] * len(others) + [700]
    options = {"quality": 85, "method": 6, "loop": 0, "duration": durations}
    first.save(picture, save_all=True, append_images=others, exif=exif, **options)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        for command in commands():
            subprocess.run(["bash", "-euc", command], cwd=folder, env=env, check=True)
        for picture, command in shown():
            write(Path(folder) / _output(command), picture, command)
            print(f"{picture} {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
