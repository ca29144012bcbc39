"""`doctor --machine`: every form is right here, and one that is broken is found and named.

Forms are broken in MLX, for GPUs only: the device under test uses the forms of GPUs here as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_sora.loading import model_folder
from mlx_sora.manage import machine_check, machine_networks
from mlx_sora.manage.machine_check import (
    Allowance,
    Case,
    CheckResult,
    Form,
    check_form,
    relative_error,
)
from mlx_sora.manage.machine_forms import FORMS
from mlx_sora.manage.machine_networks import NETWORKS, check_video
from mlx_sora.manage.machine_report import CHECKS
from mlx_sora.models import conv, ops

#: Each form at its smallest size, each network narrower.
TINY = Allowance(flops=1e6, memory=1e9)

#: All forms; their cases are made once.
ALL = tuple(replace(form, make=cache(form.make)) for form in (*FORMS, *NETWORKS))


def results(forms: Sequence[Form], *types: mx.Dtype) -> list[CheckResult]:
    """Check forms in some of their types."""
    return [
        result
        for form in forms
        for result in check_form(
            replace(form, types=[dtype for dtype in form.types if dtype in types]), TINY
        )
    ]


def wrong_names(found: Sequence[CheckResult]) -> list[str]:
    """Return the names of the rows that are wrong, without the type."""
    return [result.name.rpartition(", ")[0] for result in found if result.status == "wrong"]


def names(*starts: str) -> list[str]:
    """Return the names of forms that begin so; one with all of its name is the only one."""
    whole = {form.name for form in ALL} & set(starts)
    starts = tuple(start for start in starts if start not in whole)
    found = [form.name for form in ALL if form.name in whole or form.name.startswith(starts)]
    assert all(any(name.startswith(start) for name in found) for start in starts)
    return found


def test_names_differ() -> None:
    assert len({form.name for form in ALL}) == len(ALL)


def test_everything_is_right_here() -> None:
    found = [result for check in CHECKS.values() for result in check(TINY)]
    assert [result for result in found if result.status == "wrong"] == []
    compared = [result for result in found if result.error is not None]
    assert len(compared) > 80
    assert all(result.error <= result.bound for result in compared)


def break_on_gpu(
    patch: pytest.MonkeyPatch, module: Any, name: str, change: Callable[[mx.array], mx.array]
) -> None:
    """Change the results of a function where the forms of GPUs are used."""
    real = getattr(module, name)

    def broken(*arguments: Any, **named: Any) -> Any:
        out = real(*arguments, **named)
        return change(out) if ops.on_gpu() else out

    patch.setattr(module, name, broken)


def scaled(x: mx.array) -> mx.array:
    """One part in a thousand too large."""
    return x * 1.001


def without_last_row(x: mx.array) -> mx.array:
    """As a kernel that leaves out the rest of a division."""
    return mx.concatenate([x[..., :-1, :], mx.zeros_like(x[..., -1:, :])], axis=-2)


def with_nan(x: mx.array) -> mx.array:
    return mx.where(mx.arange(x.shape[-1]) == 3, math.nan, x)


def images_scaled(x: mx.array) -> mx.array:
    return scaled(x) if x.ndim == 4 else x


def videos_scaled(x: mx.array) -> mx.array:
    return scaled(x) if x.ndim == 5 else x


ATTENTION = ("attention", "STDiT3", "T5 block", "VAE middle")
IMAGES = tuple(
    f"convolution {name}" for name in ("512", "128 to 128, 2", "4 to 512, 2", "128 to 3")
)
VIDEOS = tuple(f"convolution {name}" for name in ("256", "4 to 512, 3", "128 to 128, 3"))

FAULTS = [
    (mx, "addmm", scaled, ("product", "STDiT3", "VAE level, spatial", "VAE middle")),
    (mx.fast, "scaled_dot_product_attention", scaled, ATTENTION),
    (mx.fast, "scaled_dot_product_attention", without_last_row, ATTENTION),
    (mx.fast, "scaled_dot_product_attention", with_nan, ATTENTION),
    (mx, "conv2d", scaled, ("convolution downsampling",)),
    (mx, "conv_general", images_scaled, (*IMAGES, "convolution up", "VAE level, s", "VAE mid")),
    (mx, "conv_general", videos_scaled, (*VIDEOS, "VAE level, temporal")),
    (mx, "quantized_matmul", scaled, ("quantized",)),
    (mx.fast, "rope", scaled, ("rope", "STDiT3")),
    (mx, "cos", scaled, ("embedding of times",)),
    (mx.fast, "layer_norm", scaled, ("layer norm", "STDiT3")),
    (mx.fast, "rms_norm", scaled, ("RMS norm", "STDiT3", "T5 block")),
    (conv, "_group_mean", scaled, ("group n", "VAE")),
    (conv, "_scale_gpu", scaled, ("group norm", "VAE middle")),
    (conv, "_scale_silu_gpu", scaled, ("group norm, SiLU", "VAE")),
    (ops, "_silu_gpu", scaled, ("SiLU",)),
    (ops, "_gelu_tanh_gpu", scaled, ("GELU", "STDiT3", "T5 block")),
]


@pytest.mark.parametrize(("module", "name", "change", "rows"), FAULTS)
def test_a_broken_form_is_named(
    module: Any,
    name: str,
    change: Callable[[mx.array], mx.array],
    rows: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_on_gpu(monkeypatch, module, name, change)
    found = results(ALL, mx.float32)
    assert wrong_names(found) == names(*rows)
    assert all(result.advice for result in found if result.status == "wrong")


def test_a_fault_of_one_type_is_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(x: mx.array) -> mx.array:
        return 1.2 * x if x.dtype == mx.bfloat16 else x

    break_on_gpu(monkeypatch, mx.fast, "rms_norm", change)
    found = [r for r in results(names_of("RMS"), *machine_check.TYPES) if r.status == "wrong"]
    assert [r.name for r in found] == [f"{name}, bfloat16" for name in names("RMS")]
    assert all("--dtype float32" in r.advice for r in found)


def names_of(*starts: str) -> list[Form]:
    """Return the forms that begin so."""
    return [form for form in ALL if form.name in names(*starts)]


def test_products_with_ten_bits_of_mantissa_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TF32 has, which GPUs use in place of float32 unless they are told not to."""

    def rounded(x: mx.array) -> mx.array:
        return mx.view(mx.view(x, mx.uint32) & 0xFFFFE000, mx.float32)

    def broken(bias: mx.array, x: mx.array, w: mx.array) -> mx.array:
        return real(bias, rounded(x), rounded(w)) if ops.on_gpu() else real(bias, x, w)

    real = mx.addmm
    monkeypatch.setattr(mx, "addmm", broken)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    (found,) = results(names_of("product"), mx.float32)
    assert found.status == "wrong"
    assert found.advice == "Run with MLX_ENABLE_TF32=0 in the environment."
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    (found,) = results(names_of("product"), mx.float32)
    assert found.advice == machine_check.REPORT


