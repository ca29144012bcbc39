"""Work the reference does and this engine leaves out: leaving it out changes nothing.

Each test does the work once as the reference does and once as the engine does. What each saving is
worth: `python -m benchmarks.savings`.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_sora.loading.checkpoint import Checkpoint, load_weights
from mlx_sora.loading.model_folder import Defaults, ModelFolder
from mlx_sora.loading.networks import load_text_encoder
from mlx_sora.models import conv, ops, stdit3, t5
from mlx_sora.models.stdit3 import Conditions, STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Config, T5Encoder
from mlx_sora.text.encoder import encode_tokens
from tests.helpers.tolerance import rounding

#: Largest difference allowed, in standard deviations of the result.
SAME = rounding(1e-5)

#: The reference pads every prompt to this many tokens.
PADDED = 300

T5 = T5Config(vocab_size=60, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
STDIT = STDiT3Config(
    hidden_size=32, num_heads=2, depth=2, caption_channels=T5.d_model, model_max_length=PADDED
)
GRID = (3, 4, 6)
TIMES = (1000.0, 700.0, 350.0)

Network = TypeVar("Network", bound=nn.Module)


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def randomised(network: Network) -> Network:
    """The network with every parameter drawn anew, so that nothing hides behind zeros."""
    values = [
        (path, value if path == "rope.freqs" else 0.3 * normal(seed, *value.shape))
        for seed, (path, value) in enumerate(tree_flatten(network.parameters()))
    ]
    network.update(tree_unflatten(values))
    return network


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    assert float(mx.std(b)) > 1e-3
    return float(mx.abs(a - b).max() / mx.std(b))


def token_ids(length: int) -> mx.array:
    return mx.random.randint(0, T5.vocab_size, (1, length), key=mx.random.key(length))


def padded_ids(ids: mx.array) -> tuple[mx.array, mx.array]:
    """Ids and mask [1, PADDED], padded with zeros as the tokenizer of the reference does."""
    length = ids.shape[1]
    return mx.pad(ids, [(0, 0), (0, PADDED - length)]), (mx.arange(PADDED) < length)[None]


def prepare(model: STDiT3, *text: mx.array) -> Conditions:
    return model.prepare(text, GRID, height=32, width=48, fps=24)


def as_reference(model: STDiT3, text: mx.array, mask: mx.array) -> Conditions:
    """Conditions of padded text [B, PADDED, C], whose padding is computed, then masked."""
    plain = prepare(model, *text)
    return replace(plain, text=model.y_embedder.y_proj(text), text_mask=mask[:, None, None, :])


@pytest.mark.parametrize("length", [1, 9, 140, PADDED])
def test_t5_needs_no_padding(length: int) -> None:
    encoder, ids = randomised(T5Encoder(T5)), token_ids(length)
    padded, mask = padded_ids(ids)
    reference = encoder(encoder.embed(padded), mask)
    assert difference(encoder(encoder.embed(ids)), reference[:, :length]) <= SAME


def test_the_text_encoder_pads_nothing() -> None:
    """What T5 is given for a prompt is its tokens, and no mask."""
    ids = token_ids(9)
    given: list[tuple[int, ...]] = []

    class Watched(T5Encoder):
        def __call__(
            self, embeds: mx.array, mask: mx.array | None = None, blocks: Any = None
        ) -> mx.array:
            given.append(embeds.shape)
            return super().__call__(embeds, mask, blocks)

    encoder = randomised(Watched(T5))
    rows = encoder.shared.weight
    tokens = [int(i) for i in ids[0]]
    states = encode_tokens(encoder, lambda at: rows[mx.array(list(at))], tokens, mx.float32)
    assert given == [(1, 9, T5.d_model)]
    padded, mask = padded_ids(ids)
    assert difference(states, encoder(encoder.embed(padded), mask)[0, :9]) <= SAME


@pytest.mark.parametrize("length", [1, 9, 140])
def test_stdit_needs_no_padding(length: int) -> None:
    """Prompt and null text, guided as in the reference: padding holds values, the mask hides it."""
    model, text = randomised(STDiT3(STDIT)), normal(1, PADDED, T5.d_model)
    z, t = normal(2, 2, *GRID, STDIT.in_channels), mx.array([800.0, 800.0])
    mask = mx.tile(mx.arange(PADDED) < length, (2, 1))
    both = mx.stack([text, model.null_text(PADDED)])
    reference = model(z, t, as_reference(model, both, mask))
    lean = prepare(model, text[:length], model.null_text(length))
    assert lean.text.shape[1] == length
    assert lean.text_mask is None
    assert difference(model(z, t, lean), reference) <= SAME


def steps(model: STDiT3, conditions: Callable[[], Conditions]) -> mx.array:
    """Latents after an Euler step at each of TIMES, under what `conditions` gives at each."""
    z = normal(3, 1, *GRID, STDIT.in_channels)
    for t in TIMES:
        velocity = model(z, mx.array([t]), conditions())[..., : STDIT.in_channels]
        z = z + 0.3 * velocity
    return z


def test_a_run_from_ids_to_latents() -> None:
    """All of it together: nothing padded and all computed once, or all padded in every step."""
    encoder, model, ids = randomised(T5Encoder(T5)), randomised(STDiT3(STDIT)), token_ids(7)
    padded, mask = padded_ids(ids)

    def anew() -> Conditions:
        return as_reference(model, encoder(encoder.embed(padded), mask), mask)

    kept = prepare(model, encoder(encoder.embed(ids))[0])
    assert difference(steps(model, lambda: kept), steps(model, anew)) <= SAME


def count_calls(monkeypatch: pytest.MonkeyPatch, model: STDiT3) -> Counter[str]:
    """Calls from here on, by name, of what a run needs once."""
    calls: Counter[str] = Counter()

    def spy(owner: Any, name: str, label: Callable[[Any], str]) -> None:
        plain = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[label(args[0])] += 1
            return plain(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    text, rate = model.y_embedder.y_proj, model.fps_embedder
    spy(type(text), "__call__", lambda layer: "text" if layer is text else "mlp")
    spy(type(rate), "__call__", lambda layer: "frame rate" if layer is rate else "time")
    spy(type(model.spatial_blocks[0].cross_attn), "keys_values", lambda _: "keys and values")
    spy(stdit3, "position_embedding", lambda _: "position")
    return calls


ONCE = {"text": 1, "position": 1, "frame rate": 1, "keys and values": 2 * STDIT.depth}


def test_once_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, position, frame rate, keys and values: once, however many steps; anew, the same."""
    model, text = randomised(STDiT3(STDIT)), normal(1, 9, T5.d_model)
    calls = count_calls(monkeypatch, model)
    kept = prepare(model, text)
    once = steps(model, lambda: kept)
    assert {name: calls[name] for name in ONCE} == ONCE
    calls.clear()
    anew = steps(model, lambda: prepare(model, text))
    assert {name: calls[name] for name in ONCE} == {n: len(TIMES) * c for n, c in ONCE.items()}
    assert difference(once, anew) <= SAME


