"""Win rates that a judge decides, from the command line and from a recipe's workdir, as results.json and page show."""

import json

import pytest
from judge_server import KEY, serving

from jaxrlhf.config import Evaluation, Experiment, default
from jaxrlhf.evaluation import outputs, report, results
from jaxrlhf.files import UserError, write_records
from jaxrlhf.main import main
from jaxrlhf.recipes import resolve


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


TEXTS = {"sft": ["aa", "b", "cc", "same"], "rlhf": ["aaa", "bbb", "c", "same"], "reference": ["a", "bb", "ccc", "same"]}


def files(tmp_path, join=""):
    for name, texts in TEXTS.items():
        rows = [
            {
                "instruction": f"prompt {i}",
                "output": join.join(t),
                "generator": name,
                "dataset": "near" if i < 2 else "far",
            }
            for i, t in enumerate(texts)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    named = [f"--outputs={n}={tmp_path / n}.json" for n in ("sft", "rlhf")]
    return ["jaxrlhf", "evaluate", *named, f"--reference={tmp_path / 'reference.json'}", f"--workdir={tmp_path / 'w'}"]


def llm(url, *more):
    return ["--judge=openai:m", f"--judge_base_url={url}", "--judge_api_key_env=MY_KEY", *more]


def wins(found):
    return {p: {s: m["win_rate"]["mean"] for s, m in splits.items() if "win_rate" in m} for p, splits in found.items()}


def test_from_the_command_line(tmp_path, capfd):
    argv = files(tmp_path)
    with serving() as (url, seen):
        assert main([*argv, *llm(url)]) == 0
        first = (tmp_path / "w" / "results.json").read_bytes()
        asked = len(seen)
        assert main([*argv, *llm(url)]) == 0
        assert len(seen) == asked == 3 * 3 * 2  # three pairs of policies, three prompts on which they differ, twice
    assert (tmp_path / "w" / "results.json").read_bytes() == first
    found = json.loads(first)
    # sft: won, lost, lost, same; rlhf: won, won, lost, same
    assert wins(found["policies"]) == {
        "sft": {"all": 0.375, "near": 0.5, "far": 0.25},
        "rlhf": {"all": 0.625, "near": 1.0, "far": 0.25},
        "reference": {},
    }
    heads = {(c["a"], c["b"], c["split"]): c["win_rate"]["mean"] for c in found["comparisons"]}
    assert heads == {("rlhf", "sft", s): m for s, m in (("all", 0.625), ("near", 1.0), ("far", 0.25))}
    told = found["judge_report"]
    assert (found["judge"], told["model"], told["n_pairs"], told["n_requests"]) == ("openai:m", "m", 12, 18)
    assert (told["parse_failures"], told["consistency"]["mean"], told["position_bias"]["mean"]) == (0, 1.0, 0.0)
    asked = {"base_url": url, "template": "instructions", "order": "both", "max_requests": 10_000, "concurrency": 8}
    assert found["config"]["judge"] == {"name": "openai:m"} | asked
    assert {"length_controlled", "win_rate_by_length"} <= found["policies"]["sft"]["all"].keys()
    timings = [json.loads(t) for t in (tmp_path / "w" / "judge" / "timings.jsonl").read_text().splitlines()]
    assert [(t["requests_sent"], t["cached"]) for t in timings] == [(18, 0), (0, 18)]
    page = report.write_report(tmp_path / "w").read_text()
    assert "m was asked 18 times about 12 pairs" in page
    assert "length-controlled win rate" in page
    assert KEY not in "".join(capfd.readouterr())
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_model_name_is_only_text_on_the_page(tmp_path):
    with serving() as (url, _):
        assert main([*files(tmp_path), *llm(url), "--judge=openai:<script>alert(1)</script>"]) == 0
    assert "<script>alert" not in report.write_report(tmp_path / "w").read_text()


@pytest.mark.parametrize(
    ("faults", "more", "status", "says"),
    [
        (
            [(401, {}, {"error": {"message": f"bad key {KEY}"}})],
            [],
            2,
            "refuses the key in $MY_KEY (401): bad key [key]",
        ),
        ([], ["--max_requests=7"], 2, "max_requests=7 reached"),
        ([], ["--judge_base_url=nowhere"], 2, "judge_base_url must be"),
        ([], ["--judge_template=nosuch"], 2, "judge_template=nosuch"),
        ([], ["--judge=gpt"], 2, "known are length, openai:MODEL"),
        ([], ["--judge_concurrency=none"], 2, "judge_concurrency"),
        ([(429, {"Retry-After": "9999"}, {})], [], 1, "left alone for 9999 s"),
        (
            [(200, {}, {"choices": [{"message": {"content": "hm"}}]})],
            [],
            1,
            "1 of 18 replies of judge m hold no verdict",
        ),
    ],
)
def test_a_failed_command_is_one_line_and_goes_on_when_run_again(tmp_path, capfd, faults, more, status, says):
    argv = files(tmp_path)
    with serving(faults=faults) as (url, seen):
        assert main([*argv, *llm(url, *more)]) == status
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert says in lines[0]
        assert KEY not in lines[0]
        assert not (tmp_path / "w" / "results.json").exists()
        if "reached" in says:
            assert main([*argv, *llm(url)]) == 0
            assert len(seen) == 18
            assert len({s.text for s in seen}) == 18


def test_the_length_judge_from_the_command_line(tmp_path):
    argv = files(tmp_path, " ")
    assert main([*argv, "--judge=length"]) == 0
    found = json.loads((tmp_path / "w" / "results.json").read_text())
    assert wins(found["policies"])["rlhf"] == {"all": 0.625, "near": 1.0, "far": 0.25}
    assert found["judge"] == "length"
    assert "judge_report" not in found
    assert len(found["comparisons"]) == 3
    assert not (tmp_path / "w" / "judge").exists()


def test_a_judge_and_annotations_are_one_too_many(tmp_path, capsys):
    argv = files(tmp_path)
    assert main([*argv, "--judge=length", f"--annotations=sft={tmp_path / 'v.json'}"]) == 2
    assert "give one of them" in capsys.readouterr().err


def recipe(tmp_path):
    for policy, texts in (("sft", ["x", "x x"]), ("ppo", ["x x x", "x x"])):
        for split, n in (("id", 3), ("ood_b", 2)):
            rows = [
                {"id": f"{split}{i}", "prompt": f"p {i}", "reference": "y y" if i else "", "responses": texts}
                | {"scores": [0.0, 1.0], "gold": [0.0, 1.0]}
                for i in range(n)
            ]
            write_records(tmp_path / "samples" / policy / f"{split}.jsonl", rows)
    (tmp_path / "config.json").write_text('{"name": "x"}')


def test_a_recipe_with_an_llm_judge(tmp_path):
    recipe(tmp_path)
    with serving() as (url, seen):
        c = Evaluation("openai:m", url, judge_template="cnndm", judge_api_key_env="MY_KEY", bootstrap=100)
        found = results.evaluate_samples(tmp_path, Experiment(evaluation=c))
    # the first responses: "x" loses to "y y", "x x x" wins; the first prompt has no reference
    assert wins(found["policies"]) == {"sft": {"id": 0.0, "ood_b": 0.0}, "ppo": {"id": 1.0, "ood_b": 1.0}}
    assert [m["win_rate"]["n"] for m in found["policies"]["sft"].values()] == [2, 1]
    assert found["generalisation_gap"]["ppo"]["ood_b"]["win_rate"]["mean"] == 0.0
    heads = {(h["split"], h["a"], h["b"]): (h["win_rate"]["mean"], h["win_rate"]["n"]) for h in found["comparisons"]}
    assert heads == {("id", "ppo", "sft"): (1.0, 3), ("ood_b", "ppo", "sft"): (1.0, 2)}
    assert "news article" in seen[0].text
    assert {"gold", "score"} <= found["policies"]["ppo"]["id"].keys()


def test_a_recipe_with_the_length_judge_compares_all_responses(tmp_path):
    recipe(tmp_path)
    found = results.evaluate_samples(tmp_path, Experiment(evaluation=Evaluation("length", bootstrap=100)))
    assert wins(found["policies"])["sft"]["id"] == 0.25  # "x" loses, "x x" draws
    assert not any("length_controlled" in c for c in found["comparisons"])
    assert not any("length_controlled" in m for splits in found["policies"].values() for m in splits.values())


def test_config_keys():
    c = default()
    c.evaluation.judge = "openai:gpt"
    c.evaluation.max_requests = 5
    assert resolve(c).evaluation.text_judge.max_requests == 5
    for key, value in (("judge", "opnai:x"), ("judge_order", "first"), ("judge_template", "nosuch")):
        bad = c.copy_and_resolve_references()
        bad.evaluation[key] = value
        with pytest.raises(UserError, match=value):
            resolve(bad)


def test_export_and_back(tmp_path):
    rows = [
        {"id": i, "prompt": f"q{i % 2}", "responses": [f"a{i}", f"b{i} é\u2028"], "scores": [0, 1]} for i in range(3)
    ]
    write_records(tmp_path / "mine.jsonl", rows)
    outputs.export([f"m={tmp_path / 'mine.jsonl'}"], "", tmp_path / "ae", print)
    written = sorted((tmp_path / "ae" / "m").iterdir())
    assert [p.name for p in written] == ["model_outputs.json", "model_outputs_2.json"]
    first = json.loads(written[0].read_text())
    assert first[0] == {"dataset": "", "instruction": "q0", "output": "a0", "generator": "m"}
    assert outputs.read_answers(written, "m", print) == outputs.read_answers([tmp_path / "mine.jsonl"], "m", print)
    for name in ("../m", "a/b", ".."):
        with pytest.raises(UserError, match="a folder is called so"):
            outputs.export([f"{name}={tmp_path / 'mine.jsonl'}"], "", tmp_path / "ae", print)
