import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.config import Evaluation, Experiment
from jaxrlhf.evaluation import explorer, report, results
from jaxrlhf.evaluation import samples as samples_
from jaxrlhf.evaluation.judge import Judge
from jaxrlhf.evaluation.measures import against_each_other, walk
from jaxrlhf.files import UserError

DATA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real files are not here")


def write(path, records):
    path.write_text(json.dumps(records))
    return str(path)


def answers(tmp_path, name, texts, datasets=None):
    rows = [{"instruction": f"q{i}", "output": t, "generator": name} for i, t in enumerate(texts)]
    rows = [r | {"dataset": d} for r, d in zip(rows, datasets or ["d"] * len(rows), strict=True)]
    return write(tmp_path / f"{name}.json", rows)


def measure(tmp_path, outputs, reference="", annotations=()):
    lines = []
    found = results.evaluate_outputs(outputs, reference, annotations, False, tmp_path / "out", lines.append, 200)
    return found, lines


def estimates(tree):
    if isinstance(tree, dict) and {"mean", "low", "high", "n"} <= tree.keys():
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from estimates(value)


def test_several_files_under_one_name_are_samples_of_the_prompts_they_share(tmp_path):
    a = answers(tmp_path, "a", ["x y z", "same words", ""])
    b = answers(tmp_path, "b", ["p q r", "same words"])
    found, lines = measure(tmp_path, [f"m={a}", f"m={b}"])
    m = found["policies"]["m"]["all"]
    assert (m["n_prompts"], m["samples_per_prompt"]) == (2, 2)
    assert m["diversity"]["per_input"]["distinct"]["n"] == 2
    # n=1: 6 of 6 and 2 of 4; n=2: 4 of 4 and 1 of 2; n=3: 2 of 2 and none
    assert m["diversity"]["per_input"]["distinct"]["mean"] == pytest.approx((3 / 5 + (1 / 2 + 1 / 2) / 5) / 2)
    assert any("1 prompts are not in all" in line for line in lines)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found


def test_one_sample_has_no_per_input_diversity(tmp_path):
    found, _ = measure(tmp_path, [f"m={answers(tmp_path, 'a', ['x', 'y'])}"])
    assert set(found["policies"]["m"]["all"]) == {"n_prompts", "samples_per_prompt", "cut", "length", "diversity"}
    assert "per_input" not in found["policies"]["m"]["all"]["diversity"]
    assert found["comparisons"] == []


def test_splits_are_all_and_one_for_each_dataset(tmp_path):
    a = answers(tmp_path, "a", ["x", "x y", "x y z", ""], ["k", "v", "k", ""])
    verdicts = [
        {"instruction": f"q{i}", "preference": p, "dataset": d}
        for i, (p, d) in enumerate([(2, "k"), (1, "v"), (2, "k")])
    ]
    found, _ = measure(tmp_path, [f"m={a}"], a, [f"m={write(tmp_path / 'v.json', verdicts)}"])
    m = found["policies"]["m"]
    assert {s: (v["n_prompts"], v["length"]["mean"]) for s, v in m.items()} == {
        "all": (4, 1.5),
        "k": (2, 2),
        "v": (1, 2),
    }
    assert {s: (v["win_rate"]["mean"], v["win_rate"]["n"]) for s, v in m.items()} == {
        "all": (pytest.approx(2 / 3), 3),
        "k": (1, 2),
        "v": (0, 1),
    }
    assert found["policies"]["reference"]["all"]["length"] == m["all"]["length"]
    assert "win_rate" not in found["policies"]["reference"]["all"]


def test_the_split_that_holds_all_prompts_is_not_far_from_those_of_id(tmp_path):
    a = answers(tmp_path, "a", ["x", "x y", "x y z", "w"], ["id", "far", "id", "far"])
    b = answers(tmp_path, "b", ["x y", "x", "v z", "w w"], ["id", "far", "id", "far"])
    verdicts = [
        {"instruction": f"q{i}", "preference": p, "dataset": ("id", "far")[i % 2]} for i, p in enumerate([2, 1, 1.5, 2])
    ]
    named = [f"{n}={write(tmp_path / f'v{n}.json', verdicts)}" for n in "ab"]
    found, _ = measure(tmp_path, [f"a={a}", f"b={b}"], annotations=named)
    assert {p: set(gaps) for p, gaps in found["generalisation_gap"].items()} == {"a": {"far"}, "b": {"far"}}
    assert [d["split"] for d in found["differences"] if "gap" in d] == ["far"]
    assert found["generalisation_gap"]["a"]["far"]["win_rate"]["family"] == 2


