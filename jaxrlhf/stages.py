"""The stages of an experiment in order: which is due, and how far along it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxrlhf import collect, dpo, groups, hub, ppo, reward, scoring, sft
from jaxrlhf.config import Experiment
from jaxrlhf.data import task
from jaxrlhf.evaluation import report, results
from jaxrlhf.experiment import Run
from jaxrlhf.logs import say

_TRAIN = {
    "pretrain": sft.pretrain,
    "sft": sft.sft,
    "reward": reward.reward,
    "ppo": ppo.ppo,
    "dpo": dpo.dpo,
    "rloo": groups.rloo,
    "grpo": groups.grpo,
    "sample": collect.sample,
}


def run_stages(config: Experiment, workdir: Path, stages: Sequence[str], skip_finished: bool) -> None:
    """Runs the stages named; with `skip_finished`, those that are not complete, and what follows from them."""
    if config.reward.init and "reward" in stages and not (workdir / "reward" / "summary.json").exists():
        scoring.load(hub.directory_of(config.reward.init, "config.reward.init"))  # mistakes before hours of SFT
    data = task.load(config, workdir, say) if any(s in _TRAIN for s in stages) else None
    fresh = False
    for stage in stages:
        title = f"[{config.stages.index(stage) + 1}/{len(config.stages)}] {stage}"
        if stage == "evaluate":
            if fresh or not skip_finished or not (workdir / "results.json").exists():
                say(f"{title}: measuring generalisation and diversity")
                print(results.table(results.evaluate_samples(workdir, config)))
                fresh = True
        elif stage == "report":
            if fresh or not skip_finished or not (workdir / "report" / "index.html").exists():
                say(f"{title}: drawing")
                print(report.write_report(workdir))
            else:
                say(f"{title}: complete; see {workdir / 'report' / 'index.html'}")
        elif stage == "pretrain" and config.model.init:
            say(f"{title}: the base is imported from {config.model.init}")
        elif stage == "pretrain" and config.pretrain.init != "scratch":
            say(f"{title}: the base {config.pretrain.init!r} is shipped; --config.pretrain.init=scratch makes it anew")
        else:
            assert data is not None
            run = Run(config, workdir, data, title)
            if skip_finished and run.finished(stage):
                say(f"{title}: complete")
                continue
            with jax.set_mesh(run.mesh):
                _TRAIN[stage](run)
            fresh = True
