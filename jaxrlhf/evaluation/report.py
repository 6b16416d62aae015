"""The report: one self-contained page of a workdir, with no remote asset, and its tables as files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.evaluation import captions, claims, explorer, figures, findings, page, pictures, samples, sentences, tables
from jaxrlhf.evaluation.figures import Estimate
from jaxrlhf.evaluation.findings import Found
from jaxrlhf.evaluation.judge import by_length
from jaxrlhf.evaluation.measures import ALL
from jaxrlhf.files import UserError, read_json, read_records, write_text
from jaxrlhf.names import CLIMBERS, METHODS, POLICIES, TITLES, TRAINED

# Parts of a number that has its own place on the page.
PARTS = ("win_rate_by_length",)
CUTS = ("truncated", "overlong", "join_mismatch")  # of prompts, responses, and both
TASKS = {
    "world": "the embedded world: generated forum posts to summarise",
    "files": "texts from files",
    "datasets": "public or own datasets",
}
JUDGES = {
    "gold": "the gold judge, which knows the truth",
    "reward": "the reward model trained here; its verdicts flatter policies that were trained against it, PPO first",
    "length": "length: the longer response wins, a baseline for other judges",
    "annotations": "the annotations given",
}
# What was run, as far as the config says it.
FACTS = (
    ("model", "{model.family} family, {model.layers} layers of width {model.width}, {model.heads} heads"),
    ("frozen", "a share of {model.freeze_layers} of the layers, from the bottom, with embeddings and output head"),
    ("SFT", "{sft.loop.steps} steps of {sft.batch_size} demonstrations, learning rate {sft.optim.lr}"),
    ("reward model", "{reward.loop.steps} steps of {reward.batch_size} pairs, learning rate {reward.optim.lr}"),
    (
        "PPO",
        "{ppo.loop.steps} steps of {ppo.batch_size} prompts, {ppo.epochs} epochs each, learning rate {ppo.optim.lr}, "
        "KL coefficient {ppo.kl_coef}",
    ),
    (
        "DPO",
        "{dpo.loop.steps} steps of {dpo.batch_size} pairs, loss {dpo.loss}, beta {dpo.beta}, "
        "learning rate {dpo.optim.lr}",
    ),
    *(
        (
            TITLES[m],
            f"{{{m}.loop.steps}} steps of {{{m}.batch_size}} prompts, {{{m}.samples}} responses to each, learning rate "
            f"{{{m}.optim.lr}}, KL coefficient {{{m}.kl_coef}}",
        )
        for m in ("rloo", "grpo")
    ),
    ("sampling", "{sampling.samples_per_prompt} responses a prompt at temperature {sampling.temperature}"),
    ("seed", "{seed}"),
    ("outputs", "{outputs}"),
    ("reference", "{reference}"),
    ("annotations", "{annotations}"),
    ("sentence encoder", "{sentence_encoder}"),
    ("NLI model", "{nli_model}"),
)


def write_report(workdir: Path) -> Path:
    """Draws `report/index.html`, `table.csv`, `table.tex` and `figures/*.png` from what the workdir holds.

    Only results.json is needed; the page says what else is missing. Returns the page's path.

    Raises:
      UserError: there are no results to show, or a file of the workdir does not parse.
    """
    found = read_results(workdir)
    config = found.results["config"] or _json(workdir / "config.json")
    summaries = {s: _json(workdir / s / "summary.json") for s in (*TRAINED, "samples")}
    metrics = {s: read_records(p, ("step",)) for s in TRAINED if (p := workdir / s / "metrics.jsonl").exists()}
    accuracy = _accuracy(summaries["reward"])
    curves = {TITLES[s]: list(figures.curves(s, rows)) for s, rows in metrics.items()}
    drawn = pictures.draw(found, accuracy) | {n: png for panels in curves.values() for n, _, png in panels}
    texts, gone = samples.read(workdir, found.results)
    estimates = list(tables.rows(found))
    copies = {"table.csv": tables.as_csv(estimates), "table.tex": tables.as_latex(found)}
    context = {
        "title": config.get("name") or ("comparison" if found.results["compared"] else "outputs"),
        "facts": list(_facts(found, config)),
        "config": list(flat(config)),
        **{cut: [(s, k, n) for s, m in summaries.items() for k, n in m.get(cut, {}).items()] for cut in CUTS},
        "notes": [(k.replace("_", " "), n) for k, n in _json(workdir / "data" / "notes.json").items() if n],
        "said": sentences.of(found),
        "seen": {TITLES[s]: captions.curves(s, rows) for s, rows in metrics.items()}
        | {
            "accuracy": captions.accuracy(accuracy),
            "sweep": captions.sweep(found),
            "equal_kl": captions.equal_kl(found),
            "sure": captions.sure(found),
        },
        "tables": [(p, findings.series(found, p)) for p in (findings.performance(found), findings.variety(found)) if p],
        "curves": {s: [(n, title) for n, title, _ in panels] for s, panels in curves.items() if panels},
        "accuracy": accuracy,
        "explored": explorer.embedded(texts, found.splits),
        "gone": gone,
        "decided": list(_decided(found)),
        "climbers": [TITLES[p] for p in CLIMBERS if p in found.results["policies"]],
        "methods": [m for m in METHODS if m in found.results["policies"]],
        "pairs": findings.told_pairs(found),
        "counts": list(_counts(found)),
        "shares": shares(found.results),
        "by_length": list(_by_length(found)),
        "variety": findings.variety(found),
        "cuts": _cuts(found),
        "rows": estimates,
        "copies": copies,
        "rule": claims.RULE,
    }
    context["absent"] = list(_absent(found, context))
    pictures.write(workdir / "report" / "figures", drawn)
    for name, text in copies.items():
        write_text(workdir / "report" / name, text)
    write_text(workdir / "report" / "index.html", page.render(found, drawn, context))
    return workdir / "report" / "index.html"


def read_results(workdir: Path) -> Found:
    """The workdir's results.json, with what it may lack filled in as empty; `UserError` if it is not one."""
    path = workdir / "results.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run `jaxrlhf evaluate --workdir={workdir} …` first")
    read = read_json(path)
    policies: Any = read.get("policies") if isinstance(read, dict) else None
    measured: list[Any] = list(policies.values()) if isinstance(policies, dict) else []
    if measured and not any(measured):
        raise UserError(
            f"{path}: its policies have no splits, so nothing was measured; `jaxrlhf evaluate` writes it anew"
        )
    if not measured or not all(isinstance(s, dict) and all(isinstance(m, dict) for m in s.values()) for s in measured):
        raise UserError(f"{path}: no policies in it; `jaxrlhf evaluate` writes it anew")
    empty: dict[str, Any] = {key: {} for key in ("config", "sampling", "generalisation_gap", "diversity_by_length")}
    empty |= {"differences": [], "comparisons": [], "task": "", "judge": "", "judge_report": {}}
    empty |= {
        "tradeoff": {},
        "claims": [],
        "compared": {},
        "differing": {},
        "sweep": {},
        "remarks": [],
        "notes": [],
        "seeds": [],
        "missing": [],
    }
    results = empty | read
    n = results["sampling"].get("bon", {}).get("best_of", "N")
    known = {p: TITLES[p] for p in POLICIES if p != "bon"} | {"bon": f"best-of-{n}"}
    held = dict.fromkeys(s for splits in measured for s in splits)
    ordered = [s for s in ("id", ALL) if s in held] + [s for s in held if s not in ("id", ALL)]
    return Found(
        results=results,
        looks=figures.looks({str(p): known.get(p) or str(p) for p in policies}),
        splits={s: findings.split_label(s) for s in ordered},
        places=[
            p
            for p in dict.fromkeys(p for splits in measured for m in splits.values() for p, _ in findings.walk(m))
            if p[0] not in PARTS
        ],
    )