def test_without_a_far_split_there_is_no_gap(tmp_path):
    found, _ = measure(tmp_path, [f"m={answers(tmp_path, 'a', ['x', 'y'], ['id', 'id'])}"])
    assert found["generalisation_gap"] == {}


@pytest.mark.parametrize("judge", ["", "length"])
def test_no_number_hangs_on_the_order_of_the_records(tmp_path, judge):
    """Lengths tie at the borders of the thirds, and outcomes and texts differ among them."""
    rng = np.random.default_rng(0)
    words = ["ab", "cd", "ef", "gh", "ij"]
    texts = {n: [[" ".join(rng.choice(words, 1 + i % 3)) for _ in range(2)] for i in range(31)] for n in "abr"}
    preference = rng.choice([0, 1, 2, 1.25], 31).tolist()

    def found(folder, order):
        folder.mkdir()
        for name, rows in texts.items():
            records = [{"instruction": f"q{i}", "output": rows[i], "dataset": ("id", "far")[i % 2]} for i in order]
            write(folder / f"{name}.json", records)
        verdicts = [
            {
                "instruction": f"q{i}",
                "preference": preference[i],
                "output_1": "r" * (i % 4),
                "output_2": texts["a"][i][0],
            }
            for i in order
        ]
        annotations = [] if judge else [f"a={write(folder / 'v.json', verdicts)}"]
        told = results.evaluate_outputs(
            [f"{n}={folder / n}.json" for n in "ab"],
            str(folder / "r.json"),
            annotations,
            False,
            folder / "out",
            print,
            200,
            judged_by=Judge(judge) if judge else None,
        )
        return {k: v for k, v in told.items() if k != "config"}

    first = found(tmp_path / "first", range(31))
    assert found(tmp_path / "other", rng.permutation(31).tolist()) == first
    assert "win_rate_by_length" in (first["comparisons"][0] if judge else first["policies"]["a"]["all"])


def test_every_two_of_six_policies_are_compared_and_each_of_more_with_the_first():
    assert against_each_other(["a", "sft", "b"]) == [("a", "sft"), ("b", "sft"), ("b", "a")]
    assert len(against_each_other([*"abcdef"])) == 15
    assert against_each_other([*"abcdefg"]) == [(p, "a") for p in "bcdefg"]


def test_names_that_do_not_fit_together(tmp_path):
    a = answers(tmp_path, "a", ["x"])
    verdicts = write(tmp_path / "w.json", [{"instruction": "q0", "preference": 2}])
    with pytest.raises(UserError, match=r"--annotations n=.*no --outputs has that name; known are m"):
        measure(tmp_path, [f"m={a}"], annotations=[f"n={verdicts}"])
    with pytest.raises(UserError, match=r"--annotations reference=.*known are m"):
        measure(tmp_path, [f"m={a}"], a, [f"reference={verdicts}"])
    with pytest.raises(UserError, match=r"--outputs reference=.*kept for --reference"):
        measure(tmp_path, [f"reference={a}"], a)
    assert not (tmp_path / "out").exists()


def record(i, gold, scores, **reference):
    texts = [f"{i} a b c", f"{i} a x y"]
    return {
        "id": f"i{i}",
        "prompt": f"p{i}",
        "reference": "r",
        "responses": texts,
        "scores": scores,
        "gold": gold,
    } | reference


def samples(tmp_path, policy, split, records):
    path = tmp_path / "samples" / policy / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "config.json").write_text('{"name": "x"}')


def evaluate(tmp_path, judge="gold"):
    config = Experiment(evaluation=Evaluation(judge=judge, bootstrap=200))
    return results.evaluate_samples(tmp_path, config)


def a_workdir(tmp_path):
    ref = {"reference_gold": 1.0, "reference_score": 0.0}
    for policy, shift in (("sft", 0.0), ("ppo", 1.0)):
        rows = [
            record(1, [shift, 1 + shift], [-1.0, -1.0], **ref),
            record(2, [2 + shift, 2 + shift], [1.0, -1.0], **ref),
            record(3, [shift, shift], [1.0, 1.0]),  # no reference: does not count in win rates
        ]
        samples(tmp_path, policy, "ood_b", rows)
        samples(tmp_path, policy, "ood_a", rows[:2])
        samples(tmp_path, policy, "id", rows)
    (tmp_path / "samples" / "ppo" / "info.json").write_text('{"pool": 64}')


