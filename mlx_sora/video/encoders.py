"""Frame encoders, one class per file format.

`add` takes frames uint8 [H, W, 3], `save` writes the file, and `close` frees all resources without
writing. Metadata is given to `save`, because the timings are known only then.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_sora.errors import UsageError
from mlx_sora.video.metadata import EXIF_DESCRIPTION, PNG_KEY, to_json

if TYPE_CHECKING:
    import numpy as np

Metadata = dict[str, Any]

CRF = "16"

#: Threads of an encoder, which decide what it makes of a picture: as many on every machine.
THREADS = 4

#: FFmpeg's numbers for BT.709 primaries, transfer and matrix, and for limited range.
BT709, LIMITED_RANGE = 1, 1

#: Luma weights of red and blue (ITU-R BT.709); green has the rest.
KR, KB = 0.2126, 0.0722


class FrameEncoder(Protocol):
    """Encoder of one file format, as `mlx_sora.video.writer` uses it."""

    def add(self, frame: np.ndarray) -> None: ...

    def save(self, path: Path, metadata: Metadata | None) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class FilmFormat:
    """A container, its options, and the codec of its frames with the name that people know."""

    container: str
    codec: str
    codec_name: str
    options: dict[str, str]


#: Formats that PyAV writes, by suffix. QuickTime's own comments end after 64 KB, those of its
#: metadata tags do not. Without bitexact, Matroska draws random numbers.
FILMS = {
    ".mp4": FilmFormat("mp4", "libx264", "H.264", {"movflags": "+faststart"}),
    ".mov": FilmFormat("mov", "libx264", "H.264", {"movflags": "+faststart+use_metadata_tags"}),
    ".webm": FilmFormat("webm", "libvpx-vp9", "VP9", {"fflags": "+bitexact"}),
}


@cache
def missing_encoder(suffix: str) -> tuple[str, str] | None:
    """Return why this machine cannot write files of a format, and what to install, or None."""
    if suffix == ".webp":
        from PIL import features

        if not features.check("webp"):
            return "This build of Pillow cannot write WebP.", "or install pillow from PyPI."
    if (film := FILMS.get(suffix)) is not None:
        try:
            import av

            av.Codec(film.codec, "w")
        except (ImportError, ValueError):  # of which av's own error is one
            reason = f"PyAV has no {film.codec_name} encoder ({film.codec}) here."
            return reason, "or install av from PyPI."
    return None


class FilmEncoder:
    """H.264 (mp4, mov) or VP9 (webm) yuv420p, CRF 16, BT.709 limited range.

    In mp4 and mov the index is at the front. Frames are compressed as they come. The packets wait
    in memory until `save`, because a header cannot be changed once it is written. The constructor
    and `save` have the same `path`.
    """

    def __init__(self, path: Path, film: FilmFormat, size: tuple[int, int], fps: float) -> None:
        import av

        rate = Fraction(fps).limit_denominator(1001)
        self._container: Any = av.open(
            str(path), "w", format=film.container, options=dict(film.options)
        )
        options = codec_options(film.codec)
        stream: Any = self._container.add_stream(film.codec, rate=rate, options=options)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.time_base = 1 / rate
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED_RANGE
        self._stream = stream
        self._packets: list[Any] = []
        self._count = 0

    def add(self, frame: np.ndarray) -> None:
        import av

        picture: Any = av.VideoFrame.from_ndarray(rgb_to_yuv420(frame), format="yuv420p")
        picture.colorspace, picture.color_range = BT709, LIMITED_RANGE
        picture.pts, picture.time_base = self._count, self._stream.time_base
        self._count += 1
        self._packets += self._stream.encode(picture)

    def save(self, path: Path, metadata: Metadata | None) -> None:
        if metadata is not None:
            self._container.metadata["comment"] = to_json(metadata)
        self._packets += self._stream.encode(None)
        for packet in self._packets:
            self._container.mux(packet)
        self._container.close()

    def close(self) -> None:
        self._packets.clear()
        self._container.close()


def codec_options(codec: str) -> dict[str, str]:
    """Return the options of a codec with which equal frames make equal files."""
    if codec == "libx264":
        return {"crf": CRF, "x264-params": x264_params()}
    # A rate of 0 leaves the quality to CRF.
    return {"crf": CRF, "b": "0", "cpu-used": "4", "row-mt": "1", "threads": str(THREADS)}


def x264_params() -> str:
    """Return the parameters of x264 with which equal frames make equal files.

    Its AVX-512 code of mbtree reads past its arrays: up to half of the files of small pictures
    differed. With AVX2 they are those of its plain C code.
    """
    avx512 = False
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        avx512 = "avx512f" in next((line for line in file if line.startswith("flags")), "").split()
    return f"threads={THREADS}" + (":asm=AVX2" if avx512 else "")


class PngEncoder:
    """A single image."""

    def __init__(self) -> None:
        self._frame: np.ndarray | None = None

    def add(self, frame: np.ndarray) -> None:
        if self._frame is not None:
            raise UsageError("A png holds one frame.", "Write name_%04d.png, FOLDER/ or .mp4.")
        self._frame = frame.copy()

    def save(self, path: Path, metadata: Metadata | None) -> None:
        assert self._frame is not None, "VideoWriter saves after the first frame only"
        save_png(self._frame, path, metadata)

    def close(self) -> None:
        self._frame = None


class AnimationEncoder:
    """GIF (256 colours per frame) and WebP (quality 90) by Pillow.

    Pillow writes all frames at once, so they wait in memory: 1 byte a pixel for GIF, 3 for WebP.
    fast: find the colours of a GIF in a twentieth of the time, 5 dB less exactly.
    """

    def __init__(self, kind: str, fps: float, *, fast: bool = False) -> None:
        self._kind, self._fps, self._fast = kind, fps, fast
        self._images: list[Any] = []

    def add(self, frame: np.ndarray) -> None:
        from PIL import Image

        image = Image.fromarray(frame)
        method = Image.Quantize.FASTOCTREE if self._fast else None
        self._images.append(image.quantize(256, method) if self._kind == "gif" else image.copy())

    def save(self, path: Path, metadata: Metadata | None) -> None:
        from PIL import Image

        settings: Metadata = {"duration": self._durations(), "loop": 0}
        if self._kind == "gif":
            settings["optimize"] = False
            if metadata is not None:
                settings["comment"] = to_json(metadata, ascii_only=True).encode()
        else:
            settings |= {"quality": 90, "method": 4}
            if metadata is not None:
                exif = Image.Exif()
                exif[EXIF_DESCRIPTION] = to_json(metadata, ascii_only=True)
                settings["exif"] = exif
        first, *rest = self._images
        first.save(path, self._kind, save_all=True, append_images=rest, **settings)

    def close(self) -> None:
        self._images.clear()

    def _durations(self) -> list[int]:
        """Return milliseconds per frame in the unit of the format, without drift of their sum."""
        unit = 10 if self._kind == "gif" else 1
        edges = [round(1000 * i / self._fps / unit) * unit for i in range(len(self._images) + 1)]
        return [after - before for before, after in pairwise(edges)]


def save_png(frame: np.ndarray, path: Path, metadata: Metadata | None) -> None:
    """Write uint8 [H, W, 3] as a png file, with the metadata as a text chunk."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if metadata is not None:
        info.add_itxt(PNG_KEY, to_json(metadata))
    Image.fromarray(frame).save(path, "png", pnginfo=info)


def rgb_to_yuv420(frame: np.ndarray) -> np.ndarray:
    """Convert uint8 [H, W, 3] to uint8 [3H/2, W]: planes Y, U, V in PyAV's layout of yuv420p.

    H and W are even. Y = 16..235, U and V = 16..240. Each chroma sample is the mean of four pixels.
    """
    import numpy as np

    height, width, _ = frame.shape
    rgb = frame.astype(np.float32) / 255
    luma = rgb @ np.array([KR, 1 - KR - KB, KB], np.float32)
    small = rgb.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    small_luma = luma.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
    blue = (small[..., 2] - small_luma) / (2 * (1 - KB))
    red = (small[..., 0] - small_luma) / (2 * (1 - KR))
    planes = [16 + 219 * luma, 128 + 224 * blue, 128 + 224 * red]
    flat = np.concatenate([plane.ravel() for plane in planes])
    yuv: np.ndarray = np.rint(flat).astype(np.uint8).reshape(height * 3 // 2, width)
    return yuv
