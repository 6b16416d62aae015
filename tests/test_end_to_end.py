"""The whole recipe as a user runs it, in its smoke variant."""

import json
import math
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxrlhf import config, model, ppo, scoring, weights
from jaxrlhf.data import task, tokens, world
from jaxrlhf.evaluation import results
from jaxrlhf.experiment import Run, base_params
from jaxrlhf.files import UserError
from jaxrlhf.main import main
from jaxrlhf.sampling import Generation, sample

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
    assert first["ppo/trunk_gap"] < 1e-4


def test_the_report_is_written(workdir):
    page = (workdir / "report" / "index.html").read_text()
    assert "Content-Security-Policy" in page
    assert list((workdir / "report" / "figures").glob("*.png"))


def test_a_damaged_checkpoint_of_a_finished_stage_is_never_taken_and_made_again(workdir, monkeypatch, request, capsys):
    monkeypatch.chdir(request.config.rootpath)
    before = stable_files(workdir)
    path = workdir / "ppo" / "checkpoints" / "4" / "params" / "manifest.ocdbt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    export = ["jaxrlhf", "export", f"--workdir={workdir}", "--policy=ppo", f"--to={workdir / 'exported'}"]
    assert main(export) == 1
    assert (
        "manifest.ocdbt is not as it was saved); `jaxrlhf ppo` with this config and workdir makes it again"
        in capsys.readouterr().err
    )
    assert main(["jaxrlhf", "ppo", RECIPE, f"--workdir={workdir}"]) == 0
    error = capsys.readouterr().err
    assert "removed, to go on from the checkpoint before it" in error
    assert "resumed at step 2 of 4" in error
    assert stable_files(workdir) == before
    assert main(export) == 0
    shutil.rmtree(workdir / "exported")


def test_a_second_run_skips_everything(workdir, monkeypatch, request, capsys):
    monkeypatch.chdir(request.config.rootpath)
    before = stable_files(workdir)
    monkeypatch.setattr(ppo, "update", None)
    assert main(["jaxrlhf", "run", RECIPE, f"--workdir={workdir}"]) == 0
    assert "ppo: complete" in capsys.readouterr().err
    assert stable_files(workdir) == before


def test_other_settings_of_the_measurement_measure_again(workdir, tmp_path, monkeypatch, request, capsys):
    shutil.copytree(workdir, copy := tmp_path / "copy")
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr(ppo, "update", None)
    argv = ["jaxrlhf", "run", RECIPE, f"--workdir={copy}", "--config.evaluation.cut_words=3"]
    for again in (True, False):
        assert main(argv) == 0
        said = capsys.readouterr().err
        assert ("measured by other settings of config.evaluation" in said, "report: complete" in said) == (
            again,
            not again,
        )
        results = json.loads((copy / "results.json").read_text())
        assert results["config"]["evaluation"]["cut_words"] == 3
        found = [m["cut"]["words"] for splits in results["policies"].values() for m in splits.values()]
        assert set(found) == {3}


# ---- out to transformers, and in again


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for policy in ("sft", "ppo", "reward"):
        argv = ["jaxrlhf", "export", f"--workdir={workdir}", f"--policy={policy}", f"--to={folder / policy}"]
        assert main(argv) == 0
        assert main(argv) == 0  # its own it may write anew
    return folder


def a_run(workdir):
    c = config.read(workdir / "config.json")
    return Run(c, workdir, task.Task(task.tokenizer(c, workdir)), "")


def rows_of(workdir, policy="ppo"):
    return [json.loads(r) for r in (workdir / "samples" / policy / "id.jsonl").read_text().splitlines()]


