"""The stages of an experiment in order: which is due, and how far along it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from jaxrlhf import checks, collect, dpo, groups, hosts, hub, ppo, reward, scoring, sft
from jaxrlhf.config import Experiment
from jaxrlhf.data import task
from jaxrlhf.evaluation import results
from jaxrlhf.experiment import Run
from jaxrlhf.files import read_json, writes
from jaxrlhf.logs import say
from jaxrlhf.store import Workdir

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


def run_stages(config: Experiment, kept: Workdir, stages: Sequence[str], skip_finished: bool) -> None:
    """Runs the stages named; with `skip_finished`, those that are not complete, and what follows from them."""
    workdir = kept.local
    if config.reward.init and "reward" in stages and not (workdir / "reward" / "summary.json").exists():
        scoring.load(hub.directory_of(config.reward.init, "config.reward.init"))  # mistakes before hours of SFT
    fresh, data = False, None
    if any(s in _TRAIN for s in stages):
        data = hosts.first_then_all(lambda: _load(config, kept))
        _check_batches(config, workdir, data, stages, skip_finished)
    for stage in stages:
        title = f"[{config.stages.index(stage) + 1}/{len(config.stages)}] {stage}"
        if stage == "evaluate":
            fresh = hosts.decided(partial(_evaluate, config, workdir, title, fresh or not skip_finished)) or fresh
        elif stage == "report":
            hosts.decided(partial(_report, kept, title, fresh or not skip_finished))
        elif stage == "pretrain" and (whence := _base_from(config)):
            say(f"{title}: the base {whence}")
        else:
            assert data is not None
            run = Run(config, workdir, data, title, kept if kept.remote else None)
            if skip_finished and run.finished(stage):
                say(f"{title}: complete")
                continue
            hosts.barrier(f"the start of stage {stage}")
            if not writes():
                kept.fetch()
            with jax.set_mesh(run.mesh):
                _TRAIN[stage](run)
            kept.send()
            fresh = True


def _base_from(config: Experiment) -> str:
    """Where the base comes from, in words, if not from stage `pretrain`."""
    if config.model.init:
        return f"is imported from {config.model.init}"
    if config.pretrain.init != "scratch":
        return f"{config.pretrain.init!r} is shipped; --config.pretrain.init=scratch makes it anew"
    return ""


def _check_batches(
    config: Experiment, workdir: Path, data: task.Task, stages: Sequence[str], skip_finished: bool
) -> None:
    """`UserError` for what a stage that is due would stop at after hours of others."""
    run = Run(config, workdir, data, "")
    done = {s for s in stages if s in _TRAIN and skip_finished and run.finished(s)}
    done |= {"pretrain"} if _base_from(config) else set()
    checks.divides(config, [s for s in stages if s not in done], run.mesh)


def _load(config: Experiment, kept: Workdir) -> task.Task:
    if not writes():
        kept.fetch()
    found = task.load(config, kept.local, say)
    kept.send()
    return found


def _evaluate(config: Experiment, workdir: Path, title: str, due: bool) -> bool:
    """Whether it was due: `due`, or what is there was measured by other settings, or nothing is there."""
    found = workdir / "results.json"
    if not due and found.exists():
        now = read_json(workdir / "config.json")["evaluation"]
        if due := read_json(found).get("config", {}).get("evaluation") != now:
            say(f"{title}: {found.name} was measured by other settings of config.evaluation")
    if due := due or not found.exists():
        say(f"{title}: measuring generalisation and diversity")
        print(results.table(results.evaluate_samples(workdir, config)))
    return due


def _report(kept: Workdir, title: str, due: bool) -> None:
    page = kept.local / "report" / "index.html"
    if not due and page.exists():
        return say(f"{title}: complete; see {kept.named(page)}")
    from jaxrlhf.evaluation import report  # it takes half a second, and no stage before has a use for it

    say(f"{title}: drawing")
    print(kept.named(report.write_report(kept.local)))
