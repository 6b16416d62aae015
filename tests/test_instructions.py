import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxrlhf.config import Evaluation, Experiment, Files
from jaxrlhf.data import instructions, task
from jaxrlhf.files import UserError

DATA = Path(__file__).parents[1] / "../shared/data"
REAL = Files(
    root=str(DATA),
    demonstrations=("alpaca_eval/outputs/*.json",),
    annotations=("alpaca_eval/annotations/*.json",),
    reference="alpaca_eval/outputs/text_davinci_003.json",
    id_sources=("selfinstruct", "oasst", "helpful_base"),
    ood_sources=("koala", "vicuna"),
    ood_files=("sequential=instructions/seed_tasks_sequential.jsonl", "seeds=instructions/seed_tasks.jsonl"),
)
NEAR = [f"near {{{i}}}" for i in range(40)]
FAR = [f"far {i}" for i in range(6)]
OTHER = ["elsewhere"]
FILES = Files(
    demonstrations=("outputs/*.json",),
    annotations=("annotations/*.json",),
    reference="reference.json",
    id_sources=("near",),
    ood_sources=("far",),
    ood_files=("tasks=tasks.jsonl",),
    prompt="Q: {instruction}\nA:",
    held_out=0.3,
)


def source(text):
    return {"n": "near", "f": "far", "e": "other"}[text[0]]


def answers(model, **changed):
    return [
        {"dataset": source(t), "instruction": t, "output": f"{model} on {t}", "generator": model} | changed
        for t in [*NEAR, *FAR, *OTHER]
    ]


def verdicts(preference: object = 1):
    return [
        {"dataset": source(t), "instruction": t, "output_1": "one", "output_2": "two", "preference": preference}
        for t in [*NEAR, *FAR, *OTHER]
    ]


@pytest.fixture
def data(tmp_path):
    """A folder of small files, and a function that writes one anew."""

    def write(name, records):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(records) if name.endswith(".json") else "\n\n".join(map(json.dumps, records)) + "\n"
        path.write_text(text)

    write("outputs/a.json", answers("a"))
    write("outputs/b.json", answers("b"))
    write("annotations/a.json", verdicts())
    write("reference.json", [r for r in answers("r") if r["instruction"] != "far 3"])
    write(
        "tasks.jsonl",
        [
            {"instruction": "plan", "instances": [{"input": "", "output": "done"}]},
            {"instruction": "sum", "instances": [{"input": "1 2", "output": "3"}, {"input": "4", "output": "4"}]},
        ],
    )
    return replace(FILES, root=str(tmp_path)), write


def asked(records, c):
    before, after = c.prompt.split("{instruction}")
    assert all(r["prompt"].startswith(before) and r["prompt"].endswith(after) for r in records)
    return [r["prompt"].removeprefix(before).removesuffix(after) for r in records]


def test_everything_by_hand(data):
    c, _ = data
    found = instructions.read(c, 0)
    held, trained = set(asked(found.splits["id"], c)), set(asked(found.ppo_prompts, c))
    assert held | trained == set(NEAR)
    assert not held & trained
    assert 4 <= len(held) <= 20
    for records, texts in ((found.demonstrations, trained), (found.validation, held)):
        assert sorted(r["response"] for r in records) == sorted(f"{m} on {t}" for m in "ab" for t in texts)
        assert set(asked(records, c)) == texts
    assert found.demonstrations[0]["prompt"].startswith("Q: near {")
    assert list(found.splits) == ["id", "ood_far", "ood_tasks"]
    assert [r["response"] for r in found.splits["ood_far"]] == ["" if t == "far 3" else f"r on {t}" for t in FAR]
    assert [(r["prompt"], r["response"]) for r in found.splits["ood_tasks"]] == [
        ("Q: plan\nA:", "done"),
        ("Q: sum\n\n1 2\nA:", "3"),
    ]
    assert {split: set(asked(pairs, c)) for split, pairs in found.preferences.items()} == {
        "train": trained,
        "id": held,
        "ood_far": set(FAR),
    }
    assert found.notes == dict.fromkeys(instructions.NOTES, 0) | {"without_reference": 1}
    for records in (found.demonstrations, found.validation, found.ppo_prompts, *found.splits.values()):
        assert len({r["id"] for r in records}) == len(records)
        assert all(isinstance(v, str) for r in records for v in r.values())


