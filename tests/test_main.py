"""The command line as a user meets it: exit status, one line, nothing half-written."""

import json

import pytest
from encoder_directories import TINY

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
        (["export", "--workdir=x", "--policy=dpo", "--to=y"], "known are sft, reward, ppo"),
        (["export", "--workdir=x", "--policy=sft", "--to=setup.py"], "a file stands there"),
        (["export", "--workdir=x", "--policy=sft", "--to=tests"], "holds what no export wrote"),
        (["export", "--workdir=x", "--policy=sft", "--to=y"], "config.json: no such file"),
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
