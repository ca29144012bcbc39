"""Flags of Open-Sora 1.2's scripts/inference.py for `generate`, and the names of its files.

They are hidden from the help; mlx_sora/cli/README.md lists them beside the flags of `generate`.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mlx_sora.cli.flags import Parser, argument_type
from mlx_sora.errors import UsageError
from mlx_sora.geometry import (
    MICRO_FRAME_SIZE,
    get_image_size,
    latent_frames,
    parse_frames,
    public_ratio,
)
from mlx_sora.request.generation import GenerationRequest, options
from mlx_sora.request.options import MAX_NAME
from mlx_sora.text.prompt import split_directives
from mlx_sora.video.output_template import escape_template

log = logging.getLogger(__name__)

#: Flags that set an option of ours.
_ALIASES = {
    "num_sampling_steps": "steps",
    "aes": "aesthetic",
    "flow": "motion",
    "camera_motion": "camera",
}

#: Flags without a counterpart that change no video, and why not.
_WITHOUT_EFFECT = {
    "flash_attn": "MLX has its own attention",
    "layernorm_kernel": "MLX has its own norms",
    "batch_size": "videos are made one after the other",
}

#: Flags that are refused, and what to do instead.
_REFUSED = {
    "ckpt_path": "Make a model folder with mlx_sora convert, and give --model FOLDER.",
    "prompt_generator": "Give --prompt TEXT, and --enhance-prompt to have it written out.",
}

#: Number of latent frames that one chunk has, in which Open-Sora counts --condition-frame-length.
_CHUNK_LATENTS = latent_frames(MICRO_FRAME_SIZE)

#: Most seeds of a prompt.
MAX_SEEDS = 1000

#: Longest name of a file before its suffix and a partial file's, in bytes.
_MAX_STEM = MAX_NAME - 40


@dataclass(frozen=True)
class Samples:
    """Samples that are made of each prompt, and their files.

    count: samples of a prompt, with seeds that follow each other. folder, name: of the files; None
    leaves them to the request. start, end: first prompt of a file, and the one after the last.
    references, strategies: of each prompt; empty for none.
    """

    count: int = 1
    folder: str | None = None
    name: str | None = None
    prompt_as_path: bool = False
    start: int | None = None
    end: int | None = None
    references: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()

    @property
    def first(self) -> int:
        """Number of the first prompt in the names of files."""
        return self.start or 0

    def select(self, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Return the lines from `start` to `end`."""
        return islice(lines, self.first, self.end)

    def check_prompts(self, count: int) -> None:
        """Raise UsageError unless each of `count` prompts has its references and strategy."""
        if not count and (self.first or self.end is not None):
            raise UsageError(
                "No prompt of the file lies between --start-index and --end-index.",
                "They count its prompts from 0; --end-index is the one after the last.",
            )
        for flag, values in (
            ("--reference-path", self.references),
            ("--mask-strategy", self.strategies),
        ):
            if values and len(values) != count:
                raise UsageError(
                    f"{flag} has {len(values)} values for {count} prompts.",
                    'Give one for each prompt, "" for none.',
                )

    def of_prompt(self, place: int, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the options of the samples of prompt number `place`, counted from 0.

        values: all options; seed: a list, if it is set.
        """
        found = dict(values)
        for name, each in (("references", self.references), ("mask_strategy", self.strategies)):
            if place < len(each):
                found[name] = each[place]
        samples = [found | seed for seed in self._seeds(found)]
        if not self._names_files:
            return samples
        for number, sample in enumerate(samples):
            end = "" if self.count == 1 else f"-{number}"
            sample.setdefault("output", self._output(self.first + place, sample, end))
        return samples

    @property
    def _names_files(self) -> bool:
        named = (self.folder, self.name, self.start)
        return self.prompt_as_path or any(value is not None for value in named)

    def _seeds(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the option `seed` of each sample; of a single one, nothing that changes it."""
        if self.count == 1:
            return [{}]
        seeds = values.get("seed")
        if isinstance(seeds, list) and len(seeds) > 1:
            raise UsageError(
                "--num-sample and several seeds exclude each other.", "Give the first seed."
            )
        first = GenerationRequest(seed=seeds[0] if seeds else None).with_seed().seed
        assert first is not None, "with_seed sets one"
        return [{"seed": [first + number]} for number in range(self.count)]

    def _output(self, number: int, values: Mapping[str, Any], end: str) -> str:
        """Return the output template of a sample, as get_save_path_name of Open-Sora names it."""
        text = split_directives(str(values.get("prompt", "")))[0]
        name = self.name or ("" if self.prompt_as_path else "sample")
        stem = name + (text if self.prompt_as_path else f"_{number:04d}") + end
        if "/" in stem or len(stem.encode()) > _MAX_STEM:
            fix = "Leave out --prompt-as-path." if self.prompt_as_path else "Change --sample-name."
            raise UsageError(f"{stem!r} cannot be the name of a file.", fix)
        if "." in stem:  # which would begin a suffix
            frames = values.get("num_frames")
            stem += ".png" if frames is not None and parse_frames(frames) == 1 else ".mp4"
        return escape_template(os.path.join(self.folder or "", stem))


#: One sample of each prompt.
ALL_PROMPTS = Samples()


def add_opensora_flags(parser: Parser) -> None:
    """Add the flags of Open-Sora, hidden. One that is not typed is absent from the namespace."""
    for name, more in _flags().items():
        parser.add_argument(
            _flag(name), dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **more
        )


def _flags() -> dict[str, dict[str, Any]]:
    """Return what argparse is to know of each flag, by its name in the namespace."""
    found: dict[str, dict[str, Any]] = {
        name: {"type": argument_type(options()[option])} for name, option in _ALIASES.items()
    }
    counts = "num_sample start_index end_index condition_frame_length save_fps frame_interval"
    found |= {name: {"type": _count} for name in (*counts.split(), "batch_size")}
    switches = "llm_refine watermark flash_attn layernorm_kernel"
    found |= {name: {"type": _switch} for name in switches.split()}
    paths = "save_dir sample_name prompt_path ckpt_path"
    found |= {name: {"type": os.path.expanduser} for name in paths.split()}
    return found | {
        "image_size": {"type": int, "nargs": 2, "metavar": ("H", "W")},
        "reference_path_list": {"nargs": "+"},
        "mask_strategy_list": {"nargs": "+"},
        "prompt_as_path": {"action": "store_true"},
        "prompt_generator": {},
    }


def read_samples(
    args: argparse.Namespace, flags: Mapping[str, Any]
) -> tuple[dict[str, Any], Samples]:
    """Return the options with those of Open-Sora's flags, and the samples that these ask for.

    Sets `prompt_file` and `enhance_prompt` of `args`. Raises UsageError for a flag that cannot be
    followed; it names ours.
    """
    typed = {name: value for name, value in vars(args).items() if name in _flags()}
    if not typed:
        return dict(flags), ALL_PROMPTS
    _refuse(typed)
    for name, reason in _WITHOUT_EFFECT.items():
        if name in typed:
            log.warning("%s has no effect here: %s", _flag(name), reason)
    found = _options(typed)
    for name in found:
        if name in flags:
            raise UsageError(
                f"{options()[name].label} is set twice, also by a flag of Open-Sora.", "Give one."
            )
    merged = {**flags, **found}
    _check_rates(typed, merged)
    if "prompt_path" in typed:
        if args.prompt_file is not None:
            raise UsageError("--prompt-path and --prompt-file exclude each other.", "Give one.")
        args.prompt_file = typed["prompt_path"]
    if typed.get("llm_refine") and args.enhance_prompt is None:
        args.enhance_prompt = ""  # the template
    if "aspect_ratio" in merged:
        _warn_of_aspect_ratio(merged)
    if "output" in merged and (named := {"save_dir", "sample_name", "prompt_as_path"} & set(typed)):
        raise UsageError(f"--output and {_flag(min(named))} exclude each other.", "Give only one.")
    count = typed.get("num_sample", 1)
    if not 1 <= count <= MAX_SEEDS:
        raise UsageError(f"--num-sample {count} is out of range.", f"Give 1 to {MAX_SEEDS}.")
    return merged, Samples(
        count=count,
        folder=typed.get("save_dir"),
        name=typed.get("sample_name"),
        prompt_as_path="prompt_as_path" in typed,
        start=typed.get("start_index"),
        end=typed.get("end_index"),
        references=tuple(typed.get("reference_path_list", ())),
        strategies=tuple(typed.get("mask_strategy_list", ())),
    )


def _options(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that flags set."""
    found = {option: typed[name] for name, option in _ALIASES.items() if name in typed}
    if "image_size" in typed:
        found["height"], found["width"] = typed["image_size"]
    if "condition_frame_length" in typed:
        length = typed["condition_frame_length"]
        chunks, rest = divmod(length, _CHUNK_LATENTS)
        if rest or not chunks:
            raise UsageError(
                f"--condition-frame-length {length} is not a multiple of {_CHUNK_LATENTS} latent "
                "frames.",
                f"Give --condition-frames, in frames: a multiple of {MICRO_FRAME_SIZE}.",
            )
        found["condition_frames"] = chunks * MICRO_FRAME_SIZE
    return found


def _refuse(typed: Mapping[str, Any]) -> None:
    """Raise UsageError for a flag without a counterpart that would change the video."""
    for name, fix in _REFUSED.items():
        if name in typed:
            raise UsageError(f"{_flag(name)} of Open-Sora has no counterpart.", fix)
    if typed.get("watermark"):
        raise UsageError("--watermark is not supported.", "Leave it out; ffmpeg can add one.")


def _check_rates(typed: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise UsageError if the file is to play at another rate than the model is conditioned on."""
    interval = typed.get("frame_interval", 1)
    rate = typed.get("save_fps")
    if interval != 1 or rate not in (None, values.get("fps")):
        flag = "--frame-interval" if rate is None else f"--save-fps {rate}"
        raise UsageError(
            f"{flag}: a video plays at the rate that the model is conditioned on.",
            f"Give --fps {rate or 'N'}, which sets both, in its place or beside it.",
        )


def _warn_of_aspect_ratio(values: Mapping[str, Any]) -> None:
    """Warn that a ratio is width:height, unless both readings agree."""
    ratio, resolution = values["aspect_ratio"], values.get("resolution")
    try:
        taken, other = get_image_size(resolution or "240p", ratio), public_ratio(ratio)
        swapped = get_image_size(resolution or "240p", other)
    except UsageError:
        return  # which `validate` raises again
    if other != ratio:
        sizes = ("", "") if resolution is None else (f" ({taken})", f" ({swapped})")
        text = "--aspect-ratio %s is taken as width:height%s; Open-Sora's %s%s is --aspect-ratio %s"
        log.warning(text, ratio, sizes[0], ratio, sizes[1], other)


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_list").replace("_", "-")


def _count(text: str) -> int:
    """Read a number from 0 on."""
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, not {text[:80]!r}")
    return int(text)


def _switch(text: str) -> bool:
    """Read True or False, as Open-Sora writes them."""
    values = {
        **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
        **dict.fromkeys(("no", "false", "f", "n", "0"), False),
    }
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be True or False, not {text[:80]!r}")
    return values[text.lower()]
