"""Following the flow: the samplers that a request can name."""

from mlx_sora.sampling.ab2 import AdamsBashforth
from mlx_sora.sampling.base import Sampler
from mlx_sora.sampling.midpoint import Midpoint
from mlx_sora.sampling.rflow import RFlow

#: A new sampler is one file and one line here (and its name in `request.SAMPLERS`).
SAMPLERS: dict[str, Sampler] = {
    "rflow": RFlow(),
    "midpoint": Midpoint(),
    "ab2": AdamsBashforth(),
}
