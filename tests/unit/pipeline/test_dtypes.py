"""`dtype` and `vae_dtype` as options: what each network runs in, the record, plans and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, MemoryBudgetError, Pipeline, UsageError
from mlx_sora.cli.main import main
from mlx_sora.errors import NumericsError
from mlx_sora.memory.estimate import published_sizes
from mlx_sora.models.precision import Precision
from mlx_sora.models.stdit3 import STDiT3
from mlx_sora.models.t5 import T5Encoder
from mlx_sora.models.vae import VideoVAE
from mlx_sora.pipeline.generate import prepare
from mlx_sora.request.edit import EditRequest
from mlx_sora.runtime.events import StepFinished
from mlx_sora.video.metadata import read_metadata

PROMPT = "a red circle moving right on a black background"
SMALL = {"prompt": PROMPT, "seed": 1, "steps": 4, "num_frames": 17, "width": 64, "height": 64}


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow half precision here, as on a Mac."""
    monkeypatch.setattr("mlx_sora.runtime.device._is_linux_cpu", lambda device: False)


def frames(pipe: Pipeline, **more: object) -> np.ndarray:
    video = pipe(**{**SMALL, "dtype": "float32", **more})  # type: ignore[arg-type]
    assert video.frames is not None
    return video.frames.astype(float)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a - b) ** 2)))


@pytest.fixture(scope="module")
def exact(pipe: Pipeline) -> np.ndarray:
    return frames(pipe)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> dict[type, set[mx.Dtype]]:
    """The types of the inputs of every network."""
    seen: dict[type, set[mx.Dtype]] = {}
    for network, name in ((T5Encoder, "__call__"), (STDiT3, "prepare"), (VideoVAE, "_run")):
        real = getattr(network, name)

        def record(self, *args, real=real, kind=network, **more):  # type: ignore[no-untyped-def]
            dtypes = {v.dtype for v in _weights(self) if mx.issubdtype(v.dtype, mx.floating)}
            seen.setdefault(kind, set()).update(dtypes)
            return real(self, *args, **more)

        monkeypatch.setattr(network, name, record)
    return seen


def _weights(network: T5Encoder | STDiT3 | VideoVAE) -> Iterator[mx.array]:
    from mlx.utils import tree_flatten

    parts = [network]
    if isinstance(network, VideoVAE):  # its scale and shift are float32
        parts = [network[n] for n in ("temporal_vae", "spatial_vae") if n in network]
    for part in parts:
        yield from (v for path, v in tree_flatten(part.parameters()) if path != "rope.freqs")


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(
    ("dtype", "vae_dtype", "least"),
    [
        ("float32", "bfloat16", 45),
        ("float32", "float16", 60),
        ("float16", "float32", 40),
    ],
)
def test_each_network_runs_in_its_own_type(
    pipe: Pipeline,
    exact: np.ndarray,
    networks: dict[type, set[mx.Dtype]],
    dtype: str,
    vae_dtype: str,
    least: float,
) -> None:
    out = frames(pipe, dtype=dtype, vae_dtype=vae_dtype)
    assert least < psnr(out, exact) < 90
    assert networks[STDiT3] == {getattr(mx, dtype)}
    assert networks[VideoVAE] == {getattr(mx, vae_dtype)}
    assert mx.float16 not in networks[T5Encoder]


@pytest.mark.usefixtures("any_device")
def test_the_record_has_the_types_and_a_checkpoint_is_of_one(
    pipe: Pipeline, tmp_path: Path
) -> None:
    small = {**SMALL, "num_frames": 1}
    first, second = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    pipe(**small, output=first, dtype="float16", vae_dtype="bfloat16")  # type: ignore[arg-type]
    record = read_metadata(first)["request"]
    assert (record["dtype"], record["vae_dtype"]) == ("float16", "bfloat16")
    request = GenerationRequest(**small, output=second, checkpoint_every=1, vae_dtype="bfloat16")  # type: ignore[arg-type]
    run = pipe.stream(request)
    assert any(isinstance(event, StepFinished) for event in run)
    run.close()
    with pytest.raises(UsageError, match=r"vae_dtype was \"bfloat16\", now \"float32\""):
        pipe.stream(replace(request, vae_dtype="float32"))


