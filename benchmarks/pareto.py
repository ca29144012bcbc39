"""Speed against quality of every acceleration and of combinations, and the front they make.

    python -m benchmarks.pareto [--prompts 24] [--only WORD] [--json FILE]

Runs the bundled model on held-out prompts, one seed each, every row on the same ones and in turn.
Evaluations are counted as the blocks run: both halves of guidance in all blocks are one. Seconds of
the steps are the processor's, which others on the machine disturb less than a clock; those of the
stage, which also reads the weights, are a clock's. Speeds are medians of ratios to exact, prompt by
prompt; PSNR and SSIM compare with the exact video of the same seed; adherence is the share of
videos that show all that was asked. On the front are the rows that no other beats in both speed and
PSNR. `python -m benchmarks.plots` draws them. --renew measures nothing: it writes today's presets
and the front into the file. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

from benchmarks.common import RESULTS, scored_parser, write_json
from benchmarks.ondevice import EXACT, Made, Row, Tally, add, make, show, table
from benchmarks.shapes import world
from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.models.stdit3 import STDiT3Block
from mlx_sora.request.generation import technique_names
from mlx_sora.request.presets import PRESETS
from mlx_sora.request.techniques import OFF
from mlx_sora.sampling import loop

#: Steps of a run, for which the bundled model has a table.
STEPS = 30


#: Technique → modes that are run alone.
ALONE = {
    "lpl": ("fixed:15", "fixed:10", "fixed:6", "t:660"),
    "tdtm": ("5", "15", "all", "all:sites=cross", "table:1.05", "table:1.15"),
    "step_cache": (
        *("every:3", "every:4", "every:4,order=1", "every:6", "every:6,order=1"),
        *("every:4,warmup=3", "every:6,warmup=3", "every:6,warmup=3,order=1", "every:10,warmup=3"),
        *(f"table:{n}" for n in (12, 10, 8, 7, 6, 5, 4)),
        *(f"table:{n},order=1" for n in (12, 10, 8, 6)),
        *("online", "online:order=1", "online:threshold=0.35", "online:threshold=0.35,warmup=3"),
    ),
    "guidance_cache": ("every:5", "every:5,boost=1.15"),
    "guidance_interval": ("100,1000", "300,1000", "0,900"),
}
TOGETHER: tuple[dict[str, str], ...] = (
    {"lpl": "fixed:15", "guidance_cache": "every:5"},
    {"lpl": "t:220", "step_cache": "every:4,warmup=3"},
    {"lpl": "t:220", "step_cache": "online:threshold=0.35,warmup=3"},
    {"tdtm": "3", "step_cache": "every:4,warmup=3"},
    {"tdtm": "all:sites=cross", "step_cache": "every:4,order=1"},
    {"tdtm": "table:1.05", "step_cache": "every:4,order=1"},
    {"step_cache": "every:4", "guidance_cache": "every:5"},
    {"step_cache": "online", "guidance_cache": "every:5"},
    {"step_cache": "table:8", "guidance_cache": "every:5,after=0.1"},
    {"step_cache": "every:4", "guidance_interval": "100,1000"},
)


def rows() -> dict[str, dict[str, Any]]:
    """Row → options of the request."""
    alone = [{name: mode} for name, modes in ALONE.items() for mode in modes]
    presets = [_short(preset.values) for preset in PRESETS.values()]
    found = {_name(options): options for options in [*alone, *TOGETHER, *presets]}
    return {EXACT: {}, **{name: options for name, options in found.items() if name}}


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a preset, the techniques that are on: what else it says does not change the video."""
    return {k: v for k, v in values.items() if k in technique_names() and v != OFF}


def _name(options: Mapping[str, Any]) -> str:
    return " + ".join(f"{name} {mode}" for name, mode in options.items())


@dataclass
class Counter:
    """Samples that went through blocks, all blocks of the network."""

    samples: int = 0
    blocks: int = 0

    def evaluations(self) -> float:
        """As many as there would be with both halves in every block."""
        return self.samples / (2 * self.blocks)


