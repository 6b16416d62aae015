import json
import os
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import checkpoint, optim, sharding
from jaxrlhf.claim import bound, claim
from jaxrlhf.config import Experiment, Loop, Mesh, Ppo, Sampling, Sft
from jaxrlhf.files import Failure, UserError

TX = optax.adam(0.1)
META = {"config": {"sft": {"batch_size": 8}}, "tokenizer": "a", "frozen": "b"}


def state_at(step, value=0.5):
    params = {"w_D": jnp.full((5,), value * step, jnp.float32), "bias": jnp.float32([-1.25, step])}
    state = optim.new_state(TX, params, sharding.make_mesh(Mesh()))
    return state.replace(step=jnp.int32(step))


def save(directory, *steps, keep=3):
    with checkpoint.saver(directory, keep, META) as save_state:
        for step in steps:
            save_state(state_at(step))


def step_of(directory):
    found = checkpoint.restore(directory, state_at(0), META)
    if found is None:
        return None
    wanted = state_at(int(found.step))
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(wanted)))
    return int(found.step)


def test_only_so_many_are_kept_and_sha256sum_reads_their_seals(tmp_path):
    save(tmp_path, 2, 4, 6, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "6", "8"]
    assert step_of(tmp_path) == 8
    if shutil.which("sha256sum"):
        found = subprocess.run(["sha256sum", "-c", "--quiet", "6/SHA256SUMS"], cwd=tmp_path, capture_output=True)
        assert (found.returncode, found.stdout) == (0, b"")


