"""Workdirs like a recipe's and like those that `jaxrlhf evaluate --outputs` leaves, for the tests of the report."""

import math

from jaxrlhf.evaluation.measures import against_each_other
from jaxrlhf.files import write_json, write_records

SPLITS = ("id", "ood_subreddit", "ood_length", "ood_sentiment", "ood_news")
# Gold reward and per-input EAD by split, as a prototype of the embedded world measured them.
GOLD = {
    "sft": (2.53, 0.50, 1.78, 1.83, -0.99),
    "bon": (3.95, 2.08, 3.45, 3.13, 0.65),
    "ppo": (4.16, 1.81, 3.09, 3.37, 0.13),
}
EAD = {
    "sft": (0.595, 0.651, 0.611, 0.621, 0.685),
    "bon": (0.476, 0.539, 0.489, 0.501, 0.616),
    "ppo": (0.384, 0.486, 0.420, 0.421, 0.547),
}
HALF = {"sft": 0.15, "bon": 0.25, "ppo": 0.15}


def around(mean, half, n=100, **more):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n} | more


def share(x):
    return 1 / (1 + math.exp(-x))


def differences(results):
    """Paired differences of each pair, as wide as both intervals together."""
    policies, gap = results["policies"], results["generalisation_gap"]

    def minus(a, b):
        if "mean" not in a:
            return {k: minus(a[k], b[k]) for k in a if k in b and isinstance(a[k], dict)}
        half = (a["high"] - a["low"] + b["high"] - b["low"]) / 2
        return around(a["mean"] - b["mean"], half, min(a["n"], b["n"]))

    return [
        {"split": s, "a": a, "b": b}
        | minus(policies[a][s], policies[b][s])
        | ({"gap": minus(gap[a][s], gap[b][s])} if s in gap.get(a, {}) else {})
        for a, b in against_each_other(list(policies))
        for s in policies[a]
    ]


def recipe_results():
    policies = {}
    for policy in GOLD:
        policies[policy] = {}
        for i, split in enumerate(SPLITS):
            gold, ead, half = GOLD[policy][i], EAD[policy][i], HALF[policy]
            policies[policy][split] = {
                "n_prompts": 100,
                "samples_per_prompt": 16,
                "win_rate": around(share(gold - 4), 0.4 * share(gold - 4), se=0.0255),
                "score": around(gold / 2 - 1, half / 2),
                "gold": around(gold, half),
                "length": around(18.0 - EAD["sft"][i] * 3 + ead, 0.4),
                "diversity": {
                    "per_input": {
                        "ead": around(ead, 0.011),
                        "distinct": around(ead - 0.05, 0.01),
                        "cosine": around(0.5 + ead / 2, 0.008),
                    },
                    "across_input": {
                        "ead": around(0.9 * ead, 0.02),
                        "distinct": around(0.6 * ead, 0.02),
                        "cosine": around(0.99925 - ead / 1000, 0.00021),
                    },
                },
            }
    gap = {
        p: {
            s: {k: around(m["id"][k]["mean"] - m[s][k]["mean"], 0.2) for k in ("win_rate", "score", "gold")}
            for s in SPLITS[1:]
        }
        for p, m in policies.items()
    }
    heads = [
        {"split": s, "a": a, "b": b, "win_rate": around(share(GOLD[a][i] - GOLD[b][i]), 0.08, se=0.04)}
        for a, b in (("bon", "sft"), ("ppo", "sft"), ("ppo", "bon"))
        for i, s in enumerate(SPLITS)
    ]
    results = {
        "schema": 1,
        "task": "world",
        "judge": "gold",
        "config": recipe_config(),
        "sampling": {"bon": {"best_of": 16, "pool": 64}},
        "policies": policies,
        "generalisation_gap": gap,
        "comparisons": heads,
    }
    return results | {"differences": differences(results)}


def recipe_config():
    def stage(steps, batch, lr):
        return {"batch_size": batch, "loop": {"steps": steps}, "optim": {"lr": lr}}

    return {
        "name": "quickstart",
        "seed": 0,
        "task": "world",
        "model": {"family": "llama", "layers": 6, "width": 64, "heads": 2, "freeze_layers": 0.5},
        "pretrain": stage(1000, 64, 3e-3) | {"init": "world"},
        "sft": stage(300, 32, 1.5e-3),
        "reward": stage(160, 32, 1.5e-3),
        "ppo": stage(40, 128, 1e-3) | {"epochs": 4, "kl_coef": 0.05},
        "sampling": {"samples_per_prompt": 16, "best_of": 16, "pool": 64, "temperature": 1.0},
        "evaluation": {"judge": "gold", "paper_compat": False},
    }


