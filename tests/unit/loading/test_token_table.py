"""T5's table of tokens, quantized: the same rows on load and converted, and folders of old."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint, load_weights
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_text_encoder, stream_text_encoder
from mlx_sora.loading.quantization import (
    NetworkQuantization,
    embedding_form,
    insert_quantized_layers,
    named_form,
)
from mlx_sora.loading.quantization_choice import choose_quantization, quantization_metadata
from mlx_sora.manage.conversion_plan import ConversionOptions
from mlx_sora.manage.convert import convert
from mlx_sora.manage.doctor import diagnose
from mlx_sora.manage.info import describe_model
from mlx_sora.manage.smoke_test import run_text_encoder
from mlx_sora.models import t5
from tests.helpers.quantizable_model import T5, tensors, write_model

IDS = [3, 0, 39, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return write_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def four(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Converted to 4 bits."""
    target = tmp_path_factory.mktemp("quantized") / "m"
    return ModelFolder.open(convert(model, target, ConversionOptions(4, "float32")).path)


def rows(model: ModelFolder) -> mx.array:
    _, read = load_text_encoder(model, mx.float32)
    _, streamed, _ = stream_text_encoder(model, mx.float32)
    found = read(IDS)
    assert mx.array_equal(found, streamed(IDS)).item()
    return found


@pytest.mark.parametrize(
    ("name", "bits"), [(3, 5), (4, 5), (5, 6), (6, 8), (8, 8), ("mxfp4", 5), ("mxfp8", 8)]
)
def test_it_has_a_bit_more_than_the_layers(name: int | str, bits: int) -> None:
    assert embedding_form(name) == named_form(bits)


@pytest.mark.parametrize(
    ("value", "error"), [(4, 0.05), ("t5=8", 0.006), ("mxfp4", 0.05), ("transformer=4", 0.0)]
)
def test_rows_on_load_and_converted(
    model: ModelFolder, tmp_path: Path, value: int | str, error: float
) -> None:
    plain, on_load = rows(model), choose_quantization(model, value)
    made = convert(model, tmp_path / "m", ConversionOptions(value, "float32")).path
    found = rows(on_load)
    lost = (mx.linalg.norm(found - plain) / mx.linalg.norm(plain)).item()
    assert error / 2 <= lost <= error
    assert mx.array_equal(found, rows(ModelFolder.open(made))).item()


def test_it_is_counted_checked_and_run(model: ModelFolder, four: ModelFolder) -> None:
    packed, dense = (tensors(m, "text_encoder") for m in (four, model))
    form = embedding_form(4)
    for name, shape in form.packed_shapes(dense[t5.EMBEDDING_KEY].shape).items():
        assert packed[f"shared.{name}"].shape == shape
    assert describe_model(four)["parameters"] == describe_model(model)["parameters"]
    described = describe_model(four)["parts"]["text_encoder"]["quantization"]
    assert described == str(named_form(4))
    assert not [found for found in diagnose(four.path) if found.level in ("error", "warning")]
    assert quantization_metadata(four) == quantization_metadata(choose_quantization(model, 4))
    run_text_encoder(four)
    network = t5.T5Encoder(T5)
    insert_quantized_layers(network, NetworkQuantization.from_config(four.config("text_encoder")))
    load_weights(network, four.checkpoint("text_encoder"), t5.KEYS)
    assert mx.array_equal(network.embed(mx.array(IDS)), rows(four)).item()


def test_a_folder_of_old_has_a_table_of_floats(
    model: ModelFolder, four: ModelFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(four.path, folder)
    for name in ("provenance.json", "statistics.json"):
        (folder / name).unlink()
    edit_config(folder, lambda settings: settings.pop("shared"))
    replace_table(folder, tensors(model, "text_encoder")[t5.EMBEDDING_KEY])
    old = ModelFolder.open(folder)
    assert mx.array_equal(rows(old), rows(model)).item()
    assert choose_quantization(old, 4) == old
    assert describe_model(old)["parameters"] == describe_model(model)["parameters"]
    assert not [found for found in diagnose(folder) if found.level == "error"]
    edit_config(folder, lambda settings: settings.update(shared=named_form(4).to_dict()))
    with pytest.raises(WeightsError, match=r"shared.weight is of shape \[\d+, 64\], expected"):
        load_text_encoder(old, mx.float32)


def edit_config(folder: Path, change: object) -> None:
    """Change the settings of T5's quantization."""
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization"])  # type: ignore[operator]
    path.write_text(json.dumps(config))


def replace_table(folder: Path, table: mx.array) -> None:
    """Replace the quantized table of the folder by one of floats."""
    checkpoint = Checkpoint.open(folder / "text_encoder")
    file = checkpoint.tensors[t5.EMBEDDING_KEY].file
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    kept = {name: array for name, array in arrays.items() if not name.startswith("shared.")}
    mx.eval(kept)
    mx.save_safetensors(str(file), {**kept, t5.EMBEDDING_KEY: table})
    index = folder / "text_encoder" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in ("shared.scales", "shared.biases"):
        del content["weight_map"][name]
    index.write_text(json.dumps(content))
