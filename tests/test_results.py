import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.evaluation import results
from jaxrlhf.evaluation.generalisation import comparisons, gaps, outcomes
from jaxrlhf.files import UserError

DATA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real files are not here")


def write(path, records):
    path.write_text(json.dumps(records))
    return str(path)


def answers(tmp_path, name, texts, dataset="d"):
    rows = [{"instruction": f"q{i}", "output": t, "generator": name, "dataset": dataset} for i, t in enumerate(texts)]
    return write(tmp_path / f"{name}.json", rows)


def measure(tmp_path, outputs, reference="", annotations=(), log=None):
    lines = []
    found = results.evaluate_outputs(outputs, reference, annotations, False, tmp_path / "out", log or lines.append, 200)
    return found, lines


def test_several_files_under_one_name_are_samples_of_the_prompts_they_share(tmp_path):
    a = answers(tmp_path, "a", ["x y z", "same words", ""])
    b = answers(tmp_path, "b", ["p q r", "same words"])
    found, lines = measure(tmp_path, [f"m={a}", f"m={b}"])
    m = found["policies"]["m"]["all"]
    assert (m["n_prompts"], m["samples_per_prompt"]) == (2, 2)
    assert m["diversity"]["per_input"]["distinct"]["n"] == 2
    assert any("1 prompts are not in all" in line for line in lines)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found


def test_one_sample_has_no_per_input_diversity(tmp_path):
    found, _ = measure(tmp_path, [f"m={answers(tmp_path, 'a', ['x', 'y'])}"])
    assert "per_input" not in found["policies"]["m"]["all"]["diversity"]
    assert "win_rate" not in found["policies"]["m"]["all"]


def test_verdicts_draws_count_half_and_missing_ones_not_at_all(tmp_path):
    a = answers(tmp_path, "a", list("vwxyz"))
    verdicts = [{"instruction": "q", "preference": p, "dataset": "d"} for p in (2, 1, 1.5, 0, None, 2)]
    found, _ = measure(tmp_path, [f"m={a}"], annotations=[f"m={write(tmp_path / 'v.json', verdicts)}"])
    e = found["policies"]["m"]["all"]["win_rate"]
    assert (e["mean"], e["n"]) == (pytest.approx(3 / 5), 5)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"instruction": "q"}, "record 2: no field 'output'"),
        ({"instruction": "q", "output": 3}, "record 2: the output must be a text"),
        ({"instruction": 3, "output": "x"}, "record 2: the prompt must be a text"),
        ([], "record 2: expected an object"),
    ],
)
def test_bad_records_are_named(tmp_path, record, says):
    path = write(tmp_path / "a.json", [{"instruction": "q", "output": "x"}, record])
    with pytest.raises(UserError, match=says):
        measure(tmp_path, [f"m={path}"])
    assert not (tmp_path / "out").exists()


def test_bad_lines_and_verdicts_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "responses": ["x"]}\n\n{"prompt": \n')
    with pytest.raises(UserError, match=r"a\.jsonl:3: not valid JSON"):
        measure(tmp_path, [f"m={tmp_path / 'a.jsonl'}"])
    a = answers(tmp_path, "a", ["x"])
    with pytest.raises(UserError, match="record 1: preference is 7"):
        measure(tmp_path, [f"m={a}"], annotations=[f"m={write(tmp_path / 'v.json', [{'preference': 7}])}"])
    with pytest.raises(UserError, match="no --outputs has that name"):
        measure(tmp_path, [f"m={a}"], annotations=[f"n={write(tmp_path / 'w.json', [{'preference': 2}])}"])


def test_outcomes_by_hand():
    a_BN, b_BM = np.array([[1.5, -2.0], [0.0, 0.0]]), np.array([[1.5], [-0.5]])
    assert outcomes(a_BN, b_BM).tolist() == [0.25, 1.0]  # a draw and a loss; two wins


def test_gap_and_comparisons_by_hand():
    values = {"p": {"id": {"gold": np.array([3.0, 3.0])}, "ood_x": {"gold": np.array([1.0, 1.0, 1.0])}}}
    assert gaps(values, 100)["p"]["ood_x"]["gold"] == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 2}
    judged = {"a": {"id": np.array([[1.0], [2.0]])}, "b": {"id": np.array([[2.0], [2.0]])}}
    (found,) = comparisons(judged, 100)
    assert (found["a"], found["b"], found["win_rate"]["mean"]) == ("b", "a", 0.75)


@needs_data
def test_published_win_rates(tmp_path):
    published = json.loads((DATA / "published_win_rates.json").read_text())
    models = [p.stem for p in (DATA / "annotations").glob("*.json")]
    assert models
    for model in models:
        wanted = published[model]
        found = results.outputs.read_verdicts([DATA / "annotations" / f"{model}.json"])
        e = results.win_rate(np.array([o for _, o in found]))
        assert 100 * e["mean"] == pytest.approx(wanted["win_rate"], abs=1e-6)
        assert 100 * e["se"] == pytest.approx(wanted["standard_error"], abs=1e-6)
        assert e["n"] == wanted["n_total"]


def test_measuring_imports_no_jax():
    program = "import sys, jaxrlhf.main, jaxrlhf.evaluation.results; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
