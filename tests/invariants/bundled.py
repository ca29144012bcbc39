"""`python -m tests.invariants.bundled`: renew the records of the bundled model after a change.

Its checksums and statistics are in its folder; the package has the checksum of the latter.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_sora.loading.model_folder import BUNDLED, bundled_folder
from mlx_sora.manage import records
from mlx_sora.manage.provenance import FileOrigin, Provenance
from mlx_sora.manage.statistics import RECORDS, Statistics
from mlx_sora.utils.files import sha256


def origins(folder: Path) -> dict[str, FileOrigin]:
    """Size and checksum of every file of `folder` except the record itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    return {
        name: FileOrigin(BUNDLED, "", name, path.stat().st_size, sha256(path))
        for path, name in names.items()
        if name not in RECORDS and not path.name.startswith(".")
    }


def main() -> None:
    """Write both records and the checksum."""
    folder = bundled_folder()
    digest = sha256(Statistics.measure(folder).write(folder))
    Provenance(BUNDLED, "", origins(folder)).write(folder)
    module = Path(str(records.__file__))
    text = re.sub(
        r'(BUNDLED_STATISTICS = )".*"', rf'\1"{digest}"', module.read_text(encoding="utf-8")
    )
    module.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
