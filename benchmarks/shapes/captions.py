"""Token ids of captions, and the pre-training of the small T5 encoder on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import world
from benchmarks.shapes.run_state import RunState, schedule, set_rate
from benchmarks.shapes.torch_t5 import T5Config, T5Encoder

TEXT_STEPS = 700
LONGEST = 32
END = 1


class Tokenizer:
    """Caption -> ids with end-of-sequence, as the engine makes them after its cleaning."""

    def __init__(self, model: Path) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def ids(self, text: str) -> list[int]:
        return [*self._pieces.encode(text.lower().strip()), END]

    def batch(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask) [B, L], L the longest of the batch, padded with 0."""
        rows = [torch.tensor(self.ids(text)) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        return ids, mask


def new_text_encoder() -> T5Encoder:
    """A T5 encoder with T5's own scales of initialisation."""
    torch.manual_seed(10)
    c = T5Config()
    model = T5Encoder(c)
    nn.init.normal_(model.shared.weight)
    for name, weight in model.named_parameters():
        if name.endswith((".q.weight",)):
            nn.init.normal_(weight, std=(c.d_model * c.d_kv) ** -0.5)
        elif name.endswith((".k.weight", ".v.weight", ".o.weight", "wi_0.weight", "wi_1.weight")):
            nn.init.normal_(weight, std=c.d_model**-0.5)
        elif name.endswith("wo.weight"):
            nn.init.normal_(weight, std=c.d_ff**-0.5)
    return model


def train_text(folder: Path, tokenizer: Tokenizer, choices: list[world.Attributes]) -> None:
    """Teach every token's output all four attributes; writes the phase `text`.

    The diffusion model then finds the whole caption in any token it attends to, so that text
    steers it from its first steps.
    """
    model = new_text_encoder()
    classes = [len(world.COLOURS), len(world.SHAPES), len(world.MOTIONS), len(world.BACKGROUNDS)]
    heads = nn.ModuleList(nn.Linear(model.config.d_model, n) for n in classes)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-3, fused=True)
    parts = {"t5": model, "heads": heads, "optimizer": optimizer}
    run = RunState(folder, "text", parts, seed=4)
    while run.step < TEXT_STEPS:
        set_rate(optimizer, schedule(run.step, TEXT_STEPS, 3e-3))
        picked = [choices[i] for i in run.rng.integers(len(choices), size=64)]
        ids, mask = tokenizer.batch([world.random_caption(a, run.rng) for a in picked])
        labels = torch.tensor([a.indices for a in picked])
        hidden = model(ids, mask)
        hidden = hidden + 0.1 * torch.randn_like(hidden)
        keep = mask.bool()
        losses, hits = [], []
        for i, head in enumerate(heads):
            logits, target = head(hidden)[keep], labels[:, i, None].expand(mask.shape)[keep]
            losses.append(F.cross_entropy(logits, target))
            hits.append((logits.argmax(-1) == target).float().mean())
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        run.step += 1
        if run.step % 100 == 0:
            run.log(loss=loss.item(), accuracy=torch.stack(hits).min().item())
    run.save()


class CaptionBank:
    """Frozen embeddings of random captions: `variants` paraphrases of every combination."""

    def __init__(
        self, model: T5Encoder, tokenizer: Tokenizer, choices: list[world.Attributes], variants: int
    ) -> None:
        rng = np.random.default_rng(5)
        self.rows: list[list[Tensor]] = []
        for attributes in choices:
            texts = [world.caption(attributes)]
            texts += [world.random_caption(attributes, rng) for _ in range(variants - 1)]
            ids, mask = tokenizer.batch(texts)
            with torch.no_grad():
                hidden = model(ids, mask)
            self.rows.append([h[: int(m.sum())].clone() for h, m in zip(hidden, mask, strict=True)])

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Embeddings [B, 32, C] and mask [B, 32] for combinations; one length compiles once."""
        y = torch.zeros(len(indices), LONGEST, self.rows[0][0].shape[-1])
        mask = torch.zeros(len(indices), LONGEST, dtype=torch.bool)
        for i, index in enumerate(indices):
            row = self.rows[index][rng.integers(len(self.rows[index]))]
            y[i, : len(row)] = row
            mask[i, : len(row)] = True
        return y, mask
