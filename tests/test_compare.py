"""Several workdirs in one report: what is paired, what is not, and what is refused."""

import json

import numpy as np
import pytest
from report_workdirs import around

from jaxrlhf.evaluation import compare, findings, outputs, report, results, samples
from jaxrlhf.files import UserError, read_json, write_json, write_records
from jaxrlhf.main import main

GOLD = {"a": [0.5, -1.25, 2.0], "b": [1.0, -0.75, 1.75]}


def run(path, name, kl, answers=2, scorer=0.25, judge="gold", split="id"):
    """A workdir of three prompts, whose gold rewards are GOLD[name]."""
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"prompt {i}",
            "reference": "so it goes",
            "responses": [f"{name} says {i} {j} and no more" for j in range(answers)],
            "scores": [0.5 * i - j for j in range(answers)],
            "gold": [g + 0.5 - j for j in range(answers)],
            "reference_score": scorer + i,
            "reference_gold": 0.0,
        }
        for i, g in enumerate(GOLD[name])
    ]
    write_records(path / "samples" / "ppo" / f"{split}.jsonl", rows)
    write_records(path / "ppo" / "metrics.jsonl", [{"step": s, "ppo/kl": s / kl} for s in (1, 2)])
    measured = {"n_prompts": 3, "samples_per_prompt": answers, "gold": around(np.mean(GOLD[name]), 0.5, 3)}
    measured |= {"score": around(0.5, 0.25, 3), "diversity": {"per_input": {"ead": around(0.5, 0.125, 3)}}}
    config = {"name": name, "seed": 0, "ppo": {"kl_coef": kl, "epochs": 4}}
    held = {"schema": 1, "task": "world", "judge": judge, "config": config, "policies": {"ppo": {split: measured}}}
    write_json(path / "results.json", held)
    return str(path)


def merged(tmp_path, *folders):
    compare.write_comparison(folders, tmp_path / "all")
    return read_json(tmp_path / "all" / "results.json")


def test_differences_are_paired_by_prompt(tmp_path):
    found = merged(tmp_path, run(tmp_path / "a", "a", 0.1), run(tmp_path / "b", "b", 0.2))
    assert list(found["policies"]) == ["a/ppo", "b/ppo"]
    (d,) = found["differences"]
    assert (d["a"], d["b"], d["split"]) == ("b/ppo", "a/ppo", "id")
    apart = np.subtract(GOLD["b"], GOLD["a"])  # two answers each: g + 0.5 and g - 0.5, so their mean is g
    assert d["gold"]["mean"] == pytest.approx(apart.mean())
    assert d["gold"]["n"] == 3
    half = 4 * np.std(apart, ddof=1)  # unpaired, the interval would be several times as wide
    assert apart.mean() - half < d["gold"]["low"] < d["gold"]["mean"] < d["gold"]["high"] < apart.mean() + half
    # Three wins against the reference at 0 where g > 0.5, a draw counts half: a 0.75, 0, 1; b 1, 0, 1.
    assert d["win_rate"]["mean"] == pytest.approx(0.25 / 3)
    assert d["score"]["mean"] == 0
    assert found["remarks"] == []
    assert found["compared"] == {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}


def test_one_differing_number_is_a_sweep(tmp_path):
    folders = [run(tmp_path / n, n, kl) for n, kl in (("b", 0.5), ("a", 0.25))]
    found = merged(tmp_path, *folders)
    assert found["differing"] == {"ppo.kl_coef": {"b": "0.5", "a": "0.25"}}
    values, kl = {"b": 0.5, "a": 0.25}, {"b": 4.0, "a": 8.0}
    assert found["sweep"] == {"key": "ppo.kl_coef", "values": values, "kl": kl}
    assert found["config"] == {"seed": 0, "ppo": {"epochs": 4}}
    page = report.write_report(tmp_path / "all").read_text()
    drawn = {p.stem for p in (tmp_path / "all" / "report" / "figures").glob("sweep*")}
    assert drawn == {f"sweep_{x}_0_{y}" for x in ("values", "kl") for y in ("gold", "diversity")}
    points = findings.swept(report.read_results(tmp_path / "all"), "values", ("gold",), "id")["ppo"]
    assert [x for x, _ in points] == [0.25, 0.5]
    assert "From ppo.kl_coef 0.25 to 0.5, gold reward of ppo on in-distribution goes from 0.42 [-0.08" in page
    assert "a says 0 1" in page
    assert "b says 0 1" in page


def test_two_differing_keys_are_none(tmp_path):
    folders = [run(tmp_path / n, n, 0.25) for n in "ab"]
    config = read_json(tmp_path / "b" / "results.json")
    config["config"] |= {"seed": 1, "ppo": {"kl_coef": 0.5, "epochs": 4}}
    write_json(tmp_path / "b" / "results.json", config)
    assert merged(tmp_path, *folders)["sweep"] == {}


def test_scores_of_other_reward_models_and_other_numbers_of_answers_are_not_subtracted(tmp_path):
    found = merged(tmp_path, run(tmp_path / "a", "a", 1.0), run(tmp_path / "b", "b", 1.0, answers=3, scorer=0.5))
    (d,) = found["differences"]
    assert "score" not in d
    assert "per_input" not in d["diversity"]
    assert "gold" in d
    said = " ".join(found["remarks"])
    assert "b and a: their scores come from different reward models" in said
    assert "b and a: 3 and 2 responses a prompt" in said
    assert "no paired difference for per-input EAD, reward-model score of ppo; their intervals are unpaired" in said


