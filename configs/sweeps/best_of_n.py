"""N of best-of-N: how far choosing among SFT's samples goes, and at what KL, which trains nothing again.

    jaxrlhf run --config=configs/sweeps/best_of_n.py --workdir=runs/best_of_n
    jaxrlhf run --config=configs/sweeps/best_of_n.py:smoke --workdir=runs/best_of_n-smoke

Every N picks from one pool, which holds samples of its own for each pick up to the greatest N.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

QUICKSTART = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))


def get_config(variant: str = "") -> ConfigDict:
    c = QUICKSTART["get_config"](variant)
    c.name = "best_of_n"
    c.sampling.update(samples_per_prompt=4, pool=128)
    c.sweep = ("sampling.best_of=4; 2; 8; 16; 32",)
    if variant == "smoke":
        c.sampling.pool = 16
        c.sweep = ("sampling.best_of=4; 2",)
    return c
