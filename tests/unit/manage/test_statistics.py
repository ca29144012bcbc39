"""Statistics of tensors: impossible values, distances that no rounding brings, and their file."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.loading.quantization import CONFIG_KEY, named_form
from mlx_sora.loading.safetensors import read_header
from mlx_sora.manage import statistics
from mlx_sora.manage.statistics import (
    FILE,
    ROUNDING,
    Statistics,
    TensorStatistics,
    measure_part,
    measure_tensor,
)
from mlx_sora.request.options import FLOAT_FORMS, WIDTHS
from tests.helpers.published import write_model
from tests.reports.test_model_folders import save_as


def measure(folder: Path, **arrays: mx.array) -> dict[str, TensorStatistics]:
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), arrays)
    return {key: measure_tensor(info) for key, info in read_header(path).items()}


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype("<f4"))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("chunk", [8, 1 << 18])
def test_every_bad_value_is_counted(
    tmp_path: Path, dtype: mx.Dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", chunk)
    nan, inf = float("nan"), float("inf")
    largest = mx.finfo(dtype).max
    found = measure(
        tmp_path,
        good=mx.array([0.0, -0.0, 1e-30, -3.0, largest, -largest]).astype(dtype),
        bad=mx.array([1.0, nan, -nan, inf, 2.0, -inf, inf, 0.0]).astype(dtype),
        last=mx.array([0.0] * 9 + [nan]).astype(dtype),
        zero=mx.array([[0.0, -0.0, 0.0]]).astype(dtype),
        none=mx.zeros((0, 3)).astype(dtype),
    )
    counts = {name: (row.nan, row.inf) for name, row in found.items()}
    assert counts == {"good": (0, 0), "bad": (2, 3), "last": (1, 0), "zero": (0, 0), "none": (0, 0)}
    assert (found["zero"].rms, found["zero"].constant_rows) == (0, 1)


def test_numbers_are_those_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.array(random(37, 19))
    x[5] = x[7] = 2.5
    sums = []
    for chunk in (1, 64, 1 << 18):
        monkeypatch.setattr(statistics, "_CHUNK", chunk)
        found = measure(tmp_path, x=mx.array(x))["x"]
        assert found.rms == pytest.approx(np.sqrt(np.mean(x**2.0)), rel=1e-6)
        assert found.kurtosis == pytest.approx(np.mean(x**4.0) / np.mean(x**2.0) ** 2, rel=1e-6)
        assert found.constant_rows == (2 if chunk > 1 else 0)  # a row may exceed a chunk
        sums.append(found.sums)
    assert sums[1:] == [pytest.approx(sums[0], abs=1e-5)] * 2


@pytest.mark.parametrize("code", ["F8_E4M3", "BF16", "F16"])
def test_types_are_read_as_mlx_reads_them(tmp_path: Path, code: str) -> None:
    x = random(64, 64)
    path = tmp_path / "a.safetensors"
    if code == "F8_E4M3":
        save_as(path, code, {"x": x})
        x = mx.from_fp8(mx.to_fp8(x), mx.float32)
    else:
        x = x.astype(mx.bfloat16 if code == "BF16" else mx.float16)
        mx.save_safetensors(str(path), {"x": x})
    (info,) = read_header(path).values()
    expected = measure(tmp_path / "b", x=x.astype(mx.float32))["x"]
    assert measure_tensor(info).difference(expected) == ""


@pytest.mark.parametrize("name", [*WIDTHS, *FLOAT_FORMS])
def test_packed_words_are_what_they_stand_for(tmp_path: Path, name: int | str) -> None:
    x, form = random(48, 128), named_form(name)
    packed = form.quantize(x)
    dense = form.rotate(mx.dequantize(*packed.values(), dtype=mx.float32, **form.kernel_options))
    part = tmp_path / "vae"
    measure(part, **{f"x.{name}": value for name, value in packed.items()})
    (part / "config.json").write_text(json.dumps({CONFIG_KEY: form.to_dict()}))
    row = dict(measure_part(tmp_path, "vae"))["x.weight"]
    assert (row.dtype, row.shape) == (name if name in FLOAT_FORMS else f"{name}-bit", (48, 128))
    expected = measure(tmp_path / "dense", x=dense.astype(mx.float32), y=x)
    assert row.difference(expected["x"], 1e-3) == ""
    assert row.difference(expected["y"]) != ""
    assert row.difference(expected["y"], ROUNDING[row.dtype]) == ""


def changed(x: np.ndarray, how: str) -> np.ndarray:
    y = x.copy()
    if how == "swapped":
        y[[3, 40]] = y[[40, 3]]
    if how == "constant":
        y[9] = y[9].mean()
    if how == "scaled":
        y *= 1.5
    if how == "one":
        y[8, 8] = 300.0
    if how == "moved":
        y = np.roll(y, 16)
    if how == "negated":
        y = -y
    return y


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nothing", ""),
        ("swapped", "% away"),
        ("constant", "1 constant rows, not 0"),
        ("scaled", "has a scale of 1."),
        ("one", "has a scale of"),
        ("moved", "% away"),
        ("negated", "about 2e+02 % away"),
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_no_rounding_brings(tmp_path: Path, how: str, says: str, dtype: mx.Dtype) -> None:
    x = np.array(random(64, 48))
    before = measure(tmp_path, x=mx.array(x))["x"]
    after = measure(tmp_path, x=mx.array(changed(x, how)).astype(dtype))["x"]
    found = after.difference(before, ROUNDING[after.dtype])
    assert says in found
    assert bool(found) == bool(says)


def test_a_large_tensor_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"large": mx.ones((24, 1 << 18)), "long": mx.ones(6 << 20)})
    for info in read_header(path).values():
        seen: list[int] = []
        tracemalloc.start()
        try:
            assert measure_tensor(info, seen.append).rms == 1
            assert tracemalloc.get_traced_memory()[1] < info.nbytes // 2
        finally:
            tracemalloc.stop()
        assert seen == sorted(seen)
        assert seen[-1] == info.nbytes


def test_the_file_holds_what_was_measured(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    assert Statistics.read(model) is None
    made = Statistics.measure(model)
    made.write(model)
    found = Statistics.read(model)
    assert found is not None
    assert found.settings == made.settings
    assert set(found.settings) == {
        *(f"{part}/config.json" for part in ("vae", "transformer", "text_encoder")),
        "tokenizer/spiece.model",
    }
    for part, rows in made.tensors.items():
        assert found.tensors[part].keys() == rows.keys()
        for name, row in rows.items():
            assert row.difference(found.tensors[part][name]) == ""
            assert row.sha256 == found.tensors[part][name].sha256 != ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"sums": [', '"sums": [1, '),
        ('"rms": ', '"rms": NaN, "x": '),
        ('"shape": [', '"shape": [-1, '),
        ('"constant_rows": 0', '"constant_rows": 0.5'),
        ('"vae":', '"other":'),
        ('"settings"', '"set"'),
        ("{", "["),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, old: str, new: str) -> None:
    model = write_model(tmp_path / "model")
    text = Statistics.measure(model).write(model).read_text()
    (model / FILE).write_text(text.replace(old, new, 1))
    with pytest.raises(WeightsError, match=f"{FILE} is damaged"):
        Statistics.read(model)
