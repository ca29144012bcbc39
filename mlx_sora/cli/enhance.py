"""`--enhance-prompt`: prompts written out before the run, and recorded with the typed ones."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from mlx_sora.errors import MlxSoraError, printable
from mlx_sora.request.generation import GenerationRequest


def add_enhance_flag(parser: argparse.ArgumentParser) -> None:
    """Add --enhance-prompt."""
    parser.add_argument(
        "--enhance-prompt",
        nargs="?",
        const="",
        type=os.path.expanduser,
        metavar="MODEL",
        help="write the prompt out, with a local language model (a folder or a name that mlx-lm "
        "takes) or, without MODEL, with a template; the result is printed and recorded",
    )


def enhance_requests(
    requests: Iterable[GenerationRequest], language_model: str
) -> tuple[list[GenerationRequest], list[str]]:
    """Return the requests with enhanced prompts, and a note for each prompt.

    Requests of a record whose prompt is enhanced stay as they are. Raises MlxSoraError.
    """
    from mlx_sora.text.enhance import enhance_prompt

    found, enhanced, notes = list[GenerationRequest](), dict[str, str](), list[str]()
    for request in requests:
        prompt = request.prompt
        if request.original_prompt is not None:
            notes.append("The recorded prompt is an enhanced one; it stays.")
        elif prompt not in enhanced:
            guide = _guide(request.model)
            enhanced[prompt] = enhance_prompt(prompt, language_model, guide)
            notes.append(f"enhanced prompt: {printable(enhanced[prompt])}")
            if enhanced[prompt] == prompt:
                reason = "the model draws only what it knows" if guide else "it is long enough"
                notes[-1] = f"The prompt stays as it is: {reason}."
        text = enhanced.get(prompt, prompt)
        changed = text != prompt and request.original_prompt is None
        found.append(replace(request, prompt=text, original_prompt=prompt) if changed else request)
    return found, list(dict.fromkeys(notes))


def _guide(model: str | None) -> str:
    """Return what a model draws, if that is limited."""
    from mlx_sora.loading.model_folder import find_model

    with suppress(MlxSoraError):  # which opening the model raises again
        card = find_model(model).card
        return card.guide() if card.patterns else ""
    return ""
