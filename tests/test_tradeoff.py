"""Best-of-N's KL, what is said at equal KL, and the paper's findings over seeds."""

import itertools
import math

import numpy as np
import pytest
from report_workdirs import SPLITS, around, recipe_results

from jaxrlhf.evaluation import captions, claims, tradeoff
from jaxrlhf.evaluation.measures import KL, Measured
from jaxrlhf.evaluation.report import read_results, write_report
from jaxrlhf.files import write_json, write_records
from jaxrlhf.policies import best_of_n_kl

EAD = ("diversity", "per_input", "ead")


def test_the_closed_form_of_best_of_n():
    assert tradeoff.best_of_n_bound(1) == 0.0
    assert tradeoff.best_of_n_bound(4) == pytest.approx(0.6362943611)  # ln 4 - 3/4
    assert tradeoff.best_of_n_bound(16) == pytest.approx(1.8350887222)


def test_kl_of_best_of_n_equals_enumeration_with_ties():
    """Two outcomes of probability 1/4 and 3/4, and three of unequal ones, by listing every draw."""
    for score_M in ([0.5, 2.0, 2.0, 2.0], [-1.5, -1.5, 0.25, 7.0, 7.0, 7.0], [3.0, 1.0, 2.0, 0.5, -4.0]):
        outcomes = sorted(set(score_M))
        for n in (1, 2, 3):
            best = [max(draw) for draw in itertools.product(score_M, repeat=n)]
            q = [best.count(o) / len(best) for o in outcomes]
            p = [score_M.count(o) / len(score_M) for o in outcomes]
            exact = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
            assert best_of_n_kl(np.array([score_M]), n)[0] == pytest.approx(exact, abs=1e-12)


def test_kl_of_best_of_n_from_a_pool_is_hardly_biased():
    p_M = 1 / np.arange(1, 51)
    p_M /= p_M.sum()
    rng, n = np.random.default_rng(0), 16
    rank_M = rng.permutation(50)  # how good an outcome is has nothing to do with how likely
    F = p_M[np.argsort(rank_M)].cumsum()
    q = np.diff(F**n, prepend=0.0)
    exact = float(np.sum(q * np.log(np.maximum(q, 1e-300) / p_M[np.argsort(rank_M)])))
    kl_B = best_of_n_kl(rank_M[rng.choice(50, (400, 96), p=p_M)].astype(float), n)
    assert -0.02 < kl_B.mean() - exact < 0.0


def test_kl_of_best_of_n_nears_its_closed_form_from_below():
    score_BM = np.random.default_rng(0).normal(size=(2, 20_000))
    for n in (2, 6, 16):
        kl_B = best_of_n_kl(score_BM, n)
        assert np.all(kl_B < tradeoff.best_of_n_bound(n))
        assert kl_B == pytest.approx(tradeoff.best_of_n_bound(n), abs=2e-3)
    assert best_of_n_kl(np.full((1, 8), -0.5), 4)[0] == 0.0  # one response alone: nothing to choose


def measured(kl, gold):
    m = Measured(["a", "b", "c"])
    m.add_mean(KL, m.prompts, [kl - 0.25, kl, kl + 0.25])
    m.add_mean(("gold",), m.prompts, gold)
    return m


def test_at_equal_kl_by_hand():
    curve = [measured(3.0, [2.0, 0.0, -1.0]), measured(0.5, [1.0, 1.0, 1.0]), measured(1.5, [1.5, -0.5, 0.0])]
    found = tradeoff.at_equal_kl(curve, measured(0.75, [1.0, 0.0, 2.0]))
    assert found is not None
    # three quarters of [1, 1, 1] and a quarter of [1.5, -0.5, 0], less best-of-N's; all KLs vary alike and cancel
    assert found["gold",] == pytest.approx([1.125 - 1.0, 0.625 - 0.0, 0.75 - 2.0])
    exact = tradeoff.at_equal_kl(curve, measured(1.5, [0.0, 0.0, 0.0]))
    assert exact is not None
    assert exact["gold",] == pytest.approx([1.5, -0.5, 0.0])


