"""Converted folders: a file per block, the same values, whole or not there, and little memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_transformer, stream_text_encoder, stream_transformer
from mlx_sora.loading.quantization import EMBEDDING
from mlx_sora.loading.quantization_choice import choose_quantization
from mlx_sora.manage.conversion_plan import PARTS, ConversionOptions, Gptq, plan_part
from mlx_sora.manage.convert import JOURNAL, convert, staging_folder
from mlx_sora.manage.doctor import diagnose
from mlx_sora.manage.info import describe_model
from mlx_sora.manage.progress import FileProgress, ProgressCallback
from mlx_sora.manage.provenance import Provenance
from mlx_sora.manage.staging import folder_lock
from mlx_sora.manage.statistics import RECORDS
from mlx_sora.memory.limits import release
from tests.helpers import networks
from tests.helpers.full_size import write_published
from tests.helpers.quantizable_model import STDIT, T5, tensors, write_model

BLOCKS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return write_model(tmp_path_factory.mktemp("plain"))


def stopping_at(shard: int) -> ProgressCallback:
    """Interrupts when so many shards of the transformer are done."""
    seen = set[int]()

    def interrupt(progress: FileProgress) -> None:
        seen.add(progress.done)
        of_transformer = (progress.action, progress.path) == ("convert", "transformer")
        if of_transformer and progress.done * BLOCKS > shard * progress.total:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize(
    "options",
    [
        ConversionOptions(),
        ConversionOptions(8),
        ConversionOptions(4, "float32"),
        ConversionOptions(8, "bfloat16"),
        ConversionOptions(8, "float16"),
    ],
)
def test_one_file_per_block(model: ModelFolder, tmp_path: Path, options: ConversionOptions) -> None:
    made = ModelFolder.open(convert(model, tmp_path / "made", options).path)
    for source in (
        stream_text_encoder(made, mx.float32)[2],
        stream_transformer(made, mx.float32)[1],
    ):
        files = [{source.tensors[entry.key].file for entry in block} for block in source.entries]
        assert [len(names) for names in files] == [1] * BLOCKS
        assert len(set.union(*files)) == BLOCKS
        for names, block in zip(files, source.entries, strict=True):
            checkpoint = Checkpoint.open(names.pop())
            assert checkpoint.tensors.keys() == {entry.key for entry in block}
    assert not [f for f in diagnose(made.path) if f.level in ("error", "warning")]
    assert sum(f.stat().st_size for f in made.path.rglob("*.safetensors")) < sum(
        plan.nbytes + 16384 for part in PARTS for plan in plan_part(model, part, options)
    )


def test_values_that_are_not_asked_to_change_do_not(model: ModelFolder, tmp_path: Path) -> None:
    made = convert(model, tmp_path / "made", ConversionOptions()).path
    for part in PARTS:
        before, after = tensors(model, part), tensors(made, part)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert value.dtype == after[key].dtype
            assert mx.array_equal(value, after[key]).item()


def test_quantized_are_linear_layers_and_the_table(model: ModelFolder, tmp_path: Path) -> None:
    made = convert(model, tmp_path / "made", ConversionOptions(8)).path
    assert {k: v.dtype for k, v in tensors(made, "vae").items()} == {
        k: v.dtype for k, v in tensors(model, "vae").items()
    }
    words = 0
    for part, layers in (("text_encoder", 7), ("transformer", 14)):
        before, after = tensors(model, part), tensors(made, part)
        packed = {key for key, value in after.items() if value.dtype == mx.uint32}
        words += len(packed)
        assert len(packed) == layers * BLOCKS + (part == "text_encoder")
        for key, value in before.items():
            if key in packed:
                stem = key.removesuffix("weight")
                scales, biases = (
                    after[stem + name].astype(mx.float32) for name in ("scales", "biases")
                )
                back = mx.dequantize(after[key], scales, biases, group_size=64, bits=8)
                assert mx.abs(back - value).max().item() < mx.abs(scales).max().item()
                continue
            expected = value if value.ndim == 1 else value.astype(mx.bfloat16)
            assert mx.array_equal(after[key], expected).item()
            assert after[key].dtype == expected.dtype
    for part in PARTS:
        config = json.loads((made / part / "config.json").read_text())
        said = {"bits": 8, "group_size": 64}
        table = {"shared": said} if part == "text_encoder" else {}
        assert config.pop("quantization", None) == (None if part == "vae" else said | table)
        assert config == model.config(part)


def test_constants_stay_float32(model: ModelFolder, tmp_path: Path) -> None:
    """Rotary frequencies: converted, quantized, streamed or whole, in a run of any type."""
    expected = tensors(model, "transformer")["rope.freqs"]
    folders = [choose_quantization(model, 8)]
    for number, options in enumerate((ConversionOptions(None, "bfloat16"), ConversionOptions(8))):
        made = convert(model, tmp_path / str(number), options).path
        folders.append(ModelFolder.open(made))
    for folder in folders:
        whole = load_transformer(folder, mx.bfloat16)
        streamed, _ = stream_transformer(folder, mx.bfloat16)
        for network in (whole, streamed):
            assert network.rope.freqs.dtype == mx.float32
            assert mx.array_equal(network.rope.freqs, expected)
            assert network.final_layer.linear.weight.dtype == mx.bfloat16


def test_float16_is_for_the_transformer(model: ModelFolder, tmp_path: Path) -> None:
    made = convert(model, tmp_path / "made", ConversionOptions(None, "float16")).path
    for part, dtype in (("text_encoder", mx.bfloat16), ("transformer", mx.float16)):
        kinds = {v.dtype for k, v in tensors(made, part).items() if k != "rope.freqs"}
        assert kinds == {dtype}
    assert not [f for f in diagnose(made) if f.level in ("error", "warning")]


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """An infinite weight would show in the middle of a run only."""
    model = write_model(tmp_path / "plain")
    values = tensors(model, "transformer")
    values["final_layer.linear.bias"] = values["final_layer.linear.bias"] + 7e4
    for file in model.transformer.glob("*.safetensors*"):
        file.unlink()
    mx.save_safetensors(str(model.transformer / "model.safetensors"), values)
    with pytest.raises(WeightsError, match=r"final_layer\.linear\.bias exceeds 65504.*bfloat16"):
        convert(model, tmp_path / "made", ConversionOptions(None, "float16"))
    convert(model, tmp_path / "made", ConversionOptions(None, "bfloat16"))


def test_what_is_written_beside(model: ModelFolder, tmp_path: Path) -> None:
    made = convert(model, tmp_path / "made", ConversionOptions(8)).path
    assert (made / "tokenizer/spiece.model").read_bytes() == model.tokenizer.read_bytes()
    known = Provenance.read(made)
    assert known is not None
    assert known.conversion["quantization"] == {"bits": 8, "group_size": 64}
    assert known.conversion["source"] == str(model.path)
    names = {f.relative_to(made).as_posix() for f in made.rglob("*") if f.is_file()}
    assert names == {*known.files, *RECORDS}
    assert known.damaged_files(made, checksums=True) == []
    assert not staging_folder(made).exists()


def test_an_interrupted_conversion_loads_nowhere_and_goes_on(
    model: ModelFolder, tmp_path: Path
) -> None:
    target, staging = tmp_path / "made", staging_folder(tmp_path / "made")
    with pytest.raises(KeyboardInterrupt):
        convert(model, target, ConversionOptions(8), on_progress=stopping_at(1))
    assert not target.exists()
    for folder in (staging, staging / "text_encoder", staging / "transformer"):
        with pytest.raises(WeightsError):
            ModelFolder.open(folder)
    with pytest.raises(WeightsError, match="config"):
        stream_text_encoder(ModelFolder(staging, "x", model.defaults), mx.float32)
    finished = sorted(staging.rglob("model-*.safetensors"))
    assert len(finished) == BLOCKS + 1 + 1
    damaged = finished[1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (staging / "stray").write_text("of another attempt")
    kept = {file: file.stat().st_mtime_ns for file in finished if file != damaged}
    made = convert(model, target, ConversionOptions(8))
    assert made.reused_files == len(kept)
    assert kept == {f: (target / f.relative_to(staging)).stat().st_mtime_ns for f in kept}
    fresh = convert(model, tmp_path / "fresh", ConversionOptions(8)).path
    for part in PARTS:
        expected = tensors(fresh, part)
        assert all(mx.array_equal(v, expected[k]).item() for k, v in tensors(target, part).items())
    assert not (target / "stray").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A model that makes one small frame unless told otherwise."""
    root = tmp_path_factory.mktemp("small") / "m"
    write_model(root)
    defaults = {"width": 64, "height": 64, "num_frames": 1}
    (root / "model_index.json").write_text(json.dumps({"name": "small", "defaults": defaults}))
    return ModelFolder.open(root)


