"""`--show` and `--open`: a finished file as a picture in the terminal, or in its own program."""

from __future__ import annotations

import base64
import io
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlx_sora.cli.progress import Renderer
from mlx_sora.errors import MlxSoraError
from mlx_sora.runtime.events import Event, Finished
from mlx_sora.video.output_path import frame_path, is_sequence

if TYPE_CHECKING:
    import numpy as np

    from mlx_sora.video import Video

log = logging.getLogger(__name__)

#: Frames of a video in the picture, longest side of each in pixels, and columns of text for each.
FRAMES, MAX_SIDE, COLUMNS = 4, 240, 24

#: Programs of terminals that know iTerm2's pictures.
_ITERM_PROGRAMS = ("iTerm.app", "WezTerm", "mintty")

#: Most bytes of a picture in one command of kitty.
_KITTY_CHUNK = 4096

#: Red, green and blue values of the 6 x 6 x 6 colours of terminals without others.
_LEVELS = (0, 95, 135, 175, 215, 255)

#: Seconds to wait for the program that opens a file; most only start another one.
_OPEN_SECONDS = 5.0


def add_display_flags(parser: Any) -> None:
    """Add --show and --open."""
    parser.add_argument(
        "--show",
        action="store_true",
        help="show the result in the terminal: a picture in kitty, Ghostty, iTerm2 and WezTerm, "
        "coloured blocks in others",
    )
    parser.add_argument(
        "--open",
        action="store_true",
        help="open the result; of several videos, the last; of frames, the first",
    )


class Display:
    """A renderer that also shows finished files, and opens the last one at the end."""

    def __init__(self, renderer: Renderer, *, show: bool, open: bool) -> None:
        self._renderer, self._show, self._open = renderer, show, open
        self._last: Path | None = None

    def note(self, text: str) -> None:
        self._renderer.note(text)

    def handle(self, event: Event) -> None:
        self._renderer.handle(event)
        if isinstance(event, Finished) and event.video.path is not None:
            self._last = event.video.path
            if self._show:
                show_video(event.video, sys.stderr)

    def close(self) -> None:
        self._renderer.close()
        if self._open and self._last is not None and sys.exc_info()[0] is None:
            open_file(frame_path(self._last, 0) if is_sequence(self._last) else self._last)


