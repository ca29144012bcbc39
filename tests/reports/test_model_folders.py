"""Model folders as people have them.

Reports: SceneWorks/SceneWorks #1333 and unslothai/unsloth #8566 (macOS's ._ files),
Kwai-Kolors/Kolors #7 (fp16 variants), huggingface/transformers #27923 (Git LFS pointers),
ml-explore/mlx-examples #1232 (8-bit floats), mlalma/kokoro-ios #4 (another model).
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint, plain_names
from mlx_sora.loading.model_folder import BUNDLED, ModelFolder, find_model
from mlx_sora.loading.safetensors import read_header
from mlx_sora.manage.conversion_plan import ConversionOptions
from mlx_sora.manage.convert import convert
from mlx_sora.manage.doctor import diagnose
from mlx_sora.manage.sources import SOURCES, choose_files
from mlx_sora.pipeline import Pipeline

#: Start of an AppleDouble file.
SIDECAR = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(100)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 123456\n".format(
    "0" * 64
)
SMALL = {"steps": 1, "num_frames": 1, "width": 64, "height": 64, "seed": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    return Path(shutil.copytree(find_model(BUNDLED).path, tmp_path / "a model"))


def errors(folder: Path) -> list[str]:
    return [f"{d.message} {d.fix}" for d in diagnose(folder, quick=True) if d.level == "error"]


def works(folder: Path) -> bool:
    made = Pipeline.from_pretrained(folder)("red", **SMALL)
    return not errors(folder) and made.num_frames == 1


def test_hidden_files_of_macos(model: Path, tmp_path: Path) -> None:
    for file in [path for path in model.rglob("*") if path.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(SIDECAR)
    for folder in (model, model / "vae", model / "transformer"):
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert works(model)
    converted = tmp_path / "converted"
    convert(ModelFolder.open(model), converted, ConversionOptions())
    for file in [path for path in converted.rglob("*") if path.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(SIDECAR)
    assert works(converted)
    result = convert(ModelFolder.open(model), converted, ConversionOptions(8), overwrite=True)
    assert result.is_new


def test_only_sidecars_are_no_weights(model: Path) -> None:
    weights = next((model / "vae").glob("*.safetensors"))
    weights.rename(weights.with_name("._model.safetensors"))
    with pytest.raises(WeightsError, match=r"vae/\*\.safetensors is missing"):
        ModelFolder.open(model)


@pytest.mark.parametrize(
    "name",
    [
        "model copy.safetensors",
        "model copy 2.safetensors",
        "model (1).safetensors",
        "model.fp16.safetensors",
        "model.bf16.safetensors",
    ],
)
def test_copies_and_variants(model: Path, name: str) -> None:
    part = model / "transformer"
    assert (part / "model.safetensors").exists()
    (part / name).write_bytes(b"not read")
    assert works(model)
    (part / name).unlink()
    (part / "model.safetensors").rename(part / name)
    assert works(model)


def test_plain_names() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    indexes = [index, "model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"]
    assert plain_names(shards) == shards
    assert plain_names(indexes) == [index]
    assert plain_names(["a.safetensors", "b.safetensors"]) == ["a.safetensors", "b.safetensors"]
    transformer = SOURCES[0]
    files = ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    plain = "diffusion_pytorch_model.safetensors"
    assert choose_files(transformer, files) == files
    assert choose_files(transformer, [*files, plain]) == ["config.json", plain]


@pytest.mark.parametrize("name", ["vae/model.safetensors", "tokenizer/spiece.model"])
def test_lfs_pointers(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    command = f"git -C '{(model / name).parent}' lfs pull"
    with pytest.raises(WeightsError, match="Git LFS pointer") as caught:
        Pipeline.from_pretrained(model)("red", **SMALL)
    assert command in str(caught.value)
    assert any("Git LFS pointer" in line for line in errors(model))


def test_an_lfs_pointer_for_a_configuration(model: Path) -> None:
    (model / "vae" / "config.json").write_text(POINTER)
    with pytest.raises(WeightsError, match="Git LFS pointer.* lfs pull"):
        ModelFolder.open(model).config("vae")


def save_as(path: Path, code: str, weights: dict[str, mx.array]) -> None:
    """Write weights in a type that MLX does not write."""
    header, data = dict[str, object](), b""
    for name, value in weights.items():
        raw = np.array(mx.to_fp8(value)).tobytes() if code == "F8_E4M3" else bytes(value.size)
        header[name] = {
            "dtype": code,
            "shape": value.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_read(model: Path, part: str, dtype: mx.Dtype) -> None:
    file = next((model / part).glob("*.safetensors"))
    mx.save_safetensors(str(file), {n: v.astype(dtype) for n, v in mx.load(str(file)).items()})
    assert works(model)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_8_bit_floats_are_read(model: Path, part: str, tmp_path: Path) -> None:
    """As the same numbers in bfloat16 are, which holds each of them."""
    file = next((model / part).glob("*.safetensors"))
    weights = {name: mx.clip(value, -448, 448) for name, value in mx.load(str(file)).items()}
    save_as(file, "F8_E4M3", weights)
    assert works(model)
    name = next(name for name, info in read_header(file).items() if len(info.shape) == 2)
    expected = mx.from_fp8(mx.to_fp8(weights[name]), mx.bfloat16)
    checkpoint = Checkpoint.open(model / part)
    assert mx.array_equal(checkpoint.load([name])[name], expected)
    assert mx.array_equal(checkpoint.read_rows(name, [1, 0]), expected[mx.array([1, 0])])
    made = Pipeline.from_pretrained(model)("red", **SMALL)
    mx.save_safetensors(
        str(file), {n: mx.from_fp8(mx.to_fp8(v), mx.bfloat16) for n, v in weights.items()}
    )
    same = Pipeline.from_pretrained(model)("red", **SMALL)
    assert np.array_equal(made.frames, same.frames)


@pytest.mark.parametrize("code", ["F8_E5M2", "I8", "U8", "F64"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_other_types_are_named(model: Path, part: str, code: str) -> None:
    file = next((model / part).glob("*.safetensors"))
    weights = {name: mx.zeros((*v.shape,)) for name, v in mx.load(str(file)).items()}
    save = save_f64 if code == "F64" else partial(save_as, code=code)
    save(file, weights=weights)
    with pytest.raises(WeightsError) as caught:
        Pipeline.from_pretrained(model)("red", **SMALL)
    said = str(caught.value)
    assert file.name in said
    assert code in said
    assert any(name in said for name in weights)
    assert "Get the model in one of these types" in said


def save_f64(path: Path, weights: dict[str, mx.array]) -> None:
    doubled = {name: mx.zeros((8 * value.size,)) for name, value in weights.items()}
    save_as(path, "U8", doubled)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for name, value in weights.items():
        header[name] |= {"dtype": "F64", "shape": value.shape}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def diffusers(folder: Path) -> None:
    (folder / "unet").mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')


def complete_diffusers(folder: Path) -> None:
    """A pipeline with the same parts."""
    shutil.copytree(find_model(BUNDLED).path, folder, dirs_exist_ok=True)
    (folder / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')


def mlx_lm(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2", "quantization": {"bits": 4}}')
    (folder / "model.safetensors").write_bytes(b"")


def comfyui(folder: Path) -> None:
    (folder / "flux1-dev-fp8.safetensors").write_bytes(b"")


def gguf(folder: Path) -> None:
    (folder / "t5-v1_1-xxl-Q4_K_M.gguf").write_bytes(b"")


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (diffusers, "diffusers pipeline of another model (StableDiffusionXLPipeline)"),
        (complete_diffusers, "diffusers pipeline of another model (CogVideoXPipeline)"),
        (mlx_lm, "one network (qwen2), as mlx-lm"),
        (comfyui, "single files (flux1-dev-fp8.safetensors), as ComfyUI"),
        (gguf, "single files (t5-v1_1-xxl-Q4_K_M.gguf)"),
        (lambda folder: None, "incomplete: text_encoder/config.json is missing"),
    ],
)
def test_other_models(tmp_path: Path, fill: object, words: str) -> None:
    assert callable(fill)
    fill(tmp_path)
    needed = "Get one: python -m mlx_sora download opensora-1.2"
    with pytest.raises(WeightsError) as caught:
        find_model(tmp_path)
    assert words in str(caught.value)
    assert needed in str(caught.value)
    assert "\n" not in str(caught.value)
    if "incomplete" not in words:
        assert any(words in line and needed in line for line in errors(tmp_path))


def test_a_single_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match=r"is a file.*ComfyUI.*Get one"):
        find_model(path)
    assert any("is a file" in line for line in errors(path))


@pytest.mark.parametrize("inside", ["transformer", "vae/model.safetensors"])
def test_a_part_of_a_model(model: Path, inside: str) -> None:
    if "/" in inside:
        with pytest.raises(WeightsError, match="is a file"):
            find_model(model / inside)
        return
    with pytest.raises(WeightsError, match="holds one network") as caught:
        find_model(model / inside)
    assert f"The model folder is '{model}'" in str(caught.value)


def test_the_folder_around_a_model(model: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        find_model(model.parent)
    assert f"The model folder is '{model}'" in str(caught.value)