def test_without_samples_nothing_is_paired(tmp_path):
    folders = [run(tmp_path / n, n, 1.0) for n in "ab"]
    (tmp_path / "a" / "samples" / "ppo" / "id.jsonl").unlink()
    found = merged(tmp_path, *folders)
    assert found["differences"] == []
    assert "no paired difference for per-input EAD, gold reward, reward-model score" in found["remarks"][0]


def test_names_are_the_shortest_that_tell_apart(tmp_path):
    folders = [run(tmp_path / x / y / "run", "a", 1.0) for x, y in (("x", "s"), ("x", "t"), ("z", "s"))]
    assert list(merged(tmp_path, *folders)["compared"]) == ["x/s/run", "x/t/run", "z/s/run"]


def test_the_compared_stay_as_they_are_and_the_same_bytes_come_again(tmp_path):
    folders = [run(tmp_path / n, n, 1.0) for n in "ab"]
    before = {p: p.read_bytes() for n in "ab" for p in (tmp_path / n).rglob("*") if p.is_file()}
    argv = ["jaxrlhf", "report", f"--workdir={tmp_path / 'all'}", *(f"--compare={f}" for f in folders)]
    assert main(argv) == 0
    first = {p: p.read_bytes() for p in (tmp_path / "all").rglob("*") if p.is_file()}
    assert main(argv) == 0
    assert {p: p.read_bytes() for p in first} == first
    assert {p: p.read_bytes() for n in "ab" for p in (tmp_path / n).rglob("*") if p.is_file()} == before


def test_mistakes_are_one_line(tmp_path, capsys):
    a, b = (run(tmp_path / n, n, 1.0) for n in "ab")
    far = run(tmp_path / "far", "a", 1.0, split="ood_far")
    reward = run(tmp_path / "reward", "a", 1.0, judge="reward")
    for workdir, folders, says in (
        ("all", (a, str(tmp_path / "none")), "none/results.json: no such file"),
        ("all", (a, b, f"{a}/../a"), "given twice"),
        ("all", (a,), "twice or more"),
        ("all", (a, far), "its splits is ood_far"),
        ("all", (a, reward), "its judge is reward"),
        ("a", (a, b), "holds a run's own results"),
    ):
        argv = ["report", f"--workdir={tmp_path / workdir}", *(f"--compare={f}" for f in folders)]
        assert main(["jaxrlhf", *argv]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
        assert not (tmp_path / "all").exists()


def test_outputs_are_read_where_they_still_are(tmp_path):
    rows = [{"instruction": f"q{i}", "output": [f"w{i} and so on", f"v{i} and so"], "dataset": "id"} for i in range(3)]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows))
    found = results.evaluate_outputs([f"mine={path}"], "", [], False, tmp_path / "out", print, 50)
    held, gone = samples.read(tmp_path / "out", found)
    assert gone == []
    prompts = {s: [r["prompt"] for r in records] for s, records in held["mine"].items()}
    assert prompts == {s: ["q0", "q1", "q2"] for s in ("all", "id")}
    path.write_text(json.dumps([*rows[:2], rows[2] | {"output": ["other", "v2 and so"]}]))
    assert "no longer holds the texts that were measured" in samples.read(tmp_path / "out", found)[1][0]
    path.unlink()
    assert samples.read(tmp_path / "out", found) == ({}, [f"mine: {path}: no such file."])
    assert f"mine: {path}: no such file." in report.write_report(tmp_path / "out").read_text()
    assert outputs.read_named([f"mine={path}"], "outputs")["mine"] == [path]


def test_a_sample_that_is_no_text_is_refused(tmp_path):
    run(tmp_path, "a", 1.0)
    write_records(tmp_path / "samples" / "ppo" / "id.jsonl", [{"id": 1, "prompt": "p", "responses": ["x", 3]}])
    with pytest.raises(UserError, match=r"id\.jsonl, record 1: the prompt must be a text"):
        report.write_report(tmp_path)


def test_what_was_odd_in_the_files_of_a_run_is_said_of_the_comparison(tmp_path):
    for name, texts in (("x", ["a b", "c"]), ("y", ["a", ""])):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([{"instruction": f"q{i}", "output": t} for i, t in enumerate(texts)]))
        told = results.evaluate_outputs([f"m={path}"], "", [], False, tmp_path / name, lambda _: None, 50)
        if name == "x":
            low = {"consistency": {"mean": 0.52, "low": 0.4, "high": 0.6, "n": 90}}
            write_json(tmp_path / name / "results.json", told | {"judge_report": low})
    compare.write_comparison([str(tmp_path / "x"), str(tmp_path / "y")], tmp_path / "both")
    remarks = json.loads((tmp_path / "both" / "results.json").read_text())["remarks"]
    assert f"y, {tmp_path}/y.json: 1 of 2 answers are empty; they are measured as they are" in remarks
    assert any(r.startswith("x, win rates with care: the judge named the same winner") for r in remarks)
