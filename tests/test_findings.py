"""What the report says in sentences: no more than intervals support, and of many policies all together."""

import pytest
from report_workdirs import around, differences, outputs_workdir

from jaxrlhf.evaluation import findings, report, sentences
from jaxrlhf.files import write_json


def found_of(sft, ppo, tmp_path):
    """Results of two policies on splits a, b, …, with the win rates given as (low, high)."""
    policies = {
        name: {
            s: {"win_rate": around((lo + hi) / 2, (hi - lo) / 2)} for s, (lo, hi) in zip("abcd", values, strict=False)
        }
        for name, values in (("sft", sft), ("ppo", ppo))
    }
    results = {"schema": 1, "policies": policies, "generalisation_gap": {}}
    write_json(tmp_path / "results.json", results | {"differences": differences(results)})
    return report.read_results(tmp_path)


def test_only_differences_whose_interval_excludes_0_decide(tmp_path):
    found = found_of([(0.1, 0.2), (0.5, 0.6), (0.3, 0.5)], [(0.3, 0.4), (0.1, 0.2), (0.4, 0.6)], tmp_path)
    said = sentences.of(found)["generalisation"]
    assert said[0].startswith("On a, win rate: 0.150 [0.100,")
    assert said[1:] == [
        "By win rate, PPO does better than SFT on 1 of 3 splits (a); does worse than SFT on 1 of 3 splits (b); "
        "1 undecided."
    ]


def test_one_item_decides_nothing():
    above, below, one, wide = around(0.6, 0.2), around(-0.6, 0.2), around(0.8, 0.0, n=1), around(0.1, 0.2)
    verdict = findings.decide({"a": above, "b": below, "c": one, "d": wide})
    assert verdict == (("a",), ("b",), ("c", "d"))


def test_a_ppo_that_is_worse_is_said_to_be_worse(tmp_path):
    found = found_of([(0.5, 0.6)] * 4, [(0.1, 0.2)] * 4, tmp_path)
    assert sentences.of(found)["generalisation"][1:] == ["By win rate, PPO does worse than SFT on 4 of 4 splits."]


def test_touching_intervals_are_undecided(tmp_path):
    found = found_of([(0.25, 0.5)] * 2, [(0.5, 0.75)] * 2, tmp_path)
    said = sentences.of(found)["generalisation"][1:]
    assert said == ["By win rate, PPO is not told apart from SFT on any of 2 splits."]


@pytest.mark.parametrize(
    ("ppo", "end"),
    [((0.3, 0.4), "does better than SFT on 1 of 1 split."), ((0.1, 0.2), "is not told apart from SFT on a.")],
)
def test_one_split_is_one(tmp_path, ppo, end):
    said = sentences.of(found_of([(0.1, 0.2)], [ppo], tmp_path))["generalisation"][1:]
    assert said == [f"By win rate, PPO {end}"]


def test_many_policies_beside_one_are_told_of_together(tmp_path):
    win_rates = {"sft": [(0.3, 0.5)] * 2, "a": [(0.6, 0.7)] * 2, "b": [(0.6, 0.7)] * 2, "c": [(0.1, 0.2), (0.3, 0.5)]}
    win_rates |= {p: [(0.35, 0.45)] * 2 for p in "defg"}
    policies = {
        name: {s: {"win_rate": around((lo + hi) / 2, (hi - lo) / 2)} for s, (lo, hi) in zip("xy", held, strict=True)}
        for name, held in win_rates.items()
    }
    results = {"schema": 1, "policies": policies, "generalisation_gap": {}}
    write_json(tmp_path / "results.json", results | {"differences": differences(results)})
    found = report.read_results(tmp_path)
    said = [line.replace("\N{NO-BREAK SPACE}", " ") for line in sentences.of(found)["generalisation"]]
    assert said == [
        "On x, win rate: from 0.650 [0.600, 0.700] for a to 0.150 [0.100, 0.200] for c.",
        "By win rate, each of a and b does better than SFT on 2 of 2 splits; each of d, e, f and g is not told apart "
        "from SFT on any of 2 splits; c does worse than SFT on 1 of 2 splits, 1 undecided.",
    ]


