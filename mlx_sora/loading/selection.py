"""Which files of a hub repository make a part of a model, judged by their names alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import PICKLES
from mlx_sora.loading.sources import SOURCES, Source

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_INDEX = ".safetensors.index.json"


def choose_files(source: Source, names: Sequence[str]) -> list[str]:
    """Names of the files that `source` needs: configuration and weights, or the tokenizer model.

    Weights: model.safetensors, else the only index with all of its shards, else the only
    .safetensors file. Raises WeightsError when there are none, only pickles, or several, and when a
    name of the listing is not one of a file inside the repository.
    """
    for name in names:
        if not _inside(name):
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
        wanted = ["config.json", *_weights(source, local)]
    for name in wanted:
        if name not in local:
            raise WeightsError(
                f"{source} has no {start}{name}.",
                f"Name the folder that holds it: --source {source.part}={source.repo}:FOLDER.",
            )
    return [start + name for name in wanted]


def _inside(name: str) -> bool:
    """Whether a listed name can only mean a file inside the repository."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


def _weights(source: Source, names: Sequence[str]) -> list[str]:
    if "model.safetensors" in names:
        return ["model.safetensors"]
    indexes = [name for name in names if name.endswith(_INDEX)]
    if len(indexes) == 1:
        stem = indexes[0].removesuffix(_INDEX)
        return [indexes[0], *_shards(source, stem, names)]
    files = [name for name in names if name.endswith(".safetensors")]
    if not indexes and len(files) == 1:
        return files
    where = f"{source}" + (f" in {source.folder}/" if source.folder else "")
    if files or indexes:
        raise WeightsError(
            f"{where} holds several sets of weights ({', '.join(sorted(indexes or files)[:3])}).",
            f"Name a repository with one: --source {source.part}=REPO.",
        )
    pickles = sorted(name for name in names if name.endswith(PICKLES))
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


def _shards(source: Source, stem: str, names: Sequence[str]) -> list[str]:
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
