import subprocess
import sys
import textwrap

import pytest

from jaxrlhf.config import Experiment, World
from jaxrlhf.data import builders, task, world
from jaxrlhf.files import UserError

ROWS = [{"id": str(i), "text": f"line {i}\n日本 {{x}} \x00"} for i in range(37)]
SIZES = {"demonstrations": 12, "preference": 3, "ppo": 5, "evaluation": 4}


def prepare(folder, splits, fingerprint="f", fields=("id", "text")):
    makers = {name: (lambda rows=rows: rows) for name, rows in splits.items()}
    return builders.prepare(
        lambda path: builders.Records(splits=makers, fields=fields, data_dir=path), folder, fingerprint
    )


def test_records_come_back_in_order_as_text(tmp_path):
    found = prepare(tmp_path / "data", {"train": ROWS, "ood_a-b": ROWS[:1]})
    assert list(found) == ["train", "ood_a-b"]
    assert list(found["train"]) == ROWS
    assert (len(found["train"]), found["train"][-1], found["train"][30:99:3]) == (37, ROWS[-1], ROWS[30:99:3])
    assert list(found["ood_a-b"]) == ROWS[:1]
    with pytest.raises(IndexError):
        found["train"][37]


def test_files_are_array_records(tmp_path):
    prepare(tmp_path, {"train": ROWS})
    assert [p.name for p in tmp_path.rglob("*array_record*")] == ["records-train.array_record-00000-of-00001"]


def test_the_same_fingerprint_is_taken_from_disk(tmp_path):
    prepare(tmp_path, {"train": ROWS}, "one")
    never = {"train": lambda: pytest.fail("made again")}
    again = builders.prepare(
        lambda path: builders.Records(splits=never, fields=("id", "text"), data_dir=path), tmp_path, "one"
    )
    assert list(again["train"]) == ROWS
    assert list(prepare(tmp_path, {"train": ROWS[:2]}, "two")["train"]) == ROWS[:2]


def test_what_was_not_finished_is_made_anew(tmp_path):
    class Stopped(Exception):
        pass

    def stops():
        yield from ROWS[:5]
        raise Stopped

    with pytest.raises(Stopped):
        builders.prepare(
            lambda path: builders.Records(splits={"train": stops}, fields=("id", "text"), data_dir=path), tmp_path, "f"
        )
    assert not (tmp_path / "fingerprint.txt").exists()
    assert list(prepare(tmp_path, {"train": ROWS})["train"]) == ROWS
    next(tmp_path.rglob("dataset_info.json")).unlink()
    assert list(prepare(tmp_path, {"train": ROWS})["train"]) == ROWS


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"split 'far' of the data is empty"),
        ([ROWS[0], {"id": "1"}], r"split 'far', record 2: field 'text'"),
        ([{"id": 1, "text": "a"}], r"split 'far', record 1: field 'id'"),
    ],
)
def test_bad_splits_are_named(tmp_path, rows, message):
    for _ in range(2):  # a refused split leaves nothing that a second call would take up
        with pytest.raises(UserError, match=message):
            prepare(tmp_path, {"train": ROWS, "far": rows})


def test_the_world_is_what_its_functions_say(tmp_path):
    found = builders.prepare(lambda path: builders.World(seed=5, sizes=SIZES, data_dir=path), tmp_path, "f")
    assert set(found) == {"demonstrations", "validation", "preference", "ppo", *world.SPLITS}
    assert list(found["demonstrations"]) == [world.demonstration(5, i) for i in range(12)]
    assert list(found["validation"]) == [world.post(5, "validation", "id", i) for i in range(4)]
    assert list(found["preference"]) == [world.post(5, "preference", "id", i) for i in range(3)]
    assert list(found["ppo"]) == [world.post(5, "ppo", "id", i) for i in range(5)]
    for split in world.SPLITS:
        assert list(found[split]) == [world.post(5, "evaluation", split, i) for i in range(4)]


def tiny(**changes):
    sizes = {"documents": 3, "demonstrations": 4, "preference_prompts": 2, "ppo_prompts": 3, "evaluation_prompts": 2}
    return World(**(sizes | changes))


def test_the_world_as_a_task(tmp_path):
    made = task.load(Experiment(seed=5, world=tiny()), tmp_path, pytest.fail)
    assert list(made.splits) == list(world.SPLITS)
    assert next(iter(made.splits)) == "id"
    assert list(made.documents()) == [world.document(5, i) for i in range(3)]
    assert [len(x) for x in (made.demonstrations, made.validation, made.preference_prompts, made.ppo_prompts)] == [
        4,
        2,
        2,
        3,
    ]
    assert made.preferences is None
    record = made.demonstrations[0]
    assert made.gold is not None
    assert made.gold(record["facts"], record["response"], True) == world.gold(record["facts"], record["response"], True)
    assert (tmp_path / "tokenizer.json").exists()
    again = task.load(Experiment(seed=6, world=tiny()), tmp_path, pytest.fail)
    assert again.demonstrations[0] == world.demonstration(6, 0)
    with pytest.raises(UserError, match="'ppo'"):
        task.load(Experiment(seed=5, world=tiny(ppo_prompts=0)), tmp_path, pytest.fail)


def test_fingerprints_tell_what_data_depends_on():
    marks = [
        task.fingerprint(Experiment()),
        task.fingerprint(Experiment(seed=1)),
        task.fingerprint(Experiment(task="files")),
        task.fingerprint(Experiment(world=tiny())),
        task.fingerprint(Experiment(), ["a hash"]),
    ]
    assert len(set(marks)) == len(marks)
    assert task.fingerprint(Experiment(name="other")) == marks[0]


def test_no_noise_and_no_tensorflow(tmp_path):
    """A fresh process: nothing of TFDS's own on the terminal, and neither TensorFlow nor torch is imported."""
    code = f"""
        import sys
        from pathlib import Path
        from jaxrlhf.data import builders
        make = lambda p: builders.Records(splits={{"train": lambda: [{{"a": "b"}}]}}, fields=("a",), data_dir=p)
        print(list(builders.prepare(make, Path({str(tmp_path)!r}), "f")["train"]))
        print([m for m in ("tensorflow", "torch", "transformers") if m in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[{'a': 'b'}]", "[]"]
    assert done.stderr == ""
