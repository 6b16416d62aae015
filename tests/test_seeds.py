"""Runs that differ in their seed alone, as one."""

import copy
import json
from typing import Any

import pytest
from report_workdirs import around, recipe_results

from jaxrlhf.evaluation import pictures, report, seeds, sentences
from jaxrlhf.files import UserError, write_json
from jaxrlhf.main import main


def run(seed, shift=0.0) -> Any:
    """A recipe's results, of which PPO's gold reward and its differences are moved by `shift`."""
    found: Any = copy.deepcopy(recipe_results())
    found["config"]["seed"] = seed
    for m in found["policies"]["ppo"].values():
        m["gold"]["mean"] += shift
    for d in found["differences"]:
        if d["a"] == "ppo":
            d["gold"]["mean"] += shift
    return found


def test_by_hand():
    found = seeds.combine([run(3, -0.5), run(1, 0.25), run(7, 1.0)])
    assert (found["seeds"], found["missing"], found["config"].get("seed")) == ([3, 1, 7], [], None)
    # means 4.16 + (-.5, .25, 1): 4.41 +- 4.30265 x .75 / sqrt(3)
    gold = found["policies"]["ppo"]["id"]["gold"]
    assert gold == pytest.approx({"mean": 4.41, "low": 4.41 - 1.86310, "high": 4.41 + 1.86310, "n": 3}, abs=1e-4)
    assert found["policies"]["ppo"]["id"]["n_prompts"] == 100
    assert "se" in found["policies"]["sft"]["id"]["win_rate"]
    (d,) = [d for d in found["differences"] if (d["split"], d["a"], d["b"]) == ("id", "ppo", "sft")]
    assert (d["gold"]["mean"], d["gold"]["n"], d["gold"]["family"]) == (pytest.approx(4.41 - 2.53), 3, 15)
    # t = 1.88 / (.75 / sqrt 3) = 4.3416 with 2 degrees of freedom
    assert d["gold"]["p"] == pytest.approx(0.0491, abs=2e-4)
    assert d["gold"]["p_holm"] > 0.05
    assert d["gold"]["n_needed"] > 3
    heads = {(c["a"], c["b"], c["split"]): c["win_rate"] for c in found["comparisons"]}
    assert len(heads) == 15
    assert heads["bon", "sft", "id"]["n"] == 3
    assert found["generalisation_gap"]["sft"]["ood_news"]["gold"]["n"] == 3


def test_shares_stay_between_0_and_1():
    one, other = run(0), run(1)
    one["policies"]["sft"]["id"]["win_rate"]["mean"], other["policies"]["sft"]["id"]["win_rate"]["mean"] = 0.9, 0.99
    e = seeds.combine([one, other])["policies"]["sft"]["id"]["win_rate"]
    assert (e["mean"], e["high"]) == (pytest.approx(0.945), 1.0)


def test_what_a_seed_lacks_is_stated_and_not_averaged():
    one, other, third = run(0), run(1), run(2)
    del other["policies"]["ppo"]["ood_news"]
    del third["policies"]["sft"]["id"]["gold"]
    found = seeds.combine([one, other, third])
    assert "ood_news" not in found["policies"]["ppo"]
    assert "gold" not in found["policies"]["sft"]["id"]
    assert found["missing"] == [
        {"at": "policies/sft/id/gold", "why": "not measured", "seeds": [2]},
        {"at": "policies/ppo/ood_news", "why": "not measured", "seeds": [1]},
    ]


def test_texts_cut_to_other_lengths_are_not_averaged():
    runs = [run(0), run(1)]
    for words, found in zip((12, 13), runs, strict=True):
        for splits in found["policies"].values():
            splits["id"]["cut"] = {"words": words, "reached": 0.8}
            splits["ood_news"]["cut"] = {"words": 9, "reached": words / 20}
            for m in (splits["id"], splits["ood_news"]):
                m["diversity"]["per_input"]["ead_cut"] = around(0.5, 0.1)
    found = seeds.combine(runs)
    sft = found["policies"]["sft"]
    assert "ead_cut" not in sft["id"]["diversity"]["per_input"]
    assert "cut" not in sft["id"]
    assert sft["ood_news"]["diversity"]["per_input"]["ead_cut"]["n"] == 2
    assert sft["ood_news"]["cut"] == {"words": 9, "reached": 0.6}
    (gone,) = found["missing"]
    assert gone["at"] == "at equal length, id"
    assert "12, 13 words; set config.evaluation.cut_words" in gone["why"]


