"""Text of mlx_sora/request/keywords.py, which follows from the fields of the requests."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from mlx_sora.request.edit import EditRequest
from mlx_sora.request.generation import GenerationRequest, options
from mlx_sora.request.options import as_amount, as_images, as_path, as_paths, as_videos

FILE = Path(__file__).parents[2] / "mlx_sora" / "request" / "keywords.py"

HEAD = '''\
"""Keywords of `Pipeline`, typed for editors and type checkers.

Generated from the fields of the requests: python -m tests.invariants.readme
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import TypeAlias

    import numpy as np
    from PIL import Image

    from mlx_sora.request.techniques import GuidanceCache, GuidanceInterval, Lpl, StepCache, Tdtm
    from mlx_sora.video import Video

    FilePath: TypeAlias = str | os.PathLike[str]

    #: A file, a PIL image, pixels [H, W, 3] (uint8, or floats 0 to 1), or a `Video` of one frame.
    Picture: TypeAlias = FilePath | Image.Image | np.ndarray | Video

    #: A file, a `Video`, pixels [F, H, W, 3], or a list of pictures.
    Footage: TypeAlias = FilePath | Video | np.ndarray | Sequence[Image.Image | np.ndarray]

    #: Each picture stands by itself or in (picture, frame, strength); frames are numbers, first or
    #: last.
    Pictures: TypeAlias = Picture | Sequence[Picture | Sequence[Any]]

    #: Each video stands by itself or in (video, before or after, frames to use, strength).
    Footages: TypeAlias = Footage | Sequence[Footage | Sequence[Any]]
'''

#: Types of values with a reader of their own.
_TYPES = {
    as_path: "FilePath | None",
    as_paths: "FilePath | Sequence[FilePath]",
    as_images: "Pictures",
    as_videos: "Footages",
    as_amount: "str | int | None",
}


def keyword_type(name: str) -> str:
    """The type of a keyword: that of its field, or of what its reader takes."""
    option = options()[name]
    field = next(f for f in fields(GenerationRequest) if f.name == name)
    if option.choices:
        choices = ", ".join(f'"{choice}"' for choice in option.choices)
        return f"Literal[{choices}]" + (" | None" if option.default is None else "")
    return _TYPES.get(option.parse, str(field.type))


def typed_dict(head: str, names: list[str]) -> str:
    lines = [f"    {name}: {keyword_type(name)}" for name in names]
    return "\n".join([head, *lines]) + "\n"


def keywords() -> str:
    """The whole file."""
    own = options()
    shared = [n for n, o in own.items() if {"edit", "generate"} <= {*o.tasks} and n != "prompt"]
    rest = [n for n, o in own.items() if "generate" in o.tasks and n not in shared]
    inject = next(str(f.type) for f in fields(EditRequest) if f.name == "inject_steps")
    return "\n\n".join(
        [
            HEAD,
            typed_dict(
                "class SharedKeywords(TypedDict, total=False):\n"
                '    """Options of generations and edits."""\n',
                shared,
            ),
            typed_dict(
                "class GenerationKeywords(SharedKeywords, total=False):\n"
                '    """Options of `GenerationRequest`, but for the prompt."""\n',
                [n for n in rest if n != "prompt"],
            ),
            "class EditKeywords(SharedKeywords, total=False):\n"
            '    """Options of `EditRequest`, but for the video and both prompts."""\n\n'
            f"    inject_steps: {inject}\n",
            typed_dict(
                "class ReconstructionKeywords(TypedDict, total=False):\n"
                '    """Options of a reconstruction."""\n',
                [n for n, o in own.items() if "reconstruct" in o.tasks],
            ),
        ]
    )
