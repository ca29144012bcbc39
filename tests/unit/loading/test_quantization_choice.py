"""Widths of layers by their sensitivities, and the texts of --quantize."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_sora.cli.main import main
from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_text_encoder, load_transformer
from mlx_sora.loading.quantization import NetworkQuantization, named_form
from mlx_sora.loading.quantization_choice import (
    SENSITIVITIES,
    choose_quantization,
    named_quantization,
    quantization_metadata,
    spend,
)
from mlx_sora.manage.conversion_plan import ConversionOptions
from mlx_sora.manage.convert import convert
from mlx_sora.manage.doctor import diagnose
from mlx_sora.manage.info import describe_model
from mlx_sora.manage.models import weight_bits
from mlx_sora.models.quantized import QuantizedLinear
from mlx_sora.request.options import WIDTHS, as_quantization
from tests.helpers import networks
from tests.helpers.quantizable_model import write_model

CALIBRATE = [
    *("calibrate", "--bits", "-p", "a red circle", "--steps", "2", "--num-frames", "1", "--quiet"),
    *("--width", "64", "--height", "64"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A model with measured sensitivities."""
    folder = write_model(tmp_path_factory.mktemp("measured") / "m").path
    assert main([*CALIBRATE, "--model", str(folder)]) == 0
    return ModelFolder.open(folder)


def test_the_sensitivities_are_those_of_rounded_layers(model: ModelFolder) -> None:
    found = json.loads((model.path / SENSITIVITIES).read_text())["layers"]
    assert {part: len(layers) for part, layers in found.items()} == {
        "text_encoder": 21,
        "transformer": 42,
    }
    for layers in found.values():
        for errors in layers.values():
            values = [errors[str(n)] for n in WIDTHS]
            assert values == sorted(values, reverse=True)
            assert values[0] > 10 * values[-1] > 0
    assert main([*CALIBRATE, "--model", str(model.path)]) == 2  # it exists
    assert main([*CALIBRATE, "--model", str(model.path), "--preview"]) == 2


def test_bits_go_where_they_save_most() -> None:
    """As good as the best of all choices, but for what a single layer may change."""
    sizes = {("t", str(n)): size for n, size in enumerate((1, 4, 2, 2))}
    errors = {
        layer: {n: scale * 4.0**-n for n in WIDTHS}
        for layer, scale in zip(sizes, (1.0, 3.0, 100.0, 0.1), strict=True)
    }
    budget = 5 * sum(sizes.values())
    found = dict(spend(sizes, errors, budget))
    assert sum(sizes[layer] * n for layer, n in found.items()) <= budget
    choices = [
        sum(errors[layer][n] for layer, n in zip(sizes, widths, strict=True))
        for widths in itertools.product(WIDTHS, repeat=len(sizes))
        if sum(size * n for size, n in zip(sizes.values(), widths, strict=True)) <= budget
    ]
    assert sum(errors[layer][n] for layer, n in found.items()) <= 1.05 * min(choices)


@pytest.mark.parametrize("bits", [4.5])
def test_an_average_is_kept_and_converted(model: ModelFolder, tmp_path: Path, bits: float) -> None:
    value = as_quantization(f"mixed: {bits}")
    on_load = choose_quantization(model, value)
    made = convert(model, tmp_path / "mixed", ConversionOptions(value, "float32")).path
    converted = ModelFolder.open(made)
    weights = total = 0
    for part in ("text_encoder", "transformer"):
        settings = NetworkQuantization.from_config(converted.config(part))
        assert settings == dict(on_load.quantization)[part]
        checkpoint = Checkpoint.open(made / part)
        for key, info in checkpoint.tensors.items():
            if info.dtype == "U32" and not key.startswith("shared"):  # the table is no part of it
                form = settings.form(key.removesuffix(".weight"))
                weights += 8 * info.nbytes // form.bits
                total += 8 * info.nbytes
    assert bits - 0.2 < total / weights <= bits
    assert weight_bits(converted) in range(int(bits) - 1, int(bits) + 2)
    same, other = (
        list(networks.steps(load_transformer(m, mx.float32))) for m in (on_load, converted)
    )
    assert all(mx.array_equal(a, b).item() for a, b in zip(same, other, strict=True))
    metadata = [quantization_metadata(m)["quantization"] for m in (on_load, converted)]
    assert metadata[0] == metadata[1]
    assert sum(metadata[0]["transformer"]["layers"].values()) == 42
    facts, plain = describe_model(converted), describe_model(model)
    assert facts["parameters"] == plain["parameters"]
    assert not [d.message for d in diagnose(made) if d.level == "error"]
    with pytest.raises(UsageError, match="which --quantize cannot change"):
        choose_quantization(converted, value)


