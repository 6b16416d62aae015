"""The model's size: every stage anew for each, from a base that is trained from scratch.

    jaxrlhf run --config=configs/sweeps/size.py --workdir=runs/size
    jaxrlhf run --config=configs/sweeps/size.py:smoke --workdir=runs/size-smoke

Layers and width grow together. By the base's 10 minutes of pretraining, about an hour on 2 CPU cores.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

QUICKSTART = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))


def get_config(variant: str = "") -> ConfigDict:
    c = QUICKSTART["get_config"](variant)
    c.name = "size"
    c.pretrain.init = "scratch"
    sizes = ("6,64,192", "4,32,96", "8,96,288")
    if variant == "smoke":
        sizes = ("3,32,64", "2,16,32")
    keys = ("layers", "width", "ff_width")
    axis = [[f"model.{k}={n}" for k, n in zip(keys, size.split(","), strict=True)] for size in sizes]
    c.sweep = ("; ".join(map(" ".join, axis)),)
    return c
