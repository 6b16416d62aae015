import dataclasses
import json

import pytest

from jaxrlhf.config import Experiment, Files
from jaxrlhf.data import instructions, task
from jaxrlhf.files import UserError


@pytest.fixture
def files(tmp_path):
    """Two models' answers to 40 instructions of two sources, verdicts of every kind, and a seed file with blank lines."""
    rows = [
        {
            "instruction": f"do {i} {{x}}",
            "output": "" if i == 3 else f"answer {i} 日本",
            "dataset": "near" if i % 4 else "far",
        }
        for i in range(40)
    ]
    verdicts = [
        {
            "instruction": r["instruction"],
            "output_1": "base",
            "output_2": "model",
            "dataset": r["dataset"],
            "preference": p,
        }
        for r, p in zip(rows, [1, 2, 1.5, 0, None] * 8, strict=True)
    ]
    for name, records in (("out/a.json", rows), ("out/b.json", rows), ("ann/a.json", verdicts)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(records))
    seed = {"instruction": "seed", "instances": [{"input": "given", "output": "made"}]}
    (tmp_path / "seed.jsonl").write_text(f"\n{json.dumps(seed)}\n\n")
    return Files(
        root=str(tmp_path),
        demonstrations=("out/*.json",),
        annotations=("ann/*.json",),
        reference="out/a.json",
        id_sources=("near",),
        ood_sources=("far",),
        ood_files=("seed=seed.jsonl",),
        vocab_size=300,
    )


def test_an_instruction_is_on_one_side_of_the_held_out_line(files):
    found = instructions.read(files, 0)
    train = {r["prompt"] for r in found.demonstrations}
    held_out = {r["prompt"] for r in found.splits["id"]}
    assert train
    assert held_out
    assert not train & held_out
    assert {r["prompt"] for r in found.validation} <= held_out
    assert {p["prompt"] for p in found.preferences["train"]} <= {r["prompt"] for r in found.ppo_prompts}
    assert not {p["prompt"] for p in found.preferences["train"]} & held_out
    assert instructions.read(files, 1).splits["id"] != found.splits["id"]


def test_braces_scripts_and_inputs_pass_through(files):
    found = instructions.read(files, 0)
    assert list(found.splits) == ["id", "ood_far", "ood_seed"]
    assert "do 0 {x}" in found.splits["ood_far"][0]["prompt"]
    assert found.splits["ood_far"][0]["response"] == "answer 0 日本"
    assert "seed\n\ngiven" in found.splits["ood_seed"][0]["prompt"]
    assert found.splits["ood_seed"][0]["response"] == "made"


def test_what_is_passed_over_is_counted(files):
    found = instructions.read(files, 0)
    pairs = sum(map(len, found.preferences.values()))
    assert (pairs, found.notes["draws"], found.notes["missing_verdicts"]) == (16, 16, 8)
    assert found.notes["empty_outputs"] + found.notes["without_reference"] in (2, 3)
    assert all({p["chosen"], p["rejected"]} == {"base", "model"} for ps in found.preferences.values() for p in ps)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"demonstrations": ("none/*.json",)}, "config.files.demonstrations: nothing at"),
        ({"annotations": ()}, "config.files.annotations: names no file"),
        ({"ood_files": ("seed.jsonl",)}, "must be name=path"),
        ({"ood_sources": ("nowhere",)}, "split 'ood_nowhere' is empty"),
        ({"held_out": 1.0}, "config.files.held_out=1.0"),
        ({"demonstrations": ("ann/a.json",)}, "no field 'output'"),
    ],
)
def test_mistakes_name_their_key_or_record(files, change, says):
    with pytest.raises(UserError, match=says):
        instructions.read(dataclasses.replace(files, **change), 0)


def test_the_task_is_prepared_once_and_reads_back_as_written(files, tmp_path):
    config = dataclasses.replace(Experiment(), task="files", files=files)
    first, again = (task.load(config, tmp_path / "run", lambda line: None) for _ in range(2))
    found = instructions.read(files, 0)
    for loaded in (first, again):
        assert list(loaded.demonstrations) == found.demonstrations
        assert list(loaded.splits["ood_far"]) == found.splits["ood_far"]
        assert loaded.preferences is not None
        assert list(loaded.preferences["train"]) == found.preferences["train"]
    text = found.demonstrations[0]["prompt"]
    assert first.tokenizer.decode(first.tokenizer.encode(text)) == text
