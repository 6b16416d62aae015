"""The command line as a user meets it: exit status, one line, nothing half-written."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from encoder_directories import TINY

from jaxrlhf import checks
from jaxrlhf.config import Dpo, Experiment, Optim, Sampling, Sft
from jaxrlhf.files import Stopped, UserError, read_records, write_records
from jaxrlhf.main import main

RECIPE = "--config=configs/quickstart.py:smoke"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def refused(capsys, *argv: str) -> str:
    """The one line of an exit with status 2."""
    assert main(["jaxrlhf", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def test_help(capsys):
    assert main(["jaxrlhf"]) == 0
    assert "jaxrlhf run --config=configs/quickstart.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "'trian' is no command"),
        (["run", "--workdir=x"], "--config=RECIPE is missing"),
        (["run", "--config=configs/nosuch.py", "--workdir=x"], "no such file configs/nosuch.py"),
        (["run", RECIPE], "--workdir=FOLDER is missing"),
        (["run", "--config=configs/quickstart.py:smok", "--workdir=x"], "known is smoke"),
        (["run", RECIPE, "--config.ppo.kl_cof=1", "--workdir=x"], "nearest is config.ppo.kl_coef"),
        (["run", RECIPE, "--config.pppo.kl_coef=1", "--workdir=x"], "nearest is config.ppo.kl_coef"),
        (["run", RECIPE, "--config.ppo.epochs=many", "--workdir=x"], "ppo.epochs"),
        (["run", RECIPE, "--config.ppo.epochs=0", "--workdir=x"], "config.ppo.epochs=0: must be at least 1"),
        (["run", RECIPE, "--config.model.freeze_layers=1.5", "--workdir=x"], "config.model.freeze_layers=1.5"),
        (["run", RECIPE, "--config.task=wrld", "--workdir=x"], "known are world, files"),
        (["run", RECIPE, "--wrkdir=x"], "wrkdir"),
        (["run", RECIPE, "--workdir=setup.py"], "a file stands there"),
        (["evaluate", "--workdir=x"], "--outputs NAME=FILE"),
        (["evaluate", "--outputs", "a=nosuch.json", "--workdir=x"], "nosuch.json: no such file"),
        (["evaluate", "--outputs", "a=b.json", "--cut_words=-1", "--workdir=x"], "cut_words"),
        (["run", RECIPE, "--config.evaluation.cut_words=-1", "--workdir=x"], "config.evaluation.cut_words=-1"),
        (["report", "--workdir=nosuch"], "results.json"),
        (["export", "--workdir=x"], "--policy is missing"),
        (["export", "--workdir=x", "--policy=sft"], "--to is missing"),
        (["export", "--workdir=x", "--policy=kto", "--to=y"], "known are sft, ppo, dpo, rloo, grpo, reward"),
        (["rloo", RECIPE, "--config.methods=dpo,grpo", "--workdir=x"], "does not name rloo"),
        (["export", "--workdir=x", "--policy=sft", "--to=setup.py"], "a file stands there"),
        (["export", "--workdir=x", "--policy=sft", "--to=tests"], "holds what no export wrote"),
        (["export", "--workdir=x", "--policy=sft", "--to=y"], "no run was begun there"),
        (["import", "--workdir=x"], "--from=DIR is missing"),
        (["import", "--from=tests", "--workdir=x"], "config.json: no such file"),
        (["import", "--from=tests/golden/hf/opt", "--workdir=x"], "no tokenizer in it"),
    ],
)
def test_mistakes_get_one_line(capsys, tmp_path, argv, says):
    argv = [a.replace("--workdir=x", f"--workdir={tmp_path / 'x'}") for a in argv]
    assert says in refused(capsys, *argv)
    assert not (tmp_path / "x").exists()


def test_evaluate_takes_models_and_a_cut(capsys, tmp_path):
    rows = [{"instruction": f"q{i}", "output": [f"a cat {i} sat here", "a dog"]} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    argv = ["evaluate", f"--outputs=m={tmp_path}/a.json", f"--workdir={tmp_path}/out", "--cut_words=3"]
    argv += [f"--sentence_encoder={TINY / 'bert_sentence'}", f"--nli_model={TINY / 'bert_classifier'}"]
    assert main(["jaxrlhf", *argv]) == 0
    assert "per-input EAD" in capsys.readouterr().out
    m = json.loads((tmp_path / "out" / "results.json").read_text())["policies"]["m"]["all"]
    assert m["cut"] == {"words": 3, "reached": 0.5}
    assert {"sbert", "vendi", "nli", "clusters"} <= m["diversity"]["per_input"].keys()


def test_a_workdir_of_another_config_is_refused_and_untouched(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 5}')
    assert "another config" in refused(capsys, "run", RECIPE, f"--workdir={tmp_path}")
    assert (tmp_path / "config.json").read_text() == '{"seed": 5}'


def test_a_mesh_that_does_not_fit(capsys, tmp_path):
    line = refused(capsys, "sft", RECIPE, f"--workdir={tmp_path / 'x'}", "--config.mesh.fsdp=64")
    assert "config.mesh" in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("world.evaluation_prompts=0", "config.world.evaluation_prompts=0: must be at least 1"),
        ("ppo.optim.lr=-1.0", "config.ppo.optim.lr=-1.0: must be from 0"),
        ("ppo.optim.lr=nan", "config.ppo.optim.lr=nan: must be from 0"),
        ("seed=-1", "config.seed=-1: must be from 0"),
        ("sampling.top_p=2.0", "config.sampling.top_p=2.0: must be from"),
        ("model.heads=0", "config.model.heads=0: must be at least 1"),
        ("methods=dpo,kto", "config.methods='kto': known are dpo, rloo, grpo"),
        ("dpo.loss=hinge", "config.dpo.loss='hinge': known are sigmoid, ipo"),
        ("dpo.beta=0.0", "config.dpo.beta=0.0: must be from"),
        ("rloo.samples=1", "config.rloo.samples=1: must be at least 2"),
        ("grpo.kl_coef=-0.5", "config.grpo.kl_coef=-0.5: must be from 0"),
        ("ppo.forward_kl_coef=-0.5", "config.ppo.forward_kl_coef=-0.5: must be from 0"),
        ("reward.ensemble=0", "config.reward.ensemble=0: must be at least 1"),
        ("ppo.kl_estimator=k9", "config.ppo.kl_estimator='k9': known are k1, k2, k3"),
        ("ppo.value_init=foo", "config.ppo.value_init='foo': known are zero, normal, reward"),
        ("reward.optim.schedule=linaer", "config.reward.optim.schedule='linaer': known are constant, linear, cosine"),
        ("rloo.temperature=0.0", "config.rloo.temperature=0.0: must be from 1e-06"),
        ("ppo.minibatches=3", "does not divide into config.ppo.minibatches=3"),
        ("ppo.optim.accumulate=7", "config.ppo.optim.accumulate=7: a minibatch's"),
        ("sampling.best_of=1000", "must be at least best_of=1000"),
        ("pretrain.optim.warmup=-5", "config.pretrain.optim.warmup=-5: must be at least 0"),
        ("sft.optim.b1=1.5", "config.sft.optim.b1=1.5: must be from 0 to 1"),
        ("ppo.entropy_coef=nan", "config.ppo.entropy_coef=nan: must be from -1e+06"),
        ("sampling.top_k=-2", "config.sampling.top_k=-2: must be at least 0"),
        ("datasets.evaluation_prompts=-5", "config.datasets.evaluation_prompts=-5: must be at least 0"),
        ("datasets.vocab_size=-1", "config.datasets.vocab_size=-1: must be at least 256"),
        ("reward.combine=median", "config.reward.combine='median': known are mean, worst, uncertainty"),
    ],
)
def test_impossible_values_are_refused_before_the_workdir_is_claimed(capsys, tmp_path, override, says):
    assert says in refused(capsys, "report", RECIPE, f"--workdir={tmp_path / 'x'}", f"--config.{override}")
    assert not (tmp_path / "x").exists()


def test_a_mistake_that_a_stage_finds_leaves_the_workdir_to_the_corrected_config(capsys, tmp_path):
    argv = ["sft", RECIPE, f"--workdir={tmp_path / 'x'}"]
    assert "config.model" in refused(capsys, *argv, "--config.model.heads=3", "--config.pretrain.init=scratch")
    assert not (tmp_path / "x" / "config.json").exists()


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (["pretrain", "sft"], "config.sft.batch_size=6 does not divide over data x fsdp = 4 devices; 4 or 8 would"),
        (["dpo"], "config.dpo.batch_size=16 does not divide over data x fsdp = 4 devices x optim.accumulate = 3"),
        (["ppo", "sample"], "config.sampling.batch_size=2 does not divide"),
    ],
)
def test_batches_that_do_not_divide_are_refused_before_the_first_stage(stages, says):
    e = Experiment(
        sft=Sft(batch_size=6),
        dpo=Dpo(batch_size=16, optim=Optim(accumulate=3)),
        sampling=Sampling(batch_size=2),
    )
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 1})
    checks.divides(e, ["pretrain", "ppo", "evaluate"], mesh)
    with pytest.raises(UserError, match=re.escape(says)):
        checks.divides(e, stages, mesh)


@pytest.mark.parametrize(
    ("text", "says"),
    [("def (", "SyntaxError"), ("def get_config():\n    return 3\n", "ConfigDict"), ("x = 1\n", "get_config")],
)
def test_recipes_that_do_not_run(capsys, tmp_path, text, says):
    (tmp_path / "r.py").write_text(text)
    assert says in refused(capsys, "run", f"--config={tmp_path / 'r.py'}", f"--workdir={tmp_path / 'x'}")


def test_a_stray_argument_is_refused(capsys, tmp_path):
    assert "'sft': not a flag" in refused(capsys, "run", RECIPE, "sft", f"--workdir={tmp_path / 'x'}")


def test_a_lone_surrogate_goes_out_as_it_came_in(tmp_path):
    write_records(tmp_path / "r.jsonl", [{"a": "\ud800 x\\"}])
    assert read_records(tmp_path / "r.jsonl") == [{"a": "\ud800 x\\"}]


def test_a_launcher_can_tell_a_stop_from_the_end(monkeypatch, capsys):
    def stops(_):
        raise Stopped("stopped at step 3 of 9; the same command goes on")

    monkeypatch.setattr("jaxrlhf.main._dispatch", stops)
    monkeypatch.delenv("JAXRLHF_RESTARTS", raising=False)
    assert main(["jaxrlhf", "run"]) == 0
    monkeypatch.setenv("JAXRLHF_RESTARTS", "1")
    assert main(["jaxrlhf", "run"]) == 75
    assert capsys.readouterr().err == "stopped at step 3 of 9; the same command goes on\n" * 2


def test_a_reader_that_leaves_early_takes_nothing(tmp_path):
    """More than a pipe holds goes to a reader that closes it at once."""
    rows = [{"instruction": f"q{i}", "output": "a cat", "dataset": f"{'d' * 200}{i}"} for i in range(400)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    program = "import sys; from jaxrlhf.main import console; console()"
    argv = ["evaluate", f"--outputs=m={tmp_path}/a.json", f"--workdir={tmp_path}/out"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert "results.json written" in err


def test_an_oddity_is_told_once_though_the_files_are_exported_too(tmp_path, capfd):
    (tmp_path / "a.json").write_text(
        json.dumps([{"instruction": "q", "output": ""}, {"instruction": "r", "output": "x"}])
    )
    argv = [f"--outputs=m={tmp_path}/a.json", f"--workdir={tmp_path}/out", f"--export_alpaca_eval={tmp_path}/ae"]
    assert main(["jaxrlhf", "evaluate", *argv]) == 0
    assert capfd.readouterr().err.count("1 of 2 answers are empty") == 1


@pytest.mark.parametrize(("name", "text"), [("a.json", '[{"a": 1}]'), ("a.jsonl", '{"a": 1}\n')])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_records(tmp_path / name) == [{"a": 1}]