def test_a_recipes_samples_by_hand(tmp_path):
    a_workdir(tmp_path)
    found = evaluate(tmp_path)
    assert (found["schema"], found["task"], found["judge"]) == (1, "world", "gold")
    assert (found["config"], found["sampling"]) == ({"name": "x"}, {"ppo": {"pool": 64}})
    assert {p: list(s) for p, s in found["policies"].items()} == {p: ["id", "ood_a", "ood_b"] for p in ("sft", "ppo")}
    m = found["policies"]["sft"]["id"]
    assert (m["n_prompts"], m["samples_per_prompt"]) == (3, 2)
    # prompt 1: a loss and a draw; prompt 2: two wins
    e = m["win_rate"]
    assert (e["mean"], e["n"], e["se"]) == ((0.25 + 1) / 2, 2, pytest.approx(np.std([0.25, 1], ddof=1) / 2**0.5))
    assert (m["gold"]["mean"], m["score"]["mean"], m["length"]["mean"]) == (pytest.approx(2.5 / 3), 0.0, 4.0)
    # gap of gold: (0.5 + 2 + 0) / 3 in distribution, (0.5 + 2) / 2 on the first two prompts alone
    gap = found["generalisation_gap"]["sft"]
    assert list(gap) == ["ood_a", "ood_b"]
    assert gap["ood_a"]["gold"]["mean"] == pytest.approx(2.5 / 3 - 1.25)
    assert gap["ood_b"]["gold"]["mean"] == 0
    # ppo against sft, all four pairs: prompt 1 is {1, 2} against {0, 1}, 3.5 of 4; prompts 2 and 3 all wins
    (e,) = [c for c in found["comparisons"] if c["split"] == "id"]
    assert (e["a"], e["b"], e["win_rate"]["mean"]) == ("ppo", "sft", pytest.approx((3.5 / 4 + 1 + 1) / 3))
    # every ppo response is one better than sft's, and says the same
    assert [(d["split"], d["a"], d["b"]) for d in found["differences"]] == [
        (s, "ppo", "sft") for s in ("id", "ood_a", "ood_b")
    ]
    d = found["differences"][1]
    assert {k: d["gold"][k] for k in ("mean", "low", "high", "n")} == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}
    # Two prompts that agree are a sign test with p = 2 / 4, and the same on 2 and on 3 prompts of the other splits.
    assert [e["gold"]["p"] for e in found["differences"]] == [0.25, 0.5, 0.25]
    assert [e["gold"]["p_holm"] for e in found["differences"]] == [0.75, 0.75, 0.75]
    assert {c["win_rate"]["family"] for c in found["comparisons"]} == {3}
    assert {e["family"] for p in found["generalisation_gap"].values() for s in p.values() for e in s.values()} == {4}
    assert d["diversity"]["across_input"]["ead"]["mean"] == d["gap"]["gold"]["mean"] == 0.0
    assert json.loads((tmp_path / "results.json").read_text()) == found


def test_the_reward_model_as_judge(tmp_path):
    a_workdir(tmp_path)
    e = evaluate(tmp_path, "reward")["policies"]["ppo"]["id"]["win_rate"]
    assert (e["mean"], e["n"]) == ((0 + 0.5) / 2, 2)


def test_equal_answers_draw_whatever_the_last_digit_of_their_scores(tmp_path):
    said = record(1, [0.5, 0.5], [0.3 + 1e-7, -1.0], reference_score=0.3) | {"reference": "1 a b c"}
    cut = said | {"finished": [False, True]}  # cut off, it is another answer than the reference
    samples(tmp_path, "sft", "id", [said])
    samples(tmp_path, "ppo", "id", [said | {"scores": [0.3 - 1e-7, -1.0]}])
    found = evaluate(tmp_path, "reward")
    assert [found["policies"][p]["id"]["win_rate"]["mean"] for p in ("sft", "ppo")] == [0.25, 0.25]
    assert found["comparisons"][0]["win_rate"]["mean"] == 0.5
    samples(tmp_path, "sft", "id", [cut])
    assert evaluate(tmp_path, "reward")["policies"]["sft"]["id"]["win_rate"]["mean"] == 0.5


