"""What each fast form of an operation is worth against the plain one, runs alternating.

    python -m benchmarks.kernels [--runs 9] [--json FILE]

Sizes are those of the published networks, on part of a 240p video. The plain form is MLX's own
layer or function, or the reference's order of work. Exits with 1 if the two results differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)
from benchmarks.studies import Study, evaluated, normal, report

import mlx.core as mx  # isort: skip
from mlx import nn

from mlx_sora.memory.limits import release
from mlx_sora.models import conv, ops
from mlx_sora.models.stdit3 import Mlp, PatchEmbedder, STDiT3Config

#: Largest difference, in standard deviations: MLX's own group norm is off by about as much.
SAME = 2e-4

#: Samples, frames, tokens per frame: a 240p frame for prompt and null text.
TOKENS = (2, 1, 405)

XL = STDiT3Config()


def study(
    choice: str, geometry: str, plain: Callable[[], mx.array], fast: Callable[[], mx.array]
) -> Study:
    return Study(choice, geometry, lambda: evaluated(plain()), lambda: evaluated(fast()))


def chains() -> Iterator[Study]:
    """Elementwise operations of a block."""
    wide = normal(910, 4 * XL.hidden_size)
    where = f"{wide.shape[0]} x {wide.shape[1]}"
    yield study("GELU compiled", where, lambda: nn.gelu_approx(wide), lambda: ops.gelu_tanh(wide))
    yield study("SiLU compiled", where, lambda: nn.silu(wide), lambda: ops.silu(wide))
    x, y = normal(*TOKENS, XL.hidden_size), normal(2, 1, 405, XL.hidden_size)
    shift, scale = normal(2, 1, 1, XL.hidden_size), normal(2, 1, 1, XL.hidden_size)
    where = f"{' x '.join(map(str, x.shape))}"
    yield study(
        "modulation compiled",
        where,
        lambda: x * (1 + scale) + shift,
        lambda: ops.modulate(x, shift, scale),
    )
    yield study("gate compiled", where, lambda: x + scale * y, lambda: ops.add_gated(x, scale, y))


def attentions() -> Iterator[Study]:
    heads, head = XL.num_heads, XL.head_dim
    for name, batch, queries, keys in (
        ("spatial", 2, 405, 405),
        ("temporal", 405, 15, 15),
        ("cross", 2, 2025, 40),
    ):
        q = normal(batch, heads, queries, head)
        k, v = normal(2, batch, heads, keys, head)
        yield study(
            f"{name} attention",
            f"{batch} x {heads} heads, {queries} queries, {keys} keys",
            lambda q=q, k=k, v=v: mx.fast.scaled_dot_product_attention(q, k, v, scale=head**-0.5),
            lambda q=q, k=k, v=v: ops.attention(q, k, v, head**-0.5),
        )


def layers() -> Iterator[Study]:
    width = 4096
    x = normal(300, width)
    whole = normal(3 * width, width)
    parts = [evaluated(mx.contiguous(part)) for part in mx.split(whole, 3)]
    yield study(
        "one product for q, k and v",
        f"300 tokens of T5-XXL: {width} to 3 x {width}",
        lambda: mx.concatenate([x @ part.T for part in parts], axis=-1),
        lambda: x @ whole.T,
    )
    mlp = Mlp(XL.hidden_size, 4 * XL.hidden_size, XL.hidden_size)
    rows = normal(3645, XL.hidden_size)
    mx.eval(mlp.parameters())
    yield study(
        "MLP in pieces",
        f"{rows.shape[0]} tokens of XL/2",
        lambda: mlp.fc2(ops.gelu_tanh(mlp.fc1(rows))),
        lambda: mlp(rows),
    )
    patch = PatchEmbedder(XL)
    z = normal(2, 15, 30, 54, 4)
    kernel = patch.proj.weight.reshape(-1, *XL.patch_size, 4)
    mx.eval(patch.parameters(), kernel)
    yield study(
        "patches by one product",
        " x ".join(map(str, z.shape)),
        lambda: (
            mx.conv3d(z, kernel, stride=XL.patch_size).reshape(2, 15, -1, XL.hidden_size)
            + patch.proj.bias
        ),
        lambda: patch(z),
    )


def convolutions() -> Iterator[Study]:
    """The VAE's, a quarter of a 240p frame each."""
    for channels, h, w in ((128, 120, 212), (512, 30, 53)):
        x, weight = normal(1, h, w, channels), normal(3, 3, channels, channels)
        where = f"{h} x {w}, {channels} channels"
        yield study(
            "conv2d in shifted rows",
            where,
            lambda x=x, weight=weight: conv.plain_conv2d(x, weight),
            lambda x=x, weight=weight: conv.conv2d(x, weight),
        )
    yield study(
        "enlarging conv2d by parities",
        where,
        lambda: conv.plain_conv2d(conv.upsample2x(x), weight),
        lambda: conv.upsample_conv2d(x, weight),
    )
    frames, kernel = normal(1, 9, 30, 53, 128), normal(3, 3, 3, 128, 128)
    yield study(
        "causal conv3d in shifted rows",
        "9 x 30 x 53, 128 channels",
        lambda: conv.plain_conv3d(frames, kernel),
        lambda: conv.causal_conv3d(frames, kernel),
    )
    image, one, zero = normal(1, 120, 212, 128), mx.ones(128), mx.zeros(128)
    norm = nn.GroupNorm(32, 128, eps=1e-6, pytorch_compatible=True)
    yield study(
        "group norm by channel means",
        "120 x 212, 128 channels",
        lambda: norm(image),
        lambda: conv.group_norm(image, one, zero, 32, 1e-6),
    )


def studies() -> Iterator[Study]:
    for group in (chains, attentions, layers, convolutions):
        yield from group()
        release()


if __name__ == "__main__":
    sys.exit(report(__doc__, "kernels.json", studies, SAME))
