"""Checking a model folder: what is wrong with it, and the command that mends it.

From cheap to thorough: parts, configurations, names and shapes against the networks, parts against
each other; then, unless in a hurry, checksums, values and one block of each network. A part that
fails one check is spared the later ones, which would only repeat it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from shlex import quote

import mlx.core as mx

from mlx_sora.errors import MlxSoraError, WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import (
    BUNDLED,
    MODEL_NAMES,
    PARTS,
    PUBLISHED,
    Defaults,
    ModelFolder,
    download_command,
    expand_folder,
    missing_parts,
    weights_root,
)
from mlx_sora.loading.networks import match_part
from mlx_sora.loading.quantization import Quantization, count_parameters
from mlx_sora.loading.safetensors import memory_dtype
from mlx_sora.manage.convert import staging_folder
from mlx_sora.manage.download import STAGING
from mlx_sora.manage.provenance import FILE, Provenance
from mlx_sora.manage.smoke_test import (
    ValueCounts,
    count_bad_values,
    run_text_encoder,
    run_transformer,
    run_vae,
)
from mlx_sora.models import stdit3, t5, vae
from mlx_sora.runtime.device import blas_notice, describe_machine, total_memory
from mlx_sora.text.tokenizer import Tokenizer

_SMOKE_TESTS = {"text_encoder": run_text_encoder, "transformer": run_transformer, "vae": run_vae}

#: Told action, path, bytes done and bytes in all while files are read.
ProgressCallback = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Diagnostic:
    """One line of the report. level: ok, note, warning or error; fix: the command that mends it."""

    level: str
    subject: str
    message: str
    fix: str = ""


@dataclass
class ModelChecker:
    """One examination of the model folder `path`; `failed` gathers the parts with an error."""

    path: Path
    quick: bool
    on_progress: ProgressCallback = field(default=lambda *_: None)
    failed: set[str] = field(default_factory=set)

    def run(self) -> Iterator[Diagnostic]:
        """Everything there is to say, in order."""
        absent = list(self._check_files())
        yield from absent
        if not self.path.is_dir():
            return
        yield from self._check_weights()
        yield from self._check_compatibility()
        yield from self._check_provenance()
        if not self.quick:
            yield from self._check_values()
            yield from self._run_smoke_tests()

    def _error(self, part: str, message: str) -> Diagnostic:
        self.failed.add(part)
        return Diagnostic("error", part, message, repair_command(self.path))

    def _check_files(self) -> Iterator[Diagnostic]:
        if not self.path.is_dir():
            yield self._error("folder", f"there is no model folder at {self.path}.")
            staging = self.path.parent / STAGING
            if self.path.name == PUBLISHED and staging.is_dir():
                yield Diagnostic("note", "folder", "an interrupted download is there to continue.")
            if staging_folder(self.path).is_dir():
                yield Diagnostic(
                    "note", "folder", "an interrupted conversion is there to continue."
                )
            return
        absent = missing_parts(self.path)
        for name in absent:
            yield self._error(name.split("/")[0], f"{name} is missing.")
        if not absent:
            yield Diagnostic("ok", "folder", f"all parts are in {self.path}.")

    def _check_weights(self) -> Iterator[Diagnostic]:
        """Configuration, file headers, names, shapes and types; no weight is read."""
        for part in PARTS:
            if part in self.failed:
                continue
            try:
                checkpoint = Checkpoint.open(self.path / part)
                match_part(self._folder(), part, checkpoint)
                quantization = Quantization.from_config(self._folder().config(part))
            except MlxSoraError as error:
                yield self._error(part, error.message)
                continue
            types = Counter(info.dtype for info in checkpoint.tensors.values())
            kinds = ", ".join(f"{n} {dtype}" for dtype, n in types.most_common())
            values = count_parameters(checkpoint, quantization)
            size = f"{values:,} values, {checkpoint.nbytes / 1e6:,.1f} MB"
            how = "" if quantization is None else f", quantised to {quantization}"
            yield Diagnostic("ok", part, f"fits its configuration: {kinds} tensors, {size}{how}.")

    def _check_compatibility(self) -> Iterator[Diagnostic]:
        """Whether the parts are of one model."""
        if "tokenizer" not in self.failed:
            try:
                vocabulary = Tokenizer.load(self.path / "tokenizer" / "spiece.model").vocab_size
            except MlxSoraError as error:
                yield self._error("tokenizer", error.message)
            else:
                yield Diagnostic("ok", "tokenizer", f"loads, {vocabulary} ids.")
        if self.failed & {*PARTS, "tokenizer"}:
            return
        model = self._folder()
        text = t5.T5Config.from_dict(model.config("text_encoder"))
        video = stdit3.STDiT3Config.from_dict(model.config("transformer"))
        latent = vae.VAEConfig.from_dict(model.config("vae"))
        pairs = [
            ("tokenizer ids", vocabulary, "rows of the text encoder", text.vocab_size),
            ("text encoder channels", text.d_model, "caption channels", video.caption_channels),
            ("VAE channels", latent.temporal.embed_dim, "latent channels", video.in_channels),
        ]
        for index, (name, found, other, wanted) in enumerate(pairs):
            if found > wanted or (index > 0 and found != wanted):
                message = f"parts of different models: {found} {name}, {wanted} {other}."
                yield self._error("folder", message)

    def _check_provenance(self) -> Iterator[Diagnostic]:
        """Files against what was recorded when they came: sizes, and checksums if not quick."""
        try:
            provenance = Provenance.read(self.path)
        except WeightsError as error:
            yield self._error("files", error.message)
            return
        if provenance is None:
            yield Diagnostic("note", "files", f"no {FILE}, so there are no checksums to compare.")
            return
        missized = provenance.wrong_size(self.path)
        for name in missized:
            yield self._error(name.split("/")[0], f"{name} is not of the recorded size.")
        altered: list[str] = []
        if not self.quick:
            altered = provenance.wrong_checksum(
                self.path, lambda name, done, total: self.on_progress("check", name, done, total)
            )
        for name in altered:
            if name not in missized:
                message = f"{name} has another checksum than was recorded."
                yield self._error(name.split("/")[0], message)
        if not missized and not altered:
            what = "sizes" if self.quick else "sizes and checksums"
            origin = ", ".join(sorted({o.repo for o in provenance.files.values()}))
            yield Diagnostic("ok", "files", f"{what} as recorded, from {origin}.")

    def _check_values(self) -> Iterator[Diagnostic]:
        """NaN, Inf and tensors of zeros, tensor by tensor."""
        for part in PARTS:
            if part in self.failed:
                continue
            checkpoint = Checkpoint.open(self.path / part)
            total, done, found = checkpoint.nbytes, 0, False
            for key, info in checkpoint.tensors.items():

                def read(n: int, before: int = done, part: str = part, total: int = total) -> None:
                    self.on_progress("scan", part, before + n, total)

                values = count_bad_values(info, read)
                done += info.nbytes
                if values.nan or values.inf:
                    found = True
                    yield self._error(part, f"{key} in {info.file.name}: {_format_counts(values)}.")
                elif values.all_zero and len(info.shape) > 1:
                    message = f"{key} in {info.file.name} is all zeros, which is unusual."
                    yield Diagnostic("warning", part, message)
            if not found:
                yield Diagnostic("ok", part, "no NaN or Inf.")

    def _run_smoke_tests(self) -> Iterator[Diagnostic]:
        """A forward pass through one block of each network."""
        for part in PARTS:
            if part in self.failed:
                continue
            try:
                _SMOKE_TESTS[part](self._folder())
            except MlxSoraError as error:
                yield self._error(part, f"was tried out: {error.message}")
            except (RuntimeError, ValueError, ArithmeticError) as error:
                reason = " ".join(str(error).split())[:200]
                yield self._error(part, f"was tried out, but config.json misleads: {reason}")
            else:
                yield Diagnostic(
                    "ok", part, "was tried out: one block gives finite, varied output."
                )

    def _folder(self) -> ModelFolder:
        return ModelFolder(self.path, self.path.name, Defaults())


def diagnose(
    path: Path, *, quick: bool = False, on_progress: ProgressCallback | None = None
) -> Iterator[Diagnostic]:
    """What there is to say about the model folder `path` and the machine, as it is found out.

    quick: read configurations and headers only. watch: told how far reading is.
    """
    yield from ModelChecker(path, quick, on_progress or (lambda *_: None)).run()
    yield from check_machine(path)


def check_machine(path: Path) -> Iterator[Diagnostic]:
    """Where a model would run, and whether its largest part fits into memory."""
    facts = describe_machine()
    names = f"{facts['device']} ({facts['backend']}), {facts['dtype']}"
    blas = f", matrix products by {facts['blas']}" if facts["backend"] == "cpu" else ""
    memory = total_memory()
    yield Diagnostic("ok", "machine", f"{names}{blas}, {memory / 1e9:.1f} GB of memory.")
    notice = blas_notice()
    if notice:
        yield Diagnostic("warning", "machine", notice)
    needed, dtype = 0, getattr(mx, str(facts["dtype"]))
    for part in PARTS:
        with suppress(MlxSoraError):
            tensors = Checkpoint.open(path / part).tensors.values()
            sizes = (prod(i.shape) * memory_dtype(i.dtype, dtype).size for i in tensors)
            needed = max(needed, sum(sizes))
    if needed > memory:
        message = f"the largest part needs {needed / 1e9:.1f} GB as {facts['dtype']}."
        yield Diagnostic("warning", "machine", message)


def find_folder(model: str | None) -> Path:
    """The folder that `model` means, there or not; `find_model` refuses what is broken."""
    root = weights_root()
    if model is None:
        return root / next((name for name in MODEL_NAMES if (root / name).is_dir()), BUNDLED)
    return root / model if model in MODEL_NAMES else expand_folder(model)


def repair_command(path: Path) -> str:
    """The command that makes the model in `path` whole again."""
    place, root = path.resolve(), weights_root()
    name = next((name for name in MODEL_NAMES if place == (root / name).resolve()), None)
    if name == BUNDLED:
        return f"git checkout -- weights/{BUNDLED}"
    try:
        known = Provenance.read(path)
    except WeightsError:
        known = None
    if name in (None, PUBLISHED) and known is not None and known.conversion:
        return _conversion_command(known, path)
    if name is None:
        again = "copy the folder again from where it came."
        return again if path.exists() else f"give {', '.join(MODEL_NAMES)} or a folder's path."
    command = download_command(name)
    if not path.exists():
        return command
    if known is not None:
        return f"{command} --check"
    return f"mv {quote(str(path))} {quote(str(path) + '.old')} && {command}"


def _conversion_command(known: Provenance, path: Path) -> str:
    """How a conversion is repeated, if the model that it was made from is still there."""
    source, dtype = str(known.conversion["source"]), known.conversion["dtype"]
    if not Path(source).is_dir():
        return f"convert {source} again, which is not there any more."
    command = f"python -m mlx_sora convert {quote(source)} {quote(str(path))}"
    quantization = known.conversion["quantization"]
    command += f" --quantize {quantization['bits']}" if quantization else ""
    return command + (f" --dtype {dtype}" if dtype else "") + " --check --overwrite"


def _format_counts(values: ValueCounts) -> str:
    found = [(values.nan, "NaN"), (values.inf, "Inf")]
    return " and ".join(f"{n} {name}" for n, name in found if n)
