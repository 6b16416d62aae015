"""`jaxrlhf plan`: what it says of a small model on a v5e:2x2 that is not there, its mistakes, and how it ranks.

The compiler for TPUs is an extra, so what compiles is skipped where it is not installed.
"""

import importlib.util
import json
import math

import jax
import pytest

from jaxrlhf import model, plan, plan_search, roofline
from jaxrlhf.config import Experiment, Mesh, Model, Sft
from jaxrlhf.main import main
from jaxrlhf.plan_search import Trial
from jaxrlhf.split import split

SMOKE = "--config=configs/quickstart.py:smoke"
has_libtpu = importlib.util.find_spec("libtpu") is not None
compiles = pytest.mark.skipif(not has_libtpu, reason="the extra `plan` is not installed")


def run(capsys, *flags: str) -> tuple[int, str, str]:
    status = main(["jaxrlhf", "plan", *flags])
    out, err = capsys.readouterr()
    return status, out, err.strip().splitlines()[-1] if err.strip() else ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((SMOKE,), "error: --topology=CHIP:SHAPE is missing"),
        ((SMOKE, "--topology=v9:2x2"), "error: --topology='v9:2x2': expected CHIP:SHAPE, such as v4:2x2x1"),
        ((SMOKE, "--topology=v5e"), "error: --topology='v5e': expected CHIP:SHAPE"),
        ((SMOKE, "--topology=v5e:2x2", "--stages=sft,pretrain"), "error: --stages=pretrain: the recipe's are sft,"),
        ((SMOKE, "--topology=v5e:2x2", "--config.model.init=base"), "error: config.model.init='base' is what a work"),
        ((SMOKE, "--topology=v5e:2x2", "again"), "error: 'again': not a flag"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, said):
    if "base" in flags[-1] and not has_libtpu:
        pytest.skip("found after the compiler is")
    status, out, last = run(capsys, *flags)
    assert (status, out) == (2, "")
    assert last.startswith(said)


@pytest.mark.skipif(has_libtpu, reason="the extra `plan` is installed")
def test_without_the_extra_one_line_says_which(capsys):
    status, _, last = run(capsys, SMOKE, "--topology=v5e:2x2")
    assert status == 2
    assert last == "error: plan takes the compiler for TPUs, an extra: pip install -e '.[plan]'"


@compiles
def test_a_slice_that_does_not_exist_is_one_line_with_some_that_do(capsys):
    status, _, last = run(capsys, SMOKE, "--topology=v5e:3x3")
    assert status == 2
    assert "v5e:3x3" in last
    assert "there are v4:2x2x1, v5e:8x8, v5p:2x2x1, v6e:4x4" in last


@compiles
def test_a_batch_that_the_stage_would_refuse_is_refused(capsys):
    status, _, last = run(capsys, SMOKE, "--topology=v5e:2x2", "--config.sft.batch_size=6")
    assert status == 2
    assert "config.sft.batch_size=6 does not divide over data x fsdp = 4 devices" in last


def planned(capsys, *flags: str) -> dict[str, dict]:
    status, out, _ = run(capsys, SMOKE, "--topology=v5e:2x2", "--json", *flags)
    assert status == 0
    return {s["step"]: s for s in json.loads(out)["steps"]}


def trained_bytes() -> tuple[int, int]:
    """Of what `smoke` trains: all of it, and of its matrices, which a mesh divides."""
    arch = plan.architecture(Experiment(model=Model(layers=6, width=64, heads=2, ff_width=192)))
    leaves = jax.tree.leaves(jax.eval_shape(lambda: split(model.init(arch, jax.random.key(0)), 0.8))[1])
    sizes = [(math.prod(x.shape) * 4, x.ndim) for x in leaves]
    return sum(n for n, _ in sizes), sum(n for n, rank in sizes if rank > 2)


@pytest.mark.slow
@compiles
def test_every_step_of_a_small_recipe(capsys):
    steps = planned(capsys, "--config.mesh.data=1", "--config.mesh.fsdp=4")
    assert list(steps) == ["sft", "reward", "ppo rollout", "ppo score", "ppo update", "sample", "sample score"]
    whole, matrices = trained_bytes()
    sft = steps["sft"]
    assert sft["parts"]["trained"] == whole - matrices * 3 / 4
    assert sft["parts"]["optimizer"] == pytest.approx(2 * sft["parts"]["trained"], abs=16)  # Adam's, and two counts
    assert sft["memory"] == sum(sft["parts"].values())
    for step in steps.values():
        assert step["fits"]
        assert step["parts"]["working"] > 0
        assert step["flops"] > 0
        assert set(step["seconds"]) == {"compute", "hbm", "ici"}
        assert step["traffic"]["sent"]["all-gather"] > 0  # parameters lie divided
    # Each of fsdp's chips gathers a layer, forward; at least what is trained again, backward; in f32 here.
    blocks = matrices * 6 / 2
    assert sum(sft["traffic"]["sent"].values()) > blocks * 3 / 4
    assert steps["ppo update"]["parts"]["held"] > 2 * sft["parts"]["held"]  # reference and reward model


