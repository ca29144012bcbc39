"""Training of the small STDiT3 on cached latents with rectified flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.shapes import world
from benchmarks.shapes.captions import CaptionBank
from benchmarks.shapes.latents import LATENTS, Batch, LatentSet
from benchmarks.shapes.run_state import (
    Average,
    RunState,
    schedule,
    set_rate,
    steady_schedule,
)
from benchmarks.shapes.torch_stdit import STDiT3, STDiTConfig

BATCH, GROW_EVERY, SAVE_EVERY, SCORE_EVERY = 32, 300, 250, 1000
IMAGE_FPS = 120.0
NEW_RATE, CONTINUED_RATE, ADAM_FACTOR = 4e-3, 1.5e-3, 0.5
CONTINUED_CHUNKS = (0.24, 0.26, 0.2, 0.15, 0.15)  # share of images, of clips of 1 to 4 chunks
MEMORY = 0.9985  # decay of the average of the weights


def new_transformer() -> STDiT3:
    """The bundled model's transformer with fresh weights."""
    torch.manual_seed(20)
    return STDiT3(STDiTConfig())


@dataclass(frozen=True)
class Team:
    """Processes that share a batch: on few cores, one thread each beats threads in one."""

    rank: int = 0
    size: int = 1

    def average_gradients(self, model: STDiT3) -> None:
        """Replace every gradient by its mean over the team."""
        if self.size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        """Return when all are here."""
        if self.size > 1:
            dist.barrier()


class Optimizers:
    """Muon for the blocks' matrices, AdamW for everything else, behind one interface."""

    def __init__(self, model: STDiT3) -> None:
        matrices, rest = [], []
        for name, weight in model.named_parameters():
            in_block = "_blocks." in name and weight.ndim == 2 and "table" not in name
            (matrices if in_block else rest).append(weight)
        muon = torch.optim.Muon(
            matrices, 1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4
        )
        adam = torch.optim.AdamW(rest, 1e-3, (0.9, 0.98), weight_decay=0.0, fused=True)
        for group in adam.param_groups:
            group["factor"] = ADAM_FACTOR
        self.members: list[torch.optim.Optimizer] = [muon, adam]

    def step(self, rate: float) -> None:
        for member in self.members:
            set_rate(member, rate)
            member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


def random_times(count: int) -> Tensor:
    """Noise levels [count] in (0, 1): logit-normal, some uniform, a tenth close to pure noise.

    What a video shows is decided there, and a logit-normal alone hardly ever goes.
    """
    t = torch.sigmoid(torch.randn(count) + 0.4)
    kind, uniform = torch.rand(count), torch.rand(count)
    t = torch.where(kind < 0.3, uniform, t)
    return torch.where(kind < 0.1, 0.9 + 0.1 * uniform, t)


