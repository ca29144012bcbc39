"""STDiT3: what is computed once changes nothing, what fills the seams is used."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.models import ops
from mlx_sora.models.hooks import Hooks, NoMerging, SiteMerging
from mlx_sora.models.stdit3 import BlockPair, Conditions, STDiT3, STDiT3Config
from mlx_sora.request.techniques import PAPER_SITES
from tests.helpers.tolerance import rounding

CONFIG = STDiT3Config(
    hidden_size=32, num_heads=2, depth=2, caption_channels=12, model_max_length=20
)

GRID = (5, 6, 7)
TOLERANCE = rounding(1e-5)


def network(config: STDiT3Config = CONFIG) -> STDiT3:
    """A network whose every parameter is random, so that nothing hides behind zeros."""
    model = STDiT3(config)
    keys = iter(mx.random.split(mx.random.key(1), 400))
    values = [
        (path, value if path == "rope.freqs" else 0.3 * mx.random.normal(value.shape, key=key))
        for (path, value), key in zip(tree_flatten(model.parameters()), keys, strict=False)
    ]
    model.update(tree_unflatten(values))
    return model


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def conditions(model: STDiT3, *lengths: int, grid: tuple[int, int, int] = GRID) -> Conditions:
    text = [normal(n, 12, seed=10 + n) for n in lengths]
    return model.prepare(text, grid, height=48, width=56, fps=24)


def difference(a: mx.array, b: mx.array) -> float:
    """Largest difference over the standard deviation of b."""
    assert a.shape == b.shape
    return float(mx.abs(a - b).max() / mx.std(b))


def test_padding_text_changes_nothing() -> None:
    """A prompt alone, unpadded, and the same beside a longer one, padded and masked."""
    model, z, t = network(), normal(2, *GRID, 4), mx.array([700.0, 700.0])
    alone = model(z[:1], t[:1], conditions(model, 3))
    padded = conditions(model, 3, 20)
    assert padded.text_mask is not None
    assert difference(model(z, t, padded)[:1], alone) <= TOLERANCE


def test_equal_lengths_need_no_mask() -> None:
    assert conditions(network(), 7, 7).text_mask is None


def test_text_keys_and_values_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later step reuses them, and what it predicts is what fresh ones give."""
    model, z = network(), normal(1, *GRID, 4)
    kept, calls = conditions(model, 9), list[int]()
    attention = type(model.spatial_blocks[0].cross_attn)
    plain = attention.keys_values
    monkeypatch.setattr(
        attention, "keys_values", lambda self, text: calls.append(1) or plain(self, text)
    )
    model(z, mx.array([900.0]), kept)
    assert len(calls) == 2 * CONFIG.depth
    second = model(z, mx.array([400.0]), kept)
    assert len(calls) == 2 * CONFIG.depth
    assert difference(second, model(z, mx.array([400.0]), conditions(model, 9))) <= TOLERANCE
    assert len(calls) == 4 * CONFIG.depth


def test_position_and_frame_rate_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps embed their time only; position, frame rate and text stay as prepared."""
    model, z, t = network(), normal(1, *GRID, 4), mx.array([400.0])
    kept, calls = conditions(model, 4), list[str]()
    before = kept.position, kept.fps, kept.text
    embedder = type(model.t_embedder)
    plain = embedder.__call__
    names = {id(model.t_embedder): "time", id(model.fps_embedder): "fps"}
    monkeypatch.setattr(
        embedder,
        "__call__",
        lambda self, *args: calls.append(names[id(self)]) or plain(self, *args),
    )
    first = model(z, t, kept)
    assert calls == ["time"]
    assert all(a is b for a, b in zip(before, (kept.position, kept.fps, kept.text), strict=True))
    assert difference(model(z, t, conditions(model, 4)), first) <= TOLERANCE


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, z, t = network(), normal(2, *GRID, 4), mx.array([300.0, 800.0])
    whole = model(z, t, conditions(model, 3, 11))
    monkeypatch.setattr(ops, "SLICE_BYTES", 1024)
    assert difference(model(z, t, conditions(model, 3, 11)), whole) <= TOLERANCE


def test_pieces_of_gpus_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product in pieces and every block evaluated by itself agree with the whole on CPU."""
    model, z, t = network(), normal(2, *GRID, 4), mx.array([300.0, 800.0])
    whole = model(z, t, conditions(model, 3, 11))
    mx.eval(whole)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    for name in ("DISPATCH_FLOPS", "MLP_BYTES", "LARGE_PASS_TOKENS"):
        monkeypatch.setattr(ops, name, 1)
    for name in ("MIN_ROWS", "MIN_QUERIES"):
        monkeypatch.setattr(ops, name, 5)
    assert difference(model(z, t, conditions(model, 3, 11)), whole) <= TOLERANCE


