"""RGB to the numbers inside an mp4: BT.709, limited range, chroma at half resolution.

Done here rather than by PyAV, whose conversion (matrix and range) changed between versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: Luma weights of red and blue (ITU-R BT.709); green is the rest.
KR, KB = 0.2126, 0.0722


def rgb_to_yuv420(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [3H/2, W]: planes Y, U, V as PyAV lays out yuv420p. H, W even.

    Y = 16..235, U and V = 16..240; each chroma sample is the mean of its four pixels.
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
