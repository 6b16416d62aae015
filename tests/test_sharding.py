"""Eight simulated devices in a process of their own, since a process's devices are fixed at its start."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrlhf.config import Mesh
from jaxrlhf.files import UserError
from jaxrlhf.sharding import check_divides, make_mesh, spec

FAST, SLOW = [(2, 2, 2)], [(8, 1, 1), (1, 8, 1), (1, 1, 8)]
CASES = [("fast", m) for m in FAST] + [pytest.param("slow", m, marks=pytest.mark.slow) for m in SLOW]


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return run(tmp_path_factory.mktemp("fast"), FAST, programs=[(1, 8, 1)])


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return run(tmp_path_factory.mktemp("slow"), SLOW)


def run(folder: Path, meshes: Sequence, programs: Sequence = ()) -> Path:
    """What every stage's step gives on one device and on eight, and the compiled programs."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    program = Path(__file__).with_name("sharded_steps.py")
    argv = [sys.executable, program, folder, json.dumps(meshes), json.dumps(programs)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("which", "mesh"), CASES, ids=str)
def test_sharded_equals_unsharded(request, which, mesh):
    """Metrics and updated parameters of SFT, reward model and PPO, and the sampled tokens."""
    found = request.getfixturevalue(which)
    one, many = (np.load(found / f"{m}.npz") for m in ((1, 1, 1), mesh))
    assert set(one.files) == set(many.files)
    for name in one.files:
        if name.endswith("clip_fraction"):  # counts what passes a threshold: rounding moves it by one item
            np.testing.assert_allclose(many[name], one[name], atol=0.02, err_msg=name)
        elif one[name].dtype.kind == "f":
            np.testing.assert_allclose(many[name], one[name], atol=1e-5, rtol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(many[name], one[name], err_msg=name)
    assert {n.split("/")[0] for n in one.files} == {
        "sft",
        "sft of all",
        "reward",
        "drawn",
        "rollout",
        "ppo",
        "plain ppo",
    }


@pytest.mark.parametrize(("which", "mesh"), CASES, ids=str)
def test_parameters_and_adam_lie_divided(request, which, mesh):
    """No device holds the whole of what the mesh divides."""
    share = json.loads((request.getfixturevalue(which) / f"{mesh}.json").read_text())
    assert share == pytest.approx(1 / (mesh[1] * mesh[2]), rel=0.05)


def test_fsdp_gathers_a_layer_at_a_time(fast):
    """In the compiled SFT step parameters are gathered, one layer's at once, and activations never are."""
    text = (fast / "(1, 8, 1).sft.hlo").read_text()
    shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)]
    assert [32, 64] in shapes  # one layer's `up`
    assert not [s for s in shapes if len(s) > 2 and s[0] == 2]  # of two stacked layers
    assert not [s for s in shapes if s[0] in (16, 16 * 6, 16 * 12)]  # the batch's rows, and its positions


@pytest.mark.slow
def test_data_parallel_decoding_needs_no_other_device(slow):
    """But for one bit a step: whether enough rows have ended."""
    text = (slow / "(8, 1, 1).sample.hlo").read_text()
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    assert text.count(" while(") > 1
    assert set(re.findall(rf"= (\S+) (?:{names})(?:-start)?\(", text)) == {"pred[]"}


def test_a_mesh_that_does_not_fit_is_an_error_with_numbers():
    with pytest.raises(UserError, match="= 3, but there are 1 devices"):
        make_mesh(Mesh(data=3))
    with pytest.raises(UserError, match="one at most -1"):
        make_mesh(Mesh(data=-1, fsdp=-1))


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule"):
        spec("blocks/q/kernle", (2, 4, 4, 4), make_mesh(Mesh()))


def test_members_of_an_ensemble_lie_as_one_model_does():
    mesh = make_mesh(Mesh())
    assert spec("members/top/blocks/q/kernel", (3, 2, 4, 4, 4), mesh) == P(None, None, "fsdp", "tensor", None)
    assert spec("members/top/embed/tokens", (3, 8, 4), mesh) == P(None, "tensor", "fsdp")
    assert spec("members/head/w_D", (3, 4), mesh) == spec("head/w_D", (4,), mesh) == P()


def test_every_batch_divides_over_one_device():
    check_divides("config.sft.batch_size", 7, make_mesh(Mesh()))
