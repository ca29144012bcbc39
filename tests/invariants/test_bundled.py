"""The records of the bundled model are those of its files."""

from __future__ import annotations

from mlx_sora.loading.model_folder import bundled_folder
from mlx_sora.manage.provenance import Provenance
from mlx_sora.manage.records import BUNDLED_STATISTICS
from mlx_sora.manage.statistics import FILE, Statistics
from mlx_sora.utils.files import sha256
from tests.invariants.bundled import origins

RENEW = "run: python -m tests.invariants.bundled"


def test_checksums_are_current() -> None:
    found = Provenance.read(bundled_folder())
    assert found is not None
    assert dict(found.files) == origins(bundled_folder()), RENEW


def test_statistics_are_current() -> None:
    """Within the digits of the record: sums of another machine may differ in the last one."""
    folder = bundled_folder()
    found, made = Statistics.read(folder), Statistics.measure(folder)
    assert found is not None
    assert sha256(folder / FILE) == BUNDLED_STATISTICS, RENEW
    assert found.settings == made.settings, RENEW
    for part, rows in made.tensors.items():
        assert rows.keys() == found.tensors[part].keys(), RENEW
        for name, row in rows.items():
            assert row.difference(found.tensors[part][name]) == "", RENEW
            assert row.sha256 == found.tensors[part][name].sha256, RENEW
