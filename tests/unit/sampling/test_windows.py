"""Windows of a long video: their weights, what each sees, and the mean where they overlap."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora.sampling.base import Step
from mlx_sora.sampling.windows import WindowedVelocity, Windows
from tests.helpers.flows import latents

T = mx.array([700.0])


class Recorder:
    """A velocity that is the same number everywhere; keeps the latents and steps that it sees."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.seen: list[tuple[mx.array, Step]] = []

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        self.seen.append((z, step))
        return mx.full(z.shape, self.value)


@pytest.mark.parametrize(
    "windows",
    [
        Windows(5, 5),
        Windows(10, 5, (5, 5)),
        Windows(15, 5, (10, 0, 3.5)),
        Windows(20, 5, (15, 15, 0, 15)),
        Windows(10, 5, (0, 1, 5)),
    ],
    ids=str,
)
def test_the_weights_of_a_frame_add_up_to_one(windows: Windows) -> None:
    total = mx.zeros(windows.frames)
    for index, weights in enumerate(windows.weights):
        assert weights.shape == (windows.length,)
        assert weights.min().item() >= 0
        total[windows.span(index)] += weights
    assert mx.allclose(total, mx.ones(windows.frames), rtol=0, atol=1e-6)
    assert windows.weights[0][0].item() == windows.weights[-1][-1].item() == 1


def test_one_window_takes_over_along_a_ramp() -> None:
    first, second = Windows(10, 5, (5,)).weights
    assert first.tolist() == pytest.approx([1] * 5 + [0.9, 0.7, 0.5, 0.3, 0.1])
    assert second.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9] + [1] * 5)
    assert Windows(10, 5, (1,)).weights[1].tolist() == [0, 0, 0.5] + [1] * 7


@pytest.mark.parametrize(("length", "shared", "cut"), [(10, 5, 5), (15, 10, 5), (20, 15, 10)])
def test_a_cut_lies_between_two_chunks(length: int, shared: int, cut: int) -> None:
    second = Windows(length, length - shared, (0,)).weights[1]
    assert second.tolist() == [0] * cut + [1] * (length - cut)


def test_velocities_are_averaged_and_each_sees_its_frames() -> None:
    windows, parts = Windows(10, 5, (5, 0)), [Recorder(value) for value in (1.0, 2.0, 4.0)]
    z = latents(shape=(1, 20, 1, 1, 1))
    x_mask = mx.arange(20)[None] >= 5
    step = Step(2, 9, T, T - 100, x_mask, fresh=x_mask & (mx.arange(20) < 10))
    v = WindowedVelocity(windows, parts)(z, T, step)
    assert v[0, :, 0, 0, 0].tolist() == pytest.approx(
        [1] * 5 + [1.1, 1.3, 1.5, 1.7, 1.9] + [2] * 5 + [4] * 5
    )
    for index, part in enumerate(parts):
        (seen, own), span = part.seen[0], windows.span(index)
        assert mx.array_equal(seen, z[:, span])
        assert (own.index, own.total, own.pending) == (2, 9, None)
    assert parts[0].seen[0][1].x_mask is not None
    assert [part.seen[0][1].x_mask is None for part in parts] == [False, True, True]
    assert [part.seen[0][1].fresh is None for part in parts] == [False, False, True]


def test_a_window_in_which_nothing_moves_is_left_out() -> None:
    parts = [Recorder(1.0), Recorder(2.0)]
    step = Step(0, 9, T, T - 100, mx.arange(15)[None] >= 10)
    v = WindowedVelocity(Windows(10, 5, (5,)), parts)(mx.zeros((1, 15, 1, 1, 1)), T, step)
    assert [len(part.seen) for part in parts] == [0, 1]
    assert v[0, 10:, 0, 0, 0].tolist() == [2] * 5


def test_ranks_evaluate_every_nth_window_and_add_up_all() -> None:
    """Two ranks take turns in three windows; the sum is that of one, in its order."""
    windows, z, step = Windows(10, 5, (5, 5)), latents(0, (1, 20, 1, 1, 1)), Step(0, 9, T, T - 100)
    values = (0.1, 0.7, 1 / 3)
    alone = WindowedVelocity(windows, [Recorder(value) for value in values])(z, T, step)
    sent: dict[int, list[mx.array]] = {0: [], 1: []}
    for rank in sent:
        WindowedVelocity(
            windows,
            [Recorder(value) for value in values],
            rank,
            2,
            lambda x, rank=rank: (sent[rank].append(x), mx.stack([x, x]))[1],
        )(z, T, step)
    assert not sent[1][1].any().item()  # there is no fourth window
    rounds = iter(zip(sent[0], sent[1], strict=True))
    parts = [Recorder(value) for value in values]
    shared = WindowedVelocity(windows, parts, 1, 2, lambda x: mx.stack(next(rounds)))(z, T, step)
    assert [len(part.seen) for part in parts] == [0, 1, 0]
    assert mx.array_equal(shared, alone)