def open_file(path: Path) -> None:
    """Open a file as a double click would; a failure is a warning."""
    program = "open" if sys.platform == "darwin" else "xdg-open"
    try:
        process = subprocess.Popen(
            [program, str(path.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        code = process.wait(_OPEN_SECONDS)
    except subprocess.TimeoutExpired:
        return
    except OSError as error:
        log.warning("%s cannot be opened: %s: %s", path, program, error.strerror)
        return
    if code:
        log.warning("%s cannot be opened: %s ended with %d", path, program, code)


def show_video(video: Video, stream: TextIO) -> None:
    """Print a picture of a finished video on a terminal; where that is impossible, warn."""
    way = choose_way(os.environ) if stream.isatty() else ""
    try:
        "▀".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        way = way if way in ("kitty", "iterm2") else ""
    if not way:
        log.warning("--show needs a terminal that shows colours")
        return
    columns = shutil.get_terminal_size().columns
    try:
        if way in ("kitty", "iterm2"):
            picture = to_png(contact_strip(spread_frames(video, FRAMES), MAX_SIDE, enlarge=True))
            text = kitty_picture(picture) if way == "kitty" else iterm_picture(picture)
        else:
            frames = spread_frames(video, max(1, min(FRAMES, columns // COLUMNS)))
            side = (columns - len(frames)) // len(frames)
            strip = contact_strip(frames, side, enlarge=False)
            text = "".join(block_lines(strip, true_colour=way == "24bit"))
    except MlxSoraError as error:
        log.warning("%s cannot be shown: %s", video.path, error)
        return
    stream.write(text)
    stream.flush()


def choose_way(environment: Mapping[str, str]) -> str:
    """Return how the terminal shows pictures: kitty, iterm2, 24bit or 256 colours; "" if it cannot.

    Terminals inside another program (tmux, screen, VS Code) inherit variables of the outer one.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if term in ("", "dumb"):
        return ""
    nested = "TMUX" in environment or term.startswith(("screen", "tmux")) or program == "vscode"
    if not nested:
        if "kitty" in term or "ghostty" in term or "KITTY_WINDOW_ID" in environment:
            return "kitty"
        if program in _ITERM_PROGRAMS or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    return "24bit" if environment.get("COLORTERM") in ("truecolor", "24bit") else "256"


def spread_frames(video: Video, count: int) -> list[np.ndarray]:
    """Read at most `count` frames uint8 [H, W, 3] of a file, from the first to the last.

    Raises UsageError.
    """
    from mlx_sora.video.reader import is_video, probe_video, read_image, video_frames

    path = video.path
    assert path is not None, "there is a file"
    if is_sequence(path):
        chosen = _spread(video.num_frames, count)
        return [read_image(frame_path(path, index)) for index in chosen]
    if not is_video(path):
        return [read_image(path)]
    info = probe_video(path)
    chosen = _spread(info.num_frames, count)
    frames = enumerate(video_frames(path, info))
    return [frame for index, frame in frames if index in chosen]


def _spread(length: int, count: int) -> list[int]:
    count = min(length, count)
    return [round(i * (length - 1) / max(1, count - 1)) for i in range(count)]


def contact_strip(frames: list[np.ndarray], side: int, *, enlarge: bool) -> np.ndarray:
    """Return frames side by side, uint8 [h, w, 3], a pixel or more apart, each at most `side` long.

    enlarge: repeat the pixels of smaller ones as often as fits.
    """
    import numpy as np
    from PIL import Image

    height, width, _ = frames[0].shape
    longest, shown = max(height, width), []
    factor = side // longest if enlarge else 1
    gap = np.zeros((0, 0, 3), np.uint8)
    for frame in frames:
        if longest > side:
            size = max(1, width * side // longest), max(1, height * side // longest)
            frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))
        elif factor > 1:
            frame = frame.repeat(factor, 0).repeat(factor, 1)
        gap = np.zeros((frame.shape[0], max(1, factor), 3), np.uint8)
        shown += [frame, gap]
    return np.concatenate(shown[:-1], axis=1)


def to_png(picture: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as the content of a png file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


def kitty_picture(png: bytes) -> str:
    """Return the commands of kitty's graphics protocol that show a png, without an answer."""
    data = base64.b64encode(png).decode()
    chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    found = ""
    for index, chunk in enumerate(chunks):
        keys = "a=T,f=100,q=2," if index == 0 else ""
        found += f"\033_G{keys}m={int(index + 1 < len(chunks))};{chunk}\033\\"
    return found + "\n"


def iterm_picture(png: bytes) -> str:
    """Return the command of iTerm2's inline images that shows a png."""
    return f"\033]1337;File=inline=1;size={len(png)}:{base64.b64encode(png).decode()}\a\n"


def block_lines(picture: np.ndarray, *, true_colour: bool) -> Iterator[str]:
    """Yield lines of half blocks, each of which shows two pixels of uint8 [H, W, 3]."""
    import numpy as np

    rows = [*picture] + [np.zeros_like(picture[0])] * (len(picture) % 2)
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        cells = zip(upper.tolist(), lower.tolist(), strict=True)
        colours = [(_colour(top, true_colour), _colour(low, true_colour)) for top, low in cells]
        yield "".join(f"\033[38;{top};48;{low}m▀" for top, low in colours) + "\033[0m\n"


def _colour(pixel: list[int], true_colour: bool) -> str:
    if true_colour:
        return "2;" + ";".join(map(str, pixel))
    red, green, blue = (min(range(6), key=lambda i: abs(_LEVELS[i] - value)) for value in pixel)
    return f"5;{16 + 36 * red + 6 * green + blue}"