def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that receives the shape of each array that the network evaluates."""
    seen: list[tuple[int, ...]] = []
    plain = mx.eval

    def watched(x: mx.array) -> None:
        seen.append(x.shape)
        plain(x)

    monkeypatch.setattr(mx, "eval", watched)
    return seen


@pytest.mark.parametrize(("limit", "count"), [(119, CONFIG.depth), (120, 0)])
def test_large_passes_of_gpus_are_evaluated_by_block(
    monkeypatch: pytest.MonkeyPatch, limit: int, count: int
) -> None:
    model, z, t = network(), normal(2, *GRID, 4), mx.array([300.0, 800.0])
    kept, seen = conditions(model, 3, 11), evaluated(monkeypatch)
    monkeypatch.setattr(ops, "LARGE_PASS_TOKENS", limit)
    monkeypatch.setattr(ops, "on_gpu", lambda: False)
    model(z, t, kept)
    assert seen == []
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    model(z, t, kept)
    assert seen == [(2, 5, 12, 32)] * count


def test_a_listener_hears_of_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is evaluated before the call; the result stays the same."""
    model, z, t = network(), normal(1, *GRID, 4), mx.array([500.0])
    expected = model(z, t, conditions(model, 4))
    mx.eval(expected)
    seen, blocks = evaluated(monkeypatch), list[tuple[int, int]]()
    hooks = Hooks[BlockPair](on_block=lambda index: blocks.append((index, len(seen))))
    out = model(z, t, conditions(model, 4), hooks=hooks)
    assert blocks == [(i, i + 1) for i in range(CONFIG.depth)]
    assert mx.array_equal(out, expected)


def test_a_batch_is_its_samples() -> None:
    """Batched guidance and one call after the other agree."""
    model, z, t = network(), normal(2, *GRID, 4), mx.array([300.0, 800.0])
    both = model(z, t, conditions(model, 3, 11))
    first = model(z[:1], t[:1], conditions(model, 3))
    second = model(z[1:], t[1:], conditions(model, 11))
    assert difference(mx.concatenate([first, second]), both) <= TOLERANCE


def test_all_true_mask_has_no_effect() -> None:
    model, z, t = network(), normal(1, *GRID, 4), mx.array([500.0])
    kept = conditions(model, 4)
    masked = model(z, t, kept, x_mask=mx.ones((1, GRID[0])))
    assert difference(masked, model(z, t, kept)) <= TOLERANCE


def test_still_frames_take_time_zero() -> None:
    """With no frame active, the time given reaches the final layer only, which modulates twice."""
    model, z = network(), normal(1, *GRID, 4)
    kept, none, late = conditions(model, 4), mx.zeros((1, GRID[0])), mx.array([900.0])
    at_zero, still = model(z, mx.array([0.0]), kept), model(z, late, kept, x_mask=none)
    assert difference(still, at_zero) > 1e-2
    model.final_layer._norm_modulate = lambda x, t: model.final_layer.norm_final(x)
    at_zero, still = model(z, mx.array([0.0]), kept), model(z, late, kept, x_mask=none)
    assert difference(still, at_zero) <= TOLERANCE


def test_every_trainable_parameter_has_a_gradient() -> None:
    model, z, t = network(), normal(2, *GRID, 4), mx.array([300.0, 800.0])

    def loss(model: STDiT3) -> mx.array:
        return (model(z, t, conditions(model, 3, 11)) ** 2).mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    flat = dict(tree_flatten(gradients))
    assert set(flat) == {path for path, _ in tree_flatten(model.trainable_parameters())}
    for path, gradient in flat.items():
        size = float(mx.abs(gradient).max())
        assert 0 < size < float("inf"), path


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 5, 4), (3, 2, 9), (2, 7, 7)])
@pytest.mark.parametrize("sigma", [True, False])
def test_every_size_keeps_its_shape(grid: tuple[int, int, int], sigma: bool) -> None:
    model = network(replace(CONFIG, depth=1, pred_sigma=sigma, qk_norm=sigma))
    kept = model.prepare([normal(3, 12)], grid, height=33, width=70, fps=24)
    out = model(normal(1, *grid, 4), mx.array([10.0]), kept)
    assert out.shape == (1, *grid, 8 if sigma else 4)
    assert bool(mx.isfinite(out).all())


def test_patches_in_time() -> None:
    config = replace(CONFIG, patch_size=(2, 1, 3), depth=1)
    model = network(config)
    kept = model.prepare([normal(3, 12)], GRID, height=33, width=70, fps=24)
    assert model(normal(1, *GRID, 4), mx.array([10.0]), kept).shape == (1, *GRID, 8)


