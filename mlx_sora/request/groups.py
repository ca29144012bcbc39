"""Options of `GenerationRequest` about what a run writes; none changes what the video shows."""

from __future__ import annotations

from functools import partial
from typing import Any

from mlx_sora.request.options import as_bool, as_int, as_path, option

_option = partial(option, replay=False, group="output")


def output() -> Any:
    """Where the video goes."""
    return _option(
        None,
        as_path,
        "--output -o",
        "mp4, gif, webp or png; name_%04d.png or FOLDER/ writes one png per frame; "
        "{seed} {index} {prompt_slug} are filled in",
        metavar="FILE",
    )


def overwrite() -> Any:
    """Whether a file may be replaced."""
    return _option(False, as_bool, "--overwrite", "replace an existing output")


def embed_metadata() -> Any:
    """Whether the file tells what it was made with."""
    return _option(True, as_bool, "--embed-metadata", "record the request inside the file")


def metadata() -> Any:
    """Whether a file beside it tells."""
    return _option(False, as_bool, "--metadata", "also write the record as JSON beside the output")


def health_check() -> Any:
    """Whether what cannot become a video stops the run."""
    return _option(
        True, as_bool, "--health-check", "stop at NaN, exploding, flat, black or static results"
    )


def checkpoint_every() -> Any:
    """How often a run writes what it would need to go on."""
    return _option(
        None,
        as_int,
        "--checkpoint-every",
        "after every N steps, and at an interrupt, write OUTPUT.checkpoint.safetensors; the same "
        "command, or --resume, goes on from it; it goes when the video is finished",
        metavar="N",
    )


def preview_every() -> Any:
    """How often x0 is shown."""
    return _option(
        None,
        as_int,
        "--preview-every",
        "after every N steps, write what is foreseen to OUTPUT.preview.gif (.png of an image)",
        metavar="N",
    )
