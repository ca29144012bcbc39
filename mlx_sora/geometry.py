"""Sizes and lengths: resolution buckets, frame counts, latent shapes. Pure functions, no arrays.

The tables of Open-Sora 1.2 name aspect ratios height:width ("9:16" is landscape). Everything that a
user sees is width:height ("16:9" is landscape). Only `bucket_size` takes the former. T H W are
frames, rows and columns of the latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import NamedTuple

from mlx_sora.errors import UsageError

#: One latent cell covers 8 x 8 pixels; the VAE drops what is left over.
PIXELS_PER_CELL = 8
#: Frames in one independent chunk of the temporal VAE, which become `FRAMES_PER_CELL`-fold fewer.
MICRO_FRAME_SIZE = 17
FRAMES_PER_CELL = 4
#: Frame rate that the model gets for a single image.
IMAGE_FPS = 120
MIN_SIDE, MAX_SIDE = 16, 8192
#: Largest number of VAE tiles per side: with more, the part that is not tiled needs most memory.
MAX_TILES = 4
MAX_FRAMES = 4096
#: Largest number of clips of one video.
MAX_LOOPS = 1000

DEFAULT_ASPECT_RATIO = "16:9"

#: Open-Sora's names of frame counts: multiples of 51 frames, and about that many seconds.
FRAME_ALIASES = {f"{n}x": 51 * n for n in (1, 2, 4, 8, 16)}
FRAME_ALIASES |= {f"{2 * n}s": 51 * n for n in (1, 2, 4, 8, 16)}

#: Open-Sora's ratios as height:width, in the order of the rows of `_BUCKETS`.
BUCKET_RATIOS = (
    *("3:8", "9:21", "12:25", "1:2", "9:17", "27:50", "9:16", "5:8", "2:3"),
    *("3:4", "1:1", "4:3", "3:2", "16:9", "17:9", "2:1", "50:27"),
)

#: height x width. Upstream chose the sizes by hand: no rounding rule yields them.
_BUCKETS = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 "
    "166x221 192x192 221x165 235x156 256x144 263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 "
    "276x368 320x320 370x278 392x262 426x240 440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 "
    "416x554 480x480 554x416 588x392 640x360 660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 "
    "554x738 640x640 740x555 784x522 854x480 880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 "
    "832x1110 960x960 1108x832 1176x784 1280x720 1320x698 1358x680 1386x666",
}

#: Values of `--resolution`: the range that Open-Sora 1.2 was trained on.
RESOLUTIONS = tuple(_BUCKETS)


class Size(NamedTuple):
    """Size of an image, in pixels unless stated otherwise."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    def enlarged(self, scale: int) -> Size:
        """Return the size with both sides `scale` times as long."""
        return Size(self.width * scale, self.height * scale)


@dataclass(frozen=True)
class ModelArguments:
    """Size in pixels, length and speed of a clip, as schedule and transformer get them."""

    height: int
    width: int
    num_frames: int
    fps: float

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of the schedule, by name."""
        return {"height": self.height, "width": self.width, "num_frames": self.num_frames}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a request.

    size: requested pixels, which the transformer gets. decoded: pixels of the finished frames.
    latent: (T, H, W). warnings: every deviation from the request.
    """

    size: Size
    decoded: Size
    num_frames: int
    latent: tuple[int, int, int]
    warnings: tuple[str, ...] = ()


def aspect_ratios() -> tuple[str, ...]:
    """Return the ratios that `get_image_size` takes, width:height, widest first."""
    return tuple(public_ratio(ratio) for ratio in BUCKET_RATIOS)


def get_image_size(resolution: str, aspect_ratio: str = DEFAULT_ASPECT_RATIO) -> Size:
    """Return the size of a resolution at a width:height ratio ("240p", "16:9" -> 426 x 240).

    Raises UsageError with the valid values for an unknown one.
    """
    if resolution not in RESOLUTIONS:
        raise UsageError(
            f"Unknown resolution {resolution!r}.",
            f"Choose one of {', '.join(RESOLUTIONS)}, or give width and height.",
        )
    return bucket_size(resolution, _bucket_ratio(aspect_ratio))


