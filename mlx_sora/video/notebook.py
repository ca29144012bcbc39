"""A finished video as HTML with its bytes inside, for notebooks."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Protocol

from mlx_sora.errors import MlxSoraError
from mlx_sora.utils.leftovers import temporary_folder
from mlx_sora.video.output_path import is_sequence
from mlx_sora.video.writer import save_frames

if TYPE_CHECKING:
    import numpy as np

    from mlx_sora.request.generation import GenerationRequest

#: Largest video in bytes that a notebook holds: in base64 a third more.
MAX_BYTES = 16 << 20

#: Smaller sides than this are enlarged by a whole factor, so that pixels stay squares.
MIN_SIDE = 256

#: Files that browsers show as they are, by suffix. mov holds the same streams as mp4.
TYPES = {
    ".mp4": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".png": "image/png",
}


class Playable(Protocol):
    """Video as far as it is shown: a `mlx_sora.Video`."""

    @property
    def path(self) -> Path | None: ...
    @property
    def request(self) -> GenerationRequest: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def fps(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def warnings(self) -> Sequence[str]: ...
    @property
    def frames(self) -> np.ndarray: ...


def to_html(video: Playable) -> str:
    """Return a player of the video, or its picture, with a line under it.

    One that takes over MAX_BYTES, or whose file is gone, is only named.
    """
    prompt = escape(video.request.prompt, quote=True)
    length = f"{video.num_frames} frames, {video.fps:g} fps" if video.num_frames > 1 else "image"
    facts = f"{video.width}x{video.height}, {length}, seed {video.seed}"
    name = "" if video.path is None else f"{escape(str(video.path))}: "
    lines = [escape(shorten(video.request.prompt, 100, placeholder="…")), f"{name}{facts}"]
    lines += [f"warning: {escape(warning)}" for warning in video.warnings]
    line = "".join(f"<div><small>{text}</small></div>" for text in lines)
    try:
        content, kind = _content(video)
    except (OSError, MlxSoraError) as error:
        return f"{line}<div><small>Cannot show it: {escape(str(error))}</small></div>"
    if len(content) > MAX_BYTES:
        size = f"{len(content) / 1e6:.0f} MB are too many to show here."
        return f"{line}<div><small>{size}</small></div>"
    factor = max(1, MIN_SIDE // max(video.width, video.height))
    # Large videos shrink with the page; small ones are enlarged without blur.
    style = "max-width: 100%; height: auto" + ("; image-rendering: pixelated" * (factor > 1))
    source = f"data:{kind};base64,{b64encode(content).decode()}"
    shown = f'width="{factor * video.width}" style="{style}" title="{prompt}" src="{source}"'
    if kind.startswith("image"):
        return f'<img {shown} alt="{prompt}">{line}'
    return f"<video {shown} autoplay loop muted controls playsinline></video>{line}"


def _content(video: Playable) -> tuple[bytes, str]:
    """Return the bytes to show and their type: of the file, or encoded from the frames."""
    path = video.path
    if path is not None and path.suffix.lower() in TYPES and not is_sequence(path):
        return path.read_bytes(), TYPES[path.suffix.lower()]
    even = video.width % 2 == 0 and video.height % 2 == 0
    suffix = ".png" if video.num_frames == 1 else ".mp4" if even else ".webp"
    with temporary_folder() as folder:
        file = save_frames(folder / f"video{suffix}", video.frames, video.fps)
        return file.read_bytes(), TYPES[suffix]
