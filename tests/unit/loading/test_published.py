"""The published model before it is downloaded: its plans equal those of the downloaded files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora import GenerationRequest, WeightsError
from mlx_sora.loading.model_folder import ModelFolder, find_model
from mlx_sora.loading.published import PublishedModel, find_undownloaded
from mlx_sora.loading.quantization_choice import choose_quantization
from mlx_sora.loading.sizes import model_sizes
from mlx_sora.models.precision import Precision
from mlx_sora.pipeline.pipeline import Pipeline
from tests.helpers.full_size import write_published


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder.open(write_published(tmp_path_factory.mktemp("published")))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedModel:
    monkeypatch.setenv("MLX_SORA_WEIGHTS", str(tmp_path))
    found = find_undownloaded("opensora-1.2")
    assert found is not None
    return found


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_sizes_equal_those_of_the_files(
    folder: ModelFolder, model: PublishedModel, dtype: mx.Dtype, bits: int | None
) -> None:
    before = mx.get_active_memory()
    precision = Precision(dtype, dtype)
    real, planned = (
        model_sizes(choose_quantization(each, bits), precision, encoders=True)
        for each in (folder, model)
    )
    assert planned == real
    assert mx.get_active_memory() - before < 1 << 20


def test_a_pipeline_plans_a_run(model: PublishedModel) -> None:
    request = GenerationRequest(prompt="a cat", model="opensora-1.2", negative_prompt="blur")
    plan = Pipeline(model).plan(request)
    assert plan.stage("encode").read > 18e9
    assert Pipeline(model).prepare(request).encodings.keys()
    quantized = Pipeline(model).plan(replace(request, quantize=4))
    assert quantized.stage("denoise").peak < plan.stage("denoise").peak


def test_quantized_models_are_smaller(model: PublishedModel) -> None:
    precision = Precision()
    plain = model_sizes(model, precision)
    four, eight = (
        model_sizes(found, precision)
        for name in ("opensora-1.2-4bit", "opensora-1.2-8bit")
        if (found := find_undownloaded(name)) is not None
    )
    assert plain.text_weights.stored > 3 * eight.text_weights.stored
    assert eight.text_weights.stored > 1.5 * four.text_weights.stored
    assert plain.vae_decoder == four.vae_decoder


@pytest.mark.parametrize(
    ("bits", "text_encoder", "transformer"), [(8, 5.07e9, 1.31e9), (4, 2.7e9, 0.75e9)]
)
def test_bytes_of_quantized_models(
    model: PublishedModel, bits: int, text_encoder: float, transformer: float
) -> None:
    found = find_undownloaded(f"opensora-1.2-{bits}bit")
    assert found is not None
    for part, most in (("text_encoder", text_encoder), ("transformer", transformer)):
        assert 0.9 * most < found.checkpoint(part).nbytes <= most


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("opensora-1.2", "python -m mlx_sora download opensora-1.2"),
        ("opensora-1.2-4bit", "python -m mlx_sora download opensora-1.2 --quantize 4"),
    ],
)
def test_the_notice_gives_the_download_command(
    model: PublishedModel, name: str, command: str
) -> None:
    found = find_undownloaded(name)
    assert found is not None
    assert found.notice.endswith(f"Get it: {command}")


def test_only_published_models_that_are_not_here_are_found(
    model: PublishedModel, folder: ModelFolder, tmp_path: Path
) -> None:
    for other in (None, "shapes", "opensora", str(folder.path)):
        assert find_undownloaded(other) is None
    (tmp_path / "opensora-1.2").symlink_to(folder.path)
    assert find_undownloaded("opensora-1.2") is None
    with pytest.raises(WeightsError, match="not in"):
        find_model("opensora-1.2-8bit")