def corrupt(folder, rng):
    """One random corruption of a step's folder; returns what it was."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = rng.choice(files)
    kind = rng.choice(["flip", "truncate", "delete", "add", "rename", "grow", "swap", "half", "link", "move"])
    data = path.read_bytes()
    if kind == "flip" and data:
        i = rng.randrange(len(data))
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :])
    elif kind == "truncate" and data:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "add":
        path.with_name(f"{path.name}.{rng.randrange(99)}").write_bytes(data)
    elif kind == "rename":
        path.rename(path.with_name(f"x{path.name}"))
    elif kind == "swap" and data != (other := rng.choice(files)).read_bytes():
        path.write_bytes(other.read_bytes())
    elif kind == "half":
        for half in rng.sample(files, len(files) // 2):
            half.unlink()
    elif kind == "link":
        path.unlink()
        path.symlink_to("/dev/null")
    elif kind == "move":  # another step's folder under this name
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("4"), folder)
    elif kind == "grow":
        path.write_bytes(data + b"\n")
    else:
        kind = "delete"
        path.unlink()
    return f"{kind} {path}"


def test_of_200_corruptions_none_is_restored_and_none_is_a_traceback(tmp_path, monkeypatch):
    """The one before is used each time; parameters of a finished stage are those of its last step, or of none."""
    save(tmp_path, 4, 6)
    shutil.copytree(tmp_path / "6", tmp_path / "good")
    read, chosen = checkpoint._read, []

    def reads(directory, step, *rest):
        chosen.append(step)
        # Orbax takes long to open: what it is to read is looked at each time, what it reads every 20th time.
        return read(directory, step, *rest) if len(chosen) % 20 == 0 else {"params": None, "rest": {}}

    monkeypatch.setattr(checkpoint, "_read", reads)
    rng, kinds = random.Random(0), set()
    for i in range(1, 201):
        what = corrupt(tmp_path / "6", rng)
        kinds.add(what.split()[0])
        with pytest.raises(Failure, match="makes it again") as failure:
            checkpoint.load_params(tmp_path, 6, state_at(0).params, META)
        assert "\n" not in str(failure.value)
        found = checkpoint.restore(tmp_path, state_at(0), META)
        assert chosen == [4] * i, what
        assert i % 20 or int(found.step) == 4
        assert not (tmp_path / "6").exists()
        shutil.copytree(tmp_path / "good", tmp_path / "6")
    assert len(kinds) == 10


def test_after_a_damaged_one_as_many_good_ones_are_kept(tmp_path, capsys):
    save(tmp_path, 2, 4, 6)
    (tmp_path / "6" / "params" / "_METADATA").write_text("{}")
    assert step_of(tmp_path) == 4
    assert "6: damaged (6/params/_METADATA is not as it was saved); removed" in capsys.readouterr().err
    save(tmp_path, 6, 8, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["6", "8"]
    assert step_of(tmp_path) == 8


def test_what_was_cut_off_while_saving_is_no_checkpoint(tmp_path, monkeypatch, capsys):
    save(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "_seal", lambda manager, step, keep: manager.wait_until_finished())
    save(tmp_path, 4)
    (tmp_path / "6").mkdir()
    (tmp_path / "8.orbax-checkpoint-tmp").mkdir()
    monkeypatch.undo()
    assert step_of(tmp_path) == 2
    assert capsys.readouterr().err.count("not saved to the end; removed") == 2
    save(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4"]
    assert step_of(tmp_path) == 4
    assert step_of(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"frozen": "c"}, "frozen: 'b' -> 'c'"),
        ({"tokenizer": "c"}, "tokenizer: 'a' -> 'c'"),
        ({"config": {"sft": {"batch_size": 9}}}, "config.sft.batch_size: 8 -> 9"),
    ],
)
def test_checkpoints_of_another_experiment_are_refused_with_what_differs(tmp_path, changed, said):
    save(tmp_path, 2)
    with pytest.raises(UserError) as error:
        checkpoint.restore(tmp_path, state_at(0), META | changed)
    assert said in str(error.value)
    assert (tmp_path / "2").exists()
    with pytest.raises(UserError):
        checkpoint.load_params(tmp_path, 2, state_at(0).params, META | changed)


def test_a_config_binds_a_stages_checkpoints_as_far_as_they_follow_from_it():
    plain = Experiment()
    for other, differs in (
        (Experiment(ppo=Ppo(kl_coef=0.3)), ["ppo"]),
        (Experiment(sampling=Sampling(top_k=3)), ["reward", "ppo"]),
        (Experiment(sft=Sft(batch_size=7)), ["sft", "reward", "ppo"]),
        (Experiment(sft=Sft(loop=Loop(save_every=7, keep=9)), mesh=Mesh(fsdp=2)), []),
        (Experiment(seed=1), ["pretrain", "sft", "reward", "ppo"]),
    ):
        found = [s for s in ("pretrain", "sft", "reward", "ppo") if bound(plain, s) != bound(other, s)]
        assert found == differs


def test_a_workdir_takes_another_mesh_and_no_other_config(tmp_path):
    claim(tmp_path, Experiment())
    claim(tmp_path, Experiment(mesh=Mesh(fsdp=2), sft=Sft(loop=Loop(save_every=7))))
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 2
    with pytest.raises(UserError, match=r"config\.sft\.batch_size: 32 -> 7"):
        claim(tmp_path, Experiment(sft=Sft(batch_size=7)))


DEVICES = """if True:
    import sys
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    from jaxrlhf import checkpoint, optim, sharding
    from jaxrlhf.config import Mesh, Optim
    fsdp, tensor, how = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    mesh = sharding.make_mesh(Mesh(data=-1, fsdp=fsdp, tensor=tensor))
    kernel = jnp.arange(96, dtype=jnp.float32).reshape(2, 4, 12) / 7 - 3
    params = {"blocks": {"up": {"kernel": kernel}}, "w_D": jnp.float32([-0.5, 2.25])}
    tx = optim.optimizer(Optim(schedule="constant"), 9)
    state = optim.new_state(tx, params, mesh)
    loss = lambda p: jnp.sum(p["blocks"]["up"]["kernel"] ** 2) + jnp.sum(p["w_D"])
    def step(state):
        value, grads = jax.value_and_grad(loss)(state.params)
        return optim.update(tx, value, grads, state)[0].replace(step=state.step + 1)
    def tell(state):
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
        print({jax.tree_util.keystr(k): np.asarray(v).tolist() for k, v in leaves})
    where = Path(sys.argv[1])
    if how == "save":
        for _ in range(3):
            state = step(state)
        with checkpoint.saver(where, 2, {}) as save:
            save(state)
        tell(state)
    else:
        found = checkpoint.restore(where, state, {})
        same = jax.tree.map(lambda a, b: a.sharding == b.sharding, found, state)
        assert all(jax.tree.leaves(same)), same
        tell(found)
        step(found)
    """


def on_devices(count, directory, *args):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-c", DEVICES, str(directory), *map(str, args)]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_four_devices_saved_goes_on_on_two_and_on_one(tmp_path):
    saved = on_devices(4, tmp_path, 2, 2, "save")
    assert "nan" not in saved
    assert on_devices(2, tmp_path, 2, 1, "restore") == saved
    assert on_devices(1, tmp_path, 1, 1, "restore") == saved