def test_at_equal_kl_each_prompt_counts_in_the_weights_too():
    """What a prompt adds, beside the change of the plain mean of all three when it weighs a little more."""
    rng = np.random.default_rng(4)
    kl_PB, gold_PB = rng.normal([[0.5], [1.6], [1.0]], 0.2, (3, 9)), rng.normal(size=(3, 9))

    def of(kl_B, gold_B):
        m = Measured(list(range(9)))
        m.add_mean(KL, m.prompts, kl_B)
        m.add_mean(("gold",), m.prompts, gold_B)
        return m

    def at(weight_B):
        (a, b, t), (y_a, y_b, y_t) = kl_PB @ weight_B, gold_PB @ weight_B
        return y_a + (y_b - y_a) * (t - a) / (b - a) - y_t

    found = tradeoff.at_equal_kl([of(kl_PB[0], gold_PB[0]), of(kl_PB[1], gold_PB[1])], of(kl_PB[2], gold_PB[2]))
    assert found is not None
    even_B, small = np.full(9, 1 / 9), 1e-6
    assert found["gold",].mean() == pytest.approx(at(even_B))
    for b in range(9):
        more_B = (1 - small) * even_B + small * (np.arange(9) == b)
        assert found["gold",][b] == pytest.approx(at(even_B) + (at(more_B) - at(even_B)) / small, abs=1e-4)


def test_nothing_is_said_beyond_the_ends_of_a_curve_or_without_a_kl():
    curve = [measured(0.5, [1.0, 1.0, 1.0]), measured(1.5, [1.5, -0.5, 0.0])]
    assert tradeoff.at_equal_kl(curve, measured(0.4, [0.0, 0.0, 0.0])) is None
    assert tradeoff.at_equal_kl(curve, measured(1.6, [0.0, 0.0, 0.0])) is None
    bare = Measured(["a", "b", "c"])
    assert tradeoff.at_equal_kl(curve, bare) is None


def e(mean):
    return {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 9}


def point(coef, win, per, across):
    """Policies' numbers on `id` and on two splits out of distribution: a triple each, in that order."""
    policies = {
        p: {
            s: {
                "win_rate": e(win[p][i]),
                "diversity": {"per_input": {"ead": e(per[p][i])}, "across_input": {"ead": e(across[p][i])}},
            }
            for i, s in enumerate(("id", "ood_a", "ood_b"))
        }
        for p in win
    }
    return {"ppo.kl_coef": coef}, {"policies": policies}


def seed(shift):
    win = {"sft": (0.4, 0.3, 0.2), "bon": (0.5, 0.4, 0.3), "ppo": (0.5 + shift, 0.5, 0.2 + shift)}
    per = {"sft": (0.6, 0.6, 0.6), "bon": (0.5, 0.5, 0.8), "ppo": (0.3, 0.3 + shift, 0.3)}
    across = {"sft": (0.5, 0.5, 0.5), "bon": (0.5, 0.5, 0.5), "ppo": (0.4, 0.5, 0.3)}
    held = per | {"ppo": (0.5, 0.5, 0.5 + shift)}
    return [point("0.05", win, per, across), point("0.8", win, held, across)]


def test_findings_by_hand():
    found = claims.judged([seed(0.0), seed(0.03), seed(-0.03)], {"ppo.kl_coef": "0.05"})
    better, farther, per, across, above_all, keeps, bought = (c["measured"] for c in found)
    win = "win rate against the reference"
    assert better[win]["mean"] == pytest.approx((0.2 + 0.0) / 2)
    assert farther[win]["mean"] == pytest.approx(0.1 - 0.1)
    assert per["per-input EAD"]["mean"] == pytest.approx(-0.3)
    assert across["across-input EAD"]["mean"] == pytest.approx(-0.1)
    assert above_all["per-input EAD"]["mean"] == pytest.approx(math.log(0.5) - math.log(0.8), abs=1e-3)
    assert keeps["per-input EAD"]["mean"] == pytest.approx(0.3)
    assert bought["per-input EAD"]["mean"] == pytest.approx(0.2 - 0.15)
    # Student's interval over three seeds of the first: 0.1 and 0.1 +- 0.015
    half = 4.302652729911275 * 0.015 / math.sqrt(3)
    assert better[win]["low"] == pytest.approx(0.1 - half)
    assert better[win]["n"] == 3
    verdicts = " ".join(c["verdict"] for c in found)
    assert verdicts == "confirmed undecided confirmed confirmed confirmed confirmed contradicted"