def test_exported_files_and_cards(workdir, exported):
    names = {"README.md", "config.json", "jaxrlhf.json", "model.safetensors"}
    names |= {"special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24}
    results = json.loads((workdir / "results.json").read_text())
    for policy in ("sft", "ppo", "reward"):
        found = {p.name for p in (exported / policy).iterdir()}
        assert found == names | (set() if policy == "reward" else {"generation_config.json"})
        texts = [p.read_text() for p in (exported / policy).iterdir() if p.suffix != ".safetensors"]
        assert all(str(workdir) not in t and str(exported) not in t for t in texts)
        if policy != "reward":
            assert json.loads((exported / policy / "generation_config.json").read_text()).items() >= sampled.items()
            e = results["policies"][policy]["ood_news"]["gold"]
            line = f"{e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}], n = 12"
            assert line in (exported / policy / "README.md").read_text()
    assert sorted(p.name for p in exported.iterdir()) == ["ppo", "reward", "sft"]  # nothing half-written beside them


def test_transformers_draws_and_scores_what_we_do(workdir, exported):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    run, rows = a_run(workdir), rows_of(workdir)
    prompts, responses = [r["prompt"] for r in rows], [r["responses"][0] for r in rows]
    reader = AutoTokenizer.from_pretrained(exported / "ppo")
    batch = reader(prompts, return_tensors="pt", padding=True)
    token_BP, mask_BP = batch["input_ids"].numpy(), batch["attention_mask"].numpy().astype(np.float32)
    assert reader(prompts)["input_ids"] == run.task.tokenizer.encode_prompts(prompts)
    for policy in ("sft", "ppo"):
        theirs = AutoModelForCausalLM.from_pretrained(exported / policy).eval()
        frozen, top = run.base[0], run.policy(policy)
        hidden_BPD = model.trunk(run.arch, frozen, token_BP, mask_BP)
        ours_BPV = model.logits(run.arch, frozen, top, model.run_top(run.arch, top, token_BP, hidden_BPD, mask_BP))
        with torch.no_grad():
            wanted_BPV = theirs(**batch).logits.numpy()
            wanted_BT = theirs.generate(**batch, do_sample=False, temperature=None, top_k=None, top_p=None).numpy()
        assert np.abs(ours_BPV - wanted_BPV)[mask_BP > 0].max() < 1e-4
        greedy = Generation(24, temperature=0.0)
        drawn_BR = sample(run.arch, greedy, frozen, top, token_BP, mask_BP, jax.random.key(0)).tokens_BR
        wanted_BR = wanted_BT[:, token_BP.shape[1] :]
        assert np.array_equal(drawn_BR[:, : wanted_BR.shape[1]], wanted_BR)
        assert not np.asarray(drawn_BR[:, wanted_BR.shape[1] :]).any()
    theirs = AutoModelForSequenceClassification.from_pretrained(exported / "reward").eval()
    ids = [[*i, 1] for i in reader([p + r for p, r in zip(prompts, responses, strict=True)])["input_ids"]]
    inputs = AutoTokenizer.from_pretrained(exported / "reward").pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        wanted_B = theirs(**inputs).logits[:, 0].numpy() + theirs.config.jaxrlhf_score_bias
    ours_B = scoring.score_texts(scoring.load(exported / "reward"), prompts, responses)
    assert np.abs(ours_B - wanted_B).max() < 1e-4


def test_an_exported_reward_model_scores_as_the_run_did(workdir, exported):
    rows = [(r["prompt"], t, s) for r in rows_of(workdir) for t, s in zip(r["responses"], r["scores"], strict=True)]
    short = [row for row in rows if len(row[1].split()) < 20]  # these ended by themselves
    prompts, responses, scores = zip(*short, strict=True)
    found = scoring.score_texts(scoring.load(exported / "reward"), prompts, responses)
    assert len(found) > 5
    assert max(abs(a - b) for a, b in zip(found, scores, strict=True)) < 1e-4


def test_a_workdir_as_a_judge_scores_as_its_run_did(workdir, tmp_path):
    """Responses that did not end by themselves, too."""
    for part in ("samples", "config.json"):
        (shutil.copytree if part == "samples" else shutil.copyfile)(workdir / part, tmp_path / part)
    c = config.read(workdir / "config.json")
    by = {"own": "reward", "proxy": f"reward:{workdir}"}
    found = {
        name: results.evaluate_samples(tmp_path, replace(c, evaluation=replace(c.evaluation, judge=judge)))
        for name, judge in by.items()
    }
    assert not all(all(r["finished"]) for r in rows_of(workdir))
    apart = []
    for policy in POLICIES:
        for split in SPLITS:
            own, proxy = (found[name]["policies"][policy][split] for name in by)
            apart.append(abs(proxy["proxy_score"]["mean"] - own["score"]["mean"]))
    # A policy that is hardly trained may draw the padding token, which no text spells.
    assert sum(a > 1e-4 for a in apart) <= 1
    assert max(apart) < 0.01
    (tmp_path / "reward").mkdir()
    with pytest.raises(UserError, match="stage 'reward' is not finished"):
        scoring.of_directory(tmp_path)


def test_an_export_overwrites_nothing_of_others(workdir, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    argv = ["jaxrlhf", "export", f"--workdir={workdir}", "--policy=sft"]
    assert main([*argv, f"--to={tmp_path}"]) == 2
    assert "holds what no export wrote" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("notes.txt", "mine")]
    assert main(["jaxrlhf", "export", f"--workdir={workdir}", "--policy=bon", f"--to={tmp_path / 'x'}"]) == 2
    assert "best-of-N is no model" in capsys.readouterr().err


def test_an_export_comes_in_as_the_base_of_another_run(exported, tmp_path, monkeypatch, request, capsys):
    monkeypatch.chdir(request.config.rootpath)
    argv = ["jaxrlhf", "import", f"--from={exported / 'sft'}", f"--workdir={tmp_path}"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "llama, 6 layers of width 64" in out
    assert "345,600 (float32)" in out
    assert main(argv) == 2
    assert "a base is there" in capsys.readouterr().err
    steps = ["--config.sft.loop.steps=1", "--config.sft.loop.eval_every=0"]
    assert main(["jaxrlhf", "sft", RECIPE, f"--workdir={tmp_path}", *steps]) == 0
    run = a_run(tmp_path)
    assert run.config.model.init == "base"
    wanted = weights.load(exported / "sft")[1]
    assert all(map(np.array_equal, jax.tree.leaves(base_params(run)), jax.tree.leaves(wanted)))
    shutil.rmtree(tmp_path / "base")
    assert run.task.tokenizer.encode("TITLE: my") == task.tokenizer(run.config, tmp_path).encode("TITLE: my")


# ---- a reward model from elsewhere


def renumbered(exported, folder):
    """The exported reward model with its tokens in another order: what it says of a text is the same."""
    ours = scoring.load(exported)
    words = [w for w in world.VOCABULARY if w.isascii()]
    theirs = tokens.word_tokenizer([*reversed(words), *(w for w in world.VOCABULARY if not w.isascii())])
    arch, params, head = weights.load_reward(exported)
    ids, rows = ours.tokenizer.engine.get_vocab(), np.arange(arch.vocab_size)
    for token, i in theirs.engine.get_vocab().items():
        rows[i] = ids[token]
    params["embed"] = {k: v[rows] if v.shape[0] == arch.vocab_size else v for k, v in params["embed"].items()}
    folder.mkdir()
    tokens.save_files(theirs, folder, "right")
    weights.export_reward(folder, arch, params, head, {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0})
    return folder


@pytest.mark.parametrize("reads", ["ids", "texts"])
def test_ppo_against_a_reward_model_from_elsewhere(workdir, exported, tmp_path, monkeypatch, request, reads):
    """It is the one that was trained here, exported: the scores are the same, whatever numbers its tokens have."""
    monkeypatch.chdir(request.config.rootpath)
    init = exported / "reward" if reads == "ids" else renumbered(exported / "reward", tmp_path / "renumbered")
    for part in ("sft", "data"):
        shutil.copytree(workdir / part, tmp_path / "run" / part)
    argv = ["jaxrlhf", "run", RECIPE, f"--workdir={tmp_path / 'run'}", f"--config.reward.init={init}"]
    assert main(argv) == 0
    summary = json.loads((tmp_path / "run" / "reward" / "summary.json").read_text())
    assert summary["reads"] == reads
    assert abs(summary["normalisation"]["mean"]) < 1e-3
    assert abs(summary["normalisation"]["std"] - 1) < 1e-3
    for policy in ("sft", "ppo"):
        for ours, theirs in zip(rows_of(workdir, policy), rows_of(tmp_path / "run", policy), strict=True):
            assert ours["responses"] == theirs["responses"]
            assert np.allclose(ours["scores"], theirs["scores"], atol=2e-3)
            assert abs(ours["reference_score"] - theirs["reference_score"]) < 2e-3
    runs = (workdir, tmp_path / "run")
    metrics = [json.loads((w / "ppo" / "metrics.jsonl").read_text().splitlines()[-1]) for w in runs]
    assert abs(metrics[0]["ppo/score"] - metrics[1]["ppo/score"]) < 2e-3


def test_a_wrong_reward_model_is_found_before_anything_is_trained(exported, tmp_path, monkeypatch, request, capsys):
    monkeypatch.chdir(request.config.rootpath)
    argv = ["jaxrlhf", "run", RECIPE, f"--workdir={tmp_path}"]
    assert main([*argv, f"--config.reward.init={exported / 'sft'}"]) == 2
    assert "score.weight" in capsys.readouterr().err
    assert main([*argv, f"--config.reward.init={tmp_path / 'nowhere'}"]) == 2
    assert "config.reward.init" in capsys.readouterr().err
    assert main([*argv, f"--config.reward.init={exported / 'reward'}", "--config.ppo.value_init=reward"]) == 2
    assert "config.ppo.value_init" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