def bucket_size(resolution: str, ratio: str) -> Size:
    """Look up Open-Sora's tables; `ratio` is height:width as there ("9:16" is landscape)."""
    index = BUCKET_RATIOS.index(ratio)
    height, width = _BUCKETS[resolution].split()[index].split("x")
    return Size(int(width), int(height))


def get_num_pixels(resolution: str) -> int:
    """Return the nominal area of a resolution: that of its 9:16 (height:width) size."""
    size = bucket_size(resolution, "9:16")
    return size.width * size.height


def get_num_frames(value: int | float | str) -> int:
    """Parse a frame count as Open-Sora does: an alias ("4s") or anything `int` takes (1.9 -> 1).

    Raises ValueError otherwise. Use `parse_frames` for user input.
    """
    if isinstance(value, str) and value in FRAME_ALIASES:
        return FRAME_ALIASES[value]
    return int(value)


def parse_frames(value: int | str) -> int:
    """Parse a user's frame count: a whole number or an alias. Raises UsageError, also for 2..16."""
    aliases = ", ".join(alias for alias in FRAME_ALIASES if alias.endswith("s"))
    try:
        frames = get_num_frames(value.strip() if isinstance(value, str) else value)
    except (ValueError, TypeError, OverflowError):
        frames = 0
    if isinstance(value, bool) or frames < 1 or (isinstance(value, float) and frames != value):
        raise UsageError(
            f"Cannot make {value!r} frames.",
            f"Give 1 (an image), a whole number from {MICRO_FRAME_SIZE}, or one of {aliases}.",
        )
    if 1 < frames < MICRO_FRAME_SIZE:
        raise UsageError(
            f"Cannot make {frames} frames: Open-Sora's timestep schedule is undefined for 2 to "
            f"{MICRO_FRAME_SIZE - 1} frames.",
            f"Ask for 1 frame or for at least {MICRO_FRAME_SIZE}.",
        )
    if frames > MAX_FRAMES:
        raise UsageError(f"Cannot make {frames} frames.", f"Ask for at most {MAX_FRAMES}.")
    return frames


def latent_frames(frames: int, micro_frame: int | None = MICRO_FRAME_SIZE) -> int:
    """Return the number of latent frames: four frames to one, rounded up in each chunk.

    micro_frame: frames per chunk; None means one chunk. Mirrors VideoAutoencoderPipeline of
    Open-Sora.
    """
    if micro_frame is None:
        return _cells(frames)
    return frames // micro_frame * _cells(micro_frame) + _cells(frames % micro_frame)


