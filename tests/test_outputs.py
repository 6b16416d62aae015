import json
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.evaluation.outputs import check, longer, outcomes, read_answers, read_named, read_verdicts
from jaxrlhf.evaluation.statistics import win_rate
from jaxrlhf.files import UserError

DATA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real files are not here")


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def answers(paths):
    lines = []
    return read_answers(paths, "m", lines.append), lines


def verdicts(tmp_path, preferences, name="v"):
    rows = [{"instruction": f"q{i}", "preference": p, "dataset": "d"} for i, p in enumerate(preferences)]
    return write(tmp_path / f"{name}.json", rows)


def test_names_and_paths():
    assert read_named(["a=x.json", "b=y=z.json", "a=w.json"], "outputs") == {
        "a": [Path("x.json"), Path("w.json")],
        "b": [Path("y=z.json")],
    }
    for entry in ("x.json", "=x.json", "a="):
        with pytest.raises(UserError, match=r"--outputs .*must be NAME=FILE"):
            read_named([entry], "outputs")


def test_both_formats_read_alike(tmp_path):
    listed = write(tmp_path / "a.json", [{"instruction": "q", "output": ["x", ""], "dataset": "koala"}])
    lines = tmp_path / "a.jsonl"
    lines.write_text('\n{"id": 1, "prompt": "q", "reference": "r", "responses": ["x", ""], "scores": [0, 1]}\n\n')
    a, b = answers([listed])[0], answers([lines])[0]
    assert a.responses == b.responses == {("q", 0): ["x", ""]}
    assert (a.dataset, b.dataset) == ({("q", 0): "koala"}, {("q", 0): ""})


def test_files_of_one_name_are_samples_in_the_order_of_the_first(tmp_path):
    first = write(tmp_path / "a.json", [{"instruction": q, "output": q + "1"} for q in ("u", "v", "w", "v")])
    second = write(tmp_path / "b.json", [{"instruction": q, "output": q + "2"} for q in ("v", "w", "z")])
    found, lines = answers([first, second])
    # The second "v" of the first file has no counterpart; neither have "u" and "z".
    assert found.responses == {("v", 0): ["v1", "v2"], ("w", 0): ["w1", "w2"]}
    assert lines == [
        f"{first}: 1 of 4 records repeat an earlier one's prompt and count as prompts of their own; several samples of "
        "a prompt go into one record, as a list",
        "m: 3 prompts are not in all of its 2 files and are left out",
    ]


def test_a_repeated_prompt_is_an_item_of_its_own(tmp_path):
    path = write(tmp_path / "a.json", [{"instruction": "q", "output": "x"}, {"instruction": "q", "output": "y"}])
    assert answers([path])[0].responses == {("q", 0): ["x"], ("q", 1): ["y"]}


def test_prompts_with_more_samples_are_cut_to_the_fewest_and_it_is_said(tmp_path):
    rows = [{"instruction": "q", "output": ["x", "y", "z"]}, {"instruction": "p", "output": ["x"]}]
    path = write(tmp_path / "a.json", rows)
    found, lines = answers([path])
    assert set(map(len, found.responses.values())) == {1}
    assert lines == ["m: prompts have 1 to 3 samples; the first 1 of each are measured"]


def test_files_without_a_prompt_in_common(tmp_path):
    paths = [write(tmp_path / f"{q}.json", [{"instruction": q, "output": "x"}]) for q in "ab"]
    with pytest.raises(UserError, match=r"--outputs m: .*a\.json, .*b\.json answer no prompt in common"):
        answers(paths)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"instruction": "q"}, "record 2: no field 'output'"),
        ({"output": "x"}, "record 2: no field 'instruction'"),
        ({"instruction": "q", "output": 3}, "record 2: the output must be a text"),
        ({"instruction": "q", "output": None}, "record 2: the output must be a text"),
        ({"instruction": "q", "output": []}, "record 2: the output must be a text"),
        ({"instruction": "q", "output": ["x", 1]}, "record 2: the output must be a text"),
        ({"instruction": ["q"], "output": "x"}, "record 2: the prompt must be a text"),
        ({"responses": ["x"]}, "record 2: the prompt must be a text"),
        ([], "record 2: expected an object"),
    ],
)
def test_bad_records_are_named(tmp_path, record, says):
    path = write(tmp_path / "a.json", [{"instruction": "q", "output": "x"}, record])
    with pytest.raises(UserError, match=rf"a\.json, {says}"):
        answers([path])


