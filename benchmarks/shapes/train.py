"""Trains the bundled model: `python -m benchmarks.shapes.train --out DIR`.

Phases, each resumable: spatial, temporal, sharpen, refine (VAE), text (T5), latents (cache),
decode (VAE), dit, settle (VAE), export.  Decode and dit can run side by side.  All state lives
under DIR; the finished model is DIR/model unless --model says otherwise.  --from MODEL goes on from
a finished one: its encoders and T5 stay, its transformer and the VAE's decoders learn on; the
phases are then start, latents, decode, dit, settle, export.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import (
    captions,
    export,
    latents,
    sample,
    train_decode,
    train_dit,
    train_settle,
    train_vae,
    world,
)
from benchmarks.shapes.run_state import Average, RunState
from benchmarks.shapes.scorer import read_video, score


@dataclass
class Recipe:
    """The phases over one working folder; start: a finished model to go on from."""

    out: Path
    model: Path
    spiece: Path
    steps: int
    processes: int
    start: Path | None = None
    decode_steps: int = 0
    compiled: bool = False

    def __post_init__(self) -> None:
        self.train_set, self.test_set = world.split()

    @cached_property
    def tokenizer(self) -> captions.Tokenizer:
        return captions.Tokenizer(self.spiece)

    def phases(self) -> dict[str, Callable[[], None]]:
        """Name -> action, in order."""
        last: dict[str, Callable[[], None]] = {
            "latents": lambda: latents.cache_latents(self.out, self.train_set, self.counts),
            "decode": self.train_decode,
            "dit": self.spawn_dit,
            "settle": self.train_settle,
            "export": self.export_model,
        }
        if self.start is not None:
            return {"start": self.take_start} | last
        vae = {
            "spatial": lambda: train_vae.train_spatial(self.out, self.train_set),
            "temporal": lambda: train_vae.train_temporal(self.out, self.train_set),
            "sharpen": lambda: train_vae.train_sharpen(self.out, self.train_set),
            "refine": lambda: train_vae.train_refine(self.out, self.train_set),
        }
        text = {"text": lambda: captions.train_text(self.out, self.tokenizer, self.train_set)}
        return vae | text | last

    @property
    def counts(self) -> dict[int, tuple[int, int]]:
        """Videos to encode."""
        return latents.NEW if self.start is None else latents.CONTINUED

    def take_start(self) -> None:
        """Write what the phases that are left out would have written."""
        assert self.start is not None
        self.out.mkdir(parents=True, exist_ok=True)
        vae = export.read_vae(self.start)
        statistics = {"shift": vae.shift.clone(), "scale": vae.scale.clone()}
        torch.save(statistics, self.out / "statistics.pt")
        torch.save({"parts": {"average": vae.state_dict()}}, self.out / "refine.pt")
        t5 = export.read_text_encoder(self.start).state_dict()
        torch.save({"parts": {"t5": t5}}, self.out / "text.pt")

    def train_decode(self) -> None:
        train_decode.train_decode(self.out, self.train_set, self.decode_steps)

    @property
    def course(self) -> train_dit.Course:
        if self.start is None:
            return train_dit.Course(self.steps, None, self.compiled)
        start = export.read_transformer(self.start).state_dict()
        return train_dit.Course(self.steps, start, self.compiled)

    def spawn_dit(self) -> None:
        """One single-threaded process per core."""
        meeting = self.out / "meeting"
        meeting.unlink(missing_ok=True)
        torch.multiprocessing.spawn(_dit_member, (self, meeting), nprocs=self.processes)

    def text_encoder(self) -> captions.T5Encoder:
        model = captions.new_text_encoder()
        state = torch.load(self.out / "text.pt", weights_only=False)
        model.load_state_dict(state["parts"]["t5"])
        return model.eval()

    def train_settle(self) -> None:
        transformer = train_dit.new_transformer()
        state = torch.load(self.out / "dit.pt", weights_only=False)
        transformer.load_state_dict(state["parts"]["average"])
        bank = self.caption_bank(self.text_encoder())
        pool = train_settle.MadePool(self.out, transformer, bank, self.train_set)
        train_settle.train_settle(pool)

    def caption_bank(self, encoder: captions.T5Encoder) -> captions.CaptionBank:
        return captions.CaptionBank(encoder, self.tokenizer, self.train_set, variants=24)

    def train_dit(self, team: train_dit.Team) -> None:
        encoder = self.text_encoder()
        bank = self.caption_bank(encoder)

        def on_save(average: Average, run: RunState) -> None:
            self._export(encoder, average.values)
            if run.step % train_dit.SCORE_EVERY == 0:
                torch.set_num_threads(team.size)
                run.log(**self.quick_score())
                torch.set_num_threads(1)

        data = latents.LatentSet(self.out, self.train_set, self.counts)
        train_dit.train_dit(data, bank, self.course, on_save, team)

    def quick_score(self, frames: int = world.CHUNK) -> dict[str, float]:
        """The scorer's table on the held-out prompts, sampled as one batch."""
        folder = self.model
        t5, dit = export.read_text_encoder(folder), export.read_transformer(folder)
        prompts = [world.caption(attributes) for attributes in self.test_set]
        with torch.no_grad():
            texts = [t5(*self.tokenizer.batch([prompt]))[0] for prompt in prompts]
        noise = torch.stack([sample.seeded_noise(i, frames) for i in range(len(texts))])
        guidance = export.read_guidance(folder)
        z = sample.sample_latents(dit, texts, noise, 30, guidance, frames)
        videos = sample.decode_frames(export.read_vae(folder), z, frames)
        return score([read_video(v) for v in videos], self.test_set)

    def export_model(self) -> None:
        state = torch.load(self.out / "dit.pt", weights_only=False)
        self._export(self.text_encoder(), state["parts"]["average"])

    def _export(self, encoder: captions.T5Encoder, weights: dict[str, Tensor]) -> None:
        export.write_model(
            self.model,
            (encoder.config, encoder.state_dict()),
            (train_dit.new_transformer().config, weights),
            latents.final_vae(self.out),
            self.spiece,
            sample.GUIDANCE,
        )


def _dit_member(rank: int, recipe: Recipe, meeting: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=recipe.processes
    )
    recipe.train_dit(train_dit.Team(rank, recipe.processes))
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder, resumable")
    parser.add_argument("--model", type=Path, help="where to write the model (default OUT/model)")
    parser.add_argument("--spiece", type=Path, required=True, help="T5's spiece.model")
    parser.add_argument("--steps", type=int, default=8000, help="steps of the dit phase")
    parser.add_argument("--decode-steps", type=int, default=4000, help="steps of the decode phase")
    parser.add_argument("--compile", action="store_true", help="fuse the transformer's blocks")
    parser.add_argument("--threads", type=int, default=2, help="cores to use")
    parser.add_argument("--from", type=Path, dest="start", help="finished model to go on from")
    parser.add_argument("--phase", help="run this phase only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = options.model or options.out / "model"
    recipe = Recipe(
        options.out,
        model,
        options.spiece,
        options.steps,
        options.threads,
        options.start,
        options.decode_steps,
        options.compile,
    )
    phases = recipe.phases()
    if options.phase and options.phase not in phases:
        parser.error(f"unknown phase {options.phase!r}; there are {', '.join(phases)}")
    for name, action in phases.items():
        if options.phase in (None, name):
            action()


if __name__ == "__main__":
    main()