def test_a_compensated_conversion_goes_on_and_is_known(small: ModelFolder, tmp_path: Path) -> None:
    target, gptq = tmp_path / "made", Gptq(("a circle", "a square"), 1, distill=2)
    options = ConversionOptions(4, gptq=gptq)
    with pytest.raises(KeyboardInterrupt):
        convert(small, target, options, on_progress=stopping_at(1))
    assert convert(small, target, options).reused_files == BLOCKS + 1 + 1
    fresh = convert(small, tmp_path / "fresh", options).path
    plain = convert(small, tmp_path / "plain", ConversionOptions(4)).path
    for part in ("text_encoder", "transformer"):
        found, expected = tensors(target, part), tensors(fresh, part)
        assert all(mx.array_equal(value, expected[key]).item() for key, value in found.items())
        other = tensors(plain, part)
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in other.items()}
        for key, value in found.items():
            if value.dtype == mx.uint32:  # the table of tokens is no product, and stays as it is
                same = mx.array_equal(value, other[key]).item()
                assert same == (key == f"{EMBEDDING}.weight"), key
    known = Provenance.read(target)
    assert known is not None
    record = {"prompts": ["a circle", "a square"], "steps": 1, "distill": 2}
    assert known.conversion["gptq"] == record
    assert not [f for f in diagnose(target) if f.level in ("error", "warning")]
    assert describe_model(ModelFolder.open(target))["gptq"] == record | {"prompts": 2}
    assert not convert(small, target, options).is_new
    fewer = replace(gptq, prompts=("a circle",))
    for others in (replace(gptq, steps=2), replace(gptq, distill=0), fewer, None):
        with pytest.raises(UsageError, match="exists"):
            convert(small, target, replace(options, gptq=others))


