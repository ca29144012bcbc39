"""Warnings about texts: what says nothing to the model, and what it was not trained for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mlx_sora.errors import shell_words
from mlx_sora.loading.model_card import join_words
from mlx_sora.loading.model_folder import ModelFolder, other_model_hint
from mlx_sora.pipeline.settings import NEGATIVE, SOURCE, ResolvedRequest
from mlx_sora.text.prompt import Scores
from mlx_sora.text.tokenizer import Tokenizer


def ineffective_texts(subjects: Mapping[str, str], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a warning for each text, by its name, that gives the model nothing to show."""
    for name, text in subjects.items():
        if not text:
            yield f"Nothing is left of {name} after cleaning; the model gets no subject."
        elif not tokenizer.knows(text):
            yield f"The model knows no character of {name}; describe it in English."


def untrained_warning(
    model: ModelFolder, resolved: ResolvedRequest, tokenizer: Tokenizer, source: str | None = None
) -> Iterator[str]:
    """Yield one warning for all that the model was not trained for, if there is any.

    source: cleaned source prompt of an edit.
    """
    card, camera = model.card, Scores(camera=resolved.camera)
    prompts = {name: text for name, text in resolved.subjects.items() if tokenizer.knows(text)}
    negative = prompts.pop(NEGATIVE, "")
    prompts = {name: camera.append_to(text) for name, text in prompts.items()}
    prompts |= {} if source is None else {SOURCE: source}
    geometry = resolved.geometry
    found = list(card.mismatches(prompts, negative, geometry.size, geometry.num_frames))
    if found:
        yield (
            f"{resolved.model} was not trained for {join_words(found, 'and')}; it draws "
            f"{card.summary()}. Its words: python -m mlx_sora info "
            f"{shell_words('--model', model.argument)}. {other_model_hint()}"
        )