@contextmanager
def counted(blocks: int) -> Iterator[Counter]:
    """Counts what goes through blocks inside."""
    counter, plain = Counter(blocks=blocks), STDiT3Block.__call__

    def call(self: STDiT3Block, x: Any, *rest: Any) -> Any:
        counter.samples += len(x)
        return plain(self, x, *rest)

    STDiT3Block.__call__ = call  # type: ignore[method-assign]
    try:
        yield counter
    finally:
        STDiT3Block.__call__ = plain  # type: ignore[method-assign]


@contextmanager
def by_processor() -> Iterator[None]:
    """Steps are timed in processor seconds inside."""
    clock = loop.time
    loop.time = SimpleNamespace(perf_counter=clock.process_time)  # type: ignore[assignment]
    try:
        yield
    finally:
        loop.time = clock


def gather(
    options: argparse.Namespace, modes: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Tally]]:
    """Every row on every prompt, told after each; the order of the rows turns, for fair times."""
    pipe = Pipeline.from_pretrained(options.model)
    blocks = 2 * int(pipe.model.config("transformer")["depth"])
    tallies, names = {name: Tally() for name in modes}, list(modes)
    for seed, truth in enumerate(world.split()[1][: options.prompts]):
        common = {"prompt": world.caption(truth), "seed": seed, "steps": STEPS, "num_frames": 17}
        made: dict[str, Made] = {}
        if seed == 0:
            make(pipe, GenerationRequest.from_dict(common))
        for name in names[seed % len(names) :] + names[: seed % len(names)]:
            with by_processor(), counted(blocks) as counter:
                one = make(pipe, GenerationRequest.from_dict({**common, **modes[name]}))
            made[name] = replace(one, evaluations=counter.evaluations())
        for name, tally in tallies.items():
            add(tally, made[name], made[EXACT])
        yield tallies


def front(found: list[Row]) -> list[str]:
    """Rows that no other beats in both speed and PSNR; exact first, then by speed."""
    best, names = float("-inf"), []
    for row in sorted(found, key=lambda row: -row.speed):
        if row.psnr is None or row.psnr > best:
            names.append(row.row)
            best = float("inf") if row.psnr is None else row.psnr
    return names[::-1]


def arguments() -> argparse.Namespace:
    parser = scored_parser(__doc__ or "", 24, RESULTS / "pareto.json")
    parser.add_argument("--only", default="", help="rows with one of these words, with commas")
    parser.add_argument("--renew", action="store_true", help="renew what follows from the rows")
    return parser.parse_args()


def presets() -> dict[str, str]:
    """Preset → the row that shows what it does."""
    return {name: _name(_short(preset.values)) or EXACT for name, preset in PRESETS.items()}


def renew(options: argparse.Namespace) -> None:
    """Presets, front and table of a file, as if it had just been measured."""
    result = json.loads(options.json.read_text(encoding="utf-8"))
    found = [Row(**row) for row in result["rows"]]
    result |= {"presets": presets(), "front": front(found)}
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(show(found))


def main() -> None:
    options = arguments()
    if options.renew:
        renew(options)
        return
    words, wanted = options.only.split(","), options.prompts
    modes = {k: v for k, v in rows().items() if k == EXACT or any(w in k for w in words)}
    setting = {"model": options.model, "frames": 17, "steps": STEPS, "presets": presets()}
    for done, tallies in enumerate(gather(options, modes), start=1):
        # Written each time: a long sweep that is broken off has measured something.
        options.prompts = done
        found = table(tallies, options, modes)
        result = {**setting, "prompts": done, "front": front(found)}
        write_json(options.json, {**result, "rows": [asdict(row) for row in found]})
        options.prompts = wanted
        print(f"{done} of {wanted} prompts", flush=True)
    print(show(found))
    print("front:", ", ".join(front(found)))


if __name__ == "__main__":
    main()
