"""Where a model lies and what it prefers: `shapes`, `opensora-1.2`, or any folder laid out alike.

A model folder holds the published files under these names:
    transformer/   config.json, model.safetensors          (STDiT3)
    vae/           config.json, model.safetensors          (spatial and temporal VAE)
    text_encoder/  config.json, safetensors, maybe sharded (T5 v1.1 encoder)
    tokenizer/     spiece.model
    model_index.json  (optional) name and default options
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_sora.errors import MlxSoraError, WeightsError, printable
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.request.options import as_int
from mlx_sora.utils.json import read_object

PUBLISHED = "opensora-1.2"
BUNDLED = "shapes"

#: What `download --quantize` makes of the published model, by bits per weight.
QUANTIZED_MODELS = {8: f"{PUBLISHED}-8bit", 4: f"{PUBLISHED}-4bit"}

#: Models that have a name, the ones to take without a choice first.
MODEL_NAMES = (PUBLISHED, *QUANTIZED_MODELS.values(), BUNDLED)

#: Parts with a configuration and weights.
PARTS = ("text_encoder", "transformer", "vae")

#: Characters of the name that a model gives itself.
MAX_NAME = 100

#: Environment variable that names another folder of models than the one beside the package.
WEIGHTS_VARIABLE = "MLX_SORA_WEIGHTS"


@dataclass(frozen=True)
class Defaults:
    """Options of a model that a request leaves open. The values here are Open-Sora 1.2's own.

    width and height are pixels; fewer frames than `warn_below_frames` are known to look bad.
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
    """A complete model on disk. bits: to quantise its weights to while they are loaded, if any."""

    path: Path
    name: str
    defaults: Defaults
    quantize_bits: int | None = None

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

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Check that all parts are there. Raises WeightsError naming the first that is not."""
        path = expand_folder(path)
        if not path.is_dir():
            raise WeightsError(
                f"No model folder at {path}.",
                f"Give --model {BUNDLED}, {PUBLISHED} or the path of a model folder.",
            )
        absent = missing_parts(path)
        if absent:
            raise WeightsError(
                f"The model in {path} is incomplete: {absent[0]} is missing.",
                "A model folder holds transformer, vae, text_encoder and tokenizer/spiece.model.",
            )
        name, defaults = _read_index(path)
        return cls(path, name, defaults)

    def config(self, part: str) -> dict[str, Any]:
        """config.json of `part` (transformer, vae or text_encoder)."""
        return _read_json(self.path / part / "config.json")


def expand_folder(path: str | Path) -> Path:
    """A folder as typed, with the home folder in place of ~. Raises WeightsError."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise WeightsError(f"{path} names no user's home.", "Check the path.") from None


def missing_parts(path: Path) -> list[str]:
    """Parts of the model folder layout that `path` lacks, as relative names."""
    needed = [f"{part}/config.json" for part in PARTS]
    absent = [name for name in [*needed, "tokenizer/spiece.model"] if not (path / name).is_file()]
    return absent + [
        f"{part}/*.safetensors" for part in PARTS if not any((path / part).glob("*.safetensors"))
    ]


def weights_root() -> Path:
    """Folder that holds the models: $MLX_SORA_WEIGHTS, else `weights/` beside the package."""
    override = os.environ.get(WEIGHTS_VARIABLE)
    return Path(override) if override else Path(__file__).resolve().parents[2] / "weights"


def find_model(model: str | Path | None = None) -> ModelFolder:
    """The model that `--model` means: a known name, a path, or by default the best one present.

    Without a choice: the published model when it was downloaded, quantised if only that is there,
    else the bundled one.
    Raises WeightsError when it is not there or not complete.
    """
    root = weights_root()
    if model is None:
        whole = (name for name in MODEL_NAMES if not missing_parts(root / name))
        return ModelFolder.open(root / next(whole, BUNDLED))
    if str(model) in MODEL_NAMES:
        path = root / str(model)
        if not path.is_dir():
            fix = f"Set {WEIGHTS_VARIABLE}, or give the path of a model folder."
            if path.name != BUNDLED:
                fix = f"Get it: {download_command(path.name)}"
            raise WeightsError(f"{model} is not in {root}.", fix)
        return ModelFolder.open(path)
    return ModelFolder.open(model)


def download_command(name: str) -> str:
    """The command that gets the model `name`, the published one or what is made of it."""
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
    """Name and defaults: from model_index.json where there is one, else Open-Sora 1.2's."""
    index = path / "model_index.json"
    if not index.is_file():
        return path.name, Defaults()
    content = _read_json(index)
    given = content.get("defaults", {})
    if not isinstance(given, dict) or any(isinstance(value, str) for value in given.values()):
        raise WeightsError(f"{index}: 'defaults' must map option names to numbers.", "Correct it.")
    # Score phrases and the frame warning are about Open-Sora's training, unless the index says so.
    own = asdict(Defaults(aesthetic=None, warn_below_frames=0))
    values = own | {key: value for key, value in given.items() if key in own}
    try:
        values["warn_below_frames"] = as_int(values["warn_below_frames"])
        options = {key: value for key, value in values.items() if key != "warn_below_frames"}
        request = GenerationRequest(prompt="any", **options)
        request.validate()
        if any(getattr(request, key) is None for key in options if key != "aesthetic"):
            raise ValueError("a number is missing")
    except (MlxSoraError, ValueError) as error:
        raise WeightsError(f"{index}: 'defaults' are impossible: {error}", "Correct it.") from None
    chosen = {key: getattr(request, key) for key in options}
    name = printable(str(content.get("name", path.name)), MAX_NAME)
    return name, Defaults(**chosen, warn_below_frames=values["warn_below_frames"])


#: Bytes of each tensor that a fingerprint looks at.
_SAMPLE = 64


def fingerprint(model: ModelFolder) -> str:
    """Checksum of what tells models apart: configurations, and of every tensor its name, shape,
    type and the bytes in its middle. Reads a few kilobytes in all.

    Raises WeightsError for files that cannot be opened.
    """
    found = hashlib.sha256()
    for part in PARTS:
        found.update(json.dumps([part, model.config(part)], sort_keys=True).encode())
        tensors = Checkpoint.open(model.path / part).tensors
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
            found.update(f"\n{name} {info.dtype} {info.shape}\n".encode())
            with info.file.open("rb") as file:
                file.seek(info.offset + info.nbytes // 2)
                found.update(file.read(min(_SAMPLE, info.nbytes - info.nbytes // 2)))
    return found.hexdigest()
