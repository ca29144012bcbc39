"""Each kind of damage to a model folder has its finding, and the command that mends it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_sora.loading.model_folder import PUBLISHED, WEIGHTS_VARIABLE, bundled_folder
from mlx_sora.manage import doctor, statistics
from mlx_sora.manage.doctor import diagnose, find_folder, repair_command
from mlx_sora.manage.download import STAGING
from mlx_sora.manage.progress import FileProgress
from mlx_sora.manage.provenance import FILE, FileOrigin, Provenance
from mlx_sora.manage.records import Diagnostic
from mlx_sora.models.t5 import T5Config, T5Encoder
from mlx_sora.utils.files import sha256
from tests.helpers.published import write_model

PARTS = ("text_encoder", "transformer", "vae")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("healthy") / "model")


@pytest.fixture
def model(healthy: Path, tmp_path: Path) -> Path:
    """A healthy model to be damaged."""
    return Path(shutil.copytree(healthy, tmp_path / "model"))


def findings(path: Path, quick: bool = False) -> list[Diagnostic]:
    """What is said about the model; the machine is none of its business."""
    return [f for f in diagnose(path, quick=quick) if f.subject != "machine"]


def errors(path: Path, quick: bool = False) -> list[str]:
    found = [f for f in findings(path, quick) if f.level == "error"]
    assert all(f.fix for f in found)
    return [f"{f.subject}: {f.message}" for f in found]


def rewrite(path: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    """Load a safetensors file, change its tensors, save it."""
    tensors = dict(mx.load(str(path)))  # type: ignore[arg-type]
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(path), tensors)


def reconfigure(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sign(model: Path) -> Provenance:
    """Write provenance for what is in the folder."""
    files = {
        path.relative_to(model).as_posix(): FileOrigin(
            "a/b", "0" * 40, path.name, path.stat().st_size, sha256(path)
        )
        for path in model.rglob("*")
        if path.is_file()
    }
    provenance = Provenance(PUBLISHED, "http://127.0.0.1", files)
    provenance.write(model)
    return provenance


@pytest.mark.parametrize("quick", [False, True])
def test_a_healthy_model(healthy: Path, quick: bool) -> None:
    found = findings(healthy, quick)
    assert {f.level for f in found} == {"ok", "note"}
    for part in (*PARTS, "tokenizer", "folder", "files"):
        assert any(f.subject == part for f in found)
    for words in ("NaN", "one block"):
        assert sum(words in f.message for f in found) == (0 if quick else len(PARTS))


def test_the_machine_is_described(healthy: Path) -> None:
    (fact, *_) = (f for f in diagnose(healthy, quick=True) if f.subject == "machine")
    assert fact.level == "ok"
    for words in ("float32" if "cpu" in fact.message else "float", "GB of memory"):
        assert words in fact.message


def test_a_part_larger_than_memory(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "total_memory", lambda: 100_000)
    monkeypatch.setattr(doctor, "blas_notice", lambda: "no BLAS")
    found = [f.message for f in diagnose(healthy, quick=True) if f.level == "warning"]
    assert found[0] == "no BLAS"
    assert "the largest part needs" in found[1]


@pytest.mark.parametrize(
    "name",
    [
        "transformer/config.json",
        "vae/model.safetensors",
        "text_encoder/config.json",
        "tokenizer/spiece.model",
    ],
)
def test_missing_files(model: Path, name: str) -> None:
    (model / name).unlink()
    (message,) = errors(model, quick=True)
    part, file = name.split("/")
    assert message.startswith(f"{part}: ")
    assert "is missing" in message
    assert file in message or file.endswith(".safetensors")


def test_no_folder(tmp_path: Path) -> None:
    assert "no model folder" in errors(tmp_path / "gone")[0]
    (tmp_path / "file").write_bytes(b"")
    assert "not a model folder" in errors(tmp_path / "file")[0]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("text", ["{", "[]", "\0"])
def test_unreadable_configuration(model: Path, part: str, text: str) -> None:
    (model / part / "config.json").write_text(text)
    (message,) = errors(model, quick=True)
    assert message.startswith(f"{part}: ")
    assert "JSON" in message


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("transformer", {"depth": "two"}, "depth"),
        ("transformer", {"depth": 3}, "missing tensor"),
        ("transformer", {"hidden_size": 64}, "shape"),
        ("text_encoder", {"num_layers": 1}, "unexpected tensor"),
        ("text_encoder", {"vocab_size": 300}, "shared.weight"),
        ("text_encoder", {"feed_forward_proj": "relu"}, "gated-gelu"),
        ("vae", {"shift": ["x"]}, "config.json"),
        ("vae", {"vae_2d": 3}, "config.json"),
    ],
)
def test_a_configuration_of_something_else(
    model: Path, part: str, values: dict[str, object], words: str
) -> None:
    reconfigure(model / part / "config.json", **values)
    (message,) = errors(model, quick=True)
    assert message.startswith(f"{part}: ")
    assert words in message


def test_weights_of_something_else(model: Path) -> None:
    shutil.copy(model / "vae/model.safetensors", model / "transformer/model.safetensors")
    (message,) = errors(model, quick=True)
    assert "unexpected tensor" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("final_layer.linear.bias"), "missing tensor final_layer.linear.bias"),
        (lambda t: t.update(extra=mx.zeros(3)), "unexpected tensor extra [3]"),
        (lambda t: t.update({"t_block.1.bias": mx.zeros(3)}), "t_block.1.bias has shape [3]"),
        (
            lambda t: t.update({"t_block.1.bias": t["t_block.1.bias"].astype(mx.int32)}),
            "type I32",
        ),
    ],
    ids=["missing", "extra", "misshaped", "mistyped"],
)
@pytest.mark.parametrize("quick", [False, True])
def test_tensors_that_do_not_fit(
    model: Path, change: Callable[[dict[str, mx.array]], object], words: str, quick: bool
) -> None:
    rewrite(model / "transformer/model.safetensors", change)
    (message,) = errors(model, quick)
    assert words in message


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_files(model: Path, keep: int) -> None:
    file = model / "vae/model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    (message,) = errors(model, quick=True)
    assert "truncated" in message or "not a complete" in message


def test_a_missing_shard(model: Path) -> None:
    (model / "text_encoder/model-00002-of-00002.safetensors").unlink()
    (message,) = errors(model, quick=True)
    assert "model-00002-of-00002.safetensors, which is missing" in message


@pytest.mark.parametrize("content", [b"", b"no tokenizer"])
def test_a_damaged_tokenizer(model: Path, content: bytes) -> None:
    (model / "tokenizer/spiece.model").write_bytes(content)
    (message,) = errors(model, quick=True)
    assert message.startswith("tokenizer: ")


def write_text_encoder(model: Path, **values: int) -> None:
    """A sound text encoder of another size in place of the model's."""
    folder = model / "text_encoder"
    config = json.loads((folder / "config.json").read_text()) | values
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(T5Encoder(T5Config.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"d_model": 24}, "settings: The parts are of different models: 24 text encoder channels"),
        ({"vocab_size": 50}, "text encoder 50 rows"),
    ],
)
def test_parts_of_different_models(model: Path, values: dict[str, int], words: str) -> None:
    write_text_encoder(model, **values)
    (message,) = errors(model, quick=True)
    assert words in message


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "model.safetensors"),
        ("vae", "model.safetensors"),
        ("text_encoder", "model-00002-of-00002.safetensors"),
    ],
)
@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("-inf"), "Inf")])
def test_values_that_no_weight_has(
    model: Path, part: str, file: str, value: float, name: str
) -> None:
    def damage(tensors: dict[str, mx.array]) -> None:
        key = max(tensors)
        flat = tensors[key].reshape(-1)
        tensors[key] = mx.concatenate([flat[:-1], mx.array([value])]).reshape(tensors[key].shape)

    rewrite(model / part / file, damage)
    assert errors(model, quick=True) == []
    (message,) = errors(model)
    assert message.startswith(f"{part}: ")
    assert f"in {file}: 1 {name}" in message


