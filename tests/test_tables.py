"""Tables to copy say what results.json says; the explorer marks what answers share."""

import csv
import io
import json

import pytest
from report_workdirs import around, estimates, recipe_results

from jaxrlhf.evaluation import explorer, report, tables
from jaxrlhf.files import write_json


def found_of(tmp_path, results):
    write_json(tmp_path / "results.json", results)
    return report.read_results(tmp_path)


def test_csv_holds_every_number_in_full(tmp_path):
    results = recipe_results()
    results["differences"][0]["gold"] |= {"p": 0.0123, "p_holm": 0.0369, "n_needed": 77}
    third = {"words": [4.0, 10.0], "policies": {"sft": {"ead": around(1 / 3, 0.1)}}}
    results["diversity_by_length"] = {"id": [third]}
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(list(tables.rows(found_of(tmp_path, results)))))))
    held = [{k: float(v) for k, v in row.items() if k in tables.NUMBERS and v} for row in lines]
    told = [{k: float(v) for k, v in e.items()} for e in estimates(json.loads(json.dumps(results)))]
    assert sorted(map(repr, map(sorted, map(dict.items, held)))) == sorted(
        map(repr, map(sorted, map(dict.items, told)))
    )
    (one,) = [r for r in lines if r["p_holm"]]
    assert (one["kind"], one["against"], one["measure"]) == ("difference", "sft", "gold")
    (short,) = [r for r in lines if r["kind"] == "at 4 to 10 words"]
    assert (short["policy"], short["measure"], short["mean"]) == ("sft", "diversity.per_input.ead", repr(1 / 3))


def test_no_name_is_a_formula_in_a_spreadsheet(tmp_path):
    policies = {"=1+1": {"+x": {"length": around(-3.5, 1.0)}}}
    text = tables.as_csv(list(tables.rows(found_of(tmp_path, {"policies": policies}))))
    assert text == "kind,policy,against,split,measure,mean,low,high,n\npolicy,'=1+1,,'+x,length,-3.5,-4.5,-2.5,100\n"


def test_latex_is_escaped_and_rounded_by_its_intervals(tmp_path):
    policies = {r"50%_\input{x}": {"[a]": {"length": around(-3.456, 0.12), "gold": around(0.5, 0.25)}}}
    text = tables.as_latex(found_of(tmp_path, {"policies": policies}))
    assert r"split & policy & gold reward & length (words) \\" in text
    row = r"{}[a] & 50\%\_\textbackslash{}input\{x\} & 0.50 [0.25,~0.75] & $-$3.46 [$-$3.58,~$-$3.34] \\"
    assert row in text.splitlines()
    assert r"\begin{tabular}{llrr}" in text


@pytest.mark.parametrize(
    ("texts", "cut"),
    [
        (["a b c d", "x a b c"], [["", "a b c", " d"], ["x ", "a b c", ""]]),
        (["a b", "a b"], [["a b"], ["a b"]]),
        (["A b c", "a b c"], [["A b c"], ["a b c"]]),
        (["a b c d e", "a b c", "c d e"], [["", "a b c d e", ""], ["", "a b c", ""], ["", "c d e", ""]]),
        (["a b c a b c"], [["a b c a b c"]]),
        (["it's, so!", "(it's, so)", ""], [["", "it's, so", "!"], ["(", "it's, so", ")"], [""]]),
    ],
)
def test_shared_words_are_in_a_row_of_three(texts, cut):
    assert explorer.pieces(texts) == cut


def rows(n, length=10):
    return [{"id": i, "prompt": f"p{i}", "responses": ["x" * length] * 20} for i in range(n)]


def test_the_first_prompts_are_embedded(tmp_path):
    (id_, far) = explorer.embedded({"sft": {"id": rows(250), "far": rows(7)}}, {"id": "near", "far": "far"})
    assert (id_["name"], id_["total"], [q["prompt"] for q in id_["prompts"]]) == (
        "near",
        250,
        [f"p{i}" for i in range(100)],
    )
    assert len(far["prompts"]) == 7
    assert len(id_["prompts"][0]["answers"]["sft"]) == explorer.ANSWERS


def test_long_texts_make_fewer_prompts_of_all_splits_alike():
    size = explorer.LETTERS * explorer.ANSWERS  # letters of a prompt
    found = explorer.embedded({"sft": {s: rows(60, explorer.LETTERS) for s in "ab"}}, {"a": "a", "b": "b"})
    assert [len(s["prompts"]) for s in found] == [explorer.ROOM // (2 * size)] * 2
