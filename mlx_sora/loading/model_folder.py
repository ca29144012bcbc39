"""Model folders: the models with a name, their layout and default options.

A model folder holds the published files under these names:
    transformer/   config.json, model.safetensors          (STDiT3)
    vae/           config.json, model.safetensors          (spatial and temporal VAE)
    text_encoder/  config.json, safetensors, maybe sharded (T5 v1.1 encoder)
    tokenizer/     spiece.model
    model_index.json  (optional) name, default options, and a card for people
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_sora.errors import MlxSoraError, WeightsError, printable, shell_words
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_card import ModelCard
from mlx_sora.loading.other_models import describe_other_model
from mlx_sora.loading.quantization import NetworkQuantization
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.request.options import as_int
from mlx_sora.utils.files import cache_folder, visible_files
from mlx_sora.utils.json import read_object

PUBLISHED = "opensora-1.2"
BUNDLED = "shapes"

#: Names of the models that `download --quantize` writes, by bits per weight.
QUANTIZED_MODELS = {8: f"{PUBLISHED}-8bit", 4: f"{PUBLISHED}-4bit"}

#: Models with a name, in the order in which the default model is looked for.
MODEL_NAMES = (PUBLISHED, *QUANTIZED_MODELS.values(), BUNDLED)

#: Parts with a configuration and weights.
PARTS = ("text_encoder", "transformer", "vae")

#: Longest name in a model_index.json, in characters.
MAX_NAME = 100

#: Environment variable with the folder of models.
WEIGHTS_VARIABLE = "MLX_SORA_WEIGHTS"

#: Folder with the bundled model. In a clone it is a link to weights/, which may hold others, too.
_PACKAGE_ROOT = (Path(__file__).parents[1] / "weights").resolve()


@dataclass(frozen=True)
class Defaults:
    """Default options of a model; the values here are those of Open-Sora 1.2.

    width, height: pixels. warn_below_frames: fewer frames are known to look bad.
    """

    steps: int = 30
    guidance: float = 7.0
    width: int = 426
    height: int = 240
    num_frames: int = 51
    fps: int = 24
    aesthetic: float | None = 6.5
    warn_below_frames: int = 32


@dataclass(frozen=True)
class ModelFolder:
    """A complete model on disk. quantization: pairs of part and forms to quantize it to on load."""

    path: Path
    name: str
    defaults: Defaults
    quantization: tuple[tuple[str, NetworkQuantization], ...] = ()

    @property
    def transformer(self) -> Path:
        return self.path / "transformer"

    @property
    def vae(self) -> Path:
        return self.path / "vae"

    @property
    def text_encoder(self) -> Path:
        return self.path / "text_encoder"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer" / "spiece.model"

    @property
    def argument(self) -> str:
        """Value of --model that names it: a name, else the path."""
        return model_argument(self.path)

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Open a folder. Raises WeightsError that names the first missing part."""
        path = expand_folder(path)
        if not path.exists():
            raise WeightsError(f"No model folder at {path}.", unknown_name_fix(path.name))
        other = describe_other_model(path)
        if other is not None:
            raise WeightsError(f"{path} {other}.", other_model_fix(path))
        missing = missing_parts(path)
        if missing:
            raise WeightsError(
                f"The model in {path} is incomplete: {missing[0]} is missing.",
                other_model_fix(path),
            )
        name, defaults = _read_index(path)
        return cls(path, name, defaults)

    @cached_property
    def card(self) -> ModelCard:
        """Limits of what the model was trained for, from model_index.json. Raises WeightsError."""
        index = self.path / "model_index.json"
        content = _read_json(index).get("card", {}) if index.is_file() else {}
        try:
            return ModelCard.from_dict(content)
        except (MlxSoraError, ValueError, TypeError, AttributeError):
            raise WeightsError(
                f"{index}: 'card' is not valid.",
                "It has a description, words by names in capitals, and lists of patterns, prompts, "
                "sizes (64x64) and num_frames.",
            ) from None

    def checkpoint(self, part: str) -> Checkpoint:
        """Open the weights of `part`. Reads headers only. Raises WeightsError."""
        return Checkpoint.open(self.path / part)

    def config(self, part: str) -> dict[str, Any]:
        """Read config.json of `part` (transformer, vae or text_encoder). Raises WeightsError."""
        return _read_json(self.path / part / "config.json")


