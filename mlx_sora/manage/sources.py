"""Where the parts of the published model come from, and how a user names another place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.loading.checkpoint import PICKLE_SUFFIXES

#: Environment variables that replace a source are this and the part's name in capitals.
SOURCE_VARIABLE = "MLX_SORA_SOURCE_"

#: The hub's own variable: another server that speaks its protocol.
ENDPOINT_VARIABLE = "HF_ENDPOINT"

SYNTAX = "PART=[REPO][@REVISION][:FOLDER]"

_REPO = r"[\w-][\w.-]*/[\w-][\w.-]*"
_TEXT = re.compile(rf"({_REPO})?(?:@([\w./-]+))?(?::([\w./-]*))?")


@dataclass(frozen=True)
class PartSource:
    """One part of the model: hub repository, folder in it ("" is its root) and revision.

    revision: branch, tag or commit; None is the repository's main branch.
    """

    part: str
    repo: str
    folder: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


#: Open-Sora 1.2 as published. Its T5 comes from PixArt-Sigma, whose files are safetensors; those of
#: DeepFloyd/t5-v1_1-xxl, which Open-Sora itself names, are pickles.
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
    """The table with what environment and `overrides` (PART=..., last wins) put in its place.

    Raises UsageError for an override that names no part or no repository.
    """
    environment = os.environ if environment is None else environment
    chosen = {source.part: source for source in SOURCES}
    for part in SOURCE_PARTS:
        text = environment.get(SOURCE_VARIABLE + part.upper())
        if text:
            chosen[part] = _apply_override(chosen[part], text)
    for override in overrides:
        part, equals, text = override.partition("=")
        if not equals or part not in chosen:
            raise UsageError(
                f"--source {override!r} names no part.", f"Write {SYNTAX}; parts: {_parts()}."
            )
        chosen[part] = _apply_override(chosen[part], text)
    return tuple(chosen.values())


def choose_endpoint(flag: str | None, environment: Mapping[str, str] | None = None) -> str | None:
    """Server to ask, without a trailing slash: the flag, else $HF_ENDPOINT, else None (the hub)."""
    environment = os.environ if environment is None else environment
    endpoint = (flag or environment.get(ENDPOINT_VARIABLE) or "").rstrip("/")
    if endpoint and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
        raise UsageError(
            f"The hub's address {endpoint!r} is no http or https address.",
            f"Correct --endpoint or {ENDPOINT_VARIABLE}.",
        )
    return endpoint or None


def _apply_override(source: PartSource, text: str) -> PartSource:
    """`source` with what `text` names; another repository starts from its main branch."""
    match = _TEXT.fullmatch(text)
    if match is None or not text:
        raise UsageError(
            f"{text!r} is no source of {source.part}.",
            f"Write {SYNTAX}, such as {source.part}={source.repo}@main.",
        )
    repo, revision, folder = match.groups()
    if repo is not None:
        source = replace(source, repo=repo, revision=None)
    if revision is not None:
        source = replace(source, revision=revision)
    if folder is not None:
        source = replace(source, folder=folder.strip("/"))
    return source


def _parts() -> str:
    return ", ".join(SOURCE_PARTS)


_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_INDEX = ".safetensors.index.json"


def choose_files(source: PartSource, names: Sequence[str]) -> list[str]:
    """Names of the files that `source` needs: configuration and weights, or the tokenizer model.

    Weights: model.safetensors, else the only index with all of its shards, else the only
    .safetensors file. Raises WeightsError when there are none, only pickles, or several, and when a
    name of the listing is not one of a file inside the repository.
    """
    for name in names:
        if not _is_inside(name):
            raise WeightsError(
                f"{source.repo} lists a file {name!r}, which would lie outside its folder.",
                "Do not use this repository or server.",
            )
    start = f"{source.folder}/" if source.folder else ""
    local = [name.removeprefix(start) for name in names if name.startswith(start)]
    local = [name for name in local if _PLAIN.fullmatch(name)]
    if source.part == "tokenizer":
        wanted = ["spiece.model"]
    else:
        wanted = ["config.json", *_weight_files(source, local)]
    for name in wanted:
        if name not in local:
            raise WeightsError(
                f"{source} has no {start}{name}.",
                f"Name the folder that holds it: --source {source.part}={source.repo}:FOLDER.",
            )
    return [start + name for name in wanted]


def _is_inside(name: str) -> bool:
    """Whether a listed name can only mean a file inside the repository."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


def _weight_files(source: PartSource, names: Sequence[str]) -> list[str]:
    if "model.safetensors" in names:
        return ["model.safetensors"]
    indexes = [name for name in names if name.endswith(_INDEX)]
    if len(indexes) == 1:
        stem = indexes[0].removesuffix(_INDEX)
        return [indexes[0], *_shard_files(source, stem, names)]
    files = [name for name in names if name.endswith(".safetensors")]
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
            "a pickle runs the code of whoever wrote it.",
            f"Name a repository with safetensors: --source {source.part}={default.repo}.",
        )
    raise WeightsError(
        f"{where} holds no safetensors file.",
        f"Name a repository or folder with one: --source {source.part}={source.repo}:FOLDER.",
    )


def _shard_files(source: PartSource, stem: str, names: Sequence[str]) -> list[str]:
    """All shards of the set `stem`, which must be complete."""
    matches = [m for name in names if (m := _SHARD.fullmatch(name)) and m["stem"] == stem]
    counts = {int(m["count"]) for m in matches}
    numbers = sorted(int(m["number"]) for m in matches)
    if len(counts) != 1 or numbers != list(range(1, counts.pop() + 1)):
        raise WeightsError(
            f"{source}: {stem}{_INDEX} is there, but not all of its shards.",
            "The repository is incomplete; name another revision or repository.",
        )
    return sorted(m[0] for m in matches)
