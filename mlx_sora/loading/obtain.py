"""The published model, quantised: downloaded, then converted, each resumed where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_sora.loading.convert import Converted, convert
from mlx_sora.loading.download import Outcome, Progress, Report, covers, download, model_at, pin
from mlx_sora.loading.folders import filesystem, refuse_strangers
from mlx_sora.loading.hub import Hub
from mlx_sora.loading.layout import Choice
from mlx_sora.loading.model_folder import PUBLISHED, QUANTIZED, ModelFolder
from mlx_sora.loading.provenance import FILE, Provenance
from mlx_sora.loading.quantize import Quantization
from mlx_sora.loading.sources import Source

#: What a conversion may take, as a share of the download: half if that is of 16 bits already.
_SHARE = {8: 0.6, 4: 0.4}


@dataclass(frozen=True)
class Obtained:
    """downloaded: None where nothing had to be; removed: whether the original is gone."""

    downloaded: Outcome | None
    converted: Converted
    removed: bool


def download_quantized(
    root: Path,
    sources: Sequence[Source],
    hub: Hub,
    report: Report,
    bits: int,
    *,
    check: bool = False,
    remove_original: bool = False,
) -> Obtained:
    """Make `root`/opensora-1.2-8bit (or -4bit) the quantised model of `sources`.

    If it is there, of these sources and whole (check: by checksums), nothing is asked of a server.
    remove_original: the download goes once the quantised model is whole. Raises WeightsError.
    """
    target, original = root / QUANTIZED[bits], root / PUBLISHED
    present = model_at(target)
    outcome: Outcome | None = None
    if present is not None and _is(present, sources, bits):
        damaged = (
            present.altered(target, lambda *facts: report(Progress("check", *facts)))
            if check
            else present.missized(target)
        )
        if not damaged:
            size = sum(origin.bytes for origin in present.files.values())
            converted = Converted(target, size, len(present.files), False)
            return Obtained(None, converted, remove_original and _remove(original))
    outcome = download(root, sources, hub, report, check=check, spare=_SHARE[bits])
    converted = convert(
        ModelFolder.open(outcome.path),
        target,
        Choice(bits),
        overwrite=present is not None,
        check=check,
        watch=lambda *facts: report(Progress(*facts)),
    )
    return Obtained(outcome, converted, remove_original and _remove(original))


def _is(present: Provenance, sources: Sequence[Source], bits: int) -> bool:
    """Whether what is there was made of `sources` with so many bits."""
    same = present.conversion.get("quantization") == Quantization(bits).to_dict()
    return same and all(covers(present, pin(source, present)) for source in sources)


def _remove(original: Path) -> bool:
    """Remove the download, if it is there. Raises WeightsError if its folder holds other files."""
    if not original.exists():
        return False
    folder = original.resolve()
    known = Provenance.read(folder)
    with filesystem(folder, "Remove it by hand."):
        refuse_strangers(folder, {*known.files, FILE} if known else ())
        shutil.rmtree(folder)
    return True