def test_the_record_has_the_type_of_the_pipeline(pipe: Pipeline) -> None:
    """So that a replay, in a pipeline of its own, computes in it too."""
    whole = Pipeline.from_pretrained(pipe.model.path, dtype="float32")
    video = whole(PROMPT, seed=1, steps=1, num_frames=1)
    assert video.metadata["request"]["dtype"] == "float32"


@pytest.mark.usefixtures("any_device")
def test_captured_values_are_planned_in_the_type_of_the_transformer(
    pipe: Pipeline, tmp_path: Path
) -> None:
    output = tmp_path / "a.png"
    pipe(**{**SMALL, "num_frames": 1, "steps": 1, "output": str(output)})  # type: ignore[arg-type]
    sizes = {}
    for dtype in ("float32", "float16"):
        options = {"source_prompt": PROMPT, "prompt": PROMPT, "steps": 2, "dtype": dtype}
        edit = EditRequest.from_options(output, {**options, "vae_dtype": "float16"})
        plan = pipe.plan_edit(edit)
        sizes[dtype] = plan.stage("denoise").reserve
        assert (
            plan.stage("read").peak
            < pipe.plan_edit(EditRequest.from_options(output, options)).stage("read").peak
        )
    assert sizes["float16"] < sizes["float32"]


@pytest.mark.usefixtures("any_device")
def test_overflow_of_a_float16_vae_is_named(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_sora.models.vae.LATENT_FACTOR", 1e-6)
    small = {**SMALL, "num_frames": 1}
    with pytest.raises(NumericsError, match=r'frames 0 to 0.*vae_dtype="bfloat16"'):
        pipe(**small, vae_dtype="float16")  # type: ignore[arg-type]
    pipe(**small, vae_dtype="bfloat16", health_check=False)  # type: ignore[arg-type]


@pytest.fixture
def large(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The pipeline, to be asked for plans only, as if its model were Open-Sora 1.2 on a GPU."""
    monkeypatch.setattr("mlx_sora.pipeline.engine.model_sizes", lambda *_, **__: published_sizes(2))
    monkeypatch.setattr("mlx_sora.pipeline.engine.on_gpu", lambda: True)
    return Pipeline(pipe.model)


@pytest.mark.usefixtures("any_device")
def test_a_refusal_names_half_precision_where_it_would_do(large: Pipeline) -> None:
    options = {"prompt": PROMPT, "seed": 1, "resolution": "720p", "num_frames": 1}
    whole = large.plan(GenerationRequest(**options))  # type: ignore[arg-type]
    half = large.plan(GenerationRequest(**options, vae_dtype="bfloat16"))  # type: ignore[arg-type]
    assert half.smallest < whole.smallest
    options["memory_budget"] = str(half.smallest)
    with pytest.raises(MemoryBudgetError, match=r'or vae_dtype="bfloat16", or make'):
        large.plan(GenerationRequest(**options))  # type: ignore[arg-type]
    assert large.plan(GenerationRequest(**options, vae_dtype="bfloat16")).peak <= half.smallest  # type: ignore[arg-type]


def test_a_linux_cpu_refuses_half_precision_in_one_line(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlx_sora.runtime.device._is_linux_cpu", lambda device: True)
    for flag, value in (("--dtype", "float16"), ("--vae-dtype", "bfloat16")):
        assert main(["generate", "-p", PROMPT, "--model", "shapes", "--dry-run", flag, value]) == 2
        *_, error = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ")
        assert f"Use {flag} float32" in error


@pytest.mark.usefixtures("any_device")
def test_a_pipeline_can_be_float16(pipe: Pipeline) -> None:
    half = Pipeline.from_pretrained(pipe.model.path, dtype="float16")
    run = prepare(half.engine, GenerationRequest(**SMALL))  # type: ignore[arg-type]
    assert run.engine.precision == Precision(half.engine.precision.text_encoder, mx.float16)
    assert half.engine.precision.text_encoder != mx.float16