@pytest.mark.slow
@compiles
def test_other_methods_and_an_ensemble(capsys):
    """Group methods have no value, so their optimizer is DPO's; a member more is a top more, and its optimizer's."""
    small = ("--stages=reward,dpo,rloo,grpo", "--config.mesh.fsdp=4", "--config.mesh.data=1")
    flags = (*small, "--config.methods=dpo,rloo,grpo")
    steps = planned(capsys, *flags)
    grouped = [f"{stage} {what}" for stage in ("rloo", "grpo") for what in ("rollout", "score", "update")]
    assert list(steps) == ["reward", "dpo", *grouped]
    assert {steps[s]["parts"]["optimizer"] for s in grouped} == {steps["dpo"]["parts"]["optimizer"]}
    reward = planned(capsys, *flags, "--config.reward.ensemble=3")
    for part in ("trained", "optimizer"):
        assert reward["reward"]["parts"][part] == pytest.approx(3 * steps["reward"]["parts"][part], abs=64)
    more = reward["grpo update"]["parts"]["held"] - steps["grpo update"]["parts"]["held"]
    assert more == pytest.approx(2 * steps["reward"]["parts"]["trained"], abs=64)


@compiles
def test_data_parallel_steps_add_up_gradients_and_gather_nothing(capsys):
    sft = planned(capsys, "--stages=sft")["sft"]
    assert "all-gather" not in sft["traffic"]["sent"]
    whole, _ = trained_bytes()
    assert sft["traffic"]["sent"]["all-reduce"] == pytest.approx(2 * whole * 3 / 4, rel=0.1)


@pytest.mark.slow
@compiles
def test_what_does_not_fit_says_so(capsys):
    small = ("--stages=sft", "--config.mesh.fsdp=4", "--config.mesh.data=1")
    huge = planned(capsys, *small, "--config.model.width=16384", "--config.model.ff_width=65536")["sft"]
    assert not huge["fits"]
    assert huge["refused"] == "what lies there before the step is too much"
    wide = planned(capsys, *small, "--config.sft.batch_size=262144")["sft"]
    assert not wide["fits"]
    assert "takes" in wide["refused"]


ARCH = model.Architecture(
    vocab_size=48,
    layers=4,
    width=32,
    heads=8,
    kv_heads=4,
    head_width=4,
    ff_width=64,
    max_positions=32,
    **model.FAMILIES["llama"],
)


def test_meshes_are_all_ways_to_lay_out_the_chips_that_keep_heads_apart():
    found = plan_search.meshes(16, ARCH)
    assert len(found) == len(set(found)) == 5 + 4 + 3  # tensor 1, 2, 4; not 8, of four key/value heads
    assert all(m.data * m.fsdp * m.tensor == 16 for m in found)


def trial(stage: str, mesh: Mesh, batch: int, seconds: float, fits: bool = True, memory: float = 1.0) -> Trial:
    return Trial(stage, mesh, batch, memory, seconds, fits)


def test_ranked_by_rows_a_second_among_those_that_fit():
    a, b = Mesh(1, 4, 1), Mesh(2, 2, 1)
    found = [
        trial("sft", a, 32, 0.5),
        trial("sft", a, 64, 0.8, memory=3.0),
        trial("sft", b, 32, 0.4, memory=2.0),
        trial("sft", b, 128, 0.1, fits=False),
    ]
    assert [(t.mesh, t.batch) for t in plan_search.best(found)] == [(b, 32), (a, 64), (a, 32)]


def test_a_mesh_for_all_stages_by_hours_for_as_many_examples():
    a, b = Mesh(1, 4, 1), Mesh(2, 2, 1)
    config = Experiment(sft=Sft(batch_size=32))  # and reward 32, 100 steps each
    found = [
        trial("sft", a, 64, 0.8),
        trial("reward", a, 32, 0.5),
        trial("sft", b, 32, 0.2),
        trial("reward", b, 32, 0.2, fits=False),
    ]
    ((hours, mesh, batches),) = plan_search.hours(config, found)
    assert (mesh, batches) == (a, {"sft": 64, "reward": 32})
    assert hours == pytest.approx((100 * 32 / 80 + 100 * 32 / 64) / 3600)


@pytest.mark.parametrize(
    ("start", "most", "tried"),
    [
        (6, 20, [8, 16, 32]),  # the next that divides, doubled until it does not fit
        (40, 12, [40, 20]),  # halved as long as it divides
        (64, 20, [64, 32, 16]),  # halved until it fits
    ],
)
def test_batches_grow_while_they_fit_and_shrink_until_they_do(monkeypatch, start, most, tried):
    chip = roofline.Chip(flops=1e12, hbm=float(most), hbm_rate=1e9, ici_rate=1e9)

    def rows(config, arch, chip, mesh, stages):
        batch = config.sft.batch_size
        yield plan.Row("sft", batch, {"working": float(batch)}, "", 1e12, plan_search.plan_steps.hlo.Traffic(0.0, {}))

    monkeypatch.setattr(plan_search.plan_steps, "rows", rows)
    monkeypatch.setattr(
        plan_search.sharding, "make_mesh", lambda mesh, devices: jax.sharding.AbstractMesh((1,), ("x",))
    )
    found = list(
        plan_search.trials(Experiment(sft=Sft(batch_size=start)), ARCH, chip, (), "sft", Mesh(data=2, fsdp=2, tensor=1))
    )
    assert [t.batch for t in found] == tried
    assert [t.fits for t in found] == [b <= most for b in tried]
