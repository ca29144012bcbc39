"""One model folder on this machine: what generate, edit, batch and calibrate share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import UsageError
from mlx_sora.geometry import ModelArguments
from mlx_sora.loading.fingerprint import FileHashes, fingerprint, weight_files
from mlx_sora.loading.model_folder import PARTS, ModelFolder, model_path
from mlx_sora.loading.published import PublishedModel
from mlx_sora.loading.quantization_choice import choose_quantization, quantization_metadata
from mlx_sora.loading.sizes import model_sizes
from mlx_sora.memory.limits import StageMeter, default_cache_limit
from mlx_sora.memory.plan import Machine, ModelSizes
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.models.ops import on_gpu
from mlx_sora.models.precision import Precision, dtype_name
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.vae import VAEConfig
from mlx_sora.pipeline.locks import check_not_forked
from mlx_sora.request.generation import GenerationRequest, label
from mlx_sora.runtime.device import (
    backend,
    choose_precision,
    describe_device,
    largest_array,
    total_memory,
)
from mlx_sora.runtime.events import Event, StageFinished, StageProgress, StageStarted
from mlx_sora.runtime.switches import switches
from mlx_sora.sampling import SAMPLERS
from mlx_sora.text.cache import TextCache, open_text_cache
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.utils.files import visible_files
from mlx_sora.utils.versions import versions

log = logging.getLogger(__name__)

MB = 10**6

#: Bytes of weights whose reading is shown to the user.
SHOWN_BYTES = 300 * MB


@dataclass(frozen=True)
class Engine:
    """Model folder, data types and ranks; holds no weights.

    model: may ask for quantization on loading. dtype, vae_dtype: as in GenerationRequest. ranks:
    the processes that mlx.launch started with this one, or this process alone.
    """

    model: ModelFolder
    dtype: str
    ranks: Ranks
    vae_dtype: str = "float32"
    _sizes: dict[tuple[Any, ...], ModelSizes] = field(default_factory=dict, repr=False)
    _tokenizer: list[Tokenizer] = field(default_factory=list, repr=False)
    _hashes: FileHashes = field(default_factory=FileHashes, repr=False, compare=False)
    _flow_times: dict[tuple[Any, ...], tuple[float, ...]] = field(default_factory=dict, repr=False)
    _variants: dict[tuple[Any, ...], Engine] = field(default_factory=dict, init=False, repr=False)

    def for_request(self, request: GenerationRequest) -> Engine:
        """Return the engine with the data types, quantization and ranks that a request asks for.

        Requests that ask for the same share it, and so what it reads: a batch may have thousands.
        Raises UsageError if the request asks for another model, or for what this one cannot do, and
        in a forked process.
        """
        check_not_forked()
        if request.model is not None and model_path(request.model) != self.model.path:
            raise UsageError(
                f"This pipeline holds {self.model.name}, the request asks for {request.model}.",
                "Make a pipeline of that model, or leave the request's model open.",
            )
        dtype = self.dtype if request.dtype == "auto" else request.dtype
        precision = choose_precision(dtype, request.vae_dtype)  # of the device, which may change
        single = request.parallel == "off"
        key = (single, request.quantize, dtype, request.vae_dtype, precision)
        if key not in self._variants:
            self._variants[key] = replace(
                self.single_process() if single else self,
                model=choose_quantization(self.model, request.quantize),
                dtype=dtype,
                vae_dtype=request.vae_dtype,
            )
        return self._variants[key]

    def single_process(self) -> Engine:
        """Return the engine as one rank alone uses it."""
        return self if self.ranks.size == 1 else replace(self, ranks=self.ranks.single_rank())

    @property
    def tokenizer(self) -> Tokenizer:
        """T5's tokenizer, read once."""
        if not self._tokenizer:
            self._tokenizer.append(Tokenizer.load(self.model.tokenizer))
        return self._tokenizer[0]

    @cached_property
    def precision(self) -> Precision:
        """Type of each network. Raises UsageError if the device cannot compute in one of them."""
        return choose_precision(self.dtype, self.vae_dtype)

    @cached_property
    def vae_config(self) -> VAEConfig:
        """Configuration of the VAE."""
        return VAEConfig.from_dict(self.model.config("vae"))

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """Entry of the metadata about quantized parts; empty without any."""
        return quantization_metadata(self.model)

    @cached_property
    def transformer_config(self) -> STDiT3Config:
        """Configuration of the transformer."""
        return STDiT3Config.from_dict(self.model.config("transformer"))

    def text_cache(self) -> TextCache:
        """Return the cache of the states that T5 has on this device, as its files are now."""
        facts = {"device": describe_device(), "switches": switches(), **self._text_encoder_facts}
        return open_text_cache(visible_files(self.model.text_encoder, "*"), facts)

    @cached_property
    def _text_encoder_facts(self) -> dict[str, Any]:
        return {
            "dtype": dtype_name(self.precision.text_encoder),
            "quantization": self.quantization,
            "versions": versions(),
        }

    def sizes(self, *, encoders: bool) -> ModelSizes:
        """Return the model's sizes in bytes. Reads headers only, once for each kind.

        encoders: with the encoders of the VAE.
        """
        key = (self.model, self.precision, encoders)
        if key not in self._sizes:
            self._sizes[key] = model_sizes(self.model, self.precision, encoders=encoders)
        return self._sizes[key]

    def flow_times(self, sampler: str, steps: int, model_args: ModelArguments) -> tuple[float, ...]:
        """Return the flow time at the start of each step."""
        key = (sampler, steps, model_args)
        if key not in self._flow_times:
            times = SAMPLERS[sampler].timesteps(steps, **model_args.sizes)
            self._flow_times.clear()  # of the last schedule only: others may come for ever
            self._flow_times[key] = tuple(times[:-1, 0].tolist())  # type: ignore[arg-type]
        return self._flow_times[key]

    @property
    def machine(self) -> Machine:
        """Machine as the planner sees it."""
        return Machine(
            on_gpu(),
            default_cache_limit() or total_memory(),
            self.precision.transformer.size,
            largest_array(),
            can_throttle=backend() != "cuda",
        )

    @property
    def unread_bytes(self) -> int:
        """Bytes of weights that `fingerprint` has yet to read."""
        if isinstance(self.model, PublishedModel):  # not downloaded
            return sum(self.model.checkpoint(part).nbytes for part in PARTS)
        return sum(file.stat().st_size for file in self._unread_files())

    def _unread_files(self) -> list[Path]:
        files = (file for files in weight_files(self.model).values() for file in files)
        return self._hashes.unread(list(files))

    def hash_weights(self) -> Iterator[Event]:
        """Read the weights that `fingerprint` needs; yield the progress in MB, if that takes long.

        Of several ranks, all call it.
        """
        total, done, shown = self.unread_bytes, 0, 0
        if total < SHOWN_BYTES:
            return
        yield StageStarted("hash", total // MB)
        with StageMeter("hash") as meter:
            for file in self._unread_files():
                for count in self._hashes.read(file):
                    self.ranks.tick()
                    done += count
                    if done - shown > total // 100:
                        yield StageProgress("hash", done // MB, total // MB)
                        shown = done
        assert meter.usage is not None
        yield StageFinished("hash", meter.usage.seconds, 0, meter.usage.peak_rss)

    def fingerprint(self) -> str:
        """Return the fingerprint of the model; reads the weights whose hash is unknown."""
        if (unread := self.unread_bytes) >= SHOWN_BYTES:
            log.warning("reading %s of weights once, to recognise them", format_bytes(unread))
        return fingerprint(self.model, self._hashes, self.ranks.tick)

    def check_equal(self, requests: Sequence[GenerationRequest], **more: Any) -> None:
        """Raise UsageError if ranks have different versions, weights, requests or `more`."""
        if self.ranks.size == 1:
            return
        with self.ranks.collective_errors():
            weights = self.fingerprint()
        facts: dict[str, Any] = {"requests": [request.to_dict() for request in requests]}
        if len(requests) == 1:
            facts = {label(name): value for name, value in requests[0].to_dict().items()}
        self.ranks.check_equal({**versions(), "weights": weights, **facts, **more})
