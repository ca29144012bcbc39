"""Finding models: names, paths, the default, and what an incomplete one says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.geometry import Size
from mlx_sora.loading.model_card import ModelCard
from mlx_sora.loading.model_folder import (
    BUNDLED,
    PUBLISHED,
    WEIGHTS_VARIABLE,
    Defaults,
    ModelFolder,
    find_model,
)


def make_model(path: Path, index: object | None = None) -> Path:
    for part in ("transformer", "vae", "text_encoder"):
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text(json.dumps({"part": part}))
        (path / part / "model.safetensors").write_bytes(b"")
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "spiece.model").write_bytes(b"")
    if index is not None:
        (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_a_folder_without_index_gets_the_published_defaults(tmp_path: Path) -> None:
    model = find_model(make_model(tmp_path / "mine"))
    assert model.name == "mine"
    assert model.defaults == Defaults()
    assert model.config("vae") == {"part": "vae"}


def test_index_names_the_model_and_its_defaults(tmp_path: Path) -> None:
    index = {"name": "tiny", "defaults": {"steps": 7, "fps": 12, "unknown": 1}}
    model = ModelFolder.open(make_model(tmp_path, index))
    assert model.name == "tiny"
    assert model.defaults == Defaults(steps=7, fps=12, aesthetic=None, warn_below_frames=0)


@pytest.mark.parametrize("index", [[], {"defaults": {"steps": "7"}}, {"defaults": 3}])
def test_bad_index(tmp_path: Path, index: object) -> None:
    with pytest.raises(WeightsError, match="model_index"):
        ModelFolder.open(make_model(tmp_path, index))


def test_a_card_says_what_a_model_draws(tmp_path: Path) -> None:
    content: dict[str, object] = {"description": "cats", "sizes": ["64x48"], "num_frames": [1, 17]}
    content |= {"patterns": ["a SIZE cat, SIZE"], "words": {"SIZE": ["big", "very small"]}}
    content["differ"] = ["SIZE"]
    model = ModelFolder.open(make_model(tmp_path / "cats", {"card": content | {"more": 1}}))
    card = model.card
    assert json.loads(json.dumps(card.to_dict())) == content
    assert card.fits("A very small cat: big.")
    assert not card.fits("a big cat big")
    found = card.mismatches({"it": "a dog", "that": "big cat"}, "fog", Size(48, 64), 34)
    assert list(found) == [
        "it (dog)",
        "that",
        "the negative prompt (fog)",
        "48x64 pixels",
        "34 frames",
    ]
    assert card.guide() == "cats Prompts: a SIZE cat, SIZE. SIZE: big, very small."
    both = {"a big cat, very small", "a very small cat, big"}
    assert set(card.examples(9)) == both
    assert replace(card, prompts=("cat",)).examples(2)[0] == "cat"
    assert len(card.examples(1)) == 1
    plain = ModelFolder.open(make_model(tmp_path / "plain")).card
    for other in (plain, replace(card, words={"SIZE": ("big",)}), replace(card, patterns=())):
        assert other.examples(9) == ()
    assert plain == ModelCard()
    assert not list(plain.mismatches({"it": "a dog"}, "fog", Size(48, 64), 34))


@pytest.mark.parametrize(
    "card",
    [
        [],
        3,
        {"sizes": ["big"]},
        {"num_frames": [5]},
        {"prompts": "cat"},
        {"patterns": ["a SIZE cat"]},
        {"words": ["SIZE"]},
        {"words": {"SIZE": "big"}},
        {"words": {"SIZE": [1]}},
        {"differ": ["SIZE"]},
        {"prompts": [""]},
        {"prompts": ["cat"] * 1001},
    ],
)
def test_bad_card(tmp_path: Path, card: object) -> None:
    model = ModelFolder.open(make_model(tmp_path, {"card": card}))
    with pytest.raises(WeightsError, match="'card' is not valid"):
        _ = model.card


def test_default_prefers_the_published_model_once_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    make_model(tmp_path / BUNDLED)
    assert find_model().name == BUNDLED
    published = make_model(tmp_path / PUBLISHED)
    (published / "vae" / "config.json").rename(published / "vae" / "config.part")
    assert find_model().name == BUNDLED
    with pytest.raises(WeightsError, match=r"incomplete: vae/config\.json"):
        find_model(PUBLISHED)
    (published / "vae" / "config.part").rename(published / "vae" / "config.json")
    assert find_model().name == PUBLISHED


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(WeightsError, match="is not in"):
        find_model(PUBLISHED)
    with pytest.raises(WeightsError, match="No model folder"):
        find_model("no/such/folder")


def test_damaged_config(tmp_path: Path) -> None:
    model = ModelFolder.open(make_model(tmp_path))
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        model.config("vae")