def latent_size(width: int, height: int) -> Size:
    """Return the latent columns and rows; pixels beyond the last whole one are dropped."""
    return Size(width // PIXELS_PER_CELL, height // PIXELS_PER_CELL)


def latent_shape(
    frames: int, size: Size, micro_frame: int | None = MICRO_FRAME_SIZE
) -> tuple[int, int, int]:
    """Return the latent (T, H, W) of `frames` frames of `size` pixels."""
    cells = latent_size(*size)
    return latent_frames(frames, micro_frame), cells.height, cells.width


def decoded_size(width: int, height: int) -> Size:
    """Return the pixels of decoded frames of a requested size (426 x 240 -> 424 x 240)."""
    cells = latent_size(width, height)
    return Size(cells.width * PIXELS_PER_CELL, cells.height * PIXELS_PER_CELL)


def model_arguments(size: Size, frames: int, fps: float) -> ModelArguments:
    """Return the model's arguments for a clip; a single image has its own frame rate."""
    return ModelArguments(size.height, size.width, frames, IMAGE_FPS if frames == 1 else fps)


def check_size(width: int, height: int) -> Size:
    """Return the size. Raises UsageError if no image of that size can be made."""
    for name, side in (("Width", width), ("Height", height)):
        if isinstance(side, bool) or not isinstance(side, int):
            raise UsageError(f"{name} {side!r} is not a whole number of pixels.", "Give a number.")
        if not MIN_SIDE <= side <= MAX_SIDE:
            raise UsageError(
                f"{name} {side} is impossible.",
                f"Give {MIN_SIDE} to {MAX_SIDE} pixels, best a multiple of {PIXELS_PER_CELL}.",
            )
    return Size(width, height)


def resolve_size(
    default: Size,
    *,
    resolution: str | None = None,
    aspect_ratio: str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> Size:
    """Return the size in pixels of a request; `default` is the model's own size.

    Takes width and height, or a resolution and/or an aspect ratio (width:height), or nothing. A
    ratio alone keeps the default's area. Raises UsageError for an incomplete size or a
    contradiction.
    """
    if width is not None or height is not None:
        if width is None or height is None:
            missing = "height" if height is None else "width"
            raise UsageError(
                f"Incomplete size: {missing} is missing.", "Give width and height together."
            )
        if resolution is not None or aspect_ratio is not None:
            raise UsageError(
                "Width and height cannot be combined with a resolution or an aspect ratio.",
                "Give one or the other.",
            )
        return check_size(width, height)
    if resolution is not None:
        return get_image_size(resolution, aspect_ratio or DEFAULT_ASPECT_RATIO)
    if aspect_ratio is None:
        return default
    return _size_from_area(default.width * default.height, aspect_ratio)


def refined_size(first: Size, text: str) -> Size:
    """Return the size of a second pass, from WIDTHxHEIGHT or a resolution.

    first: size of the first pass; of a resolution, the ratio nearest to it is taken. Raises
    UsageError for a size that is shorter on one side.
    """
    if text in RESOLUTIONS:
        sizes = (bucket_size(text, ratio) for ratio in BUCKET_RATIOS)
        size = min(sizes, key=lambda each: abs(log(_aspect(each) / _aspect(first))))
    else:
        size = check_size(*map(int, text.split("x")))
    if size.width < first.width or size.height < first.height:
        raise UsageError(
            f"A second pass of {size} pixels is smaller than the first of {first}.",
            f"Give --refine {first} or more.",
        )
    return size


def _aspect(size: Size) -> float:
    return size.width / size.height


def plan_geometry(size: Size, frames: int) -> Geometry:
    """Return the latent shape and decoded size of a clip, with a warning if pixels are dropped.

    Raises UsageError for an impossible size or frame count.
    """
    size, frames = check_size(*size), parse_frames(frames)
    decoded = decoded_size(*size)
    warning = f"{size} pixels come out as {decoded}: the VAE works in cells of {PIXELS_PER_CELL}."
    warnings = () if decoded == size else (warning,)
    return Geometry(size, decoded, frames, latent_shape(frames, size), warnings)


def check_tiles(tiles: int, geometry: Geometry) -> int:
    """Return the VAE tiles in a row that frames are decoded in. Raises UsageError if too many."""
    if tiles > 1 and min(geometry.latent[1:]) < 2 * tiles:
        raise UsageError(
            f"{geometry.decoded} pixels are too few for --vae-tiles {tiles}.",
            "Leave it out, or make a larger image.",
        )
    return tiles


def _cells(frames: int) -> int:
    return -(-frames // FRAMES_PER_CELL)


def public_ratio(ratio: str) -> str:
    """Return width:height of a bucket. Upstream's "50:27" has sizes of 25:12, its name here."""
    height, width = ("25", "12") if ratio == "50:27" else ratio.split(":")
    return f"{width}:{height}"


def _bucket_ratio(aspect_ratio: str) -> str:
    for ratio in BUCKET_RATIOS:
        if public_ratio(ratio) == aspect_ratio:
            return ratio
    raise UsageError(
        f"Unknown aspect ratio {aspect_ratio!r}.",
        f"Choose one of {', '.join(aspect_ratios())} (width:height).",
    )


def _size_from_area(area: int, aspect_ratio: str) -> Size:
    ratio = _bucket_ratio(aspect_ratio)
    for resolution in RESOLUTIONS:
        if get_num_pixels(resolution) == area:
            return bucket_size(resolution, ratio)
    width, height = (int(part) for part in aspect_ratio.split(":"))
    unit = sqrt(area / (width * height)) / PIXELS_PER_CELL
    return check_size(
        max(round(width * unit), 2) * PIXELS_PER_CELL,
        max(round(height * unit), 2) * PIXELS_PER_CELL,
    )