def random_frame_masks(batch: Batch, rng: np.random.Generator) -> Tensor:
    """[B, T], true where a frame is generated; videos that have begun keep their first chunks.

    Of the others a quarter keep some frames, of long ones more, most often the first alone.
    """
    count, frames = batch.z.shape[0], batch.z.shape[2]
    mask, long = np.ones((count, frames), bool), frames > LATENTS
    for row, begun in zip(mask, batch.begun, strict=True):
        if begun:
            row[: LATENTS * int(rng.integers(1, frames // LATENTS))] = False
        elif frames > 1 and rng.random() < (0.4 if long else 0.25):
            _keep_some(row, rng, 0.55 if long else 0.25)
    return torch.from_numpy(mask)


def _keep_some(row: np.ndarray, rng: np.random.Generator, first: float) -> None:
    """Unset the first entry of `row` (with that probability), some at one end, or any."""
    kind, length = int(rng.integers(1, 4)), int(rng.integers(1, max(2, len(row) // 2 + 1)))
    if rng.random() < first:
        row[0] = False
    elif kind == 1:
        row[:length] = False
    elif kind == 2:
        row[-length:] = False
    else:
        row[rng.random(len(row)) < 0.3] = False
        row[rng.integers(len(row))] = True


def show_pictures(batch: Batch, keep: Tensor, rng: np.random.Generator) -> Tensor:
    """The latents; half of the frames that are kept alone at the start become those of pictures.

    A picture is encoded as the first of still frames.
    """
    alone = ~keep[:, 0] & keep[:, 1:].all(1) & torch.from_numpy(rng.random(len(keep)) < 0.5)
    z = batch.z.clone()
    z[alone, :, 0] = batch.first[alone]
    return z


def flow_loss(model: STDiT3, z: Tensor, text: tuple[Tensor, Tensor], keep: Tensor) -> Tensor:
    """Mean squared error of the velocity x0 - noise over the generated frames."""
    t, noise = random_times(len(z)), torch.randn_like(z)
    level = torch.where(keep, t[:, None], 0.0)[:, None, :, None, None]
    x = (1 - level) * z + level * noise
    fps = IMAGE_FPS if z.shape[2] == 1 else float(world.FPS)
    v = model(x, t * 1000, text, (float(world.SIZE), float(world.SIZE), fps), keep)
    v = v[:, : z.shape[1]]
    error = (v - (z - noise)).square().mean((1, 3, 4))
    return (error * keep).sum() / keep.sum()


def drop_text(model: STDiT3, text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A tenth of the captions becomes the first rows of the null embedding, as in guidance."""
    y, mask = text
    null = model.y_embedder.y_embedding[: y.shape[1]]
    return torch.where(torch.rand(len(y), 1, 1) < 0.1, null, y), mask


@dataclass(frozen=True)
class Course:
    """How long to train, how fast, and from what; `start` is None for fresh weights.

    compiled: let torch.compile fuse the blocks, once for each length; a third faster.
    """

    steps: int
    start: dict[str, Tensor] | None = None
    compiled: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of a step; a continued run may get more steps later."""
        if self.start is None:
            return schedule(step, self.steps, NEW_RATE, warm=100)
        return steady_schedule(step, self.steps, CONTINUED_RATE, warm=200)

    def pick_chunks(self, step: int) -> int:
        """Clip length of a batch; images (0) and longer clips come late to fresh weights."""
        rng = np.random.default_rng((11, step))
        if self.start is not None:
            return int(rng.choice(5, p=CONTINUED_CHUNKS))
        if step < self.steps // 3:
            return 1
        return int(rng.choice([0, 1, 2, 3], p=[0.06, 0.3, 0.4, 0.24]))

    @property
    def begun(self) -> float:
        """Share of the longer videos that begin within their swing, so that chunks are given."""
        return 0.5 if self.start is None else 0.35


def train_dit(
    data: LatentSet,
    bank: CaptionBank,
    course: Course,
    on_save: Callable[[Average, RunState], None],
    team: Team,
) -> None:
    """Train as the course says; writes the phase `dit` and calls `on_save` every so many steps."""
    model, total = new_transformer(), course.steps
    if course.start is not None:
        model.load_state_dict(course.start)
    if course.compiled:
        torch._dynamo.config.recompile_limit = 64
        for block in [*model.spatial_blocks, *model.temporal_blocks]:
            block.compile(dynamic=False)
    optimizers, average = Optimizers(model), Average(model, MEMORY)
    parts = {"dit": model, "optimizers": optimizers, "average": average}
    run = RunState(data.folder, "dit", parts, seed=8)
    # Every member draws its own videos, captions and noise.
    run.rng = np.random.default_rng((8, team.rank, run.step))
    torch.manual_seed(8 + team.rank + 1000 * run.step)
    losses: list[float] = []
    while run.step < total:
        chunks = course.pick_chunks(run.step)
        count = max(1, BATCH // team.size // chunks) if chunks else 2 * BATCH // team.size
        batch = data.batch(chunks, count, run.rng, course.begun)
        text = drop_text(model, bank.batch(batch.indices, run.rng))
        keep = random_frame_masks(batch, run.rng)
        loss = flow_loss(model, show_pictures(batch, keep, run.rng), text, keep)
        loss.backward()
        team.average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(course.rate(run.step))
        run.step += 1
        average.update(model, run.step)
        losses.append(loss.item())
        if run.step % 100 == 0 and team.rank == 0:
            run.log(loss=float(np.mean(losses[-100:])))
        if run.step % GROW_EVERY == 0:
            data.grow(team.rank, team.size, team.wait)
        if (run.step % SAVE_EVERY == 0 or run.step == total) and team.rank == 0:
            run.save()
            on_save(average, run)
