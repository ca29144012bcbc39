"""Enhanced prompts: short ones written out, by a template or by a local language model (mlx-lm).

Open-Sora's captions describe a scene in sentences, so that prompts of that kind are followed best.
A language model runs in a process of its own: its memory is free again before T5 is planned and
read, and an end of it ends nothing else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from mlx_sora.errors import MlxSoraError, UsageError, printable
from mlx_sora.text.prompt import split_directives, split_scenes, split_segments

#: What the language model is to do; the prompt follows.
INSTRUCTION = (
    "Rewrite the prompt below as a caption for a text-to-video model. Stay with its subject, its "
    "action and its place, and invent no other people or events. Add what a camera would see: "
    "looks of the subject, how it moves, surroundings, light, and how the camera moves. Write two "
    "to four plain sentences of English in the present tense, without a heading, a list or quotes. "
    "Translate a prompt in another language. Answer with the caption only."
)

#: What the template adds, to prompts of up to LONG words.
TEMPLATE = (
    "{prompt}. The scene is shown in sharp detail and natural light, with smooth, realistic motion "
    "in front of a clear background. The camera follows the subject steadily."
)
LONG = 30

#: Most tokens that the language model writes, and most characters that are taken of them: T5 reads
#: 300 tokens.
MAX_TOKENS, MAX_CHARACTERS = 220, 1000

#: Name of the pip extra with mlx-lm.
_EXTRA = 'pip install "mlx_sora[enhance]"'


def enhance_prompt(prompt: str, language_model: str = "", guide: str = "") -> str:
    """Return a prompt written out, each of its scenes and segments for itself; its settings stay.

    language_model: a folder or a name that mlx-lm takes; "" uses the template. guide: what the
    video model can draw; with one, the template changes nothing. Raises UsageError without mlx-lm
    and MlxSoraError if it fails.
    """
    text, _ = split_directives(prompt)
    settings = prompt[len(text) :]

    def enhance(scene: str) -> str:
        if segments := split_segments(scene):
            return " ".join(f"[{start}-{stop}] {enhance(body)}" for start, stop, body in segments)
        if not scene.strip():
            return scene
        if language_model:
            return _ask(language_model, scene.strip(), guide)
        return scene if guide else _fill_template(scene)

    if not text.startswith("|0|"):
        return enhance(text) + settings
    return "".join(f"|{s.start}|{enhance(s.text)}" for s in split_scenes(text)) + settings


def _fill_template(scene: str) -> str:
    if len(scene.split()) > LONG:
        return scene
    return TEMPLATE.format(prompt=scene.strip().rstrip(".!,;: "))


def _ask(language_model: str, scene: str, guide: str) -> str:
    """Return what the language model makes of a scene."""
    if find_spec("mlx_lm") is None:
        raise UsageError(
            "--enhance-prompt with a language model needs mlx-lm.",
            f"Install it: {_EXTRA}. Without a model, --enhance-prompt uses a template.",
        )
    model = os.path.expanduser(language_model)
    if not Path(model).is_dir() and model.startswith((".", "/")):
        raise UsageError(f"There is no language model in {model}.", "Give a folder or a name.")
    limits = f" The video model draws nothing but this: {guide}" if guide else ""
    words = ["generate", "--model", model, "--prompt", "-", "--max-tokens", str(MAX_TOKENS)]
    words += ["--temp", "0", "--verbose", "False"]
    words += ["--chat-template-config", json.dumps({"enable_thinking": False})]
    result = subprocess.run(
        [sys.executable, "-m", "mlx_lm", *words],
        input=f"{INSTRUCTION}{limits}\n\nPrompt: {scene}",
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = printable(lines[-1].strip() if lines else f"exit code {result.returncode}", 300)
        raise MlxSoraError(
            f"mlx-lm failed with {language_model}: {reason}",
            "Give --enhance-prompt another model, or none for a template.",
        )
    answer = _clean(result.stdout)
    if not answer:
        raise MlxSoraError(
            f"{language_model} wrote nothing about the prompt.", "Try another model, or none."
        )
    return answer


def _clean(answer: str) -> str:
    """Return an answer as one line without thoughts, quotes and marks that prompts use."""
    text = re.sub(r"<think>.*?(</think>|$)", "", answer, flags=re.DOTALL)
    text = " ".join(text.translate(str.maketrans("{}|", "(),")).split()).strip("\"'` ")
    text = "".join(c for c in text if c.isprintable())
    if len(text) > MAX_CHARACTERS:
        cut = text[:MAX_CHARACTERS]
        text = cut[: cut.rfind(".") + 1] or cut[: cut.rfind(" ")] or cut
    return text
