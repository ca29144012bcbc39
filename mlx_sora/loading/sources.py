"""Where the parts of the published model come from, and how a user names another place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from mlx_sora.errors import UsageError

#: Environment variables that replace a source are this and the part's name in capitals.
SOURCE_VARIABLE = "MLX_SORA_SOURCE_"

#: The hub's own variable: another server that speaks its protocol.
ENDPOINT_VARIABLE = "HF_ENDPOINT"

SYNTAX = "PART=[REPO][@REVISION][:FOLDER]"

_REPO = r"[\w-][\w.-]*/[\w-][\w.-]*"
_TEXT = re.compile(rf"({_REPO})?(?:@([\w./-]+))?(?::([\w./-]*))?")


@dataclass(frozen=True)
class Source:
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
    Source("transformer", "hpcai-tech/OpenSora-STDiT-v3"),
    Source("vae", "hpcai-tech/OpenSora-VAE-v1.2"),
    Source("text_encoder", "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "text_encoder"),
    Source("tokenizer", "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "tokenizer"),
)
PARTS = tuple(source.part for source in SOURCES)


def choose_sources(
    overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> tuple[Source, ...]:
    """The table with what environment and `overrides` (PART=..., last wins) put in its place.

    Raises UsageError for an override that names no part or no repository.
    """
    environment = os.environ if environment is None else environment
    chosen = {source.part: source for source in SOURCES}
    for part in PARTS:
        text = environment.get(SOURCE_VARIABLE + part.upper())
        if text:
            chosen[part] = _override(chosen[part], text)
    for override in overrides:
        part, equals, text = override.partition("=")
        if not equals or part not in chosen:
            raise UsageError(
                f"--source {override!r} names no part.", f"Write {SYNTAX}; parts: {_parts()}."
            )
        chosen[part] = _override(chosen[part], text)
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


def _override(source: Source, text: str) -> Source:
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
    return ", ".join(PARTS)
