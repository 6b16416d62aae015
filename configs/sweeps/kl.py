"""PPO's KL coefficient: what a pull towards SFT costs and buys, over 3 seeds of PPO from one SFT and one reward model.

    jaxrlhf run --config=configs/sweeps/kl.py --workdir=runs/kl
    jaxrlhf run --config=configs/sweeps/kl.py:smoke --workdir=runs/kl-smoke

The report draws how well PPO does and how varied it is over its KL to SFT, and where best-of-N stands at the same KL.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

QUICKSTART = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))


def get_config(variant: str = "") -> ConfigDict:
    c = QUICKSTART["get_config"](variant)
    c.name = "kl"
    c.sweep = ("ppo.kl_coef=0.05; 0.01; 0.2; 0.8; 3.2", "ppo.seed=0; 1; 2")
    if variant == "smoke":
        c.sweep = ("ppo.kl_coef=0.05; 0.8", "ppo.seed=0; 1")
    return c