def test_a_number_that_was_not_measured_is_absent(tmp_path):
    rows = [{k: v for k, v in record(i, [], [0.5, 1.5]).items() if k != "gold"} for i in range(3)]
    samples(tmp_path, "sft", "id", rows)
    assert not {"gold", "win_rate"} & set(evaluate(tmp_path, "reward")["policies"]["sft"]["id"])
    with pytest.raises(UserError, match=r"config\.evaluation\.judge='gold': samples have no field 'gold'"):
        evaluate(tmp_path)


def test_samples_that_cannot_be_measured_are_named(tmp_path):
    with pytest.raises(UserError, match="samples holds no samples; run `jaxrlhf sample` first"):
        evaluate(tmp_path)
    rows = [record(i, [1.0, 2.0], [0.0, 0.0]) for i in range(3)]
    samples(tmp_path, "sft", "id", rows)
    samples(tmp_path, "ppo", "id", rows[1:])
    with pytest.raises(UserError, match=r"ppo/id\.jsonl: its ids are not those of sft/id\.jsonl"):
        evaluate(tmp_path)
    samples(tmp_path, "ppo", "id", [rows[0], rows[1] | {"gold": [1.0]}, rows[2]])
    with pytest.raises(UserError, match=r"ppo/id\.jsonl, record 2: 1 gold; must be 2"):
        evaluate(tmp_path)
    samples(tmp_path, "ppo", "id", [])
    with pytest.raises(UserError, match=r"ppo/id\.jsonl: holds no record"):
        evaluate(tmp_path)