def changed(key, value):
    found = run(1)
    section, name = key.split(".")
    found["config"][section][name] = value
    return found


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([run(0)], "one run has no interval over seeds"),
        ([run(0), run(1), run(0)], "2 runs have config.seed=0; each seed counts once"),
        (
            [run(0), changed("ppo.kl_coef", 0.2)],
            r"config\.ppo\.kl_coef is 0\.05 in the first run and 0\.2 in that of s",
        ),
        ([run(0), changed("sampling.new", 3)], r"config\.sampling\.new is None in the first run and 3"),
        ([run(0), run(1) | {"judge": "reward"}], "judge is 'gold' in the first run and 'reward'"),
        ([run(0), run(1) | {"config": {"outputs": []}}], r"run 2: its results\.json has no config\.seed"),
    ],
)
def test_runs_that_are_not_one_experiment_are_refused(runs, says):
    with pytest.raises(UserError, match=says):
        seeds.combine(runs)


def workdirs(tmp_path):
    for seed, shift in enumerate((-0.2, 0.1, 0.5)):
        write_json(tmp_path / f"s{seed}" / "results.json", run(seed, shift))
    return [f"--seeds={tmp_path / f's{seed}'}" for seed in range(3)]


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "draw", lambda found, accuracy: {})
    runs = workdirs(tmp_path)
    assert main(["jaxrlhf", "report", f"--workdir={tmp_path / 'all'}", *runs]) == 0
    assert main(["jaxrlhf", "report", f"--workdir={tmp_path / 'all'}", *runs]) == 0
    found = json.loads((tmp_path / "all" / "results.json").read_text())
    assert found["seeds"] == [0, 1, 2]
    page = (tmp_path / "all" / "report" / "index.html").read_text()
    assert "0, 1, 2: every number is a mean over them" in page
    assert "The intervals say what other seeds would change" in page
    assert "seeds would settle" in page
    capsys.readouterr()
    for workdir, more, says in (
        ("s0", [], "holds a run of its own"),
        ("new", [f"--seeds={tmp_path / 'nowhere'}"], "nowhere/results.json: no such file"),
    ):
        assert main(["jaxrlhf", "report", f"--workdir={tmp_path / workdir}", *runs, *more]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert "seeds" not in json.loads((tmp_path / "s0" / "results.json").read_text())


def verdicts(**estimates):
    found = report.Found({"seeds": []}, {}, {s: s for s in estimates}, [])
    words = sentences.Words("beats SFT", "loses to SFT", "is not told apart from SFT")
    return list(sentences._said(found, "PPO", {("gold",): estimates}, words))


def judged(mean, p_holm, **more):
    return around(mean, 0.1, p=p_holm / 3, p_holm=p_holm, family=3, **more)


def test_findings_decide_after_holm_and_say_how_many_prompts_are_needed():
    """On b the interval excludes 0, and yet that does not hold among three comparisons."""
    assert verdicts(a=judged(0.4, 0.001), b=judged(0.11, 0.06, n_needed=143), c=judged(0.01, 1.0, n_needed=23_456)) == [
        "By gold reward, PPO beats SFT on 1 of 3 splits (a); 2 undecided, after Holm's correction for 3 comparisons; "
        "about 140 to 23,000 prompts would settle differences of these sizes."
    ]
    assert verdicts(a=judged(0.05, 0.4, n_needed=1_386))[0].endswith(
        "SFT on a, after Holm's correction for 3 comparisons; about 1,400 prompts would settle a "
        "difference of this size."
    )
    assert "; more than a million prompts would settle a difference of this size." in verdicts(a=judged(1e-6, 1.0))[0]
    assert verdicts(a=judged(0.0, 1.0))[0].endswith("after Holm's correction for 3 comparisons.")