def test_findings_need_two_seeds_and_what_they_measure():
    assert claims.judged([seed(0.0)], {"ppo.kl_coef": "0.05"}) == []
    found = claims.judged([seed(0.0)[:1], seed(0.1)[:1]], {"ppo.kl_coef": "0.05"})
    assert "KL coefficient" not in found[-1]["claim"]
    assert len(found) == len(claims.CLAIMS) - 1
    lost = [seed(0.0), seed(0.1), seed(0.2)[1:]]  # the last seed's base failed
    assert claims.judged(lost, {"ppo.kl_coef": "0.05"})[0]["measured"]["win rate against the reference"]["n"] == 2


def test_what_a_seed_leaves_as_it_is_keeps_its_interval_over_prompts(tmp_path):
    ran = []
    for s in (0, 4):
        folder = tmp_path / "points" / f"seed={s}"
        results = recipe_results() | {"config": {"seed": 0, "ppo": {"seed": s}}}
        results["policies"]["ppo"]["id"]["gold"] = around(4.0 + s / 4, 0.15)
        for policy in ("sft", "bon"):
            (tmp_path / policy).mkdir(exist_ok=True)
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            (folder / "samples" / policy).symlink_to(tmp_path / policy)
        (folder / "samples" / "ppo").mkdir()
        write_json(folder / "results.json", results)
        ran.append(tradeoff.Ran(folder.name, {}, "ppo.seed", folder))
    found = tradeoff.write(ran, [{}, {}], {}, tmp_path)
    assert found["seeds"] == [0, 4]
    one = recipe_results()
    for policy in ("sft", "bon"):
        assert found["policies"][policy] == one["policies"][policy]
        assert found["generalisation_gap"][policy] == one["generalisation_gap"][policy]
    gold = found["policies"]["ppo"]["id"]["gold"]
    assert (gold["mean"], gold["n"]) == (4.5, 2)
    n = {(d["a"], d["b"]): d["gold"]["n"] for d in found["differences"] if d["split"] == "id"}
    assert n == {("bon", "sft"): 100, ("ppo", "sft"): 2, ("ppo", "bon"): 2}
    assert [p["runs"] for p in found["tradeoff"]["points"]] == [1, 1, 2]
    assert "claims" not in found  # PPO's seeds alone decide nothing about SFT


def drawn(folder, kl_B, gold_B):
    """A policy's samples of every split."""
    for split in SPLITS:
        rows = [
            {"id": str(i), "prompt": "p", "responses": ["a b", "c"], "scores": [g, g], "gold": [g, g], "kl": kl}
            for i, (kl, g) in enumerate(zip(kl_B, gold_B, strict=True))
        ]
        write_records(folder / f"{split}.jsonl", rows)
    return folder


def swept_twice(path, key, second_sft):
    """A sweep of two values: PPO's at a KL of 1 and 3, best-of-N's at 1.5."""
    ran = []
    for name, sft, kl_B, gold_B in (("2", "sft", [0.75, 1.25], [1.0, 2.0]), ("5", second_sft, [2.5, 3.5], [5.0, -2.0])):
        folder = path / "points" / name
        (folder / "samples").mkdir(parents=True)
        for policy, target in (("sft", path / sft), ("bon", path / "bon")):
            (folder / "samples" / policy).symlink_to(drawn(target, [1.5, 1.5], [0.5, -0.25]))
        drawn(folder / "samples" / "ppo", kl_B, gold_B)
        write_json(folder / "results.json", recipe_results())
        ran.append(tradeoff.Ran(name, {key: name}, "", folder))
    return tradeoff.write(ran, [r.setting for r in ran], {}, path)["tradeoff"]["equal_kl"]


