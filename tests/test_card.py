from dataclasses import replace

from jaxrlhf import card
from jaxrlhf.config import Experiment, Files
from jaxrlhf.config_data import Datasets

EVIL = "a|b\n# <script>alert(1)</script> [x](http://y) `c` *d* --- ![e](f)"
E = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 7}
FILES = Files(root="/home/me", id_sources=(EVIL,), prompt=EVIL)
TOLD = card.Told(
    policy="ppo",
    config=replace(Experiment(), name=EVIL, task="files", files=FILES),
    family="opt",
    parameters=1234567,
    base="facebook/opt-125m",
    summaries={"sft": {"examples": 5, "truncated": {EVIL: 3, "id": 0}}, "reward": {"pairs": {"train": 9}}, "ppo": {}},
    results={"policies": {"ppo": {EVIL: {"win_rate": E, "diversity": {"per_input": {"ead": E}}}, "id": {}}}},
)


def test_what_a_card_says():
    text = card.card(TOLD)
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\nbase_model: facebook/opt-125m\n"
    assert text.startswith(head)
    assert "1,234,567 parameters" in text
    assert "| 0.500 [0.250, 0.750], n = 7 | not measured | not measured | not measured | 0.500 [0.250" in text
    assert "5 demonstrations" in text
    assert "9 pairs by the files' verdicts" in text
    assert text.count("lost their left end") == 1


def test_texts_of_others_cannot_format_link_or_run():
    text = card.card(TOLD)
    plain = card.card(replace(TOLD, config=replace(TOLD.config, name="n", files=Files(id_sources=("s",), prompt="p"))))
    for mark in ("<", "](", "![", "*", "\n# "):
        assert text.count(mark) == plain.count(mark), mark
    assert "/home/me" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {row.count(" | ") for row in rows} == {1, 5}


def test_a_base_that_is_no_hub_id_is_not_claimed():
    for base in ("", "../x", "/home/me/model", "a/b/c", "a/b\nlicense: x"):
        assert "base_model" not in card.card(replace(TOLD, base=base))


def test_nothing_measured_is_said():
    assert "Nothing yet" in card.card(replace(TOLD, results={}))


def test_datasets_are_named_and_where_they_were_is_not():
    data = Datasets(sft="tldr", preferences="hh", far=("alpaca_eval",), split="length", subset=0.5, data_dir="/home/me")
    text = card.card(replace(TOLD, config=Experiment(task="datasets", datasets=data)))
    assert "| datasets | tldr, hh, alpaca_eval |" in text
    assert "split length, 0.5 of its training records" in text
    assert "| prompt format | tldr |" in text
    assert "/home/me" not in text
    assert "<b>" not in card.card(
        replace(TOLD, config=Experiment(task="datasets", datasets=replace(data, prompt="<b>{post}")))
    )
