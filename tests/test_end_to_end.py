"""The whole recipe as a user runs it, in its smoke variant."""

import json
import math

import pytest

from jaxrlhf import ppo
from jaxrlhf.main import main

RECIPE = "--config=configs/quickstart.py:smoke"
POLICIES = {"sft", "bon", "ppo"}
SPLITS = ["id", "ood_subreddit", "ood_length", "ood_sentiment", "ood_news"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        assert main(["jaxrlhf", "run", RECIPE, f"--workdir={path}"]) == 0
    return path


def stable_files(path):
    """All files that the contract says do not depend on the clock."""
    names = ("results.json", "config.json", "metrics.jsonl", "index.html", "summary.json")
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.name in names or p.parent.parent.name == "samples"
    }


def test_results_keep_the_contract(workdir):
    results = json.loads((workdir / "results.json").read_text())
    assert results["schema"] == 1
    assert set(results["policies"]) == POLICIES
    for splits in results["policies"].values():
        assert list(splits) == SPLITS or set(splits) == set(SPLITS)
        for found in splits.values():
            assert (found["n_prompts"], found["samples_per_prompt"]) == (12, 4)
            for name in ("win_rate", "score", "gold", "length"):
                e = found[name]
                assert e["low"] <= e["mean"] <= e["high"]
                assert e["n"] == 12
                assert all(math.isfinite(v) for v in e.values())
            for scope in ("per_input", "across_input"):
                assert {"ead", "distinct", "cosine"} <= set(found["diversity"][scope])
    assert set(results["generalisation_gap"]["ppo"]) == set(SPLITS[1:])


def test_samples_keep_the_contract(workdir):
    for policy in POLICIES:
        lines = (workdir / "samples" / policy / "id.jsonl").read_text().splitlines()
        assert len(lines) == 12
        for line in map(json.loads, lines):
            assert {"id", "prompt", "reference", "responses", "scores", "gold"} <= set(line)
            assert len(line["responses"]) == len(line["scores"]) == len(line["gold"]) == 4


def test_best_of_n_picks_from_what_sft_wrote_and_scores_no_worse(workdir):
    mean = {}
    for policy in ("sft", "bon"):
        rows = [json.loads(r) for r in (workdir / "samples" / policy / "id.jsonl").read_text().splitlines()]
        mean[policy] = sum(s for r in rows for s in r["scores"]) / sum(len(r["scores"]) for r in rows)
    assert mean["bon"] > mean["sft"]


def test_metrics_name_their_stage_and_hold_no_clock(workdir):
    for stage in ("sft", "reward", "ppo"):
        lines = [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        assert steps == sorted(set(steps))
        assert all(k == "step" or k.startswith(f"{stage}/") for line in lines for k in line)
    first = json.loads((workdir / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["ppo/kl"]) < 1e-5  # the policy is still the reference
    assert first["ppo/sampler_gap"] < 1e-4


def test_the_report_is_written(workdir):
    page = (workdir / "report" / "index.html").read_text()
    assert "Content-Security-Policy" in page
    assert list((workdir / "report" / "figures").glob("*.png"))


def test_an_interrupted_run_goes_on_and_ends_the_same(workdir, tmp_path, monkeypatch, request, capsys):
    """Ctrl-C within PPO, then the same command: every stable file equals the uninterrupted run's, byte for byte."""
    monkeypatch.chdir(request.config.rootpath)
    argv = ["jaxrlhf", "run", RECIPE, f"--workdir={tmp_path}"]
    update, calls = ppo.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(ppo, "update", interrupted)
    assert main(argv) == 1
    assert "goes on" in capsys.readouterr().err
    monkeypatch.setattr(ppo, "update", update)
    assert main(argv) == 0
    assert "resumed at step 2 of 4" in capsys.readouterr().err
    assert stable_files(tmp_path) == stable_files(workdir)


def test_a_second_run_skips_everything(workdir, monkeypatch, request, capsys):
    monkeypatch.chdir(request.config.rootpath)
    before = stable_files(workdir)
    monkeypatch.setattr(ppo, "update", None)
    assert main(["jaxrlhf", "run", RECIPE, f"--workdir={workdir}"]) == 0
    assert "ppo: complete" in capsys.readouterr().err
    assert stable_files(workdir) == before
