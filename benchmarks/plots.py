"""Draws the plots of `results/` from its JSON files.

    python -m benchmarks.plots [NAME ...]

Without names, draws those whose data changed. Each picture holds a hash of its data, which
tests/invariants/test_plots.py compares. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import RESULTS

#: Colours that can be told apart by most, with the marks of the same kind.
BLUE, ORANGE, GREEN, RED = "#1f5fa8", "#d9730d", "#2b7a3d", "#b3262e"
PURPLE, GREY, PINK = "#7a4fb0", "#777777", "#c2408f"

#: Key of the hash among the texts of a png.
HASH = "data"

Row = Mapping[str, Any]
#: x, y and text of a label.
Label = tuple[float, float, str]


def draw_pareto(figure: Any, data: Mapping[str, Row]) -> None:
    """PSNR to exact, and share of correct videos, against speed."""
    result = data["pareto"]
    left, right = figure.subplots(1, 2)
    rows = [row for row in result["rows"] if row["psnr"] is not None]
    for kind, (name, mark, color) in KINDS.items():
        own = [row for row in rows if _kind(row["row"]) == kind]
        style = {"marker": mark, "color": color, "ls": "none", "ms": 7, "label": name}
        speeds = [row["speed"] for row in own]
        left.plot(speeds, [row["psnr"] for row in own], **style)
        right.plot(speeds, [100 * row["adherence"]["all"] for row in own], **style)
    ahead = sorted((r["speed"], r["psnr"]) for r in rows if r["row"] in result["front"])
    left.plot(*zip(*ahead, strict=True), "-", color="0.75", lw=2, zorder=0, label="best of all")
    presets = {row: f"preset {name}" for name, row in result["presets"].items()}
    named = [row for row in rows if row["row"] in presets or _kind(row["row"]) in ("lpl", "tdtm")]
    texts = [presets.get(row["row"]) or row["row"].replace("tdtm", "TDTM") for row in named]
    texts = [text.replace("lpl", "LPL") for text in texts]
    left.set(xlabel="speed of the denoising steps, × exact", ylabel="PSNR to the exact video, dB")
    right.set(xlabel="speed of the denoising steps, × exact", ylabel="correct videos, %")
    left.set_ylim(10, 64)
    right.set_ylim(0, 104)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8
    )
    figure.suptitle(
        "{model}, 64×64, {frames} frames, {steps} steps, {prompts} prompts".format(**result)
    )
    exact = next(row["adherence"]["all"] for row in result["rows"] if row["row"] == "exact")
    points = [
        (row["speed"], row["psnr"], row["adherence"]["all"], text)
        for row, text in zip(named, texts, strict=True)
    ]
    put_labels(left, [(speed, psnr, text) for speed, psnr, _, text in points])
    put_labels(right, [(speed, 100 * a, text) for speed, _, a, text in points if a < exact])


#: How a row of pareto.json begins → name, mark and colour; "" for combinations.
KINDS = {
    "lpl": ("LPL", "o", BLUE),
    "tdtm": ("TDTM", "v", RED),
    "step_cache every": ("step cache, every", "s", GREEN),
    "step_cache table": ("step cache, table", "*", ORANGE),
    "step_cache online": ("step cache, online", "D", PURPLE),
    "guidance": ("guidance cache, interval", "P", GREY),
    "": ("combinations", "X", PINK),
}


def _kind(name: str) -> str:
    return next((kind for kind in KINDS if kind and name.startswith(kind) and "+" not in name), "")


def draw_samplers(figure: Any, data: Mapping[str, Row]) -> None:
    """PSNR to the flow, and share of correct videos, against evaluations of the network."""
    rows = data["samplers"]["rows"]
    left, right = figure.subplots(1, 2)
    for name, mark, color in (("rflow", "o", BLUE), ("midpoint", "s", ORANGE), ("ab2", "D", GREEN)):
        own = [row for row in rows if row["sampler"] == name]
        style = {"marker": mark, "color": color, "label": name}
        counts = [row["evaluations"] for row in own]
        left.plot(counts, [row["psnr"] for row in own], **style)
        right.plot(counts, [100 * row["adherence"] for row in own], **style)
    ticks = sorted({row["evaluations"] for row in rows})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("evaluations of the network")
    left.set_ylabel("PSNR to the exact flow, dB")
    right.set(ylabel="correct videos, %", ylim=(0, 104))
    left.legend()


def draw_ondevice(figure: Any, data: Mapping[str, Row]) -> None:
    """PSNR to exact, and share of correct videos, against speed, of On-device Sora's techniques."""
    ((_, result),) = data.items()
    left, right = figure.subplots(1, 2)
    marks = {"exact": ("k", "o"), "LPL": (BLUE, "o"), "TDTM": (RED, "v"), "CI-DL": (GREEN, "s")}
    labels: tuple[list[Label], list[Label]] = ([], [])
    for row in result["rows"]:
        kind = next((kind for kind in marks if row["row"].startswith(kind)), "")
        color, mark = marks.get(kind if "+" not in row["row"] else "", (PINK, "X"))
        for axes, value, found in (
            (left, row["psnr"], labels[0]),
            (right, 100 * row["adherence"]["all"], labels[1]),
        ):
            if value is not None:
                axes.plot(row["speed"], value, mark, color=color, ms=7)
                found.append((row["speed"], value, row["row"]))
    left.set(xlabel="speed of the denoising steps, × exact", ylabel="PSNR to the exact video, dB")
    right.set(xlabel="speed of the denoising steps, × exact", ylabel="correct videos, %")
    right.set_ylim(-4, 108)
    figure.suptitle("{model}, 64×64, {frames} frames, {steps} steps".format(**result))
    for axes, found in zip((left, right), labels, strict=True):
        axes.margins(x=0.12, y=0.15)
        put_labels(axes, found)


