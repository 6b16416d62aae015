"""Sweeps: what points share is trained once, a point that fails is shown, and what was done is not done again."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from absl import flags

from jaxrlhf import sweep
from jaxrlhf.claim import bound, sampled
from jaxrlhf.config import Experiment, Ppo
from jaxrlhf.evaluation import tradeoff
from jaxrlhf.files import UserError
from jaxrlhf.main import main
from jaxrlhf.recipes import parse, resolve

ROOT = Path(__file__).parents[1]
# There are no nine devices.
AXIS = "sampling.best_of=2 mesh.data=-1; sampling.best_of=3 mesh.data=-1; sampling.best_of=4 mesh.data=9"
ARGV = [
    "jaxrlhf",
    "run",
    "--config=configs/quickstart.py:smoke",
    "--config.world.evaluation_prompts=4",
    "--config.sampling.samples_per_prompt=2",
    "--config.sampling.pool=6",
    "--config.sampling.batch_size=4",
    "--config.evaluation.bootstrap=50",
]


def swept(workdir, *axes):
    return main([*ARGV, f"--config.sweep={axes}", f"--workdir={workdir}"])


def kept(workdir):
    """Every file that no clock is in, with its bytes."""
    files = [p for p in workdir.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".json")]
    return {
        p.relative_to(workdir): p.read_bytes()
        for p in files
        if p.name != "timings.jsonl" and not {"checkpoints", "data", "compiled"} & set(p.parts)
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory, request):
    """A sweep of which the last point fails, and its exit status."""
    path = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        return path, swept(path, AXIS)


def test_points_train_what_they_share_once(done):
    path, status = done
    assert status == 1
    folders = [p.name.rpartition("-")[0] for p in (path / "shared").iterdir()]
    # Best-of-4 never sampled, and has an empty folder of its own.
    assert Counter(folders) == Counter(
        ["data", "pretrain", "sft", "reward", "ppo", "samples-sft", "samples-ppo", *3 * ["samples-bon"]]
    )
    for stage in ("sft", "reward", "ppo"):
        assert len(list((path / "shared").glob(f"{stage}-*/timings.jsonl"))) == 1
        ends = {(path / "points" / f"best_of={n}" / stage).resolve() for n in (2, 3, 4)}
        assert len(ends) == 1


def test_a_point_that_fails_is_named_and_the_others_are_there(done):
    path, _ = done
    results = json.loads((path / "results.json").read_text())
    told = results["tradeoff"]
    assert told["equal_kl"] == {}  # one PPO is no curve
    assert list(told["failed"]) == ["best_of=4"]
    assert "config.mesh: data x fsdp x tensor = 9" in told["failed"]["best_of=4"]
    assert [(p["policy"], p["setting"]["sampling.best_of"]) for p in told["points"]] == [
        ("sft", "2"),
        ("bon", "2"),
        ("ppo", "2"),
        ("bon", "3"),
    ]
    page = (path / "report" / "index.html").read_text()
    assert "best_of=4: config.mesh: data x fsdp x tensor = 9" in page
    assert not (path / "points" / "best_of=4" / "config.json").exists()  # the corrected config may have the folder


def test_the_numbers_of_curves_are_those_of_the_points(done):
    path, _ = done
    told = json.loads((path / "results.json").read_text())["tradeoff"]
    for n, (kl, gold) in zip((2, 3), tradeoff.over_kl(told["points"], "bon", "ood_news", ("gold",)), strict=True):
        point = json.loads((path / "points" / f"best_of={n}" / "results.json").read_text())
        assert gold == point["policies"]["bon"]["ood_news"]["gold"]
        assert kl == point["policies"]["bon"]["ood_news"]["kl"]
        assert 0 < kl["mean"] <= tradeoff.best_of_n_bound(n)
    (zero, gold), *others = tradeoff.over_kl(told["points"], "sft", "id", ("gold",))
    assert (zero["mean"], others) == (0.0, [])
    line = tradeoff.over_axis(told["points"], "bon", "id", ("score",), "sampling.best_of")
    assert [x for x, _ in line] == [2.0, 3.0]
    drawn = {p.stem for p in (path / "report" / "figures").glob("curve_*")}
    assert {"curve_kl_0_win_rate", "curve_axis_0_win_rate_0", "curve_axis_4_diversity_0"} <= drawn


def test_a_sweep_that_was_stopped_ends_as_one_that_was_not(done, tmp_path, monkeypatch):
    path, _ = done
    whole = kept(path)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy, symlinks=True)
    for gone in ("results.json", "samples/summary.json", "samples/bon/ood_news.jsonl"):
        (copy / "points" / "best_of=3" / gone).unlink()
    (copy / "results.json").unlink()
    # Another config.evaluation measured this one.
    other = copy / "points" / "best_of=2" / "results.json"
    results = json.loads(other.read_text())
    results["config"]["evaluation"]["cut_words"] = 7
    results["policies"]["sft"]["id"]["gold"]["mean"] += 0.5
    other.write_text(json.dumps(results))
    monkeypatch.chdir(ROOT)
    assert swept(copy, AXIS) == 1
    assert kept(copy) == whole


def test_a_sweep_takes_no_single_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = ["jaxrlhf", "ppo", *ARGV[2:], f"--config.sweep={('seed=0; 1',)}", f"--workdir={tmp_path / 'w'}"]
    assert main(argv) == 2
    assert "ppo: a sweep runs as a whole" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_sweep_does_not_write_over_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text("{}")
    assert swept(tmp_path, AXIS) == 2
    assert "holds a run of its own; name another folder for a sweep" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_points_are_every_combination_with_the_first_axis_slowest():
    found = sweep.points(Experiment(sweep=("ppo.seed=0; 3", "ppo.kl_coef=0.05 methods=dpo,grpo; 0.2")))
    assert [p.name for p in found] == [
        "seed=0,kl_coef=0.05",
        "seed=0,kl_coef=0.2",
        "seed=3,kl_coef=0.05",
        "seed=3,kl_coef=0.2",
    ]
    assert [(p.experiment.ppo.seed, p.experiment.ppo.kl_coef, p.experiment.methods) for p in found] == [
        (0, 0.05, "dpo,grpo"),
        (0, 0.2, ""),
        (3, 0.05, "dpo,grpo"),
        (3, 0.2, ""),
    ]
    assert {p.seed_key for p in found} == {"ppo.seed"}
    assert [p.setting for p in found[:2]] == [{"ppo.kl_coef": "0.05"}, {"ppo.kl_coef": "0.2"}]
    assert all(p.experiment.sweep == () for p in found)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (("ppo.kl_coeff=1; 2",), "ppo.kl_coeff: no such key; the nearest is ppo.kl_coef"),
        (("ppo.epochs=1; 2.5",), "ppo.epochs=2.5: must be as 4 is, of type int"),
        (("ppo.kl_coef",), "'ppo.kl_coef' is no axis"),
        (("ppo.kl_coef=1; ; 2",), "is no axis"),
        (("ppo.kl_coef=1; ppo.lam=2",), "is no axis"),
        (("ppo.kl_coef=1; 1",), "kl_coef=1 twice"),
        (("ppo.kl_coef=0.05; 5e-2",), "kl_coef=5e-2 twice"),
        (("sampling.best_of=2; 512",), "config.sampling.pool=256 must be at least best_of=512"),
        (("ppo.kl_coef=1; -1",), "config.ppo.kl_coef=-1.0: must be from 0"),
        (("seed=0; 1", "ppo.seed=0; 1"), "one axis of seeds"),
        (("files.id_sources=a; b",), "cannot be swept"),
        (("ppo.whiten_rewards=True",), "cannot be swept"),
        (("sweep=1; 2",), "sweep: no such key; the nearest is seed"),
    ],
)
def test_axes_that_mean_nothing_are_refused(axes, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.").replace("'", ".")):
        sweep.points(Experiment(sweep=axes))


EVERY = ["pretrain", "sft", "reward", "ppo"]
SWEPT = {
    "findings": EVERY,
    "sweeps/kl": ["ppo"],
    "sweeps/temperature": [],
    "sweeps/best_of_n": [],
    "sweeps/size": EVERY,
    "tldr_nplus": [],
}


@pytest.mark.parametrize("variant", ["", ":smoke"])
@pytest.mark.parametrize("recipe", SWEPT)
def test_every_sweep_that_ships_trains_what_it_must_and_no_more(recipe, variant, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = sweep.points(resolve(parse(["jaxrlhf", f"--config=configs/{recipe}.py{variant}"], flags.FlagValues())[0]))
    first, *others = [p.experiment for p in found]
    assert [s for s in EVERY if any(bound(e, s) != bound(first, s) for e in others)] == SWEPT[recipe]
    for p in found:  # what could not be would fail after hours
        assert p.experiment.sampling.best_of <= p.experiment.sampling.pool


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ("world.annotator_temperature=2", EVERY),
        ("sft.optim.lr=1e-4", EVERY[1:]),
        ("reward.temperature=0.5", EVERY[2:]),
        ("ppo.clip=0.1", EVERY[3:]),
        ("sampling.batch_size=8", EVERY[2:]),
        ("sampling.samples_per_prompt=3", []),
        ("evaluation.cut_words=4", []),
    ],
)
def test_what_follows_from_a_key_is_not_shared(changed, stages):
    old = Experiment()
    new = sweep.points(Experiment(sweep=(changed,)))[0].experiment
    assert [s for s in EVERY if bound(old, s) != bound(new, s)] == stages
    drawn = [p for p in ("sft", "bon", "ppo") if sampled(old, p) != sampled(new, p)]
    only = {"ppo.clip=0.1": ["ppo"], "evaluation.cut_words=4": []}
    assert drawn == only.get(changed, ["sft", "bon", "ppo"])


def test_a_seed_of_ppo_alone_leaves_the_other_stages():
    plain, other = Experiment(), Experiment(ppo=Ppo(seed=2))
    assert [s for s in ("sft", "reward", "dpo", "ppo") if bound(plain, s) != bound(other, s)] == ["ppo"]
    assert [p for p in ("sft", "bon", "ppo", "dpo") if sampled(plain, p) != sampled(other, p)] == ["ppo"]
