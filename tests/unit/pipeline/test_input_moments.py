"""Second moments of the inputs of layers: of what they get in runs, whatever is asked together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn

from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import MlxSoraError
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.manage.conversion_plan import ConversionOptions, Gptq, plan_part
from mlx_sora.pipeline import input_moments
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.input_moments import InputMoments, measure_moments
from tests.helpers.quantizable_model import tensors, write_model

TINY = {"width": 64, "height": 64, "num_frames": 1}
GPTQ = Gptq(("a red circle", "a square"), 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return write_model(tmp_path_factory.mktemp("plain") / "m")


def measured(model: ModelFolder, part: str, **options: Any) -> Iterator[dict[str, mx.array]]:
    requests = [replace(r, **TINY, text_cache=False, **options) for r in GPTQ.requests()]
    shards = plan_part(model, part, ConversionOptions(4))
    layers = [shard.quantized_inputs for shard in shards]
    return measure_moments(Engine(model, "auto", Ranks()), requests, part, layers)


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_sums_of_the_inputs(model: ModelFolder, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one block at a time, and with blocks that are streamed."""
    whole = list(measured(model, part))
    assert [len(block) for block in whole] == [7 if part == "text_encoder" else 14] * 3 + [0]
    monkeypatch.setattr(input_moments, "SHARE", 0.0)
    single = list(measured(model, part, ci_dl=True))
    for block, other in zip(whole, single, strict=True):
        assert block.keys() == other.keys()
        assert all(mx.array_equal(block[path], other[path]).item() for path in block)
    for path, moments in whole[0].items():
        assert mx.diag(moments).min().item() >= 0
        assert mx.abs(moments).max().item() > 0, path
    if part == "text_encoder":
        attention = "encoder.block.0.layer.0.SelfAttention"
        assert mx.array_equal(whole[0][f"{attention}.q"], whole[0][f"{attention}.v"]).item()
        assert not mx.array_equal(whole[0][f"{attention}.q"], whole[0][f"{attention}.o"]).item()


def test_a_sum_and_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, moments = nn.Linear(3, 2), InputMoments(3)
    x = mx.random.normal((2, 5, 3), key=mx.random.key(0))
    found = input_moments.MeasuredLinear(layer, moments)(x)
    assert mx.array_equal(found, layer(x)).item()
    rows = x.reshape(-1, 3)
    assert mx.allclose(moments.total, rows.T @ rows, atol=1e-5).item()
    monkeypatch.setattr(input_moments, "ROWS", 4)
    few = InputMoments(3)
    few.add(x)
    assert mx.allclose(few.total, rows[::3].T @ rows[::3], atol=1e-5).item()


def test_nan_is_reported(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    values = tensors(model, "transformer")
    values["spatial_blocks.0.scale_shift_table"] *= float("nan")
    for file in model.transformer.glob("*.safetensors*"):
        file.unlink()
    mx.save_safetensors(str(model.transformer / "model.safetensors"), values)
    with pytest.raises(MlxSoraError, match=r"NaN or Inf\.") as error:
        list(measured(model, "transformer"))
    assert "doctor" in error.value.fix
