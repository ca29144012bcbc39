"""How several processes divide one evaluation of the transformer: by halves, frames and places.

Names as in the field (xDiT, VideoSys): guidance parallel (each half of guidance on its own ranks),
sequence parallel (spatial attention by frames, temporal attention by places, one exchange between
them), both at once, and data parallel (whole videos). Pure arithmetic: used by what does it
(`accel/sequence_parallel.py`) and by what foretells it.
Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_sora.errors import UsageError
from mlx_sora.memory.flops import Grid
from mlx_sora.models.stdit3 import STDiT3Config

#: Bytes of a number in the residual stream.
STREAM = 4


@dataclass(frozen=True)
class ParallelPlan:
    """`ranks` processes in `halves` groups (1 or 2), each with samples of its own.

    apart: the groups can exchange among themselves; ring: neighbours can; otherwise everybody hears
    everything.
    """

    ranks: int
    cfg_degree: int = 1
    subgroups: bool = False
    ring: bool = True

    def for_batch(self, batch: int) -> ParallelPlan:
        """As it is for an evaluation of `batch` samples: one that has no halves is for all."""
        return self if batch % self.cfg_degree == 0 else ParallelPlan(self.ranks, ring=self.ring)

    @property
    def mode(self) -> str:
        """How the field calls it; off for one rank."""
        if self.ranks == 1:
            return "off"
        if self.cfg_degree == 1:
            return "sequence"
        return "guidance" if self.cfg_degree == self.ranks else "both"

    @property
    def sp_degree(self) -> int:
        """Ranks that divide the tokens of a sample."""
        return self.ranks // self.cfg_degree

    @property
    def fan_out(self) -> int:
        """Ranks that take part in one exchange between blocks."""
        return self.sp_degree if self.subgroups or self.pairwise else self.ranks

    @property
    def pairwise(self) -> bool:
        """Whether two neighbours give each other just what the other lacks."""
        return self.ring and self.sp_degree == 2 and not self.subgroups


def choose_parallel(asked: str, ranks: int, *, guided: bool) -> ParallelPlan:
    """How `ranks` make one video. asked: a value of --parallel; guided: it has two halves.

    auto splits guidance where it can, as that costs next to no exchange, and each half by sequence.
    Raises UsageError for what cannot be.
    """
    if asked == "off":
        return ParallelPlan(1)
    if ranks == 1 and asked != "auto":
        raise UsageError(
            f"--parallel {asked} is for several ranks; this process is alone.",
            "Start it as mlx.launch -n 2 -- python -m mlx_sora generate ...",
        )
    if asked == "prompts":
        raise UsageError(
            "--parallel prompts divides several videos; there is one.", "Leave --parallel out."
        )
    if asked in ("guidance", "both") and not guided:
        raise UsageError(
            f"--parallel {asked}: without guidance there are no halves.",
            "Use --parallel sequence.",
        )
    if (asked == "guidance" and ranks != 2) or (asked == "both" and (ranks < 4 or ranks % 2)):
        wanted = "2 ranks" if asked == "guidance" else "4, 6, 8 ... ranks"
        raise UsageError(
            f"--parallel {asked} is for {wanted}, not {ranks}.", "Leave --parallel out."
        )
    split = asked in ("guidance", "both") or (asked == "auto" and guided and ranks % 2 == 0)
    return ParallelPlan(ranks, 2 if split else 1)


def split_evenly(total: int, parts: int, stride: int = 1) -> list[range]:
    """`total` frames or places in `parts` runs as even as can be, cut at multiples of `stride`.

    What is left over goes with the last. Where there are fewer than parts, the last run stands
    for all that follow too.
    """
    units = max(1, total // stride)
    used = min(parts, units)
    ends = [-(-units * (i + 1) // used) * stride for i in range(used - 1)] + [total]
    runs = [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return runs + runs[-1:] * (parts - used)


def sent_bytes(
    config: STDiT3Config,
    grid: Grid,
    division: ParallelPlan,
    *,
    stride: int = 1,
    itemsize: int = STREAM,
    watched: bool = False,
) -> int:
    """Bytes that a rank sends at most in one evaluation whose blocks run.

    In a ring everyone passes on every other's part: a gather of parts of n bytes among r ranks
    costs (r - 1) n, with parts padded to the longest; of two neighbours each sends half of its
    part. itemsize: of the network's numbers. watched: a cache sees what the blocks made, so that
    all of it is sent instead of the patches it becomes.
    """
    division = division.for_batch(grid.batch)
    rows, channels = grid.batch // division.cfg_degree, config.hidden_size
    runs = (
        split_evenly(grid.frames, division.sp_degree, stride),
        split_evenly(grid.tokens, division.sp_degree),
    )
    frames, places = (max(map(len, run)) for run in runs)
    token, between = rows * channels * STREAM, 0
    if division.pairwise:
        (t0, t1), (s0, s1) = (map(len, run) for run in runs)
        there, back = max(t0 * s1, t1 * s0), min(t0 * s1, t1 * s0)
        between = (config.depth * there + (config.depth - 1) * back) * token
    elif division.sp_degree > 1:
        to_space, to_frames = frames * grid.tokens, grid.frames * places
        swapped = config.depth * to_space + (config.depth - 1) * to_frames
        between = swapped * token * (division.fan_out - 1)
    patch = math.prod(config.patch_size) * config.out_channels * itemsize
    out = rows * grid.frames * places * (channels * STREAM if watched else patch)
    return between + out * (division.ranks - 1)


def hops(config: STDiT3Config, grid: Grid, division: ParallelPlan) -> int:
    """How often a rank sends in such an evaluation, one after the other.

    A gather among r ranks takes r - 1 of them, an exchange of two neighbours one.
    """
    division = division.for_batch(grid.batch)
    exchange = 1 if division.pairwise else division.fan_out - 1
    exchanges = 2 * config.depth - 1 if division.sp_degree > 1 else 0
    return exchanges * exchange + division.ranks - 1
