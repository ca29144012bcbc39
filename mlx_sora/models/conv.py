"""Convolutions, group norm and upsampling of the VAEs, channels last.

3x3 kernels are stored tap by tap, [.., kh, kw, O, I]. On a GPU they go to MLX's own convolutions.
On CPU those build the full im2col matrix (9 or 27 times the input), so larger images are convolved
as a sum of one matrix product per tap over shifted rows of the padded input.
Dimension letters: N images, T frames, H height, W width, I input channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
from mlx import nn

from mlx_sora.models import ops, precision
from mlx_sora.models.layers import compiled

#: A tap: source index, row and column of the padded window, kernel slice [O, I].
Tap = tuple[int, int, int, mx.array]

#: Mean and variance of each sample's groups, repeated over their channels: [N, 1, .., 1, C] each.
Moments = tuple[mx.array, mx.array]

#: Values of one output block of the shifted form: 2 MiB in float32, about one core's L2 cache.
BLOCK_VALUES = 1 << 19

#: The shifted form also computes the padding; images with a larger overhead use im2col.
MAX_WASTE = 1.25


def conv2d(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Apply a 3x3 convolution with stride 1 and one zero of padding on each side.

    x [N, H, W, I], weight [3, 3, O, I], bias [O]. Returns [N, H, W, O].
    """
    if ops.on_gpu() or not _use_shifted_form(x):
        return plain_conv2d(x, weight, bias)
    return shifted_conv2d(x, weight, bias)