def test_half_precision_weights_follow_float32() -> None:
    """bfloat16 weights with float32 activations: no more than the rounding of the weights."""
    exact, half = network(), network()
    half.apply(lambda a: a.astype(mx.bfloat16))
    exact.apply(lambda a: a.astype(mx.bfloat16).astype(mx.float32))
    z, t = normal(1, *GRID, 4), mx.array([500.0])
    out = half(z, t, conditions(half, 4))
    assert out.dtype == mx.float32
    assert difference(out, exact(z, t, conditions(exact, 4))) <= TOLERANCE


def test_bfloat16_activations_stay_close() -> None:
    exact, half = network(), STDiT3(CONFIG, dtype=mx.bfloat16)
    half.update(exact.parameters())
    half.apply(lambda a: a.astype(mx.bfloat16))
    z, t = normal(1, *GRID, 4), mx.array([500.0])
    a, b = half(z, t, conditions(half, 4)), exact(z, t, conditions(exact, 4))
    assert a.dtype == mx.float32
    cosine = (a * b).sum() / mx.sqrt((a * a).sum() * (b * b).sum())
    assert 0.999 < float(cosine) < 1 - 1e-9


class Evicting:
    """A provider whose block leaves memory as soon as its output is there."""

    def __init__(self, model: STDiT3) -> None:
        self.model, self.order = model, list[int]()
        self.weights: list[list[object]] = []
        for pair in zip(model.spatial_blocks, model.temporal_blocks, strict=True):
            self.weights.append([block.parameters() for block in pair])

    def get(self, index: int) -> BlockPair:
        self.order.append(index)
        pair = (self.model.spatial_blocks[index], self.model.temporal_blocks[index])
        for block, weights in zip(pair, self.weights[index], strict=True):
            block.update(weights)
        return pair

    def release(self, index: int, output: mx.array) -> None:
        mx.eval(output)
        for blocks in (self.model.spatial_blocks, self.model.temporal_blocks):
            blocks[index].apply(lambda a: mx.full(a.shape, float("nan")))


def test_blocks_come_from_the_provider() -> None:
    """Weights that are gone after `done` are not needed later, not in the next step either."""
    model, z, t = network(), normal(1, *GRID, 4), mx.array([500.0])
    expected = model(z, t, conditions(model, 4))
    mx.eval(expected)
    provider, kept = Evicting(model), conditions(model, 4)
    for _ in range(2):
        out = model(z, t, kept, hooks=Hooks(blocks=provider))
        assert mx.array_equal(out, expected)
    assert provider.order == [0, 1, 0, 1]


class EveryOther:
    """Attend on every other frame, and note what was seen."""

    stride = 2

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def at(self, block: int, site: str) -> SiteMerging:
        return self if site in PAPER_SITES else NoMerging()

    def positions(self, frames: int) -> None:
        return None

    def merge(self, x: mx.array) -> mx.array:
        self.seen.append(x.shape)
        return x[:, ::2]

    def unmerge(self, x: mx.array, frames: int) -> mx.array:
        return mx.repeat(x, 2, axis=1)[:, :frames]


def test_tokens_pass_the_policy() -> None:
    """Twice in each of the blocks, on all frames, and with an effect."""
    model, z, t = network(), normal(2, *GRID, 4), mx.array([500.0, 500.0])
    kept, policy = conditions(model, 4, 6), EveryOther()
    out = model(z, t, kept, hooks=Hooks(token_merging=policy))
    assert policy.seen == [(2, 5, 12, 32)] * (2 * 2 * CONFIG.depth)
    assert difference(out, model(z, t, kept)) > 1e-2


def test_null_text() -> None:
    model = network()
    assert mx.array_equal(model.null_text(4), model.y_embedder.y_embedding[:4])


def test_constants_are_not_trained() -> None:
    trained = {path for path, _ in tree_flatten(STDiT3(CONFIG).trainable_parameters())}
    every = {path for path, _ in tree_flatten(STDiT3(CONFIG).parameters())}
    assert every - trained == {"rope.freqs", "y_embedder.y_embedding"}


def test_text_without_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="without text tokens"):
        conditions(network(), 3, 0)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 100, "num_heads": 16},
        {"num_heads": 0},
        {"patch_size": [2, 2]},
        {"patch_size": 2},
        {"depth": "28"},
        {"qk_norm": 1},
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match="config.json"):
        STDiT3Config.from_dict(values)


def test_published_configuration() -> None:
    published = {"patch_size": [1, 2, 2], "input_size": [None, None, None], "drop_path": 0.0}
    assert STDiT3Config.from_dict(published) == STDiT3Config()