def expand_folder(path: str | Path) -> Path:
    """Return `path` with ~ expanded to the home folder. Raises WeightsError."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise WeightsError(f"There is no such user as in {path}.", "Check the path.") from None


def missing_parts(path: Path) -> list[str]:
    """Return the files of the layout that are missing in the folder `path`, as relative names."""
    files = [*(f"{part}/config.json" for part in PARTS), "tokenizer/spiece.model"]
    missing = [name for name in files if not (path / name).is_file()]
    unfilled = [part for part in PARTS if not visible_files(path / part, "*.safetensors")]
    return missing + [f"{part}/*.safetensors" for part in unfilled]


def other_model_fix(path: Path) -> str:
    """Return what to give in place of a folder or file that is no model."""
    inner = [path.parent]
    for pattern in ("*", "snapshots/*") if path.is_dir() else ():  # a repository in the hub's cache
        inner += visible_files(path, pattern)
    for folder in inner:
        if folder.is_dir() and not missing_parts(folder):
            return f"The model folder is {shell_words(folder)}"
    return (
        "A model folder holds transformer, vae, text_encoder and tokenizer/spiece.model. "
        f"Get one: {download_command(PUBLISHED)}"
    )


def unknown_name_fix(name: str) -> str:
    """Return the models that can be given in place of the unknown `name`."""
    names = list(dict.fromkeys([*model_names(), *MODEL_NAMES]))
    near = get_close_matches(name, names, 1)
    start = f"Did you mean {shell_words(near[0])}? " if near else ""
    return (
        f"{start}Give a name that `python -m mlx_sora models` lists, or the path of a model folder."
    )


def weights_root() -> Path:
    """Return the folder for new models: $MLX_SORA_WEIGHTS, else `models` in the cache folder.

    Raises MlxSoraError without a home folder.
    """
    override = os.environ.get(WEIGHTS_VARIABLE)
    return Path(os.path.expanduser(override)) if override else cache_folder() / "models"


def model_roots() -> list[Path]:
    """Return the folders in which models have a name; that for new ones comes first.

    Without $MLX_SORA_WEIGHTS, `weights/` of a clone is the second.
    """
    if os.environ.get(WEIGHTS_VARIABLE):
        return [weights_root()]
    with suppress(MlxSoraError):
        return [weights_root(), _PACKAGE_ROOT]
    return [_PACKAGE_ROOT]


def bundled_folder() -> Path:
    """Return the folder of the bundled model."""
    return _PACKAGE_ROOT / BUNDLED


def model_names() -> list[str]:
    """Return the names of the models on this machine, the default one first.

    They may be incomplete.
    """
    folders = (path for root in model_roots() for path in visible_files(root, "*/transformer"))
    found = {path.parent.name for path in folders if not path.parent.name.startswith(".")}
    names = [*MODEL_NAMES, *sorted(found - set(MODEL_NAMES))]
    return [name for name in names if model_path(name).is_dir()]


def model_path(model: str | Path) -> Path:
    """Return the folder of a model by name or path; it may not exist. Raises MlxSoraError.

    A name means the bundled model or a folder in one of `model_roots`, a complete one first.
    """
    name = str(model)
    if name == BUNDLED:
        return bundled_folder()
    if Path(name).name == name and not name.startswith((".", "~")):
        found = [root / name for root in model_roots() if (root / name).is_dir()]
        if found:
            return next((path for path in found if not missing_parts(path)), found[0])
    return weights_root() / name if name in MODEL_NAMES else expand_folder(model)


def model_argument(path: Path) -> str:
    """Return the name of the model in a folder, else its path, as commands take it."""
    with suppress(MlxSoraError):  # without a home folder
        if model_path(path.name) == path:
            return path.name
    return str(path)


def find_model(model: str | Path | None = None) -> ModelFolder:
    """Open a model by name or path; None means the first complete one of `MODEL_NAMES`.

    Raises WeightsError if the model is missing or incomplete.
    """
    if model is None:
        paths = (root / name for name in MODEL_NAMES for root in model_roots())
        return ModelFolder.open(
            next((path for path in paths if not missing_parts(path)), bundled_folder())
        )
    path = model_path(model)
    if str(model) in MODEL_NAMES and not path.is_dir():
        fix = f"Get it: {download_command(path.name)}"
        if path.name == BUNDLED:
            fix = "Install mlx_sora again."
        raise WeightsError(f"{model} is not in {path.parent}.", fix)
    return ModelFolder.open(path)


def other_model_hint() -> str:
    """Return how to get, or to name, the model that draws anything."""
    with suppress(MlxSoraError):  # without a home folder
        if not missing_parts(model_path(PUBLISHED)):
            return f"For anything else: --model {PUBLISHED}"
    return f"For anything else: {download_command(PUBLISHED)}"


def download_command(name: str) -> str:
    """Return the command that downloads (and quantizes) the model `name`."""
    bits = [bits for bits, quantized in QUANTIZED_MODELS.items() if quantized == name]
    return f"python -m mlx_sora download {PUBLISHED}" + (f" --quantize {bits[0]}" if bits else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except OSError as error:
        raise WeightsError(
            f"Cannot read {path}: {error.strerror}.", "Download it again."
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}.", "Download it again.") from error


def _read_index(path: Path) -> tuple[str, Defaults]:
    """Read name and defaults of model_index.json; without one they are Open-Sora 1.2's."""
    index = path / "model_index.json"
    if not index.is_file():
        return path.name, Defaults()
    content = _read_json(index)
    defaults = content.get("defaults", {})
    if not isinstance(defaults, dict) or any(isinstance(value, str) for value in defaults.values()):
        raise WeightsError(f"{index}: 'defaults' must map option names to numbers.", "Correct it.")
    # Score phrases and the frame warning come from Open-Sora's training: other models opt in.
    values = asdict(Defaults(aesthetic=None, warn_below_frames=0))
    values |= {key: value for key, value in defaults.items() if key in values}
    try:
        values["warn_below_frames"] = as_int(values["warn_below_frames"])
        options = {key: value for key, value in values.items() if key != "warn_below_frames"}
        request = GenerationRequest(prompt="any", **options)
        request.validate()
        if any(getattr(request, key) is None for key in options if key != "aesthetic"):
            raise ValueError("a number is missing")
    except (MlxSoraError, ValueError) as error:
        raise WeightsError(f"{index}: 'defaults' are not valid: {error}", "Correct it.") from None
    options = {key: getattr(request, key) for key in options}
    name = printable(str(content.get("name", path.name)), MAX_NAME)
    return name, Defaults(**options, warn_below_frames=values["warn_below_frames"])