def test_sensitivities_of_other_weights_are_refused(model: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model.path, folder)
    other = replace(model, path=folder)
    named_quantization(other, "mixed:4")
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    save = {name: array * 1.5 for name, array in tensors.items()}
    mx.eval(save)
    file.unlink()
    mx.save_safetensors(str(file), save)
    with pytest.raises(UsageError, match="belongs to other weights") as found:
        named_quantization(other, "mixed:4")
    assert f"--model {folder} --overwrite" in str(found.value.fix)
    for text in ("[]", '{"layers": {"vae": {}}, "weights": ""}', "x"):
        (folder / SENSITIVITIES).write_text(text)
        with pytest.raises(UsageError, match="is damaged"):
            named_quantization(other, "mixed:4")
    (folder / SENSITIVITIES).unlink()
    with pytest.raises(UsageError, match=f"has no {SENSITIVITIES}"):
        named_quantization(other, "mixed:4")


@pytest.mark.parametrize(
    ("text", "value", "text_encoder", "transformer"),
    [
        ("6", 6, "6 bits in groups of 64, rotated", "6 bits in groups of 64, rotated"),
        (" nvfp4 ", "nvfp4", "nvfp4 in groups of 16", "nvfp4 in groups of 16"),
        ("transformer = mxfp8", "transformer=mxfp8", None, "mxfp8 in groups of 32"),
        (
            "transformer=8, t5=3",
            "t5=3,transformer=8",
            "3 bits in groups of 64, rotated",
            "8 bits in groups of 64",
        ),
    ],
)
def test_every_form_on_load_and_converted(
    model: ModelFolder,
    tmp_path: Path,
    text: str,
    value: int | str,
    text_encoder: str | None,
    transformer: str | None,
) -> None:
    assert as_quantization(text) == as_quantization(value) == value
    on_load = choose_quantization(model, value)
    made = convert(model, tmp_path / "q", ConversionOptions(value, "float32")).path
    converted = ModelFolder.open(made)
    assert choose_quantization(converted, value) == converted
    states, steps = [], []
    for each in (on_load, converted):
        t5, _ = load_text_encoder(each, mx.float32)
        stdit = load_transformer(each, mx.float32)
        for network, form in ((t5, text_encoder), (stdit, transformer)):
            found = {str(m.form) for m in network.modules() if isinstance(m, QuantizedLinear)}
            assert found == ({form} if form else set())
        states.append(networks.t5_states(t5))
        steps.append(list(networks.steps(stdit)))
    assert mx.array_equal(*states).item()
    assert all(mx.array_equal(a, b).item() for a, b in zip(*steps, strict=True))
    described = describe_model(converted)
    assert described["parts"]["transformer"]["quantization"] == transformer
    assert described["parameters"] == describe_model(model)["parameters"]
    assert not [d.message for d in diagnose(made) if d.level == "error"]
    assert main(["convert", str(model.path), str(made), "-q", text, "--dtype", "float32"]) == 0


def test_a_folder_of_old_loads_and_takes_its_bits(model: ModelFolder, tmp_path: Path) -> None:
    """As version 0.1 wrote it: 4 bits without rotation, one form for all layers."""
    made = convert(model, tmp_path / "q", ConversionOptions(4)).path
    plain = NetworkQuantization.from_config({"quantization": {"bits": 4, "group_size": 64}})
    for part in ("text_encoder", "transformer"):
        config = json.loads((made / part / "config.json").read_text())
        assert config["quantization"].pop("rotation") == 128
        (made / part / "config.json").write_text(json.dumps(config))
    old = ModelFolder.open(made)
    network = load_transformer(choose_quantization(old, 4), mx.float32)
    forms = {m.form for m in network.modules() if isinstance(m, QuantizedLinear)}
    assert plain is not None
    assert forms == {plain.default}
    with pytest.raises(MlxSoraError, match="quantized to 4 bits"):
        choose_quantization(old, 5)


def test_peak_of_a_rotated_layer_is_planned(model: ModelFolder) -> None:
    from mlx_sora.loading.quantization import dense_bytes

    small = load_transformer(choose_quantization(model, 4), mx.float32)
    few = dense_bytes(small, mx.float32, 10)
    plain = load_transformer(choose_quantization(model, 8), mx.float32)
    assert max(dense_bytes(small, mx.float32).values()) == 2 * 4 * 64 * 256
    assert max(dense_bytes(plain, mx.float32).values()) == 4 * 64 * 256
    assert max(few.values()) == 4 * (64 * 256 + 10 * 256)
    assert named_form(4).bits_per_weight == 4.5
    assert tree_flatten(small.parameters())
