"""Memory of the process outside MLX, in bytes: the program, and the files that it reads and writes.

Measured on x86 Linux: Python 3.10 to 3.13, PyAV 17 to 19, Pillow 12 and 13, x264 with four threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_sora.geometry import Size

#: Interpreter, libraries, and what their allocators hold back. On CPUs 78 MB (90 with Python 3.13);
#: not measured on GPUs.
PROGRAM, PROGRAM_GPU = 96 << 20, 160 << 20

#: PyAV and its libraries, once a video has been opened.
PYAV = 18 << 20


@dataclass(frozen=True)
class FileMemory:
    """Memory of a reader or writer: fixed, per pixel of a frame, and per pixel of all frames."""

    fixed: int
    pixel: int
    all_pixels: int = 0

    def total(self, pixels: int, frames: int = 1) -> int:
        """Return the bytes for `frames` frames of `pixels` pixels each."""
        return self.fixed + pixels * (self.pixel + frames * self.all_pixels)


#: Writers by suffix. Pillow takes all frames of a WebP or GIF at once; "" holds them in memory.
WRITERS = {
    ".mp4": FileMemory(8 << 20, 300),
    ".webp": FileMemory(5 << 20, 20, 8),
    ".gif": FileMemory(5 << 20, 40, 3),
    ".png": FileMemory(4 << 20, 24),
    "": FileMemory(0, 0, 6),
}

#: Readers: of videos with some twenty reference frames (in 4K 39 bytes per pixel of H.264, 56 of
#: 10-bit HEVC), and of pictures.
VIDEO_READER, PICTURE_READER = FileMemory(18 << 20, 60), FileMemory(4 << 20, 60)


def program_memory(*, gpu: bool) -> int:
    """Return the bytes of the process before it has read or written a file."""
    return PROGRAM_GPU if gpu else PROGRAM


def writer_memory(suffix: str, size: Size, frames: int) -> int:
    """Return the bytes that writing a file takes. suffix: "" if its frames stay in memory."""
    return WRITERS[suffix].total(size.width * size.height, frames)
