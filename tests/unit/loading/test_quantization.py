"""Which layers are quantized, what they lose, and that streaming them changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_sora.accel.cidl import BlockStream
from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import (
    load_text_encoder,
    load_transformer,
    stream_text_encoder,
    stream_transformer,
)
from mlx_sora.loading.quantization import (
    NetworkQuantization,
    insert_quantized_layers,
    named_form,
    quantizable_linears,
)
from mlx_sora.loading.quantization_choice import choose_quantization
from mlx_sora.loading.sizes import model_sizes
from mlx_sora.manage.conversion_plan import ConversionOptions
from mlx_sora.manage.convert import convert
from mlx_sora.memory.limits import release
from mlx_sora.models.precision import Precision
from mlx_sora.models.quantized import Quantization, QuantizedLinear
from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Encoder
from tests.helpers import networks
from tests.helpers.golden import relative_error
from tests.helpers.quantizable_model import STDIT, T5, write_model
from tests.unit.models.test_quantized import SAME

EIGHT = NetworkQuantization(Quantization(8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Quantized to 8 bits."""
    root = tmp_path_factory.mktemp("models")
    (root / "plain").mkdir()
    made = convert(write_model(root / "plain"), root / "q8", ConversionOptions(8))
    return ModelFolder.open(made.path)


