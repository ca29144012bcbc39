"""Strict loading: every way in which a checkpoint can be wrong has one clear error."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import pytest
from mlx import nn

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint, load_weights
from mlx_sora.models.key_map import KeyMap, KeyRule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.table = mx.zeros((4, 3))


def tensors() -> dict[str, mx.array]:
    return {
        "a.weight": mx.arange(6, dtype=mx.float32).reshape(2, 3),
        "a.bias": mx.array([0.5, -0.5]),
        "table": mx.arange(12, dtype=mx.float32).reshape(4, 3),
    }


def save(folder: Path, weights: dict[str, mx.array], name: str = "model.safetensors") -> Path:
    mx.save_safetensors(str(folder / name), weights)
    return folder / name


def save_sharded(folder: Path) -> Path:
    weights = tensors()
    first = {"a.weight": weights.pop("a.weight")}
    save(folder, first, "model-00001-of-00002.safetensors")
    save(folder, weights, "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(weights, "model-00002-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


@pytest.mark.parametrize("layout", ["file", "folder", "sharded folder", "index"])
def test_every_layout_fills_the_module(tmp_path: Path, layout: str) -> None:
    path = (
        save_sharded(tmp_path)
        if layout in ("sharded folder", "index")
        else save(tmp_path, tensors())
    )
    checkpoint = Checkpoint.open(path.parent if "folder" in layout else path)
    net = Net()
    load_weights(net, checkpoint, KeyMap())
    assert mx.array_equal(net.a.weight, tensors()["a.weight"])
    assert mx.array_equal(net.table, tensors()["table"])
    assert checkpoint.nbytes == (6 + 2 + 12) * 4


def test_loading_is_lazy(tmp_path: Path) -> None:
    save(tmp_path, {"a.weight": mx.zeros((2, 3)), "a.bias": mx.zeros(2), "table": mx.zeros((4, 3))})
    before = mx.get_active_memory()
    arrays = Checkpoint.open(tmp_path).load(["table"])
    assert mx.get_active_memory() == before
    mx.eval(arrays["table"])
    assert mx.get_active_memory() > before


def test_rules_rename_permute_and_ignore() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = mx.zeros((2, 12))

    keys = KeyMap(
        (
            KeyRule(r"old\.weight", "kernel", axes=(0, 2, 3, 1), flatten=True),
            KeyRule(r"junk.*", ignore=True),
        )
    )
    weight = mx.arange(24, dtype=mx.float32).reshape(2, 3, 2, 2)
    net = Conv()
    load_weights(net, {"old.weight": weight, "junk.1": mx.zeros(1)}, keys)
    assert mx.array_equal(net.kernel, weight.transpose(0, 2, 3, 1).reshape(2, 12))


def test_optional_parameter_keeps_its_default() -> None:
    weights = tensors()
    del weights["table"]
    net = Net()
    load_weights(net, weights, KeyMap(optional=frozenset({"table"})))
    assert mx.array_equal(net.table, mx.zeros((4, 3)))


def test_dtype_cast() -> None:
    net = Net()
    load_weights(
        net, {k: v.astype(mx.float16) for k, v in tensors().items()}, KeyMap(), dtype=mx.float32
    )
    assert net.a.weight.dtype == mx.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a.bias": None}, ["missing tensor a.bias", "[2]"]),
        ({"b.bias": mx.zeros(2)}, ["unexpected tensor b.bias", "[2]"]),
        ({"a.bias": mx.zeros(3)}, ["a.bias", "shape [3]", "expected [2]"]),
        ({"a.bias": mx.zeros(2, dtype=mx.int32)}, ["a.bias", "I32", "F32"]),
    ],
    ids=["missing", "extra", "misshaped", "mistyped"],
)
def test_mismatch_names_file_key_expected_and_found(
    tmp_path: Path, change: dict[str, mx.array | None], words: list[str]
) -> None:
    weights = {k: v for k, v in (tensors() | change).items() if v is not None}
    save(tmp_path, weights)
    with pytest.raises(WeightsError) as error:
        load_weights(Net(), Checkpoint.open(tmp_path), KeyMap())
    for word in [*words, str(tmp_path)]:
        assert word in str(error.value)


def test_two_names_of_one_weight() -> None:
    keys = KeyMap((KeyRule(r"copy", "table"),))
    with pytest.raises(WeightsError, match="second copy"):
        load_weights(Net(), tensors() | {"copy": mx.zeros((4, 3))}, keys)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = save(tmp_path, tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"truncated|not a complete"):
        Checkpoint.open(path)


def header_file(folder: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    raw = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"x": 3},
        {"x": {"dtype": "F32", "shape": [4]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}},
        {"x": {"dtype": "NO", "shape": [4], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
    ],
)
def test_damaged_header(tmp_path: Path, header: object) -> None:
    with pytest.raises(WeightsError) as error:
        Checkpoint.open(header_file(tmp_path, header))
    assert "model.safetensors" in str(error.value)


def test_index_faults(tmp_path: Path) -> None:
    index = save_sharded(tmp_path)
    good = json.loads(index.read_text())

    def broken(**weight_map: str) -> str:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | weight_map}))
        with pytest.raises(WeightsError) as error:
            Checkpoint.open(tmp_path)
        return str(error.value)

    assert "outside" in broken(x="../model.safetensors")
    assert "missing" in broken(x="model-00003-of-00003.safetensors")
    assert "does not hold" in broken(x="model-00001-of-00002.safetensors")
    index.write_text("{}")
    with pytest.raises(WeightsError, match="not a valid index"):
        Checkpoint.open(tmp_path)


def test_unlisted_tensor_in_a_shard(tmp_path: Path) -> None:
    index = save_sharded(tmp_path)
    good = json.loads(index.read_text())
    del good["weight_map"]["table"]
    index.write_text(json.dumps(good))
    with pytest.raises(WeightsError, match=r"table, which .* does not list"):
        Checkpoint.open(tmp_path)


def test_nothing_or_pickles_or_several(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No weights"):
        Checkpoint.open(tmp_path / "gone")
    with pytest.raises(WeightsError, match=r"No \.safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="never opened"):
        Checkpoint.open(tmp_path / "model.bin")
    save(tmp_path, tensors(), "a.safetensors")
    save(tmp_path, tensors(), "b.safetensors")
    with pytest.raises(WeightsError, match="several"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_read_only_what_is_asked(tmp_path: Path, dtype: mx.Dtype) -> None:
    table = mx.random.normal((50, 6), key=mx.random.key(0)).astype(dtype)
    checkpoint = Checkpoint.open(save(tmp_path, {"table": table}))
    assert mx.array_equal(checkpoint.read_rows("table", [3, 49, 3]), table[mx.array([3, 49, 3])])
    with pytest.raises(WeightsError, match="50 rows"):
        checkpoint.read_rows("table", [50])
