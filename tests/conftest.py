"""Test-wide options: which folder of golden cases the parity tests run on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_sora  # noqa: F401  (before mlx.core, so that the fast BLAS is in place)

# isort: split
from tests.helpers.golden import DEFAULT_GOLDEN, find_cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=DEFAULT_GOLDEN,
        help="folder of golden cases of the reference code (default: the committed subset)",
    )
    parser.addoption(
        "--faults", type=Path, help="with -m longrun: file for the rows of the table of faults"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "golden(family): run once per golden case whose file name starts with `family`"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `case` over the golden files of the families that the `golden` marker names."""
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    cases = find_cases(metafunc.config.getoption("--golden"), *marker.args)
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """A suite started in the background inherits SIGINT ignored, as would its children."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def bundled_model_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests see the bundled model and no other, whatever was downloaded beside it."""
    from mlx_sora.loading.model_folder import BUNDLED, WEIGHTS_VARIABLE, weights_root

    root = tmp_path_factory.mktemp("weights")
    (root / BUNDLED).symlink_to(weights_root() / BUNDLED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WEIGHTS_VARIABLE, str(root))
        yield
