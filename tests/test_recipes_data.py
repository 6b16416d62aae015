"""Recipes on real datasets: every variant resolves, and the smoke variants' files are what their script makes."""

import importlib.util
from pathlib import Path

import pytest
from absl import flags

from jaxrlhf.data import datasets, selection, task
from jaxrlhf.files import UserError
from jaxrlhf.recipes import parse, resolve

ROOT = Path(__file__).parents[1]
TLDR = ("full", "relationships", "length", "sentiment")


def load(recipe, monkeypatch, *overrides):
    monkeypatch.chdir(ROOT)
    return resolve(parse(["jaxrlhf", f"--config=configs/{recipe}", *overrides], flags.FlagValues())[0])


@pytest.mark.parametrize("model", ["opt-125m", "opt-6.7b", "llama-7b"])
@pytest.mark.parametrize("split", TLDR)
def test_the_papers_numbers(model, split, monkeypatch):
    c = load(f"tldr.py:{model},{split}", monkeypatch)
    assert c.model.init.endswith(model)
    assert c.datasets.split == ("subreddit" if split == "relationships" else split)
    assert (c.datasets.length, c.datasets.subreddits) == (245, ("relationships",))
    assert (c.sft.optim.lr, c.reward.optim.lr, c.ppo.optim.lr) == (3e-5, 1e-5, 1.5e-6)
    assert (c.ppo.kl_coef, c.ppo.kl_estimator, c.ppo.loop.steps) == (5.0, "k2", 500)
    assert c.sft.loop.steps * c.sft.batch_size <= 116_722
    if split == "full":
        assert (c.sft.loop.steps, c.reward.loop.steps) == (7295, 11607)  # 116 722 posts by 16, 92 858 pairs by 8
    assert c.model.prompt_length + c.model.response_length <= 2048  # positions of OPT and LLaMA


def test_alpacafarm_numbers(monkeypatch):
    c = load("alpacafarm.py", monkeypatch)
    assert c.model.prompt_length + c.model.response_length == 512
    assert c.sft.loop.steps == 3 * 10_000 // c.sft.batch_size
    assert c.ppo.batch_size // c.ppo.minibatches == 256


@pytest.mark.parametrize("recipe", ["tldr.py:opt-175b", "tldr.py:smoke,short", "alpacafarm.py:opt-125m"])
def test_unknown_variants_are_named(recipe, monkeypatch):
    with pytest.raises(UserError, match="known are"):
        load(recipe, monkeypatch)


@pytest.mark.parametrize("recipe", [*(f"tldr.py:smoke,{split}" for split in TLDR), "alpacafarm.py:smoke"])
def test_smoke_data_gives_every_stage_what_it_needs(recipe, monkeypatch, tmp_path):
    c = load(recipe, monkeypatch)
    made = task.load(c, tmp_path, lambda said: None)
    kind = "" if c.datasets.split == "full" else f"ood_{c.datasets.split}"
    assert list(made.splits) == [s for s in ("id", kind, *(f"ood_{name}" for name in c.datasets.far)) if s]
    assert made.preferences is not None
    assert len(made.validation) >= 4
    for records in (made.demonstrations, made.ppo_prompts, made.preferences["train"]):
        assert len(records) >= 8  # a whole batch
        assert all(len(made.tokenizer.encode(r["prompt"])) for r in records)
    for name, records in made.splits.items():
        assert 3 <= len(records) <= 6
        assert all(r["response"].strip() for r in records), name
    assert {"id"} <= set(made.preferences)


def test_smoke_files_are_what_their_script_makes(tmp_path):
    path = ROOT / "launch" / "make_smoke_data.py"
    spec = importlib.util.spec_from_file_location("make_smoke_data", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write(tmp_path)
    kept = ROOT / "configs" / "smoke"
    names = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(kept) for p in kept.rglob("*") if p.is_file())
    assert all((tmp_path / n).read_bytes() == (kept / n).read_bytes() for n in names)


def test_every_dataset_has_a_key():
    c = selection.Datasets()
    for name in (*datasets.DATASETS, *selection.OWN):
        assert selection.source(c, name) == selection.Source()