@pytest.mark.parametrize("journal", ["", "[]", '{"conversion": {}, "files": {}}'])
def test_what_is_of_another_attempt_is_not_kept(
    model: ModelFolder, tmp_path: Path, journal: str
) -> None:
    target = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        convert(model, target, ConversionOptions(8), on_progress=stopping_at(1))
    (staging_folder(target) / JOURNAL).write_text(journal)
    assert convert(model, target, ConversionOptions(8)).reused_files == 0
    assert convert(model, target, ConversionOptions(8)).is_new is False


def test_nothing_is_replaced_unasked(model: ModelFolder, tmp_path: Path) -> None:
    made = convert(model, tmp_path / "made", ConversionOptions(8)).path
    with pytest.raises(UsageError, match="exists"):
        convert(model, made, ConversionOptions(4))
    assert json.loads((made / "transformer/config.json").read_text())["quantization"]["bits"] == 8
    (made / "notes.txt").write_text("mine")
    with pytest.raises(WeightsError, match=r"notes\.txt"):
        convert(model, made, ConversionOptions(4), overwrite=True)
    (made / "notes.txt").unlink()
    convert(model, made, ConversionOptions(4), overwrite=True)
    assert json.loads((made / "transformer/config.json").read_text())["quantization"]["bits"] == 4
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("mine")
    with pytest.raises(UsageError, match="was not written by this program"):
        convert(model, other, ConversionOptions(4), overwrite=True)
    assert (other / "precious").read_text() == "mine"


def test_a_damaged_conversion_is_repeated(model: ModelFolder, tmp_path: Path) -> None:
    made = convert(model, tmp_path / "made", ConversionOptions(8)).path
    assert not convert(model, made, ConversionOptions(8), check=True).is_new
    file = made / "transformer/model-00001-of-00004.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not convert(model, made, ConversionOptions(8)).is_new
    assert convert(model, made, ConversionOptions(8), check=True).is_new
    assert file.read_bytes() == content
    file.write_bytes(content[:-1])
    assert convert(model, made, ConversionOptions(8)).is_new
    assert file.read_bytes() == content


def quantized(model: ModelFolder, tmp_path: Path) -> tuple[ModelFolder, Path]:
    return ModelFolder.open(
        convert(model, tmp_path / "q", ConversionOptions(8)).path
    ), tmp_path / "made"


