"""The paper's findings on the embedded world, over 5 seeds: SFT, best-of-N, PPO, DPO, GRPO, and a sweep of PPO's KL.

    jaxrlhf run --config=configs/findings.py --workdir=runs/findings              # about 70 minutes on 2 CPU cores
    jaxrlhf run --config=configs/findings.py:smoke --workdir=runs/findings-smoke  # 2 seeds, numbers mean nothing

A seed is a world, its texts, its annotators, and every stage of its own; only the base model is one. The report says of
each finding of Kirk et al. 2024 whether it is confirmed, contradicted or undecided at this scale, by the rule it states
(`jaxrlhf/evaluation/claims.py`). A run that was stopped goes on where it was; a seed that fails is named in the report,
and the same command tries it again.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

QUICKSTART = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))


def get_config(variant: str = "") -> ConfigDict:
    c = QUICKSTART["get_config"](variant)
    c.name = "findings"
    # Seed 0 is left out: the quickstart's numbers were chosen on it.
    seeds = "1; 2" if variant == "smoke" else "1; 2; 3; 4; 5"
    # The base trains DPO and GRPO beside PPO; the other coefficients are PPO's alone.
    c.sweep = (f"seed={seeds}", "ppo.kl_coef=0.05 methods=dpo,grpo; 0.01; 0.2; 0.8; 3.2")
    if variant != "smoke":
        c.sampling.update(best_of=16, pool=96)  # the paper's N; 6 picks a prompt, each from samples of its own
    c.evaluation.cut_words = 12  # one length for all seeds, so that numbers at equal length have a mean over them
    if variant == "smoke":
        c.sweep = (f"seed={seeds}", "ppo.kl_coef=0.05 methods=dpo,grpo; 0.8")
    return c