def test_who_beats_whom_is_in_short(tmp_path):
    found = found_of([(0.1, 0.2)], [(0.1, 0.2)], tmp_path)
    found.results["comparisons"].append({"split": "a", "a": "ppo", "b": "sft", "win_rate": around(0.8, 0.1)})
    assert sentences.of(found)["generalisation"][1:] == [
        "By win rate, PPO is not told apart from SFT on a.",
        "By head-to-head comparison, PPO beats SFT on 1 of 1 split.",
    ]


def test_the_split_of_all_prompts_is_not_counted_with_its_parts(tmp_path):
    said = sentences.of(report.read_results(outputs_workdir(tmp_path)))["generalisation"]
    assert said[1:] == [
        "By win rate, over all prompts ppo-human does better than alpaca-7b.",
        "By win rate, ppo-human is not told apart from alpaca-7b on any of 2 splits.",
    ]


def varied(tmp_path, whole, cut, **more):
    """Policies a and b of one split, with b's across-input EAD, whole and at equal length, less that of a."""

    def policy(ead, ead_cut):
        held = {"ead": around(ead, 0.01), "ead_cut": around(ead_cut, 0.01)}
        return {s: {"diversity": {"across_input": held}} for s in ("all",)}

    results = {"schema": 1, "policies": {"a": policy(1, 0.9), "b": policy(1 + whole, 0.9 + cut)}}
    results |= {"generalisation_gap": {}} | more
    write_json(tmp_path / "results.json", results | {"differences": differences(results)})
    return sentences.of(report.read_results(tmp_path))


@pytest.mark.parametrize(
    ("cut", "end"),
    [
        (0.0, "at equal length undecided (0.000 [-0.020, 0.020])"),
        (0.3, "the same at equal length (0.300 [0.280, 0.320])"),
        (-0.3, "at equal length it is less diverse than a (-0.300 [-0.320, -0.280])"),
    ],
)
def test_a_diversity_that_length_can_make_is_told_with_that_at_equal_length(tmp_path, cut, end):
    said = {k: [x.replace("\N{NO-BREAK SPACE}", " ") for x in v] for k, v in varied(tmp_path, 0.5, cut).items()}
    wanted = f"By across-input EAD, over all prompts b is more diverse than a; {end}."
    assert said["headline"] == [wanted]
    assert said["diversity"][1:] == [wanted]
    assert "1.500 [1.490, 1.510] for b; at equal length 0.900 [0.890, 0.910] for a" in said["diversity"][0]


@pytest.mark.parametrize(("consistency", "warned"), [(0.55, True), (0.6, False), (None, False)])
def test_a_judge_that_contradicts_itself_is_warned_of_in_place(tmp_path, consistency, warned):
    found = found_of([(0.1, 0.2)], [(0.3, 0.4)], tmp_path)
    judged = {"judge_report": {"consistency": around(consistency, 0.05)} if consistency else {}}
    said = sentences.of(found._replace(results={**found.results, **judged}))
    for lines in (said["generalisation"], said["headline"]):
        assert lines
        assert all(("(with care: the judge named the same winner" in line) == warned for line in lines)
    assert warned == any("on a share of only 0.55 of the pairs" in line for line in said["headline"])


def test_of_many_policies_those_with_the_same_at_equal_length_are_told_of_together(tmp_path):
    def policy(ead, ead_cut):
        return {"all": {"diversity": {"across_input": {"ead": around(ead, 0.01), "ead_cut": around(ead_cut, 0.01)}}}}

    eads = {"a": (1, 0.9), "b": (2, 0.9), "c": (2, 0.9), "d": (2, 0.5), "e": (2, 1.5)}
    results = {"schema": 1, "policies": {k: policy(*v) for k, v in eads.items()}, "generalisation_gap": {}}
    write_json(tmp_path / "results.json", results | {"differences": differences(results)})
    assert sentences.of(report.read_results(tmp_path))["headline"] == [
        "By across-input EAD, over all prompts d is more diverse than a (at equal length it is less diverse than a); "
        "each of b and c is more diverse than a (at equal length undecided); e is more diverse than a (the same at "
        "equal length)."
    ]