def _json(path: Path) -> Any:
    return read_json(path) if path.exists() else {}


def _accuracy(summary: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """Judge -> split -> how often the reward model agrees with it."""
    judges = {"the annotators": "accuracy", "the gold judge": "gold_accuracy"}
    return {judge: summary[key] for judge, key in judges.items() if summary.get(key)}


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every leaf."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(found: Found, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    results, keys = found.results, dict(flat(config))
    if results["task"] and results["task"] != "outputs":
        yield "task", TASKS.get(results["task"], str(results["task"]))
    if keys.get("model.init"):
        yield "base", f"{keys['model.init']}, imported"
    elif "pretrain.init" in keys:
        scratch = f"trained from scratch, {keys['pretrain.loop.steps']} steps"
        yield "base", scratch if keys["pretrain.init"] == "scratch" else f"{keys['pretrain.init']}, shipped"
    for fact, text in FACTS:
        named = re.findall(r"\{(.*?)\}", text)
        skipped = fact.lower() in METHODS and fact.lower() not in results["policies"]
        if all(keys.get(key) for key in named) and not skipped:
            yield fact, re.sub(r"\{(.*?)\}", lambda match: keys[match[1]], text)
    if results["seeds"]:
        yield (
            "seeds",
            f"{', '.join(map(str, results['seeds']))}: every number is a mean over them, n is how many there are",
        )
    bon = results["sampling"].get("bon", {})
    if {"best_of", "pool"} <= bon.keys():
        how = "drawn again and again from a pool of" if shares(results) else "each time others, out of"
        yield "best-of-N", f"the highest-scored of {bon['best_of']} SFT samples, {how} {bon['pool']} samples a prompt"
    if results["judge"]:
        yield "judge of win rates", JUDGES.get(results["judge"], str(results["judge"]))
    if keys.get("paper_compat", keys.get("evaluation.paper_compat")) == "True":
        yield "metrics", "as the paper's released code computes them (paper_compat)"


def shares(results: Mapping[str, Any]) -> bool:
    """Whether best-of-N responses to one prompt were picked from the same samples, and so repeat each other."""
    bon = results["sampling"].get("bon", {})
    drawn = max((m.get("samples_per_prompt", 1) for m in results["policies"].get("bon", {}).values()), default=1)
    return "pool" in bon and bon["pool"] < bon["best_of"] * drawn


def _decided(found: Found) -> Iterator[tuple[str, list[findings.Verdict]]]:
    """Of each measure, its verdict on each pair of policies."""
    for place in found.places:
        held = [findings.differences(found, a, b, place) for a, b in findings.told_pairs(found)]
        yield figures.label(place), [findings.decide(d) for d in held]


def _counts(found: Found) -> Iterator[tuple[str, str, int, int]]:
    for policy, splits in found.results["policies"].items():
        for split in found.splits:
            m = splits.get(split, {})
            if "n_prompts" in m:
                yield policy, split, m["n_prompts"], m.get("samples_per_prompt", 1)


def _cuts(found: Found) -> dict[str, tuple[int, float]]:
    """Split -> the words that texts were cut to, and the least share over policies of texts that have so many."""
    held = [(s, m["cut"]) for splits in found.results["policies"].values() for s, m in splits.items() if "cut" in m]
    return {s: (c["words"], min(other["reached"] for t, other in held if t == s)) for s, c in held}


def _by_length(found: Found) -> Iterator[tuple[str, list[str], list[tuple[str, list[Estimate | None]]]]]:
    """Of each split: policies, and rows of a length in words with each policy's main diversity."""
    varied = findings.variety(found)
    for split in found.splits:
        held = found.results["diversity_by_length"].get(split, [])
        rows = [row for row in held if varied and row.get("scope", "per_input") == varied[1]]
        policies = [p for p in found.looks if any(p in row["policies"] for row in rows)]
        if varied and policies:
            cells = [[row["policies"].get(p, {}).get(varied[2]) for p in policies] for row in rows]
            names = [f"{row['words'][0]:.0f} to {row['words'][1]:.0f}" for row in rows]
            yield split, policies, list(zip(names, cells, strict=True))


def _absent(found: Found, shown: Mapping[str, Any]) -> Iterator[str]:
    """What this page would show, and why it does not."""
    if ("win_rate",) not in found.places:
        yield "Win rates: nothing compared the outputs with a reference."
    if by_length(str(found.results["judge"])) and ("win_rate",) in found.places:
        yield "Length-controlled win rates: length itself is the judge, and the model follows only a smooth influence."
    if ("gold",) not in found.places:
        yield "Gold reward: only a task that knows the truth has one."
    if ("score",) not in found.places:
        yield "Scores: no reward model scored the outputs."
    if not any(p[:2] == ("diversity", "per_input") for p in found.places):
        yield "Per-input diversity: it takes several responses to each prompt."
    if not any(p[0] == "diversity" and p[-1] == "sbert" for p in found.places):
        yield "Sentence-BERT and Vendi score: no sentence encoder was given."
    if not any(p[0] == "diversity" and p[-1] == "nli" for p in found.places):
        yield "NLI and semantic clusters: no NLI model was given."
    if not found.results["generalisation_gap"]:
        yield "Generalisation gap: no split is marked as in-distribution."
    if not found.results["comparisons"]:
        yield "Head-to-head win rates: results.json has no comparisons."
    if not shown["config"]:
        yield "Configuration: neither results.json nor config.json has one."
    for gone in found.results["missing"]:
        seeds = ", ".join(map(str, gone["seeds"]))
        yield f"Mean over seeds of {gone['at']}: {gone['why']} (seeds: {seeds})."
    ran = [s for s in TRAINED if s not in METHODS or s in found.results["policies"]]
    stages: Sequence[str] = [TITLES[s] for s in ran if TITLES[s] not in shown["curves"]]
    if stages:
        yield f"Training curves ({', '.join(stages)}): no metrics.jsonl there."
    if not shown["accuracy"]:
        yield "Accuracy of the reward model: no reward/summary.json that has it."
    if not shown["explored"] and not shown["gone"]:
        yield "Sample outputs: no samples/<policy>/<split>.jsonl."
    yield from (f"Sample outputs of {line}" for line in shown["gone"])
