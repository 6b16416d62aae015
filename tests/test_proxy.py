"""The judge `reward:DIRECTORY`: from the command line and from a recipe's workdir."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_scoring import WORDS, exported

from jaxrlhf import scoring
from jaxrlhf.config import Evaluation, Experiment, default
from jaxrlhf.data import tokens
from jaxrlhf.evaluation import proxy, report, results
from jaxrlhf.evaluation.judge import Judge
from jaxrlhf.evaluation.proxy import Answer
from jaxrlhf.files import UserError, write_records
from jaxrlhf.main import main
from jaxrlhf.recipes import resolve

PROMPTS = ["red one", "two", "blue . two", "one one"]
TEXTS = {
    "sft": [[" blue .", " red"], [" one", " two two two ."], [" red", " red"], [" one two . red", " blue"]],
    "rlhf": [[" blue . red red", " red"], [" one two", " . ."], [" red", " blue blue"], [" two", " one red one"]],
    "reference": [[" red ."], [" two"], [" red"], [" blue blue one"]],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "x"
    exported(folder, tokenizer=tokens.word_tokenizer([*WORDS, "Question:", "Answer:"]))
    return folder


def one_by_one(directory, answers):
    """Each answer alone, as `scoring` scores it."""
    reward = scoring.load(directory)
    return np.array([scoring.score_texts(reward, [a.prompt], [a.response], [a.finished])[0] for a in answers])


def test_scores_are_those_of_each_answer_alone_whatever_the_order(directory, monkeypatch):
    answers = [
        Answer(p, t, j % 2 == 0) for p, row in zip(PROMPTS, TEXTS["sft"], strict=True) for j, t in enumerate(row)
    ]
    answers += [Answer(PROMPTS[0], " red", True), answers[3], Answer("", "", True)]
    wanted = one_by_one(directory, answers)
    monkeypatch.setattr(proxy, "CHUNK", 3)
    found = proxy.scores(Judge(f"reward:{directory}"), answers)
    assert np.abs(found - wanted).max() < 1e-5
    assert abs(found[1] - found[8]) > 1e-4  # the same text, that did not end by itself
    order = np.random.default_rng(0).permutation(len(answers))
    assert np.array_equal(proxy.scores(Judge(f"reward:{directory}"), [answers[i] for i in order]), found[order])
    assert found[3] == found[9]


def test_each_answer_is_scored_once(directory, monkeypatch):
    seen = []
    score = scoring.score_texts
    monkeypatch.setattr(
        scoring, "score_texts", lambda r, p, q, f: seen.extend(zip(p, q, f, strict=True)) or score(r, p, q, f)
    )
    found = proxy.scores(Judge(f"reward:{directory}"), [Answer("red", " one"), Answer("two", " one")] * 3)
    assert sorted(seen) == [("red", " one", True), ("two", " one", True)]
    assert found.tolist() == found[:2].tolist() * 3


def test_a_prompt_format_is_put_around_instructions(directory):
    judge = Judge(f"reward:{directory}", prompt="Question: {instruction}\nAnswer:")
    wanted = one_by_one(directory, [Answer("Question: red one\nAnswer:", " two")])
    assert np.abs(proxy.scores(judge, [Answer("red one", " two")]) - wanted).max() < 1e-5
    for spec, says in (("tldr", "judge_prompt asks for {subreddit}"), ("nosuch", "judge_prompt='nosuch'")):
        with pytest.raises(UserError, match=says):
            proxy.scores(Judge(f"reward:{directory}", prompt=spec), [Answer("red one", " two")])


def files(tmp_path):
    for name, rows in TEXTS.items():
        held = [
            {"instruction": p, "output": row, "generator": name, "dataset": "near" if i < 3 else "far"}
            for i, (p, row) in enumerate(zip(PROMPTS, rows, strict=True))
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(held))
    named = [f"--outputs={n}={tmp_path / n}.json" for n in ("sft", "rlhf")]
    return ["jaxrlhf", "evaluate", *named, f"--reference={tmp_path / 'reference.json'}", f"--workdir={tmp_path / 'w'}"]


def by_hand(directory):
    """Scores by policy and prompt, and P(a beats b) of each prompt over all pairs."""
    scores = {
        n: [one_by_one(directory, [Answer(p, t) for t in row]) for p, row in zip(PROMPTS, rows, strict=True)]
        for n, rows in TEXTS.items()
    }

    def won(a, b):
        def one(x, y, same):
            return 0.5 if same else float(x > y)

        return [
            np.mean([one(x, y, s == t) for x, s in zip(xs, ss, strict=True) for y, t in zip(ys, ts, strict=True)])
            for xs, ss, ys, ts in zip(scores[a], TEXTS[a], scores[b], TEXTS[b], strict=True)
        ]

    return scores, won


def test_from_the_command_line(tmp_path, directory):
    assert main([*files(tmp_path), f"--judge=reward:{directory}"]) == 0
    found = json.loads((tmp_path / "w" / "results.json").read_text())
    scores, won = by_hand(directory)
    assert found["judge"] == f"reward:{directory}"
    for name in ("sft", "rlhf"):
        m = found["policies"][name]
        for split, part in (("all", slice(0, 4)), ("near", slice(0, 3)), ("far", slice(3, 4))):
            assert m[split]["win_rate"]["mean"] == pytest.approx(np.mean(won(name, "reference")[part]))
            wanted = np.mean([s.mean() for s in scores[name][part]])
            assert m[split]["proxy_score"]["mean"] == pytest.approx(wanted, abs=1e-5)
    assert found["policies"]["reference"]["all"]["proxy_score"]["n"] == 4
    heads = {c["split"]: c for c in found["comparisons"]}
    assert heads["all"]["win_rate"]["mean"] == pytest.approx(np.mean(won("rlhf", "sft")))
    assert {"length_controlled", "win_rate_by_length"} <= heads["near"].keys()
    assert "win_rate_by_length" not in heads["far"]
    page = report.write_report(tmp_path / "w").read_text()
    assert "proxy score" in page
    assert "length-controlled win rate" in page


def test_one_policy_without_a_reference_has_its_scores(tmp_path, directory):
    argv = [a for a in files(tmp_path) if not a.startswith(("--reference", "--outputs=rlhf"))]
    assert main([*argv, f"--judge=reward:{directory}"]) == 0
    found = json.loads((tmp_path / "w" / "results.json").read_text())
    assert found["policies"]["sft"]["all"]["proxy_score"]["n"] == 4
    assert "win_rate" not in found["policies"]["sft"]["all"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such directory"),
        (lambda path: path.mkdir(), "no reward model in it"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text('{"task": "x"}')), "no reward model in it"),
        (
            lambda path: (path.mkdir(), (path / "config.json").write_text('{"model_type": "llama"}')),
            "model.safetensors",
        ),
    ],
)
def test_what_holds_no_reward_model_is_one_line(tmp_path, capsys, make, says):
    argv = files(tmp_path)
    make(tmp_path / "r")
    assert main([*argv, f"--judge=reward:{tmp_path / 'r'}"]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    assert says in err[0]
    assert not (tmp_path / "w").exists()


def test_mistakes_in_flags(tmp_path, capsys):
    argv = files(tmp_path)
    for more, says in (
        (["--judge=reward:"], "known are"),
        (["--judge=length", "--judge_prompt=alpaca"], "judge_prompt"),
    ):
        assert main([*argv, *more]) == 2
        assert says in capsys.readouterr().err
    c = default()
    c.evaluation.judge = f"reward:{tmp_path / 'nowhere'}"
    with pytest.raises(UserError, match="no such directory"):
        resolve(c)


def test_answers_that_have_no_positions(tmp_path):
    exported(tmp_path / "x", "gpt2")
    with pytest.raises(UserError, match="its longest answers: text 1 has 31 tokens; the reward model reads 24"):
        proxy.scores(Judge(f"reward:{tmp_path / 'x'}"), [Answer("red", " one"), Answer("red", " red" * 29)])


def test_a_recipe(tmp_path, directory):
    """Both splits, the gap, head to head; unfinished responses are read as such, prompts without a reference too."""
    for policy in ("sft", "ppo"):
        rows = TEXTS["sft" if policy == "sft" else "rlhf"]
        for split, part in (("id", slice(0, 3)), ("ood_b", slice(2, 4))):
            held = [
                {"id": p, "prompt": p, "reference": TEXTS["reference"][i][0] if i else "", "responses": rows[i]}
                | {"finished": [True, policy == "sft"], "scores": [0.0, 1.0]}
                for i, p in list(enumerate(PROMPTS))[part]
            ]
            write_records(tmp_path / "samples" / policy / f"{split}.jsonl", held)
    (tmp_path / "config.json").write_text('{"name": "x"}')
    c = Experiment(evaluation=Evaluation(f"reward:{directory}", bootstrap=100))
    found = results.evaluate_samples(tmp_path, c)
    asked = [Answer(p, t, j == 0) for p, row in zip(PROMPTS, TEXTS["rlhf"], strict=True) for j, t in enumerate(row)]
    ppo_BN = one_by_one(directory, asked).reshape(4, 2)
    m = found["policies"]["ppo"]
    assert m["id"]["proxy_score"]["mean"] == pytest.approx(ppo_BN[:3].mean(), abs=1e-5)
    gap = found["generalisation_gap"]["ppo"]["ood_b"]["proxy_score"]["mean"]
    assert gap == pytest.approx(ppo_BN[:3].mean() - ppo_BN[2:].mean(), abs=1e-5)
    reference_B = np.array(
        [one_by_one(directory, [Answer(p, t[0])])[0] for p, t in zip(PROMPTS, TEXTS["reference"], strict=True)]
    )
    won_BN = (ppo_BN > reference_B[:, None]) + 0.5 * np.isclose(ppo_BN, reference_B[:, None], atol=1e-6)
    assert m["id"]["win_rate"]["mean"] == pytest.approx(won_BN[1:3].mean())
    assert m["id"]["win_rate"]["n"] == 2
    (head,) = [h for h in found["comparisons"] if h["split"] == "id"]
    assert head["win_rate"]["n"] == 3
    assert "length_controlled" in head
    assert jnp.isfinite(found["differences"][0]["proxy_score"]["mean"])