def test_a_tensor_of_zeros_is_a_warning(model: Path) -> None:
    def damage(tensors: dict[str, mx.array]) -> None:
        tensors["t_block.1.bias"] *= 0
        tensors["t_block.1.weight"] *= 0

    rewrite(model / "transformer/model.safetensors", damage)
    assert errors(model) == []
    (warning,) = (f for f in findings(model) if f.level == "warning")
    assert "t_block.1.weight" in warning.message


@pytest.mark.parametrize(
    ("part", "file", "key"),
    [
        ("transformer", "model.safetensors", "final_layer.linear.weight"),
        ("text_encoder", "model-00002-of-00002.safetensors", "encoder.final_layer_norm.weight"),
        ("vae", "model.safetensors", "spatial_vae.module.decoder.conv_out.weight"),
        ("vae", "model.safetensors", "temporal_vae.quant_conv.conv.weight"),
    ],
)
@pytest.mark.parametrize(("factor", "words"), [(3e38, "NaN or Inf"), (0, "constant")])
def test_a_network_that_does_not_work(
    model: Path, part: str, file: str, key: str, factor: float, words: str
) -> None:
    def damage(tensors: dict[str, mx.array]) -> None:
        tensors[key] = mx.sign(tensors[key]) * factor
        bias = key.replace(".weight", ".bias")
        if bias in tensors:
            tensors[bias] = mx.zeros_like(tensors[bias])

    rewrite(model / part / file, damage)
    (message,) = errors(model)
    assert message.startswith(f"{part}: fails its smoke test")
    assert words in message


