"""Sources of the published model: repositories, overrides, and the choice of files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_sora.errors import UsageError, WeightsError, shell_words
from mlx_sora.loading.checkpoint import PICKLE_SUFFIXES, plain_names

#: Prefix of the environment variables that override a source; the part's name follows in capitals.
SOURCE_VARIABLE = "MLX_SORA_SOURCE_"

#: The hub's own variable for another server with its protocol.
ENDPOINT_VARIABLE = "HF_ENDPOINT"

SYNTAX = "PART=[REPO][@REVISION][:FOLDER]"

_REPO = r"[\w-][\w.-]*/[\w-][\w.-]*"
_OVERRIDE = re.compile(rf"({_REPO})?(?:@([\w./-]+))?(?::([\w./-]*))?")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class PartSource:
    """Source of one part of the model. folder: in the repository, "" for its root.

    revision: branch, tag or commit; None for the main branch.
    """

    part: str
    repo: str
    folder: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


#: Open-Sora 1.2 as published. T5 comes from PixArt-Sigma as safetensors; Open-Sora itself names
#: DeepFloyd/t5-v1_1-xxl, which has only pickles.
SOURCES = (
    PartSource("transformer", "hpcai-tech/OpenSora-STDiT-v3"),
    PartSource("vae", "hpcai-tech/OpenSora-VAE-v1.2"),
    PartSource("text_encoder", "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "text_encoder"),
    PartSource("tokenizer", "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "tokenizer"),
)
SOURCE_PARTS = tuple(source.part for source in SOURCES)


def choose_sources(
    overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> tuple[PartSource, ...]:
    """Return `SOURCES` with the overrides of the environment and of `overrides` (PART=...).

    The last override of a part wins. Raises UsageError for one without a valid part or repository.
    """
    environment = os.environ if environment is None else environment
    sources = {source.part: source for source in SOURCES}
    for part in SOURCE_PARTS:
        text = environment.get(SOURCE_VARIABLE + part.upper())
        if text:
            sources[part] = _apply_override(sources[part], text)
    for override in overrides:
        part, equals, text = override.partition("=")
        if not equals or part not in sources:
            raise UsageError(
                f"--source {override!r} names no part.",
                f"Write {SYNTAX}; parts: {', '.join(SOURCE_PARTS)}.",
            )
        sources[part] = _apply_override(sources[part], text)
    return tuple(sources.values())


def choose_endpoint(flag: str | None, environment: Mapping[str, str] | None = None) -> str | None:
    """Return the server's URL from the flag or $HF_ENDPOINT, None for the hub.

    Raises UsageError if it is not an http or https address.
    """
    environment = os.environ if environment is None else environment
    endpoint = (flag or environment.get(ENDPOINT_VARIABLE) or "").rstrip("/")
    if endpoint and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
        raise UsageError(
            f"The hub's address {endpoint!r} is not an http or https address.",
            f"Correct --endpoint or {ENDPOINT_VARIABLE}.",
        )
    return endpoint or None


def _apply_override(source: PartSource, text: str) -> PartSource:
    """Return `source` with the repository, revision and folder in `text`."""
    match = _OVERRIDE.fullmatch(text)
    if match is None or not text:
        raise UsageError(
            f"{text!r} is not a valid source of {source.part}.",
            f"Write {SYNTAX}, such as {shell_words(f'{source.part}={source.repo}@main')}.",
        )
    repo, revision, folder = match.groups()
    if repo is not None:
        source = replace(source, repo=repo, revision=None)  # a revision is of one repository
    if revision is not None:
        source = replace(source, revision=revision)
    if folder is not None:
        source = replace(source, folder=folder.strip("/"))
    return source


def choose_files(source: PartSource, names: Sequence[str]) -> list[str]:
    """Choose the files of `source` among `names`: configuration and weights, or the tokenizer.

    Weights: model.safetensors, else the only index with all its shards, else the only .safetensors
    file. Raises WeightsError for none, several or only pickles, and for a name that leads out of
    the repository.
    """
    for name in names:
        if not _is_inside(name):
            raise WeightsError(
                f"{source.repo} lists a file {name!r}, which would lie outside its folder.",
                "Do not use this repository or server.",
            )
    start = f"{source.folder}/" if source.folder else ""
    local = [name.removeprefix(start) for name in names if name.startswith(start)]
    local = [name for name in local if _FILE_NAME.fullmatch(name)]
    if source.part == "tokenizer":
        chosen = ["spiece.model"]
    else:
        chosen = ["config.json", *_weight_files(source, local)]
    for name in chosen:
        if name not in local:
            raise WeightsError(
                f"{source} has no {start}{name}.",
                f"Name the folder that holds it: {_folder_flag(source)}.",
            )
    return [start + name for name in chosen]


def _folder_flag(source: PartSource) -> str:
    return shell_words("--source", f"{source.part}={source.repo}:FOLDER")


def _is_inside(name: str) -> bool:
    """Return True if a listed name can only mean a file inside the repository."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


def _weight_files(source: PartSource, names: Sequence[str]) -> list[str]:
    if "model.safetensors" in names:
        return ["model.safetensors"]
    indexes = plain_names([name for name in names if name.endswith(_INDEX)])
    if len(indexes) == 1:
        stem = indexes[0].removesuffix(_INDEX)
        return [indexes[0], *_shard_files(source, stem, names)]
    files = plain_names([name for name in names if name.endswith(".safetensors")])
    if not indexes and len(files) == 1:
        return files
    where = f"{source}" + (f" in {source.folder}/" if source.folder else "")
    if files or indexes:
        raise WeightsError(
            f"{where} holds several sets of weights ({', '.join(sorted(indexes or files)[:3])}).",
            f"Name a repository with one: --source {source.part}=REPO.",
        )
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        default = next(s for s in SOURCES if s.part == source.part)
        raise WeightsError(
            f"{where} holds its weights only as pickles ({pickles[0]}), which are refused: opening "
            "a pickle runs the code in it.",
            f"Name a repository with safetensors: --source {source.part}={default.repo}.",
        )
    raise WeightsError(
        f"{where} holds no safetensors file.",
        f"Name a repository or folder with one: {_folder_flag(source)}.",
    )


def _shard_files(source: PartSource, stem: str, names: Sequence[str]) -> list[str]:
    """Return all shards of the set `stem`. Raises WeightsError if one is missing."""
    matches = [m for name in names if (m := _SHARD.fullmatch(name)) and m["stem"] == stem]
    counts = {int(m["count"]) for m in matches}
    numbers = sorted(int(m["number"]) for m in matches)
    if len(counts) != 1 or numbers != list(range(1, counts.pop() + 1)):
        raise WeightsError(
            f"{source} has {stem}{_INDEX}, but not all of its shards.",
            "The repository is incomplete; name another revision or repository.",
        )
    return sorted(m[0] for m in matches)
