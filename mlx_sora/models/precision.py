"""Which values stay float32 when matrix products run in half precision, and why: one policy.

Weights and operands of matrix products are in the type of the run (`runtime/device.py`: bfloat16 on
GPUs, float32 on CPUs); their results are added up in float32 by MLX's kernels. All else is here.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.errors import UsageError


@dataclass(frozen=True)
class Precision:
    """Type of each kind of value that does not follow the run's.

    times: flow times, frame rates and positions, before their embedding is multiplied. Times reach
        1000, where the next bfloat16 is 4 away: whole steps would fall together.
    residual: STDiT's stream of tokens, to which 112 branches are added; in 8 bits of mantissa the
        small ones are lost, and with them the velocity that is the sum's difference from its input.
    modulation: STDiT's shifts, scales and gates, which act on that stream.
    statistics: means, variances, logits and softmax, of every norm and attention; sums of many.
    activation: inside GELU and SiLU, which are one pass over memory in any type.
    vae: all of the VAE, weights too, as the reference keeps it: half precision shows as banding.
    """

    times: mx.Dtype = mx.float32
    residual: mx.Dtype = mx.float32
    modulation: mx.Dtype = mx.float32
    statistics: mx.Dtype = mx.float32
    activation: mx.Dtype = mx.float32
    vae: mx.Dtype = mx.float32


#: The one policy of all networks.
KEEP = Precision()


def check_text_encoder(dtype: mx.Dtype) -> None:
    """Raise UsageError for a type that T5's activations overflow in."""
    if dtype == mx.float16:
        raise UsageError(
            "T5 cannot run in float16: its activations exceed 65504, the largest value there.",
            "Use bfloat16 or float32; weights stored as float16 are converted as they are read.",
        )
