"""The table of sources, and what flags and environment put in its place."""

from __future__ import annotations

import pytest

from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.manage.sources import (
    SOURCE_PARTS,
    SOURCES,
    PartSource,
    choose_endpoint,
    choose_files,
    choose_sources,
)

SHARDS = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
INDEX = "m.safetensors.index.json"


def test_the_published_repositories() -> None:
    assert {source.part: (source.repo, source.folder) for source in choose_sources((), {})} == {
        "transformer": ("hpcai-tech/OpenSora-STDiT-v3", ""),
        "vae": ("hpcai-tech/OpenSora-VAE-v1.2", ""),
        "text_encoder": ("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "text_encoder"),
        "tokenizer": ("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "tokenizer"),
    }
    assert tuple(source.part for source in SOURCES) == SOURCE_PARTS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", ("a/b", "text_encoder", None)),
        ("a/b@v1", ("a/b", "text_encoder", "v1")),
        ("@refs/pr/1", (SOURCES[2].repo, "text_encoder", "refs/pr/1")),
        (":", (SOURCES[2].repo, "", None)),
        ("a/b.c-d@0f:x/y/", ("a/b.c-d", "x/y", "0f")),
    ],
)
def test_overrides(text: str, expected: tuple[str, str, str | None]) -> None:
    chosen = choose_sources([f"text_encoder={text}"], {})
    assert chosen[2] == PartSource("text_encoder", *expected)
    assert chosen[:2] == SOURCES[:2]
    assert chosen[3] == SOURCES[3]


def test_the_flag_refines_the_environment() -> None:
    environment = {"MLX_SORA_SOURCE_VAE": "a/b@v1:x"}
    assert choose_sources((), environment)[1] == PartSource("vae", "a/b", "x", "v1")
    assert choose_sources(["vae=@v2"], environment)[1] == PartSource("vae", "a/b", "x", "v2")
    assert choose_sources(["vae=c/d"], environment)[1] == PartSource("vae", "c/d", "x", None)


@pytest.mark.parametrize(
    "text", ["", "vae", "vae=", "vae=a", "vae=a/b/c", "vae=../b", "vae=a/..", "vae=a/b c", "t5=a/b"]
)
def test_overrides_that_mean_nothing(text: str) -> None:
    with pytest.raises(UsageError):
        choose_sources([text], {})


def test_endpoints() -> None:
    assert choose_endpoint(None, {}) is None
    assert choose_endpoint(None, {"HF_ENDPOINT": "https://mirror.example/"}) == (
        "https://mirror.example"
    )
    assert choose_endpoint("http://127.0.0.1:1", {"HF_ENDPOINT": "https://x"}) == (
        "http://127.0.0.1:1"
    )
    for bad in ("ftp://x", "file:///etc", "mirror.example", "https://"):
        with pytest.raises(UsageError, match="HF_ENDPOINT"):
            choose_endpoint(bad, {})


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "other.safetensors"], ["model.safetensors"]),
        (["model.safetensors", INDEX, *SHARDS], ["model.safetensors"]),
        ([INDEX, *SHARDS, "pytorch_model.bin"], [INDEX, *SHARDS]),
        ([INDEX, *SHARDS[::-1], "n-00001-of-00001.safetensors"], [INDEX, *SHARDS]),
        (["weights.safetensors", "weights.bin"], ["weights.safetensors"]),
    ],
)
@pytest.mark.parametrize("folder", ["", "sub", "sub/t5"])
def test_weights_are_one_set(names: list[str], weights: list[str], folder: str) -> None:
    start = f"{folder}/" if folder else ""
    listed = [start + name for name in ["config.json", *names]]
    listed += ["elsewhere/model.safetensors", "README.md", f"{start}deeper/model.safetensors"]
    chosen = choose_files(PartSource("vae", "a/b", folder), listed)
    assert chosen == [start + name for name in ["config.json", *weights]]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.safetensors", "b.safetensors"], "several sets"),
        ([INDEX, *SHARDS, "x.safetensors.index.json"], "several sets"),
        (["a.safetensors", "b.safetensors", "x.bin"], "several sets"),
        ([INDEX], "not all of its shards"),
        ([INDEX, SHARDS[1]], "not all of its shards"),
        ([INDEX, *SHARDS, "m-00003-of-00003.safetensors"], "not all of its shards"),
        ([], "no safetensors"),
        (["pytorch_model.bin"], "pickles"),
        (["model.ckpt", "model.pt"], r"pickles \(model\.ckpt\)"),
    ],
)
def test_weights_that_cannot_be_chosen(names: list[str], words: str) -> None:
    with pytest.raises(WeightsError, match=words) as error:
        choose_files(PartSource("vae", "a/b"), ["config.json", *names])
    assert "--source vae=" in error.value.fix or "incomplete" in error.value.fix


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_what_else_is_needed(source: PartSource) -> None:
    with pytest.raises(WeightsError, match=r"config\.json|spiece\.model") as error:
        choose_files(source, [f"{source.folder}/model.safetensors".lstrip("/")])
    assert "FOLDER" in error.value.fix