def test_the_preferred_answer_is_chosen(data):
    c, write = data
    kinds = [1, 2, 1.0, 2.0, None, 0, 1.5]
    write("annotations/a.json", [r | {"preference": kinds[i % 7]} for i, r in enumerate(verdicts())])
    found = instructions.read(c, 0)
    pairs = [p for split in found.preferences.values() for p in split]
    for p in pairs:
        i = int(p["id"].split("-")[1]) - 1
        won = kinds[i % 7]
        assert (p["chosen"], p["rejected"]) == (("one", "two") if won == 1 else ("two", "one"))
        assert (p["chosen_finished"], p["rejected_finished"]) == ("1", "1")
    # 46 verdicts count (the other source's does not): of i % 7 in (4, 5, 6) there are 6 each
    assert (found.notes["draws"], found.notes["missing_verdicts"], len(pairs)) == (12, 6, 46 - 18)


def test_the_held_out_side_is_stable(data):
    c, write = data
    first = set(asked(instructions.read(c, 0).splits["id"], c))
    write("outputs/0.json", answers("new")[::-1][:20])
    assert set(asked(instructions.read(c, 0).splits["id"], c)) == first  # more files, another order
    assert first <= set(asked(instructions.read(replace(c, held_out=0.5), 0).splits["id"], c))
    assert set(asked(instructions.read(c, 1).splits["id"], c)) != first


def test_an_instruction_of_two_sources_is_in_distribution_only(data):
    c, write = data
    twice = [r | {"dataset": "far"} for r in answers("c") if source(r["instruction"]) == "near"]
    write("outputs/0.json", twice)
    write("annotations/b.json", [r | {"dataset": "far"} for r in verdicts()])
    write("tasks.jsonl", [{"instruction": t, "instances": [{"input": "", "output": "x"}]} for t in [*NEAR, "new"]])
    found = instructions.read(c, 0)
    trained = set(asked(found.ppo_prompts, c))
    assert asked(found.splits["ood_far"], c) == FAR
    assert set(asked(found.preferences["ood_far"], c)) == set(FAR)
    assert not trained & set(asked(found.splits["ood_tasks"], c))
    assert found.notes["ood_prompts_trained_on"] == len(trained)


def test_odd_texts_are_counted(data):
    c, write = data
    odd = answers("b")
    for i, r in enumerate(odd):
        r["output"] = ["", "  \n", "cut \ud83d", "whole 🎉"][i % 4]
    write("outputs/b.json", odd)
    write("annotations/a.json", [r | {"output_2": ""} for r in verdicts()])
    found = instructions.read(c, 0)
    said = [r["response"] for r in (*found.demonstrations, *found.validation) if not r["response"].startswith("a on")]
    assert sorted(set(said)) == ["cut \ufffd", "whole 🎉"]
    assert found.notes["empty_outputs"] == 20  # of the 40 in-distribution answers of model b
    assert found.notes["texts_with_lone_surrogates"] == 12  # of all 47
    assert found.notes["empty_answers_in_pairs"] == 46
    for records in (*found.splits.values(), found.demonstrations):
        json.dumps(records, ensure_ascii=False).encode("utf-8")


