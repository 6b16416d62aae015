"""The sampling temperature of every policy: the other way to diversity, which trains nothing again.

    jaxrlhf run --config=configs/sweeps/temperature.py --workdir=runs/temperature
    jaxrlhf run --config=configs/sweeps/temperature.py:smoke --workdir=runs/temperature-smoke

The KL is that between what is sampled, policy and SFT both at that temperature.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

QUICKSTART = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))


def get_config(variant: str = "") -> ConfigDict:
    c = QUICKSTART["get_config"](variant)
    c.name = "temperature"
    c.sweep = ("sampling.temperature=1.0; 0.3; 0.6; 1.3",)
    if variant == "smoke":
        c.sweep = ("sampling.temperature=1.0; 0.6",)
    return c
