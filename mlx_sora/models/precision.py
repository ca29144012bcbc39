"""The types of values that stay float32 when matrix products run in half precision.

Weights and operands of matrix products have the dtype of the run (`runtime/device.py`: bfloat16 on
GPUs, float32 on CPUs). MLX's kernels accumulate their results in float32.
"""

from __future__ import annotations

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

#: Means, variances, logits and softmax of every norm and attention: sums of many values.
STATISTICS = mx.float32

#: Inside GELU and SiLU, which are one pass over memory in any type.
ACTIVATION = mx.float32

#: All of the VAE, weights too, as in the reference: half precision shows as banding.
VAE = mx.float32


def check_text_encoder(dtype: mx.Dtype) -> None:
    """Raise UsageError for a dtype in which T5's activations overflow."""
    if dtype == mx.float16:
        raise UsageError(
            "T5 cannot run in float16: its activations exceed 65504, the largest value there.",
            "Use bfloat16 or float32; weights stored as float16 are converted as they are read.",
        )