def test_what_is_kept_was_evaluated_once() -> None:
    """A run's conditions are values after its first step, not graphs that each step walks again."""
    model = randomised(STDiT3(STDIT))
    kept = prepare(model, normal(1, 9, T5.d_model))
    z, t = normal(3, 1, *GRID, STDIT.in_channels), mx.array([500.0])
    first = model(z, t, kept)
    mx.eval(first)
    # With the weights they came from gone, only values can still give the same prediction.
    blocks = (*model.spatial_blocks, *model.temporal_blocks)
    for part in (model.y_embedder, model.fps_embedder, *(b.cross_attn.kv_linear for b in blocks)):
        part.apply(lambda a: mx.full(a.shape, float("nan")))
    assert mx.array_equal(model(z, t, kept), first)


@pytest.fixture(params=[mx.float16, mx.float32, mx.bfloat16], ids=str)
def text_encoder(request: pytest.FixtureRequest, tmp_path: Path) -> ModelFolder:
    """A model folder whose text encoder is stored in two shards with an index."""
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    weights = {
        path: value.astype(request.param)
        for path, value in tree_flatten(randomised(T5Encoder(T5)).parameters())
    }
    weights["encoder.embed_tokens.weight"] = weights[t5.EMBEDDING_KEY]
    shards = {"a.safetensors": [t5.EMBEDDING_KEY]}
    shards["b.safetensors"] = [key for key in weights if key != t5.EMBEDDING_KEY]
    for name, keys in shards.items():
        mx.save_safetensors(str(folder / name), {key: weights[key] for key in keys})
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(vars(T5)))
    return ModelFolder(tmp_path, "test", Defaults())


def test_embedding_rows_from_disk(text_encoder: ModelFolder) -> None:
    """Rows read one by one are the rows of the table; the states are those of the whole table."""
    whole = T5Encoder(T5)
    checkpoint = Checkpoint.open(text_encoder.text_encoder)
    load_weights(
        whole, checkpoint, t5.KEYS, dtype=mx.float32, skip_keys=["encoder.embed_tokens.weight"]
    )
    lean, rows = load_text_encoder(text_encoder, mx.float32)
    assert "shared" not in lean
    ids = token_ids(11)
    embeds = rows(ids[0].tolist())[None].astype(mx.float32)
    assert mx.array_equal(embeds, whole.embed(ids))
    assert difference(lean(embeds), whole(whole.embed(ids))) <= SAME


def test_only_the_rows_asked_for_are_read(
    text_encoder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = load_text_encoder(text_encoder, mx.float32)
    requested: list[int | None] = []

    class Watched(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            requested.append(size)
            return super().read(size)

    def watched(path: Path, mode: str) -> Watched:
        return Watched(path, mode)

    monkeypatch.setattr(Path, "open", watched)
    read = rows([5, 59, 5])
    assert requested == [T5.d_model * read.dtype.size] * 3


@pytest.mark.parametrize(("side", "stride"), [(4, 1), (24, 1), (4, 2), (24, 2)])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_conv3d_of_one_sample_with_explicit_padding(
    monkeypatch: pytest.MonkeyPatch, side: int, stride: int, on_gpu: bool
) -> None:
    """The engine's form, of either device, is one plain call for the batch.

    That call pads both ends of time itself, and the frames that see the far end are dropped.
    """
    x, weight, bias = normal(1, 3, 4, side, side, 6), normal(2, 3, 3, 3, 5, 6), normal(3, 5)
    both_ends = (3 - stride, 1, 1)
    kernel = weight.transpose(3, 0, 1, 2, 4)
    plain = mx.conv3d(x, kernel, stride=(stride, 1, 1), padding=both_ends)[:, : 4 // stride] + bias
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    assert difference(conv.causal_conv3d(x, weight, bias, stride), plain) <= SAME


def test_conv3d_on_a_gpu_meets_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal convolves frame by frame when the batch is 1, time unpadded, and its stride 1."""
    seen: list[tuple[int, int, int]] = []
    plain = mx.conv_general

    def watched(
        x: mx.array, kernel: mx.array, stride: Any, padding: Any, **options: Any
    ) -> mx.array:
        seen.append((x.shape[0], x.shape[1], padding[0]))
        return plain(x, kernel, stride, padding, **options)

    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "conv_general", watched)
    conv.causal_conv3d(normal(1, 3, 4, 5, 5, 6), normal(2, 3, 3, 3, 5, 6))
    assert seen == [(1, 4 + 2, 0)] * 3
