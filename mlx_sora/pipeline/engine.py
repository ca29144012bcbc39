"""One model folder on this machine: what generate, edit, batch and calibrate share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import UsageError
from mlx_sora.loading.model_folder import ModelFolder, find_model, fingerprint
from mlx_sora.loading.quantization import choose_quantization
from mlx_sora.loading.sizes import model_sizes
from mlx_sora.memory.limits import default_cache_limit
from mlx_sora.memory.plan import Machine, ModelSizes
from mlx_sora.models.ops import on_gpu
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.vae import VAEConfig
from mlx_sora.request.generation import GenerationRequest, label
from mlx_sora.runtime.device import default_dtype, total_memory
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.utils.versions import versions


@dataclass(frozen=True)
class Engine:
    """Model folder, number format and ranks; holds no weights.

    dtype: auto, float32 or bfloat16. ranks: the processes that mlx.launch started with this one.
    """

    model: ModelFolder
    dtype: str
    ranks: Ranks
    _sizes: dict[tuple[Any, ...], ModelSizes] = field(default_factory=dict, repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """T5's tokenizer, read once."""
        return Tokenizer.load(self.model.tokenizer)

    @cached_property
    def vae_config(self) -> VAEConfig:
        """Configuration of the VAE."""
        return VAEConfig.from_dict(self.model.config("vae"))

    @cached_property
    def transformer_config(self) -> STDiT3Config:
        """Configuration of the transformer."""
        return STDiT3Config.from_dict(self.model.config("transformer"))

    def single_process(self) -> Engine:
        """Return this engine as one rank alone uses it."""
        return self if self.ranks.size == 1 else replace(self, ranks=Ranks())

    def check_model(self, name: str | None) -> None:
        """Raise UsageError if a request asks for another model than this one."""
        if name is not None and find_model(name).path != self.model.path:
            raise UsageError(
                f"This pipeline holds {self.model.name}, the request asks for {name}.",
                "Make a pipeline of that model, or leave the request's model open.",
            )

    def resolve_dtype(self, requested: str = "auto") -> mx.Dtype:
        """Return the number format of a run; `requested` "auto" means the engine's own."""
        return default_dtype(requested=self.dtype if requested == "auto" else requested)

    def weights(self, quantize: int | None) -> ModelFolder:
        """Return the model folder, its weights quantised to `quantize` bits as they are loaded."""
        return choose_quantization(self.model, quantize)

    def sizes(self, quantize: int | None, dtype: mx.Dtype, *, encoders: bool) -> ModelSizes:
        """Return the model's sizes in bytes. Reads headers only, once for each kind.

        encoders: with the encoders of the VAE.
        """
        key = (quantize, dtype, encoders)
        if key not in self._sizes:
            self._sizes[key] = model_sizes(self.weights(quantize), dtype, encoders=encoders)
        return self._sizes[key]

    def machine(self, dtype: mx.Dtype) -> Machine:
        """Return what the planner knows about this machine."""
        return Machine(on_gpu(), default_cache_limit() or total_memory(), dtype.size)

    def check_equal(self, requests: Sequence[GenerationRequest], **more: Any) -> None:
        """Raise UsageError if ranks have different versions, weights, requests or `more`."""
        if self.ranks.size == 1:
            return
        with self.ranks.collective_errors():
            weights = fingerprint(self.model)
        facts: dict[str, Any] = {"requests": [request.to_dict() for request in requests]}
        if len(requests) == 1:
            facts = {label(name): value for name, value in requests[0].to_dict().items()}
        self.ranks.check_equal({**versions(), "weights": weights, **facts, **more})