def test_the_same_samples_give_the_same_bytes_and_ordered_intervals(tmp_path):
    a_workdir(tmp_path)
    found = evaluate(tmp_path)
    first = (tmp_path / "results.json").read_bytes()
    evaluate(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == first
    assert all(e["low"] <= e["mean"] <= e["high"] and e["n"] > 0 for e in estimates(found))
    assert all("se" in c["win_rate"] for c in found["comparisons"])


def test_the_table_has_a_row_for_each_policy_and_split(tmp_path):
    a_workdir(tmp_path)
    head, *rows = results.table(evaluate(tmp_path)).splitlines()
    assert [r.split()[:3] for r in rows[:3]] == [["sft", "id", "3"], ["sft", "ood_a", "2"], ["sft", "ood_b", "3"]]
    assert len(rows) == 6
    assert rows[0].index("0.625 [") == head.index("win rate")


@needs_data
def test_real_files(tmp_path):
    names = ("alpaca-7b", "alpaca-farm-ppo-human")
    found, _ = measure(
        tmp_path,
        [f"{n}={DATA}/outputs/{n}.json" for n in names],
        annotations=[f"{n}={DATA}/annotations/{n}.json" for n in names],
    )
    sft, rlhf = (found["policies"][n] for n in names)
    assert list(sft) == ["all", "helpful_base", "koala", "oasst", "selfinstruct", "vicuna"]
    assert sum(m["n_prompts"] for s, m in sft.items() if s != "all") == sft["all"]["n_prompts"] == 805
    assert sft["all"]["win_rate"]["high"] < rlhf["all"]["win_rate"]["low"]
    # Most of what PPO wins by here is length: what it wins at equal length is much less.
    assert rlhf["all"]["length_controlled"]["high"] < rlhf["all"]["win_rate"]["low"]
    assert sft["all"]["length_controlled"]["mean"] < rlhf["all"]["length_controlled"]["mean"]
    assert all(e["low"] <= e["mean"] <= e["high"] for e in estimates(found))


def test_measuring_imports_no_jax():
    program = (
        "import sys, jaxrlhf.main, jaxrlhf.evaluation.results; "
        "sys.exit(bool({'jax', 'flax', 'matplotlib', 'scipy', 'torch', 'requests'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_split_is_that_of_the_prompt_and_not_of_the_verdict(tmp_path):
    """alpaca_eval's verdicts may have another `dataset`, or none."""
    a = answers(tmp_path, "a", ["x", "y", "z", "w"], ["id", "id", "far", "far"])
    verdicts = [{"instruction": f"q{i}", "preference": p, "dataset": "koala"} for i, p in enumerate([2, 2, 1, 1.5])]
    found, _ = measure(tmp_path, [f"a={a}"], annotations=[f"a={write(tmp_path / 'v.json', verdicts)}"])
    assert {s: m["win_rate"]["mean"] for s, m in found["policies"]["a"].items()} == {"all": 0.625, "far": 0.25, "id": 1}
    assert found["generalisation_gap"]["a"]["far"]["win_rate"]["mean"] == 0.75


def test_prompts_that_others_answered_are_counted_and_told_of(tmp_path):
    b, c = (answers(tmp_path, n, ["x y", "y", "z"]) for n in "bc")
    found, lines = measure(tmp_path, [f"a={answers(tmp_path, 'a', list('xyzvw'))}", f"b={b}"], c)
    assert lines == [
        "b, reference: no answer to 2 of the 5 prompts of all files; two are compared on the prompts that both "
        "answered, and across inputs only where all prompts are the same"
    ]
    assert found["notes"] == lines
    assert "notes" not in measure(tmp_path, [f"b={b}"], c)[0]
    page = report.write_report(tmp_path / "out")
    assert "no answer to" not in page.read_text()
    measure(tmp_path, [f"a={answers(tmp_path, 'a', list('xyzvw'))}", f"b={b}"], c)
    assert f"<li>{lines[0]}</li>" in report.write_report(tmp_path / "out").read_text()


def test_a_split_of_all_prompts_is_not_counted_twice(tmp_path):
    def splits(a, b):
        outputs = [f"{n}={answers(tmp_path, n, ['x', 'x y', n], d)}" for n, d in (("a", a), ("b", b))]
        found, _ = measure(tmp_path, outputs)
        return {p: list(s) for p, s in found["policies"].items()}, found["differences"][0]["length"]["family"]

    assert splits(["d"] * 3, ["e"] * 3) == ({"a": ["all"], "b": ["all"]}, 1)
    assert splits(["id"] * 3, ["ood_x"] * 3)[0] == {"a": ["all", "id"], "b": ["all", "ood_x"]}
    # What is a part of some policy's prompts is compared, though it is all of another's.
    assert splits(["d"] * 3, ["d", "d", "e"])[0] == {"a": ["all", "d"], "b": ["all", "d", "e"]}
    assert splits(["d", "d", ""], ["d", "d", ""])[0] == {"a": ["all", "d"], "b": ["all", "d"]}


def test_the_judge_length_has_no_win_rate_at_equal_length(tmp_path):
    files = {n: answers(tmp_path, n, [w * (i + 1) for i in range(6)]) for n, w in (("a", "x "), ("b", "x y "))}
    found = results.evaluate_outputs(
        [f"a={files['a']}"], files["b"], [], False, tmp_path / "out", print, 50, judged_by=Judge("length")
    )
    m = found["policies"]["a"]["all"]
    assert m["win_rate"]["mean"] == 0
    assert "win_rate_by_length" in m
    assert not any("length_controlled" in place for place, _ in walk(found["policies"]))
    other = answers(tmp_path, "c", ["z"] * 6)
    heads = results.evaluate_outputs(
        [f"a={files['a']}", f"c={other}"], "", [], False, tmp_path / "out", print, 50, judged_by=Judge("length")
    )["comparisons"]
    assert heads[0]["win_rate"]["mean"] < 0.5
    assert "length_controlled" not in heads[0]
    page = report.write_report(tmp_path / "out").read_text()
    assert "a smooth influence of length only" in page


def test_answers_are_shown_with_what_was_said_of_them(tmp_path):
    outputs = answers(tmp_path, "a", [["u", "a"], ["v", "w"], ["x", "a"], ["y", "a"]])
    rows = [("u", 2), ("w", 1), ("x", 1.25), ("other", 2)]
    verdicts = [{"instruction": f"q{i}", "preference": p, "output_2": t} for i, (t, p) in enumerate(rows)]
    found, _ = measure(tmp_path, [f"a={outputs}"], annotations=[f"a={write(tmp_path / 'v.json', verdicts)}"])
    held, gone = samples_.read(tmp_path / "out", found)
    assert gone == []
    told = [["won", ""], ["", "lost"], ["chance to win 0.25", ""]]
    assert [r.get("verdicts") for r in held["a"]["all"]] == [*told, None]
    shown = explorer.embedded(held, {"all": "all"})[0]["prompts"]
    assert [[words for _, words in q["answers"]["a"]] for q in shown] == [*told, ["", ""]]
    (tmp_path / "v.json").unlink()
    held, gone = samples_.read(tmp_path / "out", found)
    assert not any("verdicts" in r for r in held["a"]["all"])
    assert gone == [f"a, its verdicts: {tmp_path}/v.json: no such file."]