def test_equal_kl_is_said_of_points_that_share_one_sft_alone(tmp_path):
    told = swept_twice(tmp_path / "kl", claims.KL_COEF, "sft")
    assert list(told) == list(SPLITS)
    # three quarters of 1.5 and a quarter of 1.5, less 0.125
    assert told["ood_news"]["gold"]["mean"] == pytest.approx(1.375)
    assert told["ood_news"]["gold"]["n"] == 2
    assert swept_twice(tmp_path / "t", "sampling.temperature", "another") == {}


def test_the_base_is_the_first_that_was_swept_also_where_its_first_seed_failed(tmp_path):
    ran, results = [], recipe_results()
    for section in ("policies", "generalisation_gap"):
        del results[section]["bon"]
    results["differences"] = [d for d in results["differences"] if "bon" not in (d["a"], d["b"])]
    for s, coef in ((0, "0.8"), (1, "0.05"), (1, "0.8"), (2, "0.05"), (2, "0.8")):
        folder = tmp_path / "points" / f"seed={s},kl_coef={coef}"
        results["policies"]["ppo"]["id"]["gold"] = around(3.0 + s / 2 + float(coef), 0.15)
        write_json(folder / "results.json", results | {"config": {"seed": s, "ppo": {"kl_coef": float(coef)}}})
        ran.append(tradeoff.Ran(folder.name, {claims.KL_COEF: coef}, "seed", folder))
    swept = [{claims.KL_COEF: coef} for _ in range(3) for coef in ("0.05", "0.8")]
    found = tradeoff.write(ran, swept, {"seed=0,kl_coef=0.05": "no"}, tmp_path)
    assert found["tradeoff"]["base"] == {claims.KL_COEF: "0.05"}
    assert found["seeds"] == [1, 2]
    assert found["policies"]["ppo"]["id"]["gold"]["mean"] == pytest.approx(3.75 + 0.05)
    assert {c["measured"]["gold reward"]["n"] for c in found["claims"] if "gold reward" in c["measured"]} == {2}
    by_coef = {p["setting"][claims.KL_COEF]: p["runs"] for p in found["tradeoff"]["points"] if p["policy"] == "ppo"}
    assert by_coef == {"0.05": 2, "0.8": 3}
    alone = tradeoff.write(ran[:1], swept, {"all others": "no"}, tmp_path)
    assert alone["tradeoff"]["base"] == {claims.KL_COEF: "0.8"}
    assert "claims" not in alone


def test_the_report_of_a_sweep_shows_failures_curves_and_findings(tmp_path):
    setting, base = seed(0.0)[0]
    ran = {k: {s: m | {"kl": e(2.0)} for s, m in v.items()} if k != "sft" else v for k, v in base["policies"].items()}
    points = [{"policy": p, "setting": setting, "runs": 2, "splits": ran[p]} for p in ran]
    points[1]["kl_bound"] = 1.25
    points.append({"policy": "ppo", "setting": {"ppo.kl_coef": "0.8"}, "runs": 2, "splits": ran["ppo"]})
    told = {
        "axes": {"ppo.kl_coef": ["0.05", "0.8"]},
        "base": setting,
        "points": points,
        "equal_kl": {"id": {"gold": e(0.5)}, "ood_a": {"gold": e(-2.5)}, "ood_b": {"outside": 1, "runs": 2}},
        "failed": {"seed=7,kl_coef=0.05": "ppo: <b>not</b> finite"},
    }
    found = claims.judged([seed(0.0), seed(0.03)], setting)
    write_json(tmp_path / "results.json", {"policies": ran, "tradeoff": told, "claims": found})
    page = write_report(tmp_path).read_text()
    assert "seed=7,kl_coef=0.05: ppo: &lt;b&gt;not&lt;/b&gt; finite" in page
    for c in found:
        assert c["verdict"] in ("confirmed", "contradicted", "undecided")
        assert f"<td>{c['verdict']}</td>" in page
    assert {p.stem for p in (tmp_path / "report" / "figures").glob("curve_kl_0_*")} == {
        "curve_kl_0_win_rate",
        "curve_kl_0_diversity",
    }
    said = captions.equal_kl(read_results(tmp_path))
    assert [line.rpartition(": ")[2] for line in said[:2]] == ["neither is ahead.", "best-of-N is ahead."]
    assert "do not lie on both sides of best-of-N's KL in 1 of 2 runs" in said[2]
