"""Whatever the values: a reader succeeds, or says in one printable line what is wrong."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_sora.conditioning.mask_strategy import parse_mask_strategy
from mlx_sora.errors import MAX_MESSAGE, MlxSoraError, WeightsError, printable
from mlx_sora.loading.safetensors import load_tensors, read_header
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae import VAEConfig
from mlx_sora.request.generation import GenerationRequest, options
from mlx_sora.text.prompt import prepare_prompt
from mlx_sora.utils.json import parse_object
from tests.fuzz.targets import TARGETS
from tests.fuzz.verdict import judge

quick = settings(
    deadline=None,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    LEAVES | st.sampled_from([10**400, "9" * 5000, "\x1b[2J", "~x/y", "{seed:9999}"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def fine(call: Callable[[], object]) -> bool:
    """Whether a call succeeds, or says in one printable line what is wrong."""
    try:
        call()
    except MlxSoraError as error:
        return str(error).isprintable() and len(str(error)) < 2 * MAX_MESSAGE + 100
    return True


@quick
@given(st.dictionaries(st.sampled_from(sorted(options())), VALUES, max_size=4))
def test_requests_of_any_values(values: dict[str, Any]) -> None:
    assert fine(lambda: GenerationRequest.from_dict({"prompt": "a", **values}).validate())


@quick
@pytest.mark.parametrize("kind", [T5Config, STDiT3Config, VAEConfig])
@given(data=st.data())
def test_configurations_of_any_values(kind: Any, data: st.DataObject) -> None:
    names = [*kind.__dataclass_fields__, "temporal_config", "spatial_config", "vae_2d"]
    values = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=4))
    assert fine(lambda: kind.from_dict(values))


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": {"a": 1, "a": 2}}', "[" * 5000, "3"])
def test_json_that_readers_would_not_agree_about(text: str) -> None:
    with pytest.raises(ValueError, match="it "):
        parse_object(text)


@quick
@given(st.dictionaries(st.text(max_size=12), VALUES, max_size=5))
def test_json_comes_back(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    found = parse_object(text)
    assert json.dumps(found) == text


@quick
@given(st.text(max_size=3000), st.integers(20, 1500))
def test_printable_is_printable(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit + 10
    assert shown == text or not text.isprintable() or len(text) > limit


SHAPES = st.lists(st.integers(0, 4), max_size=3)


@quick
@given(st.dictionaries(st.from_regex(r"[a-z]{1,6}(\.weight)?", fullmatch=True), SHAPES, max_size=5))
def test_what_is_written_can_be_read(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    arrays = {name: mx.array(np.ones(shape, np.float32)) for name, shape in shapes.items()}
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), arrays)
    tensors = read_header(path)
    assert {key: info.nbytes for key, info in tensors.items()} == {
        key: 4 * math.prod(shape) for key, shape in shapes.items()
    }
    loaded = load_tensors(path, tensors)
    assert all(mx.array_equal(loaded[key], array) for key, array in arrays.items())


@quick
@given(st.integers(0, 95), st.sampled_from([-96, -64, -1, 1, 4, 64, 10**9]))
def test_a_moved_or_resized_tensor_is_refused(tmp_path: Path, at: int, by: int) -> None:
    """Either end of either tensor elsewhere: overlap, gap, or beyond the file."""
    ends = [[0, 64], [64, 96]]
    ends[at % 2][at // 2 % 2] += by
    rows = {
        key: {"dtype": "U8", "shape": [max(end - begin, 0)], "data_offsets": [begin, end]}
        for key, (begin, end) in zip("ab", ends, strict=True)
    }
    text = json.dumps(rows).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(96))
    with pytest.raises(WeightsError):
        read_header(path)


@quick
@given(
    st.text(max_size=80), st.sampled_from(["|0|", "", "|0|a|1|"]), st.sampled_from(["", "{", "}"])
)
def test_prompts_of_any_text(text: str, start: str, brace: str) -> None:
    assert fine(lambda: prepare_prompt(start + text + brace).text(3))


@quick
@given(st.text(alphabet="0123456789,;.-+e_ \u0663\x1b", max_size=60))
def test_mask_strategies_of_any_text(text: str) -> None:
    assert fine(lambda: parse_mask_strategy(text))


@quick
@given(
    st.sampled_from(sorted(TARGETS.keys() - {"repeated", "config-vae", "config-stdit", "video"})),
    st.binary(max_size=400) | st.text(max_size=200).map(lambda text: text.encode("utf-8")),
)
def test_readers_of_any_bytes(tmp_path: Path, name: str, data: bytes) -> None:
    assert judge(TARGETS[name].run, data, tmp_path) is None


@pytest.mark.parametrize("scale", [0, True, [1, 0, 1, 1]])
def test_scales_that_erase_latents_are_refused(scale: object) -> None:
    with pytest.raises(WeightsError, match="scale"):
        VAEConfig.from_dict({"scale": scale})