def test_bad_lines_and_empty_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "responses": ["x"]}\n\n{"prompt": \n')
    with pytest.raises(UserError, match=r"a\.jsonl:3: not valid JSON"):
        answers([tmp_path / "a.jsonl"])
    with pytest.raises(UserError, match=r"b\.json: holds no record"):
        answers([write(tmp_path / "b.json", [])])
    with pytest.raises(UserError, match=r"c\.json: no such file"):
        answers([tmp_path / "c.json"])


def test_verdicts_by_hand(tmp_path):
    # 1.25 is a judge that gives output_2 a chance of a quarter
    found = outcomes(read_verdicts(verdicts(tmp_path, [2, 1, 1.5, 0, None, 2.0, 1.25])))
    assert found == {(f"q{i}", 0): x for i, x in zip((0, 1, 2, 3, 5, 6), (1, 0, 0.5, 0.5, 1, 0.25), strict=True)}


def test_verdicts_on_several_samples_of_a_prompt_are_one_item(tmp_path):
    files = [verdicts(tmp_path, [2, 1, None, 2], "v"), verdicts(tmp_path, [2, 2, 1, None], "w")]
    found = outcomes([v for path in files for v in read_verdicts(path)])
    assert found == {("q0", 0): 1.0, ("q1", 0): 0.5, ("q3", 0): 1.0, ("q2", 0): 0.0}


def test_lengths_are_those_of_the_texts_that_were_judged(tmp_path):
    rows = [
        {"instruction": "q", "preference": 2, "output_1": "abc", "output_2": "a"},
        {"instruction": "q", "preference": 1, "output_1": "a", "output_2": "abcd"},
        {"instruction": "r", "preference": None, "output_1": "a", "output_2": "b"},
        {"instruction": "s", "preference": 1, "output_1": "a"},
    ]
    first = read_verdicts(write(tmp_path / "v.json", rows))
    assert longer(first) == {("q", 0): -2.0, ("q", 1): 3.0}
    rows[0]["output_2"] = "abcde"
    assert longer(first + read_verdicts(write(tmp_path / "w.json", rows)))[("q", 0)] == 0.0


def judged(tmp_path, texts, first=0, generator="other"):
    """A file of verdicts on `texts`, of which None is none, as answers to q<first>, q<first + 1>, …"""
    rows = [
        {"instruction": f"q{i}", "preference": 2, "generator_2": generator} for i in range(first, first + len(texts))
    ]
    rows = [r | ({} if t is None else {"output_2": t}) for r, t in zip(rows, texts, strict=True)]
    return write(tmp_path / "v.json", rows)


def asked(tmp_path, texts, first=0):
    rows = [{"instruction": f"q{i}", "output": t} for i, t in enumerate("abcd")]
    own, lines = answers([write(tmp_path / "a.json", rows)])
    check(read_verdicts(judged(tmp_path, texts, first)), own, "m", lines.append)
    return lines


def test_verdicts_on_a_policy_s_own_texts_are_taken_without_a_word(tmp_path):
    for texts in (["a", " b\n", "c", "d"], [None] * 4, ["a"]):
        assert asked(tmp_path, texts) == []


def test_verdicts_on_some_other_texts_and_prompts_are_told_of(tmp_path):
    assert asked(tmp_path, ["b", "x", "d", "e", "f"], first=1) == [  # q4 and q5 are nobody's
        f"{tmp_path}/v.json: 2 of 5 verdicts are about prompts that m does not answer; they count over all prompts",
        f"{tmp_path}/v.json: 1 of 3 verdicts are about other texts than m's; generator_2 is other there; they count "
        "all the same",
    ]


def test_another_model_s_verdicts_are_told_of_and_those_on_other_prompts_alone_refused(tmp_path):
    for texts, count in ((["a", "x", "y", "z"], "3 of 4"), (["a", "x", "y", None], "2 of 3")):
        (line,) = asked(tmp_path, texts)
        assert f"v.json: most likely another model's: {count} verdicts are about other texts than m's" in line
    assert "most likely" not in asked(tmp_path, ["a", "x", "c", "y"])[0]  # half is not most
    with pytest.raises(
        UserError, match=r"v\.json: none of its 2 verdicts .* a prompt of --outputs m; generator_2 is other"
    ):
        asked(tmp_path, ["a", "b"], first=7)


@needs_data
def test_published_verdicts_that_are_another_model_s_are_told_of():
    own, lines = answers([DATA / "outputs" / "falcon-7b-instruct.json"])
    check(read_verdicts(DATA / "annotations" / "falcon-7b-instruct.json"), own, "m", lines.append)
    assert "most likely another model's: 800 of 805" in lines[-1]
    assert "generator_2 is falcon-40b-instruct there" in lines[-1]
    own, lines = answers([DATA / "outputs" / "text_davinci_001.json"])
    check(read_verdicts(DATA / "annotations" / "text_davinci_001.json"), own, "m", lines.append)
    assert "2 of 804 verdicts are about prompts that m does not answer" in lines[-1]  # one of 805 is null


@pytest.mark.parametrize("preference", [3, 0.5, -1, True, "2", [1], {"a": 1}, float("nan")])
def test_bad_verdicts_are_named(tmp_path, preference):
    with pytest.raises(UserError, match=r"v\.json, record 2: preference is .*; known are 1 "):
        read_verdicts(verdicts(tmp_path, [2, preference]))


def test_verdicts_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"v\.json: no verdict in it"):
        read_verdicts(verdicts(tmp_path, [None, None]))
    with pytest.raises(UserError, match="record 1: no field 'instruction'"):
        read_verdicts(write(tmp_path / "w.json", [{"preference": 2}]))


@needs_data
def test_published_win_rates():
    published = json.loads((DATA / "published_win_rates.json").read_text())
    models = sorted(p.stem for p in (DATA / "annotations").glob("*.json"))
    assert models
    for model in models:
        wanted = published[model]
        e = win_rate(np.array(list(outcomes(read_verdicts(DATA / "annotations" / f"{model}.json")).values())))
        assert 100 * e["mean"] == pytest.approx(wanted["win_rate"], abs=1e-6)
        assert 100 * e["se"] == pytest.approx(wanted["standard_error"], abs=1e-6)
        assert e["n"] == wanted["n_total"]


def test_empty_answers_are_measured_and_told_of(tmp_path):
    path = write(
        tmp_path / "a.json", [{"instruction": "u", "output": ["", "b"]}, {"instruction": "v", "output": " \n"}]
    )
    found, lines = answers([path])
    assert found.responses[("v", 0)] == [" \n"]
    assert lines[0] == f"{path}: 2 of 3 answers are empty; they are measured as they are"