def draw_leaps(figure: Any, data: Mapping[str, Row]) -> None:
    """Cosine of successive velocities, and how near leaps come, against the step."""
    result = data["leaps"]
    left, right = figure.subplots(1, 2)
    for (frames, curve), color in zip(result["curves"].items(), (GREEN, BLUE, PURPLE), strict=True):
        steps = range(result["first"], result["first"] + len(curve["t"]))
        name = "image" if frames == "1" else f"{frames} frames"
        left.plot(steps, curve["cosine"], color=color, label=name)
        for order, line in ((0, "-"), (1, "--")):
            label = name if order == 0 else f"{name}, order 1"
            right.plot(steps, curve[f"order {order}"], line, color=color, label=label)
    left.set(xlabel="step", ylabel="cosine of a velocity and the one before", ylim=(None, 1.001))
    right.set(xlabel="steps before the leap", ylabel="dB of the latents to those of all steps")
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.suptitle("{model}, 64×64, {steps} steps, {prompts} prompts".format(**result))


def draw_memory(figure: Any, data: Mapping[str, Row]) -> None:
    """Seconds and PSNR against memory, at full size."""
    rows, quality = data["memory"]["rows"], data["quantized"]["shapes"]["rows"]
    left, right = figure.subplots(1, 2)
    psnr = {
        int(words[0]): row["psnr"]
        for row in quality
        if (words := row["row"].split())[1:] == ["bits"]
    }
    labels: list[Label] = []
    for bits, (color, mark) in {16: (BLUE, "o"), 8: (ORANGE, "s"), 4: (GREEN, "D")}.items():
        own = sorted((row["peak"] / 1e9, row["processor"]) for row in rows if row["bits"] == bits)
        if not own:
            continue
        style = {"marker": mark, "color": color, "ms": 7, "label": f"{bits} bits"}
        left.plot(*zip(*own, strict=True), **style)
        peaks = [peak for peak, _ in own]
        value = psnr.get(bits, EXACT_DB)
        right.plot(peaks, [value] * len(peaks), **style)
        text = f"{bits} bits: {value:.0f} dB" if bits in psnr else "16 bits: the same video"
        labels.append((peaks[-1], value, text))
    left.set(xlabel="peak memory of the process, GB", ylabel="processor seconds, text to file")
    right.set(xlabel="peak memory of the process, GB", ylabel="PSNR to the video at 16 bits, dB")
    left.set_ylim(0, 1.15 * max(row["processor"] for row in rows))
    right.set_ylim(20, EXACT_DB + 8)
    right.set_yticks([20, 30, 40, 50, 60, EXACT_DB], ["20", "30", "40", "50", "60", "exact"])
    for axes in (left, right):
        axes.set_xlim(0, None)
    left.legend(loc="lower right")
    figure.suptitle(
        "Left: full size (T5-XXL, STDiT3-XL/2, random weights), 144p image, 2 steps, on a CPU. "
        "Right: PSNR of the bundled model"
    )
    put_labels(right, labels)


def draw_quantized(figure: Any, data: Mapping[str, Row]) -> None:
    """PSNR against the bytes that the published networks would have, and errors of codebooks."""
    result = data["quantized"]
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    kinds = {"affine": (BLUE, "o"), "not rotated": (GREY, "x"), "by layer": (ORANGE, "s")}
    kinds |= {"small floats": (GREEN, "^"), "each network": (PURPLE, "D"), "gptq": (RED, "*")}
    kinds |= {"gptq, distilled": (RED, "P")}
    labels: list[Label] = []
    for kind, (color, mark) in kinds.items():
        own = [row for row in result["shapes"]["rows"] if _form_kind(row["row"]) == kind]
        if not own:
            continue
        points = [(sum(row["published_bytes"].values()) / 1e9, row["psnr"]) for row in own]
        style = {"marker": mark, "color": color, "ls": "none", "ms": 7, "label": kind}
        left.plot(*zip(*points, strict=True), **style)
        labels += [(*at, row["row"].split(",")[0]) for at, row in zip(points, own, strict=True)]
    left.set(xlabel="T5 and STDiT of Open-Sora 1.2 on disk, GB", ylabel="PSNR to plain, dB")
    for name, color in (("codes", RED), ("groups", BLUE)):
        own = [row for row in result["codebooks"] if name in row["form"] and row["bits"] < 4]
        points = [(row["bits"], 100 * row["error"]) for row in own]
        right.plot(*zip(*points, strict=True), "o", color=color, label=name)
    right.set(xlabel="bits per weight, scales counted", ylabel="error of the weights, %")
    right.legend(["codebooks (VQ)", "affine"])
    left.legend(loc="lower right")
    figure.suptitle("Bundled model, {prompts} prompts, {steps} steps".format(**result["shapes"]))
    put_labels(left, labels)


