"""Sampling: the denoising loop, guidance, and the samplers that a request can name."""

from pkgutil import resolve_name

from mlx_sora.request import generation
from mlx_sora.sampling.base import Sampler

#: Samplers by the name that a request gives them.
SAMPLERS: dict[str, Sampler] = {n: resolve_name(path)() for n, path in generation.SAMPLERS.items()}