def test_files_against_their_provenance(model: Path) -> None:
    sign(model)
    (fact,) = (f for f in findings(model) if f.subject == "files")
    assert (fact.level, "checksums as recorded, from a/b" in fact.message) == ("ok", True)
    (fact,) = (f for f in findings(model, quick=True) if f.subject == "files")
    assert fact.message.startswith("sizes as recorded")
    file = model / "vae/model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\0\0\0\0")
    (message,) = errors(model)
    assert message == ("vae: vae/model.safetensors does not have the recorded checksum.")
    assert errors(model, quick=True) == []
    reconfigure(model / "transformer/config.json", extra=1)
    assert errors(model, quick=True) == [
        "transformer: transformer/config.json does not have the recorded size."
    ]
    (model / FILE).write_text("{")
    assert f"{FILE} is damaged" in errors(model)[0]


def test_quick_reads_no_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign(model)

    def no(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(statistics, "measure_tensor", no)
    monkeypatch.setattr("mlx_sora.manage.provenance.sha256", no)
    assert errors(model, quick=True) == []
    with pytest.raises(AssertionError):
        errors(model)


def test_several_things_at_once(model: Path) -> None:
    (model / "tokenizer/spiece.model").unlink()
    (model / "vae/config.json").write_text("{")
    rewrite(model / "transformer/model.safetensors", lambda t: t.update(extra=mx.zeros(3)))
    assert sorted(message.split(":")[0] for message in errors(model)) == [
        "tokenizer",
        "transformer",
        "vae",
    ]


def test_reading_is_reported(healthy: Path) -> None:
    seen: dict[tuple[str, str], tuple[int, int]] = {}

    def record(progress: FileProgress) -> None:
        seen[progress.action, progress.path] = (progress.done, progress.total)

    list(diagnose(healthy, on_progress=record))
    assert set(seen) == {("scan", part) for part in PARTS}
    assert all(done == total > 0 for done, total in seen.values())


def test_which_folder_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    assert find_folder(None) == bundled_folder()
    assert find_folder(PUBLISHED) == tmp_path / PUBLISHED
    assert find_folder("x/y") == Path("x/y")
    (tmp_path / PUBLISHED).mkdir()
    assert find_folder(None) == tmp_path / PUBLISHED


def test_what_mends_what(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "weights"
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(root))
    get = f"python -m mlx_sora download {PUBLISHED}"
    published = root / PUBLISHED
    assert repair_command(published) == get
    assert "shapes or a folder" in repair_command(tmp_path / "gone")
    assert "copy" in repair_command(model)
    root.mkdir()
    model.rename(published)
    assert repair_command(published) == f"mv {published} {published}.old && {get}"
    sign(published)
    assert repair_command(published) == f"{get} --check"


def test_an_interrupted_download_is_noted(tmp_path: Path) -> None:
    (tmp_path / STAGING).mkdir()
    assert any("interrupted" in f.message for f in diagnose(tmp_path / PUBLISHED))


def test_what_mends_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "weights"
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(root))
    get = f"python -m mlx_sora download {PUBLISHED} --quantize 8"
    assert repair_command(root / f"{PUBLISHED}-8bit") == get
    record = {"source": str(tmp_path), "dtype": "float16", "quantization": {"bits": 4}}
    for folder in (tmp_path / "mine", root / PUBLISHED, root / f"{PUBLISHED}-8bit"):
        folder.mkdir(parents=True)
        Provenance(PUBLISHED, "", {}, record).write(folder)
    command = f"python -m mlx_sora convert {tmp_path} {{}} --quantize 4 --dtype float16"
    for folder in (tmp_path / "mine", root / PUBLISHED):
        assert repair_command(folder) == command.format(folder) + " --check --overwrite"
    assert repair_command(root / f"{PUBLISHED}-8bit") == f"{get} --check"


def test_weights_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    sign(model)
    monkeypatch.setattr("mlx_sora.manage.provenance.sha256", fail)
    assert "vae: vae/model.safetensors does not have the recorded checksum." in errors(model)
    (model / FILE).unlink()
    monkeypatch.setattr(statistics, "_read", fail)
    assert errors(model) == [f"{part}: cannot be read: Input/output error." for part in PARTS]
