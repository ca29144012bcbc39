"""Trains the bundled model: `python -m benchmarks.shapes.train --out DIR`.

Phases, each resumable: spatial, temporal, sharpen, refine (VAE), latents (cache), text (T5), dit,
export.  All state lives under DIR; the finished model is DIR/model unless --model says otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import captions, export, latents, sample, train_dit, train_vae, world
from benchmarks.shapes.run_state import Average, RunState
from benchmarks.shapes.scorer import read_video, score

GUIDANCE = 2.0


class Recipe:
    """The phases over one working folder."""

    def __init__(self, out: Path, model: Path, spiece: Path, steps: int, processes: int) -> None:
        self.processes = processes
        self.out, self.model, self.spiece, self.steps = out, model, spiece, steps
        self.train_set, self.test_set = world.split()

    @cached_property
    def tokenizer(self) -> captions.Tokenizer:
        return captions.Tokenizer(self.spiece)

    def phases(self) -> dict[str, Callable[[], None]]:
        """Name -> action, in order."""
        return {
            "spatial": lambda: train_vae.train_spatial(self.out, self.train_set),
            "temporal": lambda: train_vae.train_temporal(self.out, self.train_set),
            "sharpen": lambda: train_vae.train_sharpen(self.out, self.train_set),
            "refine": lambda: train_vae.train_refine(self.out, self.train_set),
            "latents": lambda: latents.cache_latents(self.out, self.train_set),
            "text": lambda: captions.train_text(self.out, self.tokenizer, self.train_set),
            "dit": self.spawn_dit,
            "export": self.export_model,
        }

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

    def train_dit(self, team: train_dit.Team) -> None:
        encoder = self.text_encoder()
        bank = captions.CaptionBank(encoder, self.tokenizer, self.train_set, variants=24)

        def on_save(average: Average, run: RunState) -> None:
            self._export(encoder, average.values)
            torch.set_num_threads(team.size)
            run.log(**self.quick_score())
            torch.set_num_threads(1)

        data = latents.LatentSet(self.out, self.train_set)
        train_dit.train_dit(data, bank, self.steps, on_save, team)

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
            GUIDANCE,
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
    parser.add_argument("--threads", type=int, default=2, help="cores to use")
    parser.add_argument("--phase", help="run this phase only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = options.model or options.out / "model"
    phases = Recipe(options.out, model, options.spiece, options.steps, options.threads).phases()
    if options.phase and options.phase not in phases:
        parser.error(f"unknown phase {options.phase!r}; there are {', '.join(phases)}")
    for name, action in phases.items():
        if options.phase in (None, name):
            action()


if __name__ == "__main__":
    main()
