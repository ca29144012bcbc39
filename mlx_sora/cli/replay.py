"""`--config-from-metadata`: the request inside a file, made again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_sora.errors import UsageError
from mlx_sora.request import GenerationRequest
from mlx_sora.text.prompt import split_settings
from mlx_sora.video.metadata import read_metadata, replay_options, same_media


def recorded_options(source: str, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the run that made the file `source`.

    Pictures and videos are taken over only where their content is that which was recorded: a file
    from somebody else could name any of ours, and its replay would show it. Raises UsageError.
    """
    record = read_metadata(source)
    options = replay_options(record, source)
    kept = {name: value for name, value in options.items() if name not in typed}
    present = [path for path in _media(kept) if Path(path).is_file()]
    same = same_media(record, present)
    for path in present:
        if path not in same:
            raise UsageError(
                f"{path} is not the file that {source} was made with.",
                "Give --image, --video or --prompt anew, as it was there.",
            )
    return options


def _media(options: Mapping[str, Any]) -> list[str]:
    """Pictures and videos that options ask for, also inside the prompt."""
    request = GenerationRequest.from_dict({"prompt": "", **options})
    written = split_settings(request.prompt)[1].reference_path or ""
    given = [item.path for item in request.images] + [item.path for item in request.videos]
    return [*given, *request.references, *filter(None, written.split(";"))]
