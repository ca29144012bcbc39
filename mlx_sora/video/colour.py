"""Pixels of video frames as sRGB: matrix, range, HDR, wide gamuts, and pixels that are not square.

FFmpeg's scale filter undoes matrix and range. Its result is the same in every version of PyAV,
unlike that of `VideoFrame.to_ndarray` and `reformat`, which read some tags in some versions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

#: FFmpeg's numbers of matrices (AVColorSpace), for those that the scale filter knows by the name.
BT709, UNSPECIFIED, BT601, BT2020, BT2020_CONSTANT = 1, 2, 6, 9, 10
MATRICES = (BT709, 4, 5, BT601, 7, BT2020)

#: FFmpeg's numbers of ranges (AVColorRange).
LIMITED, FULL = 1, 2

#: Frames without a matrix have BT.709 if they are larger than this (width, height), as players do.
MAX_BT601 = (1279, 576)

#: FFmpeg's numbers of transfer functions (AVColorTransferCharacteristic) of HDR, and their names.
HDR = {16: "PQ", 18: "HLG"}

#: Primaries (AVColorPrimaries) to convert, and their matrices from linear RGB to linear sRGB. Those
#: of BT.2020 are converted for HDR only: they are a wrong tag of most other files.
WIDE_BT2020, WIDE_P3 = 9, 12
TO_SRGB = {
    WIDE_BT2020: (
        (1.6605, -0.5876, -0.0728),
        (-0.1246, 1.1329, -0.0083),
        (-0.0182, -0.1006, 1.1187),
    ),
    WIDE_P3: ((1.2249, -0.2247, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0979)),
}

#: Brightness of white in SDR, and the peak of HLG, in cd/m2 (ITU-R BT.2408).
REFERENCE_WHITE, HLG_PEAK = 203.0, 1000.0

#: Up to this share of white, tone mapping changes nothing.
KNEE = 0.6

#: Colours on each axis of a table for Pillow.
TABLE_SIZE = 65


class RGBConverter:
    """Conversion of PyAV frames to uint8 [height, width, 3].

    One filter graph serves all frames of one format and size.
    """

    def __init__(self) -> None:
        self._graph: Any = None
        self._key: tuple[Any, ...] = ()
        self._tables: dict[tuple[int, int], Any] = {}

    def to_rgb(self, frame: Any, size: tuple[int, int], transfer: int, primaries: int) -> Any:
        """Convert a frame; `size` is width and height. Sets the frame's matrix and range."""
        from PIL import Image

        tag_colours(frame)
        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if key + size != self._key:
            self._graph, self._key = _scale_graph(frame, size), key + size
        self._graph.push(frame)
        pixels = self._graph.pull().to_ndarray()
        if not needs_table(transfer, primaries):
            return pixels
        table = self._tables.get((transfer, primaries))
        if table is None:
            table = self._tables[transfer, primaries] = colour_table(transfer, primaries)
        import numpy as np

        return np.asarray(Image.fromarray(pixels).filter(table))


def tag_colours(frame: Any) -> None:
    """Set the matrix and range of a frame without them, as players take them."""
    name = frame.format.name
    if frame.format.is_rgb or name == "pal8":
        return
    matrix, (width, height) = int(frame.colorspace), MAX_BT601
    if matrix == BT2020_CONSTANT:
        matrix = BT2020
    if matrix not in MATRICES:
        matrix = BT709 if frame.width > width or frame.height > height else BT601
    frame.colorspace = matrix
    if int(frame.color_range) not in (LIMITED, FULL):
        frame.color_range = FULL if name.startswith(("yuvj", "gray")) else LIMITED


def needs_table(transfer: int, primaries: int) -> bool:
    """Return True for HDR and for primaries that are converted."""
    return transfer in HDR or primaries == WIDE_P3


def colour_table(transfer: int, primaries: int) -> Any:
    """Return Pillow's table from 8-bit colours of a transfer function and primaries to sRGB."""
    import numpy as np
    from PIL import ImageFilter

    axis = np.linspace(0, 1, TABLE_SIZE)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")  # red varies fastest
    signal = np.stack([red, green, blue], axis=-1)
    light = {"PQ": _pq_light, "HLG": _hlg_light}.get(HDR.get(transfer, ""), _srgb_light)(signal)
    matrix = TO_SRGB.get(primaries, TO_SRGB[WIDE_BT2020] if transfer in HDR else np.eye(3))
    if transfer in HDR and primaries == BT709:
        matrix = np.eye(3)
    light = np.maximum(light @ np.array(matrix).T, 0)
    if transfer in HDR:
        peak = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
        light = light * (_map_tones(peak) / peak)
    table = _srgb_signal(np.clip(light, 0, 1)).astype(np.float32)
    return ImageFilter.Color3DLUT(TABLE_SIZE, table.ravel())


def _scale_graph(frame: Any, size: tuple[int, int]) -> Any:
    import av

    graph = av.filter.Graph()
    source = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1",
    )
    flags = "bicubic+accurate_rnd+full_chroma_int"
    steps = [
        graph.add("scale", f"w={size[0]}:h={size[1]}:out_range=full:flags={flags}"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    for before, after in zip([source, *steps], steps, strict=False):
        before.link_to(after)
    graph.configure()
    return graph


def _pq_light(signal: np.ndarray) -> np.ndarray:
    """Return light relative to white of PQ (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = signal ** (1 / m2)
    ratio = (power - c1).clip(0) / (c2 - c3 * power)
    light: np.ndarray = 10_000 / REFERENCE_WHITE * ratio ** (1 / m1)
    return light


def _hlg_light(signal: np.ndarray) -> np.ndarray:
    """Return light relative to white of HLG (ITU-R BT.2100) on a display of 1000 cd/m2."""
    import numpy as np

    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luma = scene @ np.array([0.2627, 0.678, 0.0593])
    light: np.ndarray = HLG_PEAK / REFERENCE_WHITE * scene * luma[..., None] ** 0.2
    return light


def _map_tones(peak: np.ndarray) -> np.ndarray:
    """Bring the light of highlights below 1, smoothly."""
    import numpy as np

    rest = 1 - KNEE
    over = np.maximum(peak - KNEE, 0)
    return np.where(peak <= KNEE, peak, KNEE + rest * (1 - np.exp(-over / rest)))


def _srgb_light(signal: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _srgb_signal(light: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