def downsample2d(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Apply a 3x3 convolution with stride 2: [N, H, W, I] to [N, H//2, W//2, O].

    Zeros are padded at the right and bottom only, as diffusers' Downsample2D does in AutoencoderKL.
    """
    padded = mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
    return _add_bias(mx.conv2d(padded, weight.transpose(2, 0, 1, 3), stride=2), bias)


def upsample_conv2d(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Upsample x2 (nearest), then apply a 3x3 convolution: [N, H, W, I] to [N, 2H, 2W, O]."""
    if ops.on_gpu() or not _use_shifted_form(x):
        return plain_conv2d(upsample2x(x), weight, bias)
    return subpixel_conv2d(x, weight, bias)


def causal_conv3d(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, time_stride: int = 1
) -> mx.array:
    """Apply a 3x3x3 convolution that sees no later frame; mirrors CausalConv3d of Open-Sora 1.2.

    x [B, T, H, W, I], weight [3, 3, 3, O, I]. Space is padded by one zero on each side, the front
    of time by kt - time_stride frames. Returns [B, T // time_stride, H, W, O]. Runs one sample at a
    time: MLX's per-frame path on Metal needs a batch of 1.
    """
    if ops.on_gpu() and x.shape[1] == time_stride == 1:  # the other taps see only padding
        return plain_conv2d(x[:, 0], weight[-1], bias)[:, None]
    form = plain_conv3d if ops.on_gpu() or not _use_shifted_form(x) else shifted_conv3d
    samples = [form(x[b : b + 1], weight, bias, time_stride) for b in range(x.shape[0])]
    return samples[0] if len(samples) == 1 else mx.concatenate(samples)


def plain_conv2d(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Compute `conv2d` with MLX's own convolution, ops.DISPATCH_FLOPS at a time."""
    kernel = weight.transpose(2, 0, 1, 3)
    n, h, w, _ = x.shape
    most = max(1, ops.DISPATCH_FLOPS // (2 * w * weight.size))
    if n * h <= most:
        return _add_bias(_convolve(x, kernel, (1, 1)), bias)
    images, rows = max(1, most // h), ops.slice_size(h, most)
    done: list[mx.array] = []
    for i in range(0, n, images):
        strips: list[mx.array] = []
        for top in range(0, h, rows):
            above = min(top, 1)  # neighbours of the strip; at the border, padding
            part = ops.run_after(strips or done, x[i : i + images, top - above : top + rows + 1])
            y = _convolve(part, kernel, (1, 1))[:, above : above + rows]
            strips.append(_add_bias(y, bias))
        done.append(strips[0] if len(strips) == 1 else mx.concatenate(strips, axis=1))
    return mx.concatenate(done)


def plain_conv3d(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, time_stride: int = 1
) -> mx.array:
    """Compute `causal_conv3d` with MLX's own convolution, ops.DISPATCH_FLOPS at a time."""
    front = _time_padding(weight, time_stride)
    # Time is padded here because Metal's per-frame path needs a first axis without padding.
    x = mx.pad(x, [(0, 0), (front, 0), (0, 0), (0, 0), (0, 0)])
    kernel = weight.transpose(3, 0, 1, 2, 4)
    stride, padding = (time_stride, 1, 1), (0, 1, 1)
    n, length, h, w, _ = x.shape
    steps = (length - len(weight)) // time_stride + 1
    most = max(1, ops.DISPATCH_FLOPS // (2 * n * h * w * weight.size))
    count = ops.slice_size(steps, most)
    done: list[mx.array] = []
    for start in range(0, steps, count):
        last = min(steps, start + count) - 1
        part = x[:, time_stride * start : time_stride * last + len(weight)]
        y = _convolve(ops.run_after(done, part), kernel, padding, stride)
        done.append(_add_bias(y, bias))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=1)


def _convolve(
    x: mx.array, kernel: mx.array, padding: Sequence[int], stride: Sequence[int] | int = 1
) -> mx.array:
    """Convolve x [N, .., I] with kernel [O, .., I] by MLX, in half precision without Winograd.

    Metal's Winograd rounds its intermediate values to the type of x, which makes the error 40 times
    that of half precision. It leaves flipped convolutions alone; of a flipped kernel, that is the
    same.
    """
    flip = x.dtype != mx.float32 and not mx.cuda.is_available()
    if flip:
        kernel = kernel[(slice(None), *[slice(None, None, -1)] * (x.ndim - 2))]
    return mx.conv_general(x, kernel, stride, padding, flip=flip)


def shifted_conv2d(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Compute `conv2d` as a sum of nine products over shifted rows."""
    taps = [(0, i, j, weight[i, j]) for i in range(3) for j in range(3)]
    return _sum_taps([_pad_space(x)], taps, bias, x.shape[:3])


def subpixel_conv2d(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Compute `upsample_conv2d` without the upsampled image: one 2x2 kernel per output parity.

    Taps that read the same source pixel are summed beforehand: 16 products instead of 36.
    """
    n, h, w, _ = x.shape
    rows = _pad_space(x)
    quarters = []
    for a in (0, 1):
        for b in (0, 1):
            taps = [
                (0, i, j, _sum_kernel_slices(weight, _SOURCES[a][i], _SOURCES[b][j]))
                for i in _SOURCES[a]
                for j in _SOURCES[b]
            ]
            quarters.append(_sum_taps([rows], taps, bias, (n, h, w)))
    out = mx.stack(quarters, axis=3).reshape(n, h, w, 2, 2, -1)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, -1)


#: Per output parity: source position in the padded 3-window -> kernel positions that read it.
_SOURCES = ({0: (0,), 1: (1, 2)}, {1: (0, 1), 2: (2,)})


def _sum_kernel_slices(weight: mx.array, rows: Sequence[int], columns: Sequence[int]) -> mx.array:
    total, *others = (weight[i, j] for i in rows for j in columns)
    for other in others:
        total = total + other
    return total


def shifted_conv3d(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, time_stride: int = 1
) -> mx.array:
    """Compute `causal_conv3d` of one sample as a sum of products over shifted rows."""
    front = _time_padding(weight, time_stride)
    kt, frames = weight.shape[0], x.shape[1]
    steps = (frames + front - kt) // time_stride + 1
    last = time_stride * (steps - 1)
    padded = _pad_space(mx.pad(x[0], [(front, 0), (0, 0), (0, 0), (0, 0)]))
    # Taps that read only padding are skipped: two thirds of all taps for a single frame.
    used = [k for k in range(kt) if k + last >= front]
    sources = [padded[k : k + last + 1 : time_stride] for k in used]
    taps = [
        (s, i, j, weight[k, i, j]) for s, k in enumerate(used) for i in range(3) for j in range(3)
    ]
    return _sum_taps(sources, taps, bias, (steps, x.shape[2], x.shape[3]))[None]


def _time_padding(weight: mx.array, time_stride: int) -> int:
    return weight.shape[0] - time_stride


def _use_shifted_form(x: mx.array) -> bool:
    if x.dtype != mx.float32:  # it would round after each tap, and multiplies without BLAS
        return False
    h, w = x.shape[-3], x.shape[-2]
    return (h + 3) * (w + 1) <= MAX_WASTE * h * w


def _pad_space(x: mx.array) -> mx.array:
    """Pad [N, H, W, C] to [N, H + 3, W + 1, C].

    One zero column is the right padding of a row and the left padding of the next. The third zero
    row lets the last window read past its end.
    """
    return mx.pad(x, [(0, 0), (1, 2), (1, 0), (0, 0)])


def _sum_taps(
    sources: Sequence[mx.array], taps: Sequence[Tap], bias: mx.array | None, size: tuple[int, ...]
) -> mx.array:
    """Sum shifted source @ kernelᵀ over the taps, in blocks of image rows: [N, H, W, O].

    sources: [N, H + 3, W + 1, I] each, from `_pad_space`. size: (N, H, W).
    """
    n, h, w = size
    pitch, lines = w + 1, n * (h + 3)
    flat = [source.reshape(lines * pitch, -1) for source in sources]
    channels = taps[0][3].shape[0]
    step = max(1, BLOCK_VALUES // (channels * pitch))
    blocks = []
    # The last three lines are padding: they have no output, and their windows would overrun.
    for start in range(0, lines - 3, step):
        count = min(step, lines - 3 - start)
        y = bias
        for source, i, j, kernel in taps:
            first = (start + i) * pitch + j
            rows = flat[source][first : first + count * pitch]
            y = rows @ kernel.T if y is None else mx.addmm(y, rows, kernel.T)
        assert y is not None
        blocks.append(y.reshape(count, pitch, channels)[:, :w])
    if n > 1:
        blocks.append(mx.zeros((3, w, channels), blocks[0].dtype))
        return mx.contiguous(mx.concatenate(blocks).reshape(n, h + 3, w, channels)[:, :h])
    return mx.concatenate(blocks)[None]


def _add_bias(x: mx.array, bias: mx.array | None) -> mx.array:
    return x if bias is None else x + bias


def upsample2x(x: mx.array) -> mx.array:
    """Upsample by nearest neighbour: [N, H, W, C] to [N, 2H, 2W, C]."""
    n, h, w, c = x.shape
    wide = mx.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c))
    return wide.reshape(n, 2 * h, 2 * w, c)


def group_norm(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    groups: int,
    eps: float,
    *,
    silu: bool = False,
) -> mx.array:
    """Normalize each sample [N, .., C] over all positions and the channels of a group.

    Uses two passes of per-channel means, taken axis by axis in float32: a single running sum over
    millions of values loses more than the reference's tolerance. silu: apply SiLU to the result.
    """
    if ops.on_gpu():
        return normalize(x, group_moments(x, groups), weight, bias, eps, silu=silu)
    mean = _group_mean(x, groups)
    centred = x.astype(precision.STATISTICS) - mean
    variance = _group_mean(centred * centred, groups)
    gain = mx.rsqrt(variance + eps) * weight
    y = (centred * gain + bias).astype(x.dtype)
    return ops.silu(y) if silu else y


def normalize(
    x: mx.array,
    moments: Moments,
    weight: mx.array,
    bias: mx.array,
    eps: float,
    *,
    silu: bool = False,
) -> mx.array:
    """Compute `group_norm` of x [N, .., C] with mean and variance from `moments`."""
    mean, variance = moments
    gain = mx.rsqrt(variance + eps) * weight
    if ops.on_gpu():
        return (_scale_silu_gpu if silu else _scale_gpu)(x, mean, gain, bias)
    y = ((x.astype(precision.STATISTICS) - mean) * gain + bias).astype(x.dtype)
    return ops.silu(y) if silu else y


# On GPUs each of these is one pass over memory.


@partial(compiled, shapeless=True)
def _scale_gpu(x: mx.array, mean: mx.array, gain: mx.array, bias: mx.array) -> mx.array:
    return ((x.astype(precision.STATISTICS) - mean) * gain + bias).astype(x.dtype)


@partial(compiled, shapeless=True)
def _scale_silu_gpu(x: mx.array, mean: mx.array, gain: mx.array, bias: mx.array) -> mx.array:
    y = (x.astype(precision.STATISTICS) - mean) * gain + bias
    return (y * mx.sigmoid(y)).astype(x.dtype)


@partial(compiled, shapeless=True)
def _squared_distance_gpu(x: mx.array, mean: mx.array) -> mx.array:
    return mx.square(x.astype(precision.STATISTICS) - mean)


def group_moments(x: mx.array, groups: int) -> Moments:
    """Return the mean and variance with which `group_norm` normalizes x [N, .., C]."""
    mean = _group_mean(x, groups)
    if ops.on_gpu():
        return mean, _group_mean(_squared_distance_gpu(x, mean), groups)
    centred = x.astype(precision.STATISTICS) - mean
    return mean, _group_mean(centred * centred, groups)


def _group_mean(x: mx.array, groups: int) -> mx.array:
    """Return the mean of each group, repeated over its channels: [N, 1, .., 1, C] in float32."""
    n, c = x.shape[0], x.shape[-1]
    mean = x.astype(precision.STATISTICS)
    while mean.ndim > 2:
        mean = mean.mean(axis=-2)
    mean = mean.reshape(n, groups, c // groups).mean(axis=-1, keepdims=True)
    mean = mx.broadcast_to(mean, (n, groups, c // groups))
    return mean.reshape(n, *[1] * (x.ndim - 2), c)


class GroupNorm(nn.Module):
    """`group_norm` with its weight and bias.

    moments: source of mean and variance; None computes them from the input.
    """

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.moments: Callable[[mx.array, int], Moments] | None = None
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array, *, silu: bool = False) -> mx.array:
        if self.moments is None:
            return group_norm(x, self.weight, self.bias, self.groups, self.eps, silu=silu)
        moments = self.moments(x, self.groups)
        return normalize(x, moments, self.weight, self.bias, self.eps, silu=silu)


class Conv2d(nn.Module):
    """3x3 convolution; weight [3, 3, O, I]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = mx.zeros((3, 3, outputs, inputs))
        self.bias = mx.zeros((outputs,))

    def __call__(self, x: mx.array) -> mx.array:
        return conv2d(x, self.weight, self.bias)


class Downsample2d(nn.Module):
    """Half height and width; the checkpoint names its convolution `conv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return downsample2d(x, self.conv.weight, self.conv.bias)


class Upsample2d(nn.Module):
    """Twice the height and width; the checkpoint names its convolution `conv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return upsample_conv2d(x, self.conv.weight, self.conv.bias)


class CausalConv3d(nn.Module):
    """Causal 3x3x3 convolution; weight [3, 3, 3, O, I]; some in the reference have no bias."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, time_stride: int = 1) -> None:
        super().__init__()
        self.time_stride = time_stride
        self.weight = mx.zeros((3, 3, 3, outputs, inputs))
        if bias:
            self.bias = mx.zeros((outputs,))

    def __call__(self, x: mx.array) -> mx.array:
        return causal_conv3d(x, self.weight, self.get("bias"), self.time_stride)


class Pointwise(nn.Module):
    """1x1 convolution in 2-D and 3-D; weight [O, I]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.zeros((outputs, inputs))
        if bias:
            self.bias = mx.zeros((outputs,))

    def __call__(self, x: mx.array) -> mx.array:
        bias = self.get("bias")
        return x @ self.weight.T if bias is None else mx.addmm(bias, x, self.weight.T)
