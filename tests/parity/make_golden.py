"""Make the committed subset of golden cases from a full golden folder.

    python -m tests.parity.make_golden FULL_FOLDER

The subset keeps one case of every behaviour, drops the longest clip of the VAE pipeline, cuts token
merging down to the first block pair (whose outputs the case holds), and stores weights that two
cases share once (`weights_from` in the configuration names the file). Tables and manifests are
copied whole. Unknown tensors never change: what is kept is kept bit for bit.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

from tests.helpers.golden import DEFAULT_GOLDEN

CASES = (
    "t5_pad40",
    "stdit3_c_image",
    "stdit3_d_xmask",
    "stdit3_stages",
    "rflow_add_noise",
    "rflow_sample_mask",
    "vae_pipeline_decode",
    "vae_pipeline_encode",
    "lpl_synth",
    "lpl_script",
    "tdtm_T15",
)
TABLES = ("text_*.json", "tokens*.json", "rflow_timesteps.json", "manifest_*.json")
#: Case -> case whose weights it shares.
SHARED = {"vae_pipeline_encode": "vae_pipeline_decode"}
DROPPED = ("in.f51.", "out.f51.")
#: Case -> what the blocks behind the first pair, which are left out, hold or lead to.
SHALLOW = {
    "tdtm_T15": (
        *("weights.spatial_blocks.1.", "weights.temporal_blocks.1."),
        *("out.merged.spatial.1", "out.merged.temporal.1", "out.plain"),
    )
}


def trim(source: Path, target: Path) -> None:
    """Copy one case without dropped tensors and without weights that another case holds."""
    donor = SHARED.get(source.stem)
    with safe_open(source, framework="numpy") as f:
        config = json.loads(f.metadata()["config"])
        keys = [key for key in f.keys() if not key.startswith(DROPPED)]  # noqa: SIM118
        if source.stem in SHALLOW:
            dropped = SHALLOW[source.stem]
            keys = [key for key in keys if key != "out.merged" and not key.startswith(dropped)]
            config["constructor"]["depth"] = 1
        if donor:
            keys = [key for key in keys if not key.startswith("weights.")]
            config["weights_from"] = f"{donor}.safetensors"
        if isinstance(config.get("call", {}).get("num_frames"), list):
            config["call"]["num_frames"] = [n for n in config["call"]["num_frames"] if n != 51]
        tensors = {key: f.get_tensor(key) for key in keys}
    save_file(tensors, target, metadata={"config": json.dumps(config)})


def main(source: Path, target: Path = DEFAULT_GOLDEN) -> None:
    """Write the subset of `source` to `target`."""
    target.mkdir(exist_ok=True)
    for case in CASES:
        trim(source / f"{case}.safetensors", target / f"{case}.safetensors")
    for pattern in TABLES:
        for table in source.glob(pattern):
            shutil.copyfile(table, target / table.name)
    size = sum(file.stat().st_size for file in target.iterdir())
    sys.stdout.write(f"{size / 1e6:.1f} MB in {target}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
