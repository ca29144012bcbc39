"""Options, hooks and fixtures of all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mlx_sora  # noqa: F401  (before mlx.core, so that the fast BLAS is in place)

# isort: split
import mlx.core as mx

from mlx_sora import Pipeline
from mlx_sora.loading.model_folder import BUNDLED, WEIGHTS_VARIABLE, ModelFolder, bundled_folder
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.utils.files import CACHE_VARIABLE
from tests.helpers import networks
from tests.helpers.emulated_mac import emulate_mac
from tests.helpers.golden import DEFAULT_GOLDEN, find_cases

#: More processes than this compete for memory, and tests of lost ranks for time.
MAX_WORKERS = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=DEFAULT_GOLDEN,
        help="folder of golden cases of the reference code (default: the committed subset)",
    )
    parser.addoption(
        "--device", choices=["cpu"], help="MLX's device in place of its own choice, in children too"
    )
    parser.addoption(
        "--emulate-gpu",
        action="store_true",
        help="run as on a Mac: forms for GPUs, bfloat16 by default, macOS; MLX computes on the CPU",
    )
    parser.addoption(
        "--faults", type=Path, help="with -m longrun: file for the rows of the table of faults"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "golden(family): run once per golden case whose file name starts with `family`"
    )
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    # Machine files of this user, and of other tests, must not change what commands print.
    patch.setenv(CACHE_VARIABLE, str(Path(__file__) / "no-folder"))
    if config.getoption("--device") == "cpu":
        choose_cpu(patch)
    if config.getoption("--emulate-gpu"):
        emulate_mac(patch)
        mx.set_cache_limit(4 << 30)  # Metal's is as large; that of CPUs, 32 MiB, is slow


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use the cores for the whole suite; parts of it start faster in this process."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    selected = config.option.keyword or config.option.markexpr != "not longrun"
    return min(os.cpu_count() or 1, MAX_WORKERS) if whole and not selected else 0


def pytest_collection_finish() -> None:
    """Keep the collected tests out of the garbage collections that end every stage of a run."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `case` over the golden files of the families that the `golden` marker names."""
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    cases = find_cases(metafunc.config.getoption("--golden"), *marker.args)
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def choose_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let MLX compute on the CPU, in this process and those that tests start."""
    mx.set_default_device(mx.cpu)
    patch.setenv("MLX_SORA_TEST_DEVICE", "cpu")
    children = Path(__file__).parent / "helpers" / "children"
    patch.setenv("PYTHONPATH", str(children), prepend=os.pathsep)


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
    root = tmp_path_factory.mktemp("weights")
    (root / BUNDLED).symlink_to(bundled_folder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WEIGHTS_VARIABLE, str(root))
        yield


@pytest.fixture(scope="session", autouse=True)
def tokenizers_are_read_once() -> Iterator[None]:
    """Reading the bundled tokenizer takes longer than many a run; a changed file is read anew."""

    @cache
    def load(path: Path, modified: int, size: int) -> Tokenizer:
        return read(path)

    def load_unless_changed(path: str | Path) -> Tokenizer:
        file = Path(path)
        try:
            stat = file.stat()
        except OSError:
            return read(file)
        return load(file, stat.st_mtime_ns, stat.st_size)

    read = Tokenizer.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "load", load_unless_changed)
        yield


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    """The bundled model."""
    return Pipeline.from_pretrained("shapes")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Small random T5 and STDiT, to be read only. Modules that need another model override it."""
    root = tmp_path_factory.mktemp("model")
    networks.t5_model(root)
    return networks.stdit_model(root)