@pytest.mark.parametrize(("start", "option"), [("VAE", "--vae-dtype"), ("STDiT3", "--dtype")])
def test_advice_names_the_option_of_the_type(start: str, option: str) -> None:
    advice = {form.advice(mx.float16) for form in names_of(start)}
    assert all(text.startswith(f"Run with {option} float32. ") for text in advice)


def test_a_mask_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arrays: mx.array, scale: float, mask: mx.array | None) -> mx.array:
        return real(*arrays, scale=scale)

    real = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", broken)
    found = results(ALL, mx.float32)
    assert wrong_names(found) == names("attention to text", "attention of T5", "STDiT3", "T5")


def test_a_broken_form_of_cpus_shows_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> mx.array:
        return scaled(real(*arguments))

    real = ops._attend
    monkeypatch.setattr(ops, "_attend", broken)
    assert wrong_names(results(ALL, mx.float32)) == names(*ATTENTION)


ADDITION = Form("addition", lambda _: Case(mx.add, [mx.ones((2, 3))] * 2), 1, 1, 1, 1)


def failing(error: Exception) -> Form:
    """Return a form that fails on the device under test."""

    def run(x: mx.array) -> mx.array:
        if ops.on_gpu():
            raise error
        return x

    return replace(ADDITION, make=lambda _: Case(run, [mx.ones(3)]))


