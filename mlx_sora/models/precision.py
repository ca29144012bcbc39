"""The types of each network, and of values that stay float32 when it runs in half precision.

Weights and operands of matrix products have the type of their network (`choose_precision` in
`runtime/device.py`). MLX's kernels accumulate their results in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.errors import UsageError

#: Flow times, frame rates and positions, before their embedding is multiplied. Times reach 1000,
#: where the next bfloat16 is 4 away: whole steps would coincide.
TIMES = mx.float32

#: STDiT's residual stream, to which 112 branches are added. 8 bits of mantissa lose the small ones,
#: and with them the velocity, which is the difference of the sum from its input.
RESIDUAL = mx.float32

#: STDiT's shifts, scales and gates, which act on that stream.
MODULATION = mx.float32

#: Means, variances and softmax of every norm and attention: sums of many values. Where MLX does not
#: fuse attention on a GPU, it rounds the logits before and the weights after the softmax.
STATISTICS = mx.float32

#: Latents, frames, and the images between the spatial and the temporal VAE.
LATENTS = mx.float32

#: Weights while they are rotated and rounded, and the errors of that.
ROUNDING = mx.float32

#: Inside GELU and SiLU, which are one pass over memory in any type.
ACTIVATION = mx.float32


@dataclass(frozen=True)
class Precision:
    """Type of each network's weights and of the operands of its matrix products."""

    text_encoder: mx.Dtype = mx.float32
    transformer: mx.Dtype = mx.float32
    vae: mx.Dtype = mx.float32


#: Type of the inputs of each kernel on GPUs, by network; None: the network's own type. The
#: reference runs T5 in float32, STDiT and the VAE in bfloat16.
KERNEL_TYPES: Mapping[str, Mapping[str, mx.Dtype | None]] = {
    "text_encoder": {"matmul": None, "quantized_matmul": None, "attention": None, "rms_norm": None},
    "transformer": {
        "matmul": None,
        "quantized_matmul": None,
        "attention": None,
        "rms_norm": None,  # of queries and keys
        "layer_norm": RESIDUAL,
        "rope": None,
        "rope frequencies": TIMES,
    },
    "vae": {"matmul": None, "attention": None, "convolution": None},
}


def dtype_name(dtype: mx.Dtype) -> str:
    """Return the name of a type as options have it, such as bfloat16."""
    return str(dtype).removeprefix("mlx.core.")


def check_text_encoder(dtype: mx.Dtype) -> None:
    """Raise UsageError for a dtype in which T5's activations overflow."""
    if dtype == mx.float16:
        raise UsageError(
            "T5 cannot run in float16: its activations exceed 65504, the largest value there.",
            "Use bfloat16 or float32; weights stored as float16 are converted as they are read.",
        )