def inside(model: ModelFolder, tmp_path: Path) -> tuple[ModelFolder, Path]:
    return model, model.path / "transformer" / "q8"


def indivisible(model: ModelFolder, tmp_path: Path) -> tuple[ModelFolder, Path]:
    root = tmp_path / "small"
    shutil.copytree(model.path, root)
    for part in ("text_encoder", "transformer"):
        shutil.rmtree(root / part)
    networks.t5_model(root, replace(T5, d_model=32, d_kv=8, d_ff=32))
    networks.stdit_model(root, replace(STDIT, hidden_size=48, mlp_ratio=1.0, caption_channels=32))
    return ModelFolder.open(root), tmp_path / "made"


@pytest.mark.parametrize(
    ("make", "says"),
    [(quantized, "quantized already"), (inside, "overlap"), (indivisible, "can be quantized")],
)
def test_refused(
    model: ModelFolder,
    tmp_path: Path,
    make: Callable[[ModelFolder, Path], tuple[ModelFolder, Path]],
    says: str,
) -> None:
    source, target = make(model, tmp_path)
    with pytest.raises(UsageError, match=says):
        convert(source, target, ConversionOptions(8))
    assert not target.exists()
    assert not staging_folder(target).exists()


def test_nan_is_not_quantized(model: ModelFolder, tmp_path: Path) -> None:
    root = tmp_path / "nan"
    shutil.copytree(model.path, root)
    file = root / "transformer" / "model-0.safetensors"
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    key = "spatial_blocks.0.attn.qkv.weight"
    arrays[key][3, 5] = float("nan")
    mx.save_safetensors(str(file), arrays)
    with pytest.raises(WeightsError, match=rf"{key} .* holds NaN"):
        convert(ModelFolder.open(root), tmp_path / "made", ConversionOptions(8))
    assert not (tmp_path / "made").exists()


def test_a_full_disk_is_noticed_first(
    model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(WeightsError, match="free") as error:
        convert(model, tmp_path / "made", ConversionOptions(8))
    assert "another disk" in error.value.fix
    assert not list(tmp_path.rglob("*.safetensors"))


def test_two_at_once(model: ModelFolder, tmp_path: Path) -> None:
    target = tmp_path / "made"
    running = pytest.raises(WeightsError, match="Another conversion into .* is running")
    with folder_lock(staging_folder(target), "conversion"), running:
        convert(model, target, ConversionOptions(8))
    assert convert(model, target, ConversionOptions(8)).is_new


@pytest.mark.parametrize("layers", [3, 12])
def test_memory_is_that_of_two_blocks(tmp_path: Path, layers: int) -> None:
    """Whatever the number of blocks: what is written of one, and a tensor as it was."""
    root = tmp_path / "large"
    write_model(root)
    shutil.rmtree(root / "text_encoder")
    config = replace(T5, d_model=256, d_ff=1024, num_layers=layers)
    networks.t5_model(root, config)
    model = ModelFolder.open(root)
    block = max(stream_text_encoder(model, mx.float32)[2].nbytes)
    release()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert(model, tmp_path / "made", ConversionOptions(8))
    peak = mx.get_peak_memory() - before
    assert peak < 2 * block
    assert mx.get_active_memory() - before < 1 << 16


def test_full_size_on_disk(tmp_path: Path) -> None:
    """The published shapes, from headers alone: what 8 and 4 bits take."""
    model = ModelFolder.open(write_published(tmp_path))
    sizes = {
        (part, bits): sum(shard.nbytes for shard in plan_part(model, part, ConversionOptions(bits)))
        / 1e9
        for part in ("text_encoder", "transformer")
        for bits in (8, 4)
    }
    assert sizes["text_encoder", 8] < 5.2
    assert sizes["transformer", 8] < 1.4
    assert sizes["text_encoder", 4] < 2.9
    assert sizes["transformer", 4] < 0.8
    shards = plan_part(model, "text_encoder", ConversionOptions(8))
    assert len(shards) == 24 + 1
    assert max(shard.nbytes for shard in shards[:-1]) < 1.01 * min(s.nbytes for s in shards[:-1])
    assert "encoder.embed_tokens.weight" not in {
        c.key for shard in shards for c in shard.conversions
    }