def test_what_is_quantized() -> None:
    layers = set(quantizable_linears(T5Encoder(T5), EIGHT))
    block = ["SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"]
    names = {f"layer.0.{name}" for name in block}
    names |= {f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")}
    assert layers == {f"encoder.block.{i}.{name}" for i in range(3) for name in names}
    layers = set(quantizable_linears(STDiT3(STDIT), EIGHT))
    names = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    names |= {f"cross_attn.{name}" for name in ("q_linear", "kv_linear", "proj")}
    kinds = ("spatial_blocks", "temporal_blocks")
    assert layers == {f"{kind}.{i}.{name}" for kind in kinds for i in range(3) for name in names}


def test_inputs_that_are_no_whole_groups_stay() -> None:
    """STDiT3-3B/2 has 1872 channels, of which only the wide inputs of fc2 divide by 64."""
    config = STDiT3Config(hidden_size=1872, num_heads=26, depth=1)
    kinds = ("spatial_blocks", "temporal_blocks")
    for form in (8, "nvfp4", "mxfp4"):  # CUDA multiplies 64 weights at a time, whatever the group
        found = quantizable_linears(STDiT3(config), NetworkQuantization(named_form(form)))
        assert set(found) == {f"{k}.0.mlp.fc2" for k in kinds}


@pytest.mark.parametrize(("bits", "error"), [(8, 0.006), (4, 0.095)])
@pytest.mark.parametrize("size", [1.0, 0.02, 1e-4, 1e-5])
def test_loss(bits: int, error: float, size: float) -> None:
    """In half precision, scales cost next to nothing; where they are too small for it, a little."""
    weight = size * mx.random.normal((64, 512), key=mx.random.key(1))
    made = Quantization(bits).quantize(weight)
    assert {array.dtype.size for name, array in made.items() if name != "weight"} == {2}
    assert {name: array.shape for name, array in made.items()} == Quantization(bits).packed_shapes(
        weight.shape
    )
    scales, biases = (made[name].astype(mx.float32) for name in ("scales", "biases"))
    back = mx.dequantize(made["weight"], scales, biases, group_size=64, bits=bits)
    lost = (mx.linalg.norm(back - weight) / mx.linalg.norm(weight)).item()
    assert lost < (error if size > 0.01 else 1.6 * error)


@pytest.mark.parametrize(
    "values",
    [
        3,
        {},
        {"bits": 7},
        {"bits": 8, "group_size": 48},
        {"bits": 8, "group_size": 64, "mode": "mxfp8"},
        {"bits": 4, "rotation": 32},
        {"bits": 4, "group_size": 32, "mode": "mxfp4", "rotation": 64},
        {"bits": True},
        {"q": {"bits": 4, "size": 1}},
        {"q": {}},
    ],
)
def test_another_kind_of_quantization_is_refused(values: object) -> None:
    with pytest.raises(WeightsError, match="quantization cannot be"):
        NetworkQuantization.from_config({"quantization": values})
    assert NetworkQuantization.from_config({}) is None


def dense(network: T5Encoder | STDiT3) -> dict[str, mx.array]:
    """Parameters of a quantized network as those of a plain one."""
    values = dict(tree_flatten(network.parameters()))
    for path, layer in network.named_modules():
        if isinstance(layer, QuantizedLinear):
            values[f"{path}.weight"] = layer.dequantize(mx.zeros(1))
            del values[f"{path}.scales"], values[f"{path}.biases"]
    return values


def test_text_encoder(model: ModelFolder) -> None:
    """Whole, streamed, and with dequantized weights: the same states; on CPU, bit for bit."""
    whole, _ = load_text_encoder(model, mx.float32)
    expected = networks.t5_states(whole)
    plain = T5Encoder(whole.config, embedding=False)
    plain.update(tree_unflatten(list(dense(whole).items())))
    assert relative_error(networks.t5_states(plain), expected) <= SAME
    network, _, source = stream_text_encoder(model, mx.float32)
    with BlockStream(source) as blocks:
        assert mx.array_equal(networks.t5_states(network, blocks), expected).item()


def test_scales_have_the_type_of_the_run(model: ModelFolder) -> None:
    _, source = stream_transformer(model, mx.float16)
    scales = {v.dtype for k, v in source.load(0).items() if k.endswith(("scales", "biases"))}
    assert scales == {mx.float16}


@pytest.mark.parametrize("resident", [0, 1])
def test_transformer(model: ModelFolder, resident: int) -> None:
    whole = load_transformer(model, mx.float32)
    expected = list(networks.steps(whole))
    plain = STDiT3(whole.config)
    plain.update(tree_unflatten(list(dense(whole).items())))
    network, source = stream_transformer(model, mx.float32)
    with BlockStream(source, resident, cyclic=True) as blocks:
        for found, same, out in zip(
            networks.steps(network, blocks), networks.steps(plain), expected, strict=True
        ):
            assert mx.array_equal(found, out).item()
            assert relative_error(same, out) <= SAME
        assert blocks.stats.loads > 0
    assert blocks.stats.nbytes == sum(source.disk_bytes) * blocks.stats.loads / len(source)


def test_sizes(model: ModelFolder) -> None:
    """Memory counts words as they are, scales in the type of the run, and one dequantized layer."""
    sizes = model_sizes(model, Precision())
    network = load_transformer(model, mx.float32)
    found = dict(tree_flatten(network.parameters()))
    assert sizes.transformer_weights.total == sum(value.nbytes for value in found.values())
    assert sizes.transformer_weights.largest_dequantized == 4 * 64 * 256
    assert sizes.text_weights.largest_dequantized == 4 * 64 * 128
    assert sizes.transformer_weights.stored < sizes.transformer_weights.total


def test_files_and_config_must_agree(model: ModelFolder, tmp_path: Path) -> None:
    plain = T5Encoder(T5, embedding=False)
    insert_quantized_layers(plain, NetworkQuantization.from_config({}))
    assert not any(isinstance(layer, QuantizedLinear) for layer in plain.modules())
    broken = ModelFolder(tmp_path, "test", model.defaults)
    (tmp_path / "transformer").mkdir()
    for file in model.transformer.iterdir():
        (tmp_path / "transformer" / file.name).symlink_to(file)
    config = tmp_path / "transformer" / "config.json"
    text = config.read_text()
    config.unlink()
    for old, new in (('"bits": 8', '"bits": 4'), ('"quantization"', '"was_quantized"')):
        config.write_text(text.replace(old, new))
        with pytest.raises(WeightsError, match="blocks"):
            load_transformer(broken, mx.float32)


def plain_model(
    tmp_path: Path, bits: int | str | None, dtype: mx.Dtype = mx.float32
) -> ModelFolder:
    """The model before it is converted, to be quantized while it is loaded."""
    return choose_quantization(write_model(tmp_path, dtype), bits)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_quantized_while_loading_as_if_converted(tmp_path: Path, dtype: mx.Dtype) -> None:
    plain = plain_model(tmp_path / "plain", 8, dtype)
    converted = ModelFolder.open(
        convert(plain, tmp_path / "q8", ConversionOptions(8, "float32")).path
    )
    expected = list(networks.steps(load_transformer(converted, mx.float32)))
    whole = networks.steps(load_transformer(plain, mx.float32))
    network, source = stream_transformer(plain, mx.float32)
    with BlockStream(source, 1, cyclic=True) as blocks:
        for streamed, found, out in zip(
            networks.steps(network, blocks), whole, expected, strict=True
        ):
            assert mx.array_equal(streamed, out).item()
            assert mx.array_equal(found, out).item()
    text, _ = load_text_encoder(plain, mx.float32)
    other, _ = load_text_encoder(converted, mx.float32)
    assert mx.array_equal(networks.t5_states(text), networks.t5_states(other)).item()


@pytest.mark.parametrize("form", [8, 4, "mxfp4"])
def test_memory_of_quantizing_while_loading(tmp_path: Path, form: int | str) -> None:
    """What stays is counted as quantized; reading a block takes no more than planned."""
    plain = plain_model(tmp_path, form, mx.float16)
    _, source = stream_transformer(plain, mx.float32)
    _, whole = stream_transformer(replace(plain, quantization=()), mx.float32)
    assert source.nbytes[0] < 0.35 * whole.nbytes[0]
    assert source.disk_bytes == whole.disk_bytes
    release()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    weights = source.load(0)
    assert mx.get_active_memory() - before >= source.nbytes[0]
    assert mx.get_peak_memory() - before <= source.load_peak_bytes + (1 << 14)
    del weights


def test_bits_that_are_not_those_of_the_folder(model: ModelFolder, tmp_path: Path) -> None:
    assert choose_quantization(model, None) == model
    assert choose_quantization(model, 8) == model
    with pytest.raises(UsageError, match="8 bits in groups of 64, which --quantize cannot change"):
        choose_quantization(model, 4)
    networks.t5_model(tmp_path, replace(networks.T5, d_ff=32))
    with pytest.raises(UsageError, match="can be quantized"):
        load_text_encoder(
            ModelFolder(tmp_path, "small", model.defaults, quantization=(("text_encoder", EIGHT),)),
            mx.float32,
        )
