"""Comparison of a model folder with its records: checksums, statistics, and the bundled model.

provenance.json has the checksum of each file, statistics.json what is in it. A file that was saved
again, in another layout but with the same content, is no fault. A model that bears the name of the
bundled one, in any type, is compared with that, too: records may be changed with the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from mlx_sora.errors import MlxSoraError, WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import BUNDLED, PARTS, ModelFolder, bundled_folder
from mlx_sora.loading.safetensors import FLOATS
from mlx_sora.manage import provenance as provenance_file
from mlx_sora.manage import statistics as statistics_file
from mlx_sora.manage.progress import ProgressCallback
from mlx_sora.manage.provenance import Provenance
from mlx_sora.manage.statistics import (
    ROUNDING,
    SAME,
    Statistics,
    TensorStatistics,
    measure_part,
    measure_settings,
)
from mlx_sora.utils.files import sha256
from mlx_sora.video.preview import PREVIEW_FILE

#: Checksum of the bundled model's statistics. `python -m tests.invariants.bundled` renews all.
BUNDLED_STATISTICS = "c36e1abb0cc120831135cb774cc660f2fa4f139495ad4b5bfd718e2452772f19"

#: Files that `generate` reads by their name.
_READ = {
    *("model_index.json", PREVIEW_FILE, "tokenizer/spiece.model"),
    *(f"{part}/config.json" for part in PARTS),
}

#: Suffixes of recorded files that matter: pictures and texts beside them do not.
_USED = (".json", ".safetensors", ".model")

#: Names in one line of the report.
_MOST_NAMES = 3

#: Smallest tensor in which a single value can be told from the others.
_MANY_VALUES = 1024


@dataclass(frozen=True)
class Diagnostic:
    """One line of the report. level: ok, note, warning or error; fix: the repair command."""

    level: str
    subject: str
    message: str
    fix: str = ""


@dataclass
class RecordChecker:
    """Comparison of the model in `path`. error: makes the Diagnostic of a fault in a part.

    statistics, reference: of this folder, and of the bundled model if this one bears its name.
    proven: files with the recorded checksum. unsettled: files of weights that are not as recorded,
    which the tensors excuse or not; with the fault.
    """

    path: Path
    quick: bool
    on_progress: ProgressCallback
    error: Callable[[str, str], Diagnostic]
    statistics: Statistics | None = None
    reference: Statistics | None = None
    proven: set[str] = field(default_factory=set)
    unsettled: dict[str, str] = field(default_factory=dict)

    def check_files(self) -> Iterator[Diagnostic]:
        """Compare sizes, settings and, unless quick, checksums."""
        yield from self._read_statistics()
        try:
            provenance = Provenance.read(self.path)
        except WeightsError as error:
            yield self.error("files", error.message)
            return
        differing: set[str] = set()
        if provenance is None:
            name = provenance_file.FILE
            if _is_bundled(self.path):
                yield self.error("files", f"{name} is missing.")
            else:
                yield Diagnostic("note", "files", f"no {name}, so there are no checksums.")
        else:
            yield from self._compare_files(provenance, differing)
            yield from self._name_unlisted(provenance)
        settings = measure_settings(self.path)
        if self.statistics is not None:
            found = _differing(settings, self.statistics.settings) - differing
            for name in sorted(found):
                message = f"{name} is not as {statistics_file.FILE} has it."
                yield self.error(name.split("/")[0], message)
            differing |= found
        if self.reference is not None:
            for name in sorted(_differing(settings, self.reference.settings) - differing):
                yield self.error(name.split("/")[0], f"{_other_model(f'the values of {name}')}.")

    def _read_statistics(self) -> Iterator[Diagnostic]:
        name = statistics_file.FILE
        try:
            self.statistics = Statistics.read(self.path)
        except WeightsError as error:
            yield self.error("files", error.message)
        if _is_bundled(self.path):
            file = self.path / name
            if self.statistics is not None and sha256(file) != BUNDLED_STATISTICS:
                yield self.error("files", f"{name} is not that of this version.")
            elif self.statistics is None and not file.exists():
                yield self.error("files", f"{name} is missing.")
            return
        if self.statistics is None and not (self.path / name).exists():
            yield Diagnostic("note", "statistics", f"no {name}, as download and convert write.")
        if _model_name(self.path) == BUNDLED:
            self.reference = _bundled_statistics()

    def _compare_files(self, provenance: Provenance, differing: set[str]) -> Iterator[Diagnostic]:
        """Compare with the record; add what is at fault to `differing`."""
        resized = provenance.damaged_files(self.path)
        damaged = provenance.damaged_files(self.path, not self.quick, self.on_progress)
        if not self.quick:
            self.proven = provenance.files.keys() - set(damaged)
        settings = measure_settings(self.path)
        for name in damaged:
            part, present = name.split("/")[0], (self.path / name).is_file()
            fault = f"does not have the recorded {'size' if name in resized else 'checksum'}"
            excuse = ""
            if present and not name.endswith(_USED):
                excuse = "; generate does not read it"
            elif present and self._has_content(name, settings.get(name)):
                excuse = ", but has the recorded content"
            elif self._has_tensors(part) and ".safetensors" in name:
                excuse = "; doctor without --quick compares its tensors" if self.quick else ""
                self.unsettled[name] = fault
            else:
                differing.add(name)
                yield self.error(part, f"{name} {fault}.")
            if excuse:
                yield Diagnostic("note", part, f"{name} {fault}{excuse}.")
        if not damaged:
            checks = "sizes" if self.quick else "sizes and checksums"
            origin = ", ".join(sorted({o.repo for o in provenance.files.values()}))
            yield Diagnostic("ok", "files", f"{checks} as recorded, from {origin}.")

    def _has_content(self, name: str, digest: str | None) -> bool:
        recorded = None if self.statistics is None else self.statistics.settings.get(name)
        return digest is not None and digest == recorded != ""

    def _has_tensors(self, part: str) -> bool:
        return self.statistics is not None and part in self.statistics.tensors

    def _name_unlisted(self, provenance: Provenance) -> Iterator[Diagnostic]:
        """Name the files of the folder that its record does not list."""
        listed = {*provenance.files, *statistics_file.RECORDS}
        files = (path for path in self.path.rglob("*") if not path.is_dir())
        names = {path.relative_to(self.path).as_posix() for path in files}
        extra = sorted(n for n in names - listed if not any(p[:1] == "." for p in n.split("/")))
        read = [name for name in extra if name in _READ or name in self._unrecorded_weights()]
        for name in read:
            message = f"{name} is not recorded, but generate reads it."
            yield Diagnostic("warning", name.split("/")[0], message)
        others = [name for name in extra if name not in read]
        if others:
            yield Diagnostic("note", "files", f"not recorded: {_shorten(others)}.")

    def _unrecorded_weights(self) -> set[str]:
        """Return the files that hold loaded tensors of which nothing is recorded."""
        found: set[str] = set()
        for part in PARTS:
            with suppress(MlxSoraError):  # reported already
                tensors = (
                    {} if self._has_tensors(part) else Checkpoint.open(self.path / part).tensors
                )
                found |= {f"{part}/{info.file.name}" for info in tensors.values()}
        return found

    def check_tensors(self, part: str) -> Iterator[Diagnostic]:
        """Read the tensors of `part`: look for impossible values, and compare with the records."""
        own = {} if self.statistics is None else self.statistics.tensors.get(part, {})
        other = {} if self.reference is None else self.reference.tensors.get(part, {})
        names = {
            key: f"{part}/{info.file.name}"
            for key, info in Checkpoint.open(self.path / part).tensors.items()
        }
        faults: dict[str, list[str]] = {}
        foreign: list[str] = []
        for key, row in measure_part(
            self.path,
            part,
            self.on_progress,
            hashed=lambda f: f"{part}/{f.name}" not in self.proven,
        ):
            name = names[key]
            if row.nan or row.inf:
                yield self.error(part, f"{key} in {Path(name).name}: {_format_counts(row)}.")
            elif key not in own:
                yield from _check_spread(part, f"{key} in {Path(name).name}", row)
            if own and (difference := _own_difference(row, own.get(key))):
                faults.setdefault(name, []).append(f"{key} {difference}")
            elif key in other and (difference := _conversion_difference(row, other[key])):
                foreign.append(f"{key} {difference}")
        for name, texts in faults.items():
            fault = self.unsettled.pop(name, f"is not as {statistics_file.FILE} has it")
            yield self.error(part, f"{name} {fault}: {_shorten(texts)}.")
        if foreign and not faults:
            yield self.error(part, f"{_other_model('the weights')}: {_shorten(foreign)}.")
        for name in [name for name in self.unsettled if name.startswith(f"{part}/")]:
            text = f"{name} {self.unsettled.pop(name)}, but the tensors are as recorded."
            yield Diagnostic("note", part, text)

    def proof(self, part: str) -> str:
        """Return what the tensors of a sound part agree with, to end a sentence."""
        if self._has_tensors(part):
            return f", and as {statistics_file.FILE} has it."
        return "." if self.reference is None else f", and as in {BUNDLED}."

    def settle(self) -> Iterator[Diagnostic]:
        """Report the files whose tensors were not read, for another fault of their part."""
        if not self.quick:
            for name, fault in self.unsettled.items():
                yield self.error(name.split("/")[0], f"{name} {fault}.")


def _is_bundled(path: Path) -> bool:
    return path.resolve() == bundled_folder().resolve()


def _bundled_statistics() -> Statistics | None:
    """Return the statistics of the bundled model, None if it is damaged or not there."""
    file = bundled_folder() / statistics_file.FILE
    if not file.is_file() or sha256(file) != BUNDLED_STATISTICS:
        return None
    return Statistics.read(file.parent)


def _model_name(path: Path) -> str | None:
    try:
        return ModelFolder.open(path).name
    except MlxSoraError:  # reported already
        return None


def _other_model(what: str) -> str:
    return (
        f"{what} are not those of {BUNDLED}, the name in model_index.json; "
        "give a changed model another name"
    )


def _differing(found: Mapping[str, str], recorded: Mapping[str, str]) -> set[str]:
    return {name for name in found.keys() & recorded.keys() if found[name] != recorded[name]}


def _own_difference(row: TensorStatistics, own: TensorStatistics | None) -> str:
    if own is None:
        return "is not recorded"
    if row.dtype != own.dtype:
        return f"has type {row.dtype}, not {own.dtype}"
    if row.sha256 and row.sha256 != own.sha256:
        return row.difference(own) or "has other bytes"
    return row.difference(own)


def _conversion_difference(row: TensorStatistics, other: TensorStatistics) -> str:
    return row.difference(other, ROUNDING.get(row.dtype, SAME))


def _check_spread(part: str, name: str, row: TensorStatistics) -> Iterator[Diagnostic]:
    """Look for what is unusual in a tensor of which nothing is recorded."""
    count = prod(row.shape)
    if len(row.shape) > 1 and count and row.dtype in FLOATS and row.rms == 0:
        message = f"{name} is all zeros, which is unusual."
        yield Diagnostic("warning", part, message)
    elif count >= _MANY_VALUES and row.kurtosis > count / 2:
        message = f"{name} is one large value among small ones: it may be damaged."
        yield Diagnostic("warning", part, message)


def _shorten(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return "; ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _format_counts(row: TensorStatistics) -> str:
    counts = [(row.nan, "NaN"), (row.inf, "Inf")]
    return " and ".join(f"{n} {name}" for n, name in counts if n)