def recipe_workdir(path):
    """A workdir as a whole recipe leaves it: 3 policies, 5 splits, every optional file."""
    write_json(path / "results.json", recipe_results())
    write_json(path / "config.json", recipe_config())
    write_records(
        path / "sft" / "metrics.jsonl",
        (
            {"step": s, "sft/loss": 1 + 1.2 * math.exp(-s / 60) + 0.04 * math.sin(s), "sft/grad_norm": 0.4}
            | ({"sft/validation_loss": 1 + 1.3 * math.exp(-s / 60)} if s % 100 == 0 else {})
            for s in range(20, 301, 20)
        ),
    )
    write_records(
        path / "reward" / "metrics.jsonl",
        (
            {"step": s, "reward/loss": 0.7 - s / 1500, "reward/accuracy": 0.62 + 0.06 * math.sin(s)}
            | (
                {f"reward/accuracy_{split}": 0.6 + s / 2000 - i / 100 for i, split in enumerate(SPLITS)}
                if s % 80 == 0
                else {}
            )
            for s in range(10, 161, 10)
        ),
    )
    write_records(
        path / "ppo" / "metrics.jsonl",
        (
            {
                "step": s,
                "ppo/score": 1.2 * (1 - math.exp(-s / 12)),
                "ppo/gold": 2.5 * (1 - math.exp(-s / 10)),
                "ppo/kl": 5.7 * (1 - math.exp(-s / 15)),
                "ppo/length": 18.4 - s / 13,
                "ppo/rollout_entropy": 1.28 - s / 60,
                "ppo/entropy": 1.25 - s / 60,
                "ppo/finished": min(1.0, 0.84 + s / 100),
            }
            for s in range(1, 41)
        ),
    )
    accuracy = {s: around(0.70 - i / 60, 0.065, 200) for i, s in enumerate(SPLITS)}
    gold = {s: around(0.74 - i / 60, 0.064, 190) for i, s in enumerate(SPLITS)}
    counts = {"truncated": {"train": 3, "id": 0}, "join_mismatch": {"train": 1234, "id": 0}}
    summary = {"accuracy": accuracy, "gold_accuracy": gold, **counts}
    write_json(path / "reward" / "summary.json", summary)
    write_samples(path)
    return path


def write_samples(path):
    words = {
        "sft": "in the garden , my neighbor cleaned something .",
        "bon": "in the yard , my neighbor polished the mirror .",
        "ppo": "my neighbor polished the mirror in the yard and i feel relieved . should i talk ?",
    }
    for policy, text in words.items():
        for split in SPLITS:
            rows = [
                {
                    "id": f"{split}-{i}",
                    "prompt": f"SUBREDDIT: r/relationships\nTITLE: help with my neighbor {split} {i}\nPOST: in the "
                    "garden , my neighbor cleaned my mirror . i feel relieved . is it time to speak ?\nTL;DR:",
                    "reference": " is it time to talk ? in the yard , my neighbor polished the mirror .",
                    "responses": [f" {text} {j}" for j in range(4)],
                    "scores": [0.11 + j for j in range(4)],
                    "gold": [3.0 - j for j in range(4)],
                    "finished": [j != 1 for j in range(4)],
                }
                for i in range(5)
            ]
            write_records(path / "samples" / policy / f"{split}.jsonl", rows)


def outputs_workdir(path):
    """A workdir as `jaxrlhf evaluate --outputs` leaves it: results.json alone, with names that are the user's."""
    write_json(
        path / "results.json", outputs_results(("alpaca-7b", "ppo-human", "reference"), ("all", "koala", "vicuna"))
    )
    return path


def outputs_results(names, splits):
    policies = {}
    for p, name in enumerate(names):
        policies[name] = {}
        for i, split in enumerate(splits):
            ead = around(1.19 - 0.3 * (i > 0) + p / 5, 0.04, 805)
            diversity = {"across_input": {"ead": ead, "distinct": around(0.68 - p / 30, 0.013, 805)}}
            policies[name][split] = {"n_prompts": 805, "samples_per_prompt": 1, "length": around(66.0 + 30 * p, 3.5)}
            policies[name][split] |= {"diversity": diversity}
            if p < 2:
                policies[name][split]["win_rate"] = around(0.26 + p / 7, 0.03 + i / 20, 805, se=0.0154)
    config = {
        "outputs": [f"{n}=outputs.json" for n in names],
        "reference": "r.json",
        "annotations": [],
        "paper_compat": False,
    }
    results = {
        "schema": 1,
        "task": "outputs",
        "config": config,
        "policies": policies,
        "generalisation_gap": {},
        "comparisons": [],
    }
    return results | {"differences": differences(results)}


def estimates(tree):
    """Every estimate in a tree of results."""
    if isinstance(tree, dict) and "mean" in tree:
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from estimates(value)