def test_a_form_that_raises_is_wrong() -> None:
    (found,) = results([failing(RuntimeError("no kernel\nfor this"))], mx.float16)
    assert (found.status, found.message) == ("wrong", "fails: no kernel for this")


def test_a_form_that_does_not_fit_is_skipped() -> None:
    error = RuntimeError("[malloc_or_wait] Unable to allocate 8 bytes.")
    (found,) = results([failing(error)], mx.float32)
    assert found.status == "skipped"
    assert found.message.startswith("not enough memory")


def test_what_takes_longer_on_a_gpu_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: mx.array) -> mx.array:
        time.sleep(0.3 * ops.on_gpu())
        return x

    form = replace(ADDITION, make=lambda _: Case(run, [mx.ones((2, 3))]))
    monkeypatch.setattr(machine_check, "backend", lambda: "metal")
    (found,) = results([form], mx.float32)
    assert found.status == "slow"
    assert "on the GPU" in found.message
    monkeypatch.setattr(machine_check, "backend", lambda: "cpu")
    (found,) = results([form], mx.float32)
    assert found.status == "ok"


def test_sizes_follow_work_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_check, "backend", lambda: "metal")
    form = replace(ADDITION, gflop=4, gigabytes=2)
    assert Allowance(1e12, 1e12).scale(form, mx.float16) == 1
    assert Allowance(1e9, 1e12).scale(form, mx.float16) == 0.25
    assert Allowance(1e12, 1e9).scale(form, mx.float16) == 0.5
    (found,) = check_form(replace(form, types=[mx.float32]), Allowance(1e9, 1e12))
    assert found.message.endswith("at 25 % of the published size")
    monkeypatch.setattr(machine_check, "backend", lambda: "cpu")
    assert Allowance(1e9, 1e12).scale(form, mx.float32) == 0.25
    assert Allowance(1e9, 1e12).scale(form, mx.float16) == 0.25 / 20


def test_the_memory_of_the_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_check, "gpu_memory", lambda: 6 << 20)
    allowance = Allowance.measure(0.001)
    assert allowance.after(3, expected=1) == allowance
    assert allowance.after(8, expected=1).flops == allowance.flops / 2
    assert allowance.after(8, expected=1).memory == allowance.memory / 2
    assert allowance.memory == 2 << 20
    assert 1e5 < allowance.flops < 1e10


def test_the_error_is_that_of_the_worst_row() -> None:
    expected = mx.array([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]])
    assert relative_error(expected, expected) == 0
    out = expected + mx.array([[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    assert relative_error(out, expected) == pytest.approx(0.5 / math.sqrt(12.5))
    assert relative_error(expected[:1], expected) == math.inf
    assert relative_error(mx.where(expected == 4, math.inf, expected), expected) == math.inf


def test_a_video_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    break_on_gpu(monkeypatch, mx, "conv_general", lambda x: 1.01 * x)
    found = next(check_video(TINY))
    assert (found.name, found.status) == ("whole video, float32, VAE in float32", "wrong")
    assert found.error > found.bound


def test_without_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "_PACKAGE_ROOT", tmp_path)
    (found,) = check_video(TINY)
    assert (found.status, found.name) == ("skipped", "whole video")
    assert "bundled model is missing" in found.message


def test_parts_have_their_full_width_where_it_can_be_afforded() -> None:
    case = machine_networks.block_pair(0.01)
    assert any(x.shape == (4608, 1152) for x in case.inputs)
    assert not any(x.shape == (4608, 1152) for x in machine_networks.block_pair(1e-6).inputs)
