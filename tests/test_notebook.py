"""The Colab notebook as a user runs it, top to bottom, in the smoke variant."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"


def with_parameters(notebook, **values: str):
    """The notebook with other values of its parameters, which stand one a line."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    lines = cell.source.splitlines()
    for name, value in values.items():
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[at] = f"{name} = {value!r}"
    cell.source = "\n".join(lines)
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    runs = tmp_path_factory.mktemp("notebook")
    notebook = with_parameters(nbformat.read(NOTEBOOK, 4), VARIANT="smoke", RUNS=str(runs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return runs, {c.id: c.get("outputs", []) for c in notebook.cells}


def pictures(outputs) -> int:
    return sum("image/png" in o.get("data", {}) for o in outputs)


def test_it_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_every_cell_runs_and_shows_its_results(executed):
    runs, outputs = executed
    assert pictures(outputs["figures"]) == 4
    assert pictures(outputs["compare"]) >= 2
    assert pictures(outputs["own"]) >= 1
    progress = "".join(o["text"] for o in outputs["quickstart"] if o.output_type == "stream")
    assert "[4/" in progress  # each stage says how far along it is
    kl = [json.loads((runs / name / "config.json").read_text())["ppo"]["kl_coef"] for name in ("first", "closer")]
    assert kl == [0.05, 0.2]
    assert list(json.loads((runs / "mine" / "results.json").read_text())["policies"]) == ["mine"]


@pytest.mark.slow
def test_samples_stand_side_by_side_as_text(executed):
    runs, outputs = executed
    (table,) = (o["data"]["text/html"] for o in outputs["samples"])
    for policy in ("sft", "bon", "ppo"):
        assert f">{policy}</th>" in table
    assert table.count("<tr>") == 4
    first = json.loads((runs / "first/samples/ppo/ood_subreddit.jsonl").read_text().splitlines()[0])
    assert first["responses"][0].split()[0] in table
