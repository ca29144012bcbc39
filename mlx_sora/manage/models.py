"""The models on this machine: size, bits, origin, what fits its memory; and their removal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from mlx_sora.errors import MemoryBudgetError, MlxSoraError, UsageError, WeightsError, shell_words
from mlx_sora.loading.model_folder import (
    BUNDLED,
    PARTS,
    PUBLISHED,
    QUANTIZED_MODELS,
    ModelFolder,
    bundled_folder,
    download_command,
    expand_folder,
    model_names,
    model_path,
    model_roots,
    unknown_name_fix,
)
from mlx_sora.loading.published import find_undownloaded
from mlx_sora.loading.quantization import NetworkQuantization, average_bits
from mlx_sora.loading.safetensors import FLOATS
from mlx_sora.manage import provenance
from mlx_sora.manage.convert import JOURNAL, staging_folder
from mlx_sora.manage.download import STAGING
from mlx_sora.manage.provenance import Provenance
from mlx_sora.manage.staging import disk_errors
from mlx_sora.memory.budget import OFF, machine_capacity
from mlx_sora.pipeline.locks import removal_lock
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.request.generation import GenerationRequest, label
from mlx_sora.runtime.device import backend
from mlx_sora.utils.leftovers import owned_name, sweep_temporary_folders

#: Options for a run that does not fit, those with the best quality first.
_SAVINGS: tuple[dict[str, Any], ...] = (
    {},
    {"sequential_guidance": True},
    {"vae_tiles": 2},
    {"sequential_guidance": True, "vae_tiles": 2},
)


@dataclass(frozen=True)
class Fit:
    """The memory of a run of a model's defaults on this machine.

    options: flags that it needs. needed: the least bytes with them, or with those that save most.
    """

    fits: bool
    options: str
    needed: int


@dataclass(frozen=True)
class ModelFacts:
    """A model in one of the models' folders, or one that `download` writes.

    path: None if it is not here. nbytes: of its files, or of an unfinished download. bits: per
    weight of the transformer. fit: None for a model that cannot be opened; problem: says why.
    """

    name: str
    path: Path | None
    nbytes: int
    bits: int | None
    origin: str
    fit: Fit | None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values = asdict(self) | {"path": None if self.path is None else str(self.path)}
        values["bytes"] = values.pop("nbytes")
        fit = values.pop("fit") or {"fits": None, "options": "", "needed": None}
        return values | fit


@dataclass(frozen=True)
class Removal:
    """A model to remove. folders: its own, and those of unfinished downloads and conversions."""

    name: str
    folders: tuple[Path, ...]
    freed: int


def list_models() -> Iterator[ModelFacts]:
    """Yield the models on this machine, the default one first, then those to be downloaded."""
    names = model_names()
    for name in names:
        yield describe(name)
    for name in (PUBLISHED, *QUANTIZED_MODELS.values()):
        model = find_undownloaded(name)
        if model is not None and name not in names:
            staging = model.path.parent / STAGING if name == PUBLISHED else model.path
            folders = [f for f in (staging, staging_folder(model.path)) if f.is_dir()]
            nbytes, bits = sum(map(_size, folders)), model.stored_bits or 32
            origin = f"{'continue' if folders else 'get'} it: {download_command(name)}"
            yield ModelFacts(name, None, nbytes, bits, origin, default_fit(model))


def describe(name: str) -> ModelFacts:
    """Return the facts of the model `name`."""
    path = model_path(name)
    nbytes = _size(path)
    try:
        origin = describe_origin(path)
        model = ModelFolder.open(path)
        return ModelFacts(name, path, nbytes, weight_bits(model), origin, default_fit(model))
    except MlxSoraError as error:
        return ModelFacts(name, path, nbytes, None, "folder", None, error.message)


def weight_bits(model: ModelFolder) -> int:
    """Return the bits per weight of the transformer. Raises WeightsError."""
    quantization = NetworkQuantization.from_config(model.config("transformer"))
    if quantization is not None:
        return round(average_bits(model.checkpoint("transformer"), quantization))
    tensors = model.checkpoint("transformer").tensors.values()
    largest = max(tensors, key=lambda info: info.nbytes)
    return 8 * FLOATS[largest.dtype].size


def describe_origin(path: Path) -> str:
    """Return where the model in `path` comes from, in a few words. Raises WeightsError."""
    if path == bundled_folder():
        return "bundled"
    found = Provenance.read(path)
    if found is None:
        return "folder"
    if found.conversion:
        return f"converted from {found.conversion['source']}"
    sources = {
        f"{origin.repo}@{origin.revision[:7]}": None
        for part in PARTS
        for origin in found.part_origins(part)
        if origin.revision
    }
    return f"downloaded from {', '.join(sources)}" if sources else "folder"


def default_fit(model: ModelFolder) -> Fit:
    """Return whether a run of the model's defaults fits this machine, and with which options.

    What other programs use at the moment does not count. Raises WeightsError.
    """
    pipeline, capacity, least = Pipeline(model), machine_capacity(), 0
    for changes in _SAVINGS:
        request = GenerationRequest(prompt="a test", seed=0, memory_budget=OFF, **changes)
        try:
            plan = pipeline.plan(request)
        except MemoryBudgetError:  # an array that the GPU cannot allocate
            continue
        flags = [shell_words(label(n), *([v] if v is not True else [])) for n, v in changes.items()]
        if plan.smallest <= capacity:
            if plan.peak > capacity and backend() == "cpu":  # where a run has no budget by itself
                flags.append("--memory-budget auto")
            return Fit(True, " ".join(flags), plan.smallest)
        least = min(least or plan.smallest, plan.smallest)
    return Fit(False, "", least)


def remove_model(name: str, confirm: Callable[[Removal], bool]) -> Removal | None:
    """Remove a model from the models' folders; return what was removed, None if not confirmed.

    confirm: gets what would be removed. Raises UsageError for the bundled model and for folders
    elsewhere, and WeightsError for unknown names, a model in use, and faults of the disk.
    """
    if name == BUNDLED or expand_folder(name).resolve() == bundled_folder():
        raise UsageError(f"{BUNDLED} is part of mlx_sora: it stays.", "Name another model.")
    path = model_path(name)
    root = path.parent.resolve()
    folders = [path] if os.path.lexists(path) else []
    folders += [root / STAGING] if path.name == PUBLISHED else []
    folders = [folder for folder in [*folders, staging_folder(path)] if os.path.lexists(folder)]
    if root not in {folder.resolve() for folder in model_roots()}:
        if not folders:
            raise WeightsError(f"There is no model {name}.", unknown_name_fix(path.name))
        places = ", ".join(map(str, model_roots()))
        raise UsageError(
            f"{path} is outside the folders of models ({places}).", "Remove it as any other folder."
        )
    if not folders or not any(map(_is_model, folders)):
        raise WeightsError(f"There is no model {path.name} in {root}.", unknown_name_fix(path.name))
    removal = Removal(path.name, tuple(folders), sum(map(freed_bytes, folders)))
    with disk_errors(root, "Check the rights of the folder."), removal_lock(root, *folders):
        if not confirm(removal):
            return None
        sweep_temporary_folders(str(root))
        for folder in folders:
            if folder.is_symlink():
                folder.unlink()
                continue
            hidden = root / owned_name(".mlx_sora", "-removed")  # which a later removal sweeps
            folder.rename(hidden)
            shutil.rmtree(hidden)
    return removal


def freed_bytes(folder: Path) -> int:
    """Return the bytes that the disk gains if `folder` is removed.

    Links, and files that have another name, too, as in the hub's cache, count nothing.
    """
    if folder.is_symlink():
        return 0
    stats = (file.lstat() for file in _files(folder))
    return sum(stat.st_size for stat in stats if S_ISREG(stat.st_mode) and stat.st_nlink == 1)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def _is_model(folder: Path) -> bool:
    names = (*PARTS, "tokenizer", provenance.FILE, JOURNAL)
    return any((folder / name).exists() for name in names)
