"""Distillation of quantized weights: nearer to the model of floats, in the same form."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.manage.conversion_plan import ConversionOptions, Gptq
from mlx_sora.manage.convert import convert
from mlx_sora.models.quantized import Quantization, QuantizedLinear
from mlx_sora.pipeline import distill as distillation
from mlx_sora.pipeline.distill import LearningLinear, distill
from tests.helpers.quantizable_model import tensors, write_model

TINY = {"width": 64, "height": 64, "num_frames": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFolder, ModelFolder]:
    root = tmp_path_factory.mktemp("models")
    plain = write_model(root / "plain")
    options = ConversionOptions(3, "float32")
    return plain, ModelFolder.open(convert(plain, root / "made", options).path)


def test_a_layer_that_learns_begins_as_it_was() -> None:
    form = Quantization(4, rotation=64)
    layer = QuantizedLinear(128, 8, bias=True, bits=4, rotation=64)
    layer.update(form.quantize(mx.random.normal((8, 128), key=mx.random.key(0)), mx.float32))
    layer.bias = mx.arange(8.0)
    x = mx.random.normal((3, 128), key=mx.random.key(1))
    found = LearningLinear(layer)
    assert mx.allclose(found(x), layer(x), atol=1e-5).item()
    for name, value in found.arrays().items():
        assert mx.array_equal(value, layer[name]).item(), name


def test_what_is_learned_is_nearer(
    models: tuple[ModelFolder, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error falls; codes stay."""
    losses: list[float] = []
    learn = distillation._learn

    def record(*args: Any) -> Iterator[float]:
        for loss in learn(*args):
            losses.append(loss)
            yield loss

    monkeypatch.setattr(distillation, "_learn", record)
    monkeypatch.setattr(distillation, "RATE", 0.02)
    plain, made = models
    requests = [replace(r, **TINY) for r in Gptq(("a red circle", "a square"), 2).requests()]
    done: list[int] = []
    arrays = distill(plain, made, requests, 12, done.append)
    assert done == list(range(1, 15))
    before = tensors(made, "transformer")
    assert {k: v.shape for k, v in arrays.items()} == {k: before[k].shape for k in arrays}
    assert len(arrays) == 3 * 14 * 3
    codes = [key for key, value in before.items() if value.dtype == mx.uint32]
    assert all(mx.array_equal(arrays[key], before[key]).item() for key in codes)
    assert 0 < losses[-1] < 0.5 * losses[0], losses


def test_large_videos_learn_the_same_in_less_memory(
    models: tuple[ModelFolder, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [replace(r, **TINY) for r in Gptq(("a red circle", "a square"), 2).requests()]
    together = distill(*models, requests, 2)
    monkeypatch.setattr(distillation, "CELLS", 1)
    single = distill(*models, requests, 2)
    before = tensors(models[1], "transformer")
    for name in ("scales", "biases"):
        keys = [key for key in single if key.endswith(name)]
        # Adam's first steps go by the sign of a gradient, even of one that is rounding alone.
        apart = sum(mx.square(single[key] - together[key]).sum().item() for key in keys)
        change = sum(mx.square(together[key] - before[key]).sum().item() for key in keys)
        assert apart < 0.1**2 * change, name


def test_nan_is_reported(models: tuple[ModelFolder, ModelFolder], tmp_path: Path) -> None:
    plain, made = models
    shutil.copytree(made.path, tmp_path / "m")
    file = next((tmp_path / "m" / "transformer").glob("*1-of*.safetensors"))
    values = mx.load(str(file))
    assert isinstance(values, dict)
    values = {key: value * (float("nan") if "table" in key else 1) for key, value in values.items()}
    mx.eval(values)
    mx.save_safetensors(str(file), values)
    requests = [replace(r, **TINY) for r in Gptq(("a red circle",), 1).requests()]
    with pytest.raises(WeightsError, match=r"NaN or Inf\.") as error:
        distill(plain, ModelFolder.open(tmp_path / "m"), requests, 1)
    assert "doctor" in error.value.fix
