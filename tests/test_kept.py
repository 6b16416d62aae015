"""The embedded world's data, kept for later workdirs: the same bytes, or none."""

import os

import jax
import pytest

from jaxrlhf.config import Experiment, World
from jaxrlhf.data import kept, task, world, world_words

SMALL = Experiment(world=World(demonstrations=7, preference_prompts=3, ppo_prompts=5, evaluation_prompts=4))


@pytest.fixture
def root(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    yield tmp_path / "compiled" / "data"
    jax.config.update("jax_compilation_cache_dir", before)


def made(folder, config=SMALL):
    found = task.load(config, folder, print)
    return [list(found.demonstrations), list(found.ppo_prompts), *map(list, found.splits.values())]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def never(*_):
    raise AssertionError("made again")


def test_a_second_workdir_has_a_copy_of_its_own(root, tmp_path, monkeypatch):
    first = made(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(world, "_record", never)
        assert made(tmp_path / "b") == first
    assert files(tmp_path / "a" / "data") == files(tmp_path / "b" / "data")
    for path in root.rglob("*array_record*"):
        path.unlink()
    assert made(tmp_path / "b") == first
    other = Experiment(seed=1, world=SMALL.world)
    assert made(tmp_path / "c", other) != first


def test_what_is_not_as_it_was_kept_is_made_anew_and_kept_again(root, tmp_path, monkeypatch):
    first = made(tmp_path / "a")
    (record,) = root.rglob("*demonstrations.array_record*")
    whole = record.read_bytes()
    record.write_bytes(whole[:-9] + b"X" + whole[-8:])
    with monkeypatch.context() as patch:
        patch.setattr(world, "_record", never)
        with pytest.raises(Exception, match="made again"):
            made(tmp_path / "b")
    assert not (tmp_path / "b" / "data" / "world" / "fingerprint.txt").exists()
    assert made(tmp_path / "b") == first
    monkeypatch.setattr(world, "_record", never)
    assert made(tmp_path / "c") == first


def test_another_mark_or_other_code_is_kept_elsewhere(root, tmp_path, monkeypatch):
    here = kept.place("mark", (world,))
    assert here is not None
    assert here.parent == root
    assert here != kept.place("other", (world,))
    assert here != kept.place("mark", (world, world_words))
    (tmp_path / "world.py").write_text("# changed")
    monkeypatch.setattr(world, "__file__", str(tmp_path / "world.py"))
    assert here != kept.place("mark", (world,))
    jax.config.update("jax_compilation_cache_dir", None)
    assert kept.place("mark", (world,)) is None


def test_the_latest_used_stay(root, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("x")
    for age, name in ((30, "a"), (20, "b")):
        kept.keep(tmp_path / "data", root / name)
        os.utime(root / name, (1e9 - age, 1e9 - age))
    assert kept.take(root / "a", tmp_path / "again")
    assert (tmp_path / "again" / "file").read_text() == "x"
    kept.keep(tmp_path / "data", root / "c")
    assert sorted(p.name for p in root.iterdir()) == ["a", "c"]


def test_where_nothing_can_be_kept_nothing_is(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "taken").write_text("a file stands in the way")
    kept.keep(tmp_path / "data", tmp_path / "taken" / "name")
    assert not kept.take(tmp_path / "taken" / "name", tmp_path / "x")
    assert not (tmp_path / "x").exists()
