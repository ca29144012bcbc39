"""STDiT3 against the reference: the forward, and every stage of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_sora.loading.checkpoint import load_weights
from mlx_sora.models.stdit3 import KEYS, Conditions, STDiT3, STDiT3Config
from tests.helpers.golden import Case, channels_first, channels_last, drop_padding, relative_error
from tests.helpers.tolerance import rounding

TOLERANCE = rounding(1e-4)


def load(case: Case) -> STDiT3:
    """The case's network, with the case's weights."""
    model = STDiT3(STDiT3Config.from_dict(case.config["constructor"]))
    load_weights(model, case.weights, KEYS)
    return model


def prepare(model: STDiT3, case: Case) -> Conditions:
    """The case's text (padded and masked there), sizes and frame rate."""
    text = drop_padding(case["in.y"].squeeze(1), case.get("in.mask"))
    return model.prepare(
        text,
        case["in.x"].shape[2:],
        height=float(case["in.height"][0]),
        width=float(case["in.width"][0]),
        fps=case["in.fps"],
    )


def forward(model: STDiT3, case: Case) -> mx.array:
    """Output in the reference's layout [B, channels, T, H, W]."""
    conditions = prepare(model, case)
    z = channels_last(case["in.x"])
    out = model(z, case["in.timestep"], conditions, x_mask=case.get("in.x_mask"))
    assert out.dtype == mx.float32
    return channels_first(out)


@pytest.mark.golden("stdit3")
def test_forward(case: Case) -> None:
    assert relative_error(forward(load(case), case), case["out.output"]) <= TOLERANCE


@pytest.mark.golden("stdit3")
def test_rotary_constants_may_be_absent(case: Case) -> None:
    model = STDiT3(STDiT3Config.from_dict(case.config["constructor"]))
    load_weights(model, {k: v for k, v in case.weights.items() if k != "rope.freqs"}, KEYS)
    assert relative_error(forward(model, case), case["out.output"]) <= TOLERANCE


@pytest.mark.golden("stdit3")
def test_null_text_is_the_null_half(case: Case) -> None:
    """Where a case's batch ends with null samples, `null_text` gives the same text."""
    nulls = case.config["call"].get("null_tail", 0)
    if not nulls:
        pytest.skip("the case has no null samples")
    model = load(case)
    text = drop_padding(case["in.y"].squeeze(1), case["in.mask"])
    for sample in text[-nulls:]:
        assert mx.array_equal(model.null_text(len(sample)), sample)


class Recorder:
    """Calls a layer and keeps what it returned."""

    def __init__(self, layer: Callable[..., Any], name: str, seen: dict[str, mx.array]) -> None:
        self.layer, self.name, self.seen = layer, name, seen

    def __call__(self, *args: Any) -> Any:
        out = self.layer(*args)
        self.seen.setdefault(self.name, out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def record(model: STDiT3, seen: dict[str, mx.array]) -> None:
    """Put recorders around the embedders, the blocks, and the layers of the first two blocks."""
    for kind in ("spatial", "temporal"):
        blocks = getattr(model, f"{kind}_blocks")
        attn = blocks[0].attn
        if "q_norm" in attn:
            attn.q_norm = Recorder(attn.q_norm, f"{kind}.0.attn.q_norm", seen)
        for layer in ("norm1", "attn", "cross_attn", "norm2", "mlp"):
            setattr(blocks[0], layer, Recorder(blocks[0][layer], f"{kind}.0.{layer}", seen))
        for i, block in enumerate(blocks):
            blocks[i] = Recorder(block, f"{kind}.{i}", seen)
    for layer in ("x_embedder", "final_layer"):
        setattr(model, layer, Recorder(model[layer], layer, seen))


@pytest.mark.golden("stdit3")
def test_stages(case: Case) -> None:
    """All intermediates that the case holds, in the reference's token order."""
    names = {k.removeprefix("out.") for k in case.tensors if k.startswith("out.")} - {"output"}
    if not names:
        pytest.skip("the case holds no intermediates")
    model, seen = load(case), dict[str, mx.array]()
    conditions = prepare(model, case)
    lengths = [int(n) for n in case["out.y_lens"]]
    seen["pos_emb"] = conditions.position[None]
    seen["y_encoded"] = mx.concatenate(
        [row[:n] for row, n in zip(conditions.text, lengths, strict=True)]
    )[None]
    seen["t_embedder"] = model.t_embedder(case["in.timestep"], mx.float32)
    seen["fps_embedder"] = conditions.fps
    seen["t"] = seen["t_embedder"] + seen["fps_embedder"]
    seen["t_mlp"] = model.t_block[1](model.t_block[0](seen["t"]))
    if "in.rope_q" in case.tensors:
        seen["rope_q"] = model.rope(case["in.rope_q"])
    record(model, seen)
    model(channels_last(case["in.x"]), case["in.timestep"], conditions, case.get("in.x_mask"))
    seen["x_embedder_plus_pos"] = seen["x_embedder"] + conditions.position
    for name in sorted(names - {"y_lens"}):
        assert relative_error(_as_reference(name, seen[name], case), case[f"out.{name}"]) <= (
            TOLERANCE
        ), name


def _as_reference(name: str, value: mx.array, case: Case) -> mx.array:
    """Engine's [B, T, S, C] as the reference's [B, T·S, C]; attention's as it runs there."""
    if value.ndim != 4 or "q_norm" in name or name == "rope_q":
        return value
    batch, _, _, channels = value.shape
    if re.fullmatch(r"temporal\.\d+\.attn", name):
        value = value.swapaxes(1, 2)
    if re.fullmatch(r"(spatial|temporal)\.\d+\.attn", name):
        return value.reshape(-1, value.shape[2], channels)
    return value.reshape(batch, -1, channels)