def test_fewer_prompts_are_spread_over_the_files(data):
    c, _ = data
    whole = instructions.read(c, 0)
    some = instructions.read(replace(c, evaluation_prompts=3), 0)
    assert [len(records) for records in some.splits.values()] == [3, 3, 2]
    order = asked(whole.splits["id"], c)
    chosen = asked(some.splits["id"], c)
    assert chosen == [text for text in order if text in chosen]
    assert chosen != order[:3]
    assert some.preferences == whole.preferences
    more = instructions.read(replace(c, evaluation_prompts=5), 0)
    assert set(chosen) < set(asked(more.splits["id"], c))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demonstrations": ("nothing/*.json",)}, r"config\.files\.demonstrations: nothing at .*nothing/\*\.json"),
        ({"annotations": ()}, r"config\.files\.annotations: names no file"),
        ({"reference": ""}, r"config\.files\.reference: nothing at"),
        ({"reference": "outputs"}, r"config\.files\.reference: nothing at"),
        ({"ood_files": ("tasks.jsonl",)}, r"config\.files\.ood_files: 'tasks\.jsonl' must be name=path"),
        ({"ood_files": ("far=tasks.jsonl",)}, r"'far' names 2 splits"),
        ({"ood_files": ("../x=tasks.jsonl",)}, r"'\.\./x' cannot name a split"),
        ({"ood_sources": ("near",)}, r"config\.files\.ood_sources: 'near' is in id_sources too"),
        ({"ood_sources": ("nowhere",)}, r"split 'ood_nowhere' is empty"),
        ({"id_sources": ("nowhere",)}, r"there are no demonstrations"),
        ({"held_out": 0.0}, r"config\.files\.held_out=0\.0"),
        ({"held_out": 1.0}, r"config\.files\.held_out=1\.0"),
        ({"held_out": 1e-9}, r"there are no held-out demonstrations"),
    ],
)
def test_bad_keys_are_named(data, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        instructions.read(replace(data[0], **changes), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("outputs/a.json", [{"instruction": "x", "output": "y"}], r"outputs/a\.json, record 1: no field 'dataset'"),
        ("outputs/b.json", answers("b", output=None), r"b\.json, record 1: field 'output' is NoneType"),
        ("outputs/b.json", [*answers("b"), *answers("b", dataset=[1])], r"b\.json, record 48: field 'dataset' is list"),
        ("annotations/a.json", verdicts("win"), r"a\.json, record 1: preference is 'win'"),
        ("annotations/a.json", verdicts(0), r"no annotations of training prompts"),
        ("annotations/a.json", {"a": 1}, r"a\.json: expected a list"),
        ("tasks.jsonl", [{"instruction": "a", "instances": []}], r"tasks\.jsonl, record 1: `instances`"),
        (
            "tasks.jsonl",
            [{"instruction": "a", "instances": [{"input": 3, "output": ""}]}],
            r"`instances`, input is int",
        ),
    ],
)
def test_bad_files_are_named(data, name, records, message):
    c, write = data
    write(name, records)
    with pytest.raises(UserError, match=message):
        instructions.read(c, 0)


def test_bad_json_names_its_line(data):
    c, _ = data
    (Path(c.root) / "tasks.jsonl").write_text('\n{"instruction": "a", "instances": []}\n{oops}\n')
    with pytest.raises(UserError, match=r"tasks\.jsonl:3: not valid JSON"):
        instructions.read(c, 0)


def experiment(c):
    return Experiment(task="files", files=replace(c, vocab_size=300), evaluation=Evaluation(judge="reward"))


def test_files_as_a_task(data, tmp_path):
    c, write = data
    said, workdir = [], tmp_path / "run"
    made = task.load(experiment(c), workdir, said.append)
    found = instructions.read(c, 0)
    assert list(made.demonstrations) == found.demonstrations
    assert list(made.validation) == found.validation
    assert list(made.documents()) == found.demonstrations
    assert list(made.ppo_prompts) == found.ppo_prompts
    assert {s: list(r) for s, r in made.splits.items()} == found.splits
    assert made.preferences is not None
    assert {s: list(r) for s, r in made.preferences.items()} == found.preferences
    assert (made.gold, made.prefers_first, list(made.preference_prompts)) == (None, None, [])
    assert json.loads((workdir / "data" / "notes.json").read_text()) == found.notes
    assert "1 without reference" in said[0]
    text = made.demonstrations[0]["prompt"] + made.demonstrations[0]["response"]
    assert made.tokenizer.decode(made.tokenizer.encode(text)) == text

    (workdir / "data" / "notes.json").unlink()  # the only file that is written each time
    kept = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    again = task.load(experiment(c), workdir, said.append)
    assert json.loads((workdir / "data" / "notes.json").read_text()) == found.notes
    (workdir / "data" / "notes.json").unlink()
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == kept
    assert again.tokenizer.encode(text) == made.tokenizer.encode(text)
    write("outputs/b.json", [r | {"output": "changed within the same length"} for r in answers("b")])
    changed = task.load(experiment(c), workdir, said.append)
    assert "changed within the same length" in {r["response"] for r in changed.demonstrations}
    assert changed.tokenizer.encode("changed") != made.tokenizer.encode("changed")


@pytest.mark.skipif(not DATA.exists(), reason="the real files are not here")
def test_real_files():
    found = instructions.read(REAL, 0)
    # Counted apart from this code: 805 instructions, of which 156 koala and 80 vicuna; the reference answers one of
    # the koala ones with nothing.
    held, trained = set(asked(found.splits["id"], REAL)), set(asked(found.ppo_prompts, REAL))
    assert len(held) + len(trained) == 805 - 156 - 80
    assert 0.14 < len(held) / 569 < 0.26
    assert {s: len(r) for s, r in found.splits.items() if s != "id"} == {
        "ood_koala": 156,
        "ood_vicuna": 80,
        "ood_sequential": 42,
        "ood_seeds": 175,
    }
    assert not set().union(*(asked(r, REAL) for s, r in found.splits.items())) & trained
    pairs = sum(len(p) for p in found.preferences.values())
    assert pairs + found.notes["draws"] + found.notes["missing_verdicts"] == 7 * 805
    assert (found.notes["draws"], found.notes["missing_verdicts"]) == (67, 4)
    assert [(s, r["response"]) for s, rs in found.splits.items() for r in rs if not r["response"]] == [
        ("ood_koala", "")
    ]
    assert found.notes["without_reference"] == 1
