"""Makes a finished `pretrain` stage a base that ships with the package.

    jaxrlhf pretrain --config=configs/quickstart.py --config.pretrain.init=scratch --workdir=runs/base
    python launch/ship_base.py runs/base world

Writes jaxrlhf/assets/world.safetensors (f32) and world.json: the command, the config and the hash of the parameters.
"""

import hashlib
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np

import jaxrlhf
from jaxrlhf import experiment, weights
from jaxrlhf.data import task
from jaxrlhf.files import read_json, write_json
from jaxrlhf.recipes import resolve
from jaxrlhf.split import tree_hash


def ship(workdir: Path, name: str) -> None:
    resolved = read_json(workdir / "config.json")
    config = resolve(ml_collections.ConfigDict(resolved))
    run = experiment.Run(config, workdir, task.load(config, workdir, print), "ship")
    params = jax.tree.map(np.asarray, experiment.base_params(run))
    path = experiment.ASSETS / f"{name}.safetensors"
    weights.save_params(path, params, {"sha256": tree_hash(params)})
    write_json(
        path.with_suffix(".json"),
        {
            "command": f"jaxrlhf pretrain --config=configs/{config.name}.py --config.pretrain.init=scratch",
            "jaxrlhf": jaxrlhf.__version__,
            "tree_sha256": tree_hash(params),
            "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "summary": read_json(workdir / "pretrain" / "summary.json"),
            "config": {k: resolved[k] for k in ("seed", "task", "world", "model", "pretrain")},
        },
    )


if __name__ == "__main__":
    ship(Path(sys.argv[1]), sys.argv[2])
