"""The whole recipe with every method, an ensemble and forward KL: files, resumption, export."""

import json
from itertools import combinations

import numpy as np
import pytest

from jaxrlhf import config, groups, names
from jaxrlhf.data import task
from jaxrlhf.experiment import Run
from jaxrlhf.main import main

ARGV = [
    "--config=configs/quickstart.py:smoke",
    "--config.methods=dpo, rloo,grpo",
    "--config.reward.ensemble=2",
    "--config.reward.combine=worst",
    "--config.ppo.forward_kl_coef=0.1",
    "--config.world.evaluation_prompts=4",
    "--config.sampling.samples_per_prompt=2",
    "--config.sampling.best_of=2",
    "--config.sampling.pool=4",
    "--config.sampling.batch_size=4",
    "--config.evaluation.bootstrap=50",
]
METHODS = ("dpo", "rloo", "grpo")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, request):
    """A run that Ctrl-C stops within GRPO and the same command ends, and what GRPO made without a stop."""
    path = tmp_path_factory.mktemp("methods")
    update, calls = groups.update, []

    def stops(*args):
        calls.append(type(args[2]).__name__)
        if calls.count("Grpo") == 4:
            raise KeyboardInterrupt
        return update(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        patch.setattr(groups, "update", stops)
        assert main(["jaxrlhf", "run", *ARGV, f"--workdir={path}"]) == 1
        assert not (path / "grpo" / "summary.json").exists()
        patch.setattr(groups, "update", update)
        assert main(["jaxrlhf", "run", *ARGV, f"--workdir={path}"]) == 0
        resumed = (path / "grpo" / "metrics.jsonl").read_bytes()
        (path / "grpo").rename(path / "resumed")
        assert main(["jaxrlhf", "grpo", *ARGV, f"--workdir={path}"]) == 0
    assert calls == ["Rloo"] * 4 + ["Grpo"] * 4
    return path, resumed


def test_an_interrupted_method_goes_on_and_ends_the_same(interrupted):
    path, resumed = interrupted
    assert (path / "grpo" / "metrics.jsonl").read_bytes() == resumed


def test_results_and_report_have_every_method(interrupted):
    path, _ = interrupted
    results = json.loads((path / "results.json").read_text())
    assert list(results["policies"]) == list(names.POLICIES)
    pairs = {(d["a"], d["b"]) for d in results["differences"]}
    assert pairs == {(a, b) for b, a in combinations(names.POLICIES, 2)}
    page = (path / "report" / "index.html").read_text()
    for method in METHODS:
        name = names.TITLES[method]
        assert any(
            f"{name} {said} PPO" in page for said in ("is not told apart from", "does better than", "does worse than")
        )
        assert f"<h3>{name}</h3>" in page
        assert set(results["generalisation_gap"][method]) == {s for s in results["policies"]["sft"] if s != "id"}
    assert "Training curves (Pretraining): no metrics.jsonl there" in page  # and of all others there are


def test_metrics_of_a_first_step_are_those_of_the_reference(interrupted):
    path, _ = interrupted
    for method in ("rloo", "grpo"):
        first = json.loads((path / method / "metrics.jsonl").read_text().splitlines()[0])
        assert abs(first[f"{method}/kl"]) < 1e-5
        assert first[f"{method}/sampler_gap"] < 1e-4
        assert first[f"{method}/trunk_gap"] < 1e-4
        assert "gold" in "".join(first)
    last = json.loads((path / "dpo" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"dpo/margin", "dpo/accuracy", "dpo/accuracy_id", "dpo/accuracy_ood_news"} <= last.keys()
    summary = json.loads((path / "dpo" / "summary.json").read_text())
    for split in ("id", "ood_news"):
        e = summary["margin"][split]
        assert e["low"] <= e["mean"] <= e["high"]
        assert e["n"] == summary["accuracy"][split]["n"] == summary["pairs"][split]


def test_members_differ_and_each_is_normalised(interrupted):
    path, _ = interrupted
    found = config.read(path / "config.json")
    run = Run(found, path, task.Task(task.tokenizer(found, path)), "")
    summary = json.loads((path / "reward" / "summary.json").read_text())["normalisation"]
    assert len(set(summary["mean"])) == len(set(summary["std"])) == 2
    ensemble = run.scorer()
    w_ED = np.asarray(ensemble.members.head.w_D)
    assert w_ED.shape == (2, 64)
    assert abs(np.corrcoef(w_ED)[0, 1]) < 0.5
    assert ensemble.combine == "worst"


def test_methods_are_exported_and_an_ensemble_is_not(interrupted, tmp_path, capsys):
    path, _ = interrupted
    for method in ("dpo", "rloo"):
        argv = ["jaxrlhf", "export", f"--workdir={path}", f"--policy={method}", f"--to={tmp_path / method}"]
        assert main(argv) == 0
        card = (tmp_path / method / "README.md").read_text()
        assert f"{names.TITLES[method]} policy" in card
        assert f"| {names.TITLES[method]} | from SFT" in card
        assert ("2 members, combined by worst" in card) == (method == "rloo")
    capsys.readouterr()
    argv = ["jaxrlhf", "export", f"--workdir={path}", "--policy=reward", f"--to={tmp_path / 'reward'}"]
    assert main(argv) == 2
    assert "an ensemble of 2" in capsys.readouterr().err
    assert not (tmp_path / "reward").exists()