def _form_kind(name: str) -> str:
    if ", gptq" in name:
        return name.partition(", ")[2]
    if "not rotated" in name or name.startswith("mixed"):
        return "not rotated" if "not" in name else "by layer"
    if name.startswith(("mx", "nv")):
        return "small floats"
    return "each network" if "=" in name else "affine" if "bits" in name else ""


#: Where a plot in dB shows what is exact.
EXACT_DB = 70

#: Picture → drawing, names of its JSON files, size in inches.
PLOTS: dict[str, tuple[Callable[[Any, Mapping[str, Row]], None], tuple[str, ...], float]] = {
    "pareto": (draw_pareto, ("pareto",), 5.0),
    "samplers": (draw_samplers, ("samplers",), 4.0),
    "ondevice": (draw_ondevice, ("ondevice",), 4.6),
    "ondevice_51": (draw_ondevice, ("ondevice_51",), 4.6),
    "leaps": (draw_leaps, ("leaps",), 4.4),
    "memory": (draw_memory, ("memory", "quantized"), 4.4),
    "quantized": (draw_quantized, ("quantized",), 4.8),
}

_SIDES = [(6, 4, "left"), (-6, 4, "right"), (6, -11, "left"), (-6, -11, "right")]
_SIDES += [(0, 9, "center"), (0, -17, "center"), (6, 14, "left"), (-6, 14, "right")]
_SIDES += [(6, -21, "left"), (-6, -21, "right"), (6, 24, "left"), (-6, 24, "right")]


def put_labels(axes: Any, labels: Iterable[Label]) -> None:
    """Write each label beside its point, where it covers no mark and no other label."""
    from matplotlib.text import Text

    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    marks = [axes.transData.transform(point) for line in axes.lines for point in line.get_xydata()]
    taken: list[Any] = []
    frame = axes.get_window_extent(renderer)
    for x, y, text in sorted(labels):
        best: tuple[float, Any, Any] | None = None
        for dx, dy, side in _SIDES:
            line = {"arrowstyle": "-", "lw": 0.5, "color": "0.6"} if abs(dy) > 11 else None
            style = {"textcoords": "offset points", "fontsize": 8, "ha": side, "arrowprops": line}
            note = axes.annotate(text, (x, y), (dx, dy), **style)
            note.set_in_layout(False)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(1)
            cost = sum(box.overlaps(other) for other in taken)
            cost += sum(box.padded(2).contains(*mark) for mark in marks)
            cost += 3 * (box.x0 < frame.x0 or box.x1 > frame.x1)
            cost += 3 * (box.y0 < frame.y0 or box.y1 > frame.y1)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, note, box)
            else:
                note.remove()
        assert best is not None
        taken.append(best[2])


def fingerprint(name: str, folder: Path = RESULTS) -> str:
    """Hash of the data of a picture, without the machine they were measured on."""
    data = {source: _read(folder, source) for source in PLOTS[name][1]}
    plain = {key: {k: v for k, v in value.items() if k != "machine"} for key, value in data.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def drawn_fingerprint(picture: Path) -> str:
    """The hash that a picture holds; empty if it has none."""
    if not picture.exists():
        return ""
    with Image.open(picture) as image:
        return str(image.info.get(HASH, ""))


def _read(folder: Path, name: str) -> dict[str, Any]:
    found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def draw(name: str, target: Path | None = None) -> None:
    """Draw one picture, with the hash of its data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    function, sources, height = PLOTS[name]
    figure = Figure(figsize=(12, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    function(figure, {source: _read(RESULTS, source) for source in sources})
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    target = target or RESULTS / f"{name}.png"
    figure.savefig(target, dpi=110, metadata={HASH: fingerprint(name), "Software": None})
    # 64 colours are enough for lines and marks, and a quarter of the bytes.
    with Image.open(target) as image:
        small = image.convert("RGB").quantize(64)
    info = _png_info(fingerprint(name))
    small.save(target, pnginfo=info, optimize=True)


def _png_info(text: str) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(HASH, text)
    return info


def main(words: Sequence[str]) -> None:
    stale = [
        name for name in PLOTS if drawn_fingerprint(RESULTS / f"{name}.png") != fingerprint(name)
    ]
    for name in words or stale:
        draw(name)
        print(RESULTS / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
