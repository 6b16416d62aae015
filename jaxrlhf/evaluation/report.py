"""The report: one self-contained page of a workdir, with no script and no remote asset."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxrlhf.evaluation import figures, findings
from jaxrlhf.evaluation.figures import Estimate, visible
from jaxrlhf.evaluation.findings import ALL, Found
from jaxrlhf.evaluation.measures import CUT
from jaxrlhf.files import UserError, read_json, read_records, write_text
from jaxrlhf.names import METHODS, POLICIES, TITLES, TRAINED

# Parts of a number that has its own place on the page.
PARTS = ("win_rate_by_length",)
CUTS = ("truncated", "overlong", "join_mismatch")  # of prompts, responses, and both
SHOWN_PROMPTS, SHOWN_RESPONSES, SHOWN_LETTERS = 3, 2, 20_000
TASKS = {"world": "the embedded world: generated forum posts to summarise", "files": "texts from files"}
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
    """Draws `report/index.html` and `report/figures/*.png` from what the workdir holds; returns the page's path.

    Only results.json is needed; the page says what else is missing.

    Raises:
      UserError: there are no results to show, or a file of the workdir does not parse.
    """
    found = read_results(workdir)
    config = found.results["config"] or _json(workdir / "config.json")
    summaries = {s: _json(workdir / s / "summary.json") for s in (*TRAINED, "samples")}
    metrics = {s: read_records(p, ("step",)) for s in TRAINED if (p := workdir / s / "metrics.jsonl").exists()}
    accuracy = _accuracy(summaries["reward"])
    curves = {TITLES[s]: list(figures.curves(s, rows)) for s, rows in metrics.items()}
    pictures = _pictures(found, accuracy) | {n: png for drawn in curves.values() for n, _, png in drawn}
    context = {
        "title": config.get("name", "outputs"),
        "facts": list(_facts(found, config)),
        "config": list(_flat(config)),
        **{cut: [(s, k, n) for s, m in summaries.items() for k, n in m.get(cut, {}).items()] for cut in CUTS},
        "notes": [(k.replace("_", " "), n) for k, n in _json(workdir / "data" / "notes.json").items() if n],
        "said": findings.sentences(found),
        "tables": [(p, findings.series(found, p)) for p in (findings.performance(found), findings.variety(found)) if p],
        "curves": {s: [(n, title) for n, title, _ in drawn] for s, drawn in curves.items() if drawn},
        "accuracy": accuracy,
        "samples": list(_samples(workdir, found)),
        "decided": list(_decided(found)),
        "pairs": findings.pairs(found),
        "counts": list(_counts(found)),
        "shares": shares(found.results),
        "by_length": list(_by_length(found)),
        "variety": findings.variety(found),
        "cuts": _cuts(found),
        "rows": list(_rows(found)),
    }
    context["absent"] = list(_absent(found, context))
    _write_pictures(workdir / "report" / "figures", pictures)
    images = {n: base64.b64encode(png).decode() for n, png in pictures.items()}
    page = _template().render(found=found, images=images, letters=SHOWN_LETTERS, **context)
    write_text(workdir / "report" / "index.html", page)
    return workdir / "report" / "index.html"


def read_results(workdir: Path) -> Found:
    """The workdir's results.json, with what it may lack filled in as empty; `UserError` if it is not one."""
    path = workdir / "results.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run `jaxrlhf evaluate --workdir={workdir} …` first")
    read = read_json(path)
    policies: Any = read.get("policies") if isinstance(read, dict) else None
    measured: list[Any] = list(policies.values()) if isinstance(policies, dict) else []
    if not measured or not all(isinstance(s, dict) and all(isinstance(m, dict) for m in s.values()) for s in measured):
        raise UserError(f"{path}: no policies in it; `jaxrlhf evaluate` writes it anew")
    empty: dict[str, Any] = {key: {} for key in ("config", "sampling", "generalisation_gap", "diversity_by_length")}
    empty |= {"differences": [], "comparisons": [], "task": "", "judge": "", "judge_report": {}}
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


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever the page shows passes here, and is escaped after it.
        finalize=lambda value: visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    )
    environment.filters |= {
        "number": findings.number,
        "estimate": findings.estimate,
        "measure": figures.label,
        "split": findings.split_label,
    }
    return environment.get_template("report.html.j2")


def _write_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        if old.stem not in pictures:
            old.unlink()
    for name, png in pictures.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(png)
        partial.replace(folder / f"{name}.png")


def _pictures(found: Found, accuracy: Mapping[str, Mapping[str, Estimate]]) -> dict[str, bytes]:
    """Every figure that the numbers allow; a name tells the template where it goes."""
    looks, splits = found.looks, found.splits
    best, varied = findings.performance(found), findings.variety(found)
    titles = [("Generalisation", best), ("Diversity", varied)]
    panels = [(title, findings.series(found, place), place) for title, place in titles if place]
    pictures = {}
    if panels:
        pictures["headline"] = figures.headline(panels, looks, splits, wide=True)
        pictures["headline_narrow"] = figures.headline(panels, looks, splits, wide=False)
    for i, place in enumerate(found.places):
        pictures[_named(place, i)] = figures.by_split(findings.series(found, place), looks, splits, place)
    far = {s: t for s, t in splits.items() if s not in ("id", ALL)}
    for place in findings.PERFORMANCE:
        if gaps := findings.gaps(found, place):
            pictures[f"gap_{place[0]}"] = figures.by_split(gaps, looks, far, place, zero="gap in ")
    if heads := findings.heads(found):
        named = {f"{looks[a].label} against {looks[b].label}": held for (a, b), held in heads.items()}
        pictures["heads"] = figures.shares(named, splits, "share of comparisons won by the first", "even")
    if best and varied:
        x, y = findings.series(found, varied), findings.series(found, best)
        points = {p: {s: (x[p][s], y[p][s]) for s in y[p] if s in x[p]} for p in y if p in x}
        pictures["tradeoff"] = figures.tradeoff(points, looks, splits, figures.label(varied), figures.label(best))
    if accuracy:
        rows = {s: findings.split_label(s) for held in accuracy.values() for s in held}
        pictures["accuracy"] = figures.shares(accuracy, rows, "share of pairs ranked as the judge does", "chance")
    return pictures


def _named(place: findings.Place, i: int) -> str:
    """A picture's name, never made from what a file calls a measure."""
    if place in figures.LABELS:
        return f"measure_{place[0]}"
    if len(place) == 3 and place[0] == "diversity" and place[1] in figures.SCOPES and place[2] in figures.METRICS:
        return f"{'cut_' if place[2].endswith(CUT) else ''}{place[1]}_{place[2]}"
    return f"other_{i}"


def _accuracy(summary: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """Judge -> split -> how often the reward model agrees with it."""
    judges = {"the annotators": "accuracy", "the gold judge": "gold_accuracy"}
    return {judge: summary[key] for judge, key in judges.items() if summary.get(key)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(found: Found, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    results, flat = found.results, dict(_flat(config))
    if results["task"] and results["task"] != "outputs":
        yield "task", TASKS.get(results["task"], str(results["task"]))
    if flat.get("model.init"):
        yield "base", f"{flat['model.init']}, imported"
    elif "pretrain.init" in flat:
        scratch = f"trained from scratch, {flat['pretrain.loop.steps']} steps"
        yield "base", scratch if flat["pretrain.init"] == "scratch" else f"{flat['pretrain.init']}, shipped"
    for fact, text in FACTS:
        keys = re.findall(r"\{(.*?)\}", text)
        skipped = fact.lower() in METHODS and fact.lower() not in results["policies"]
        if all(flat.get(key) for key in keys) and not skipped:
            yield fact, re.sub(r"\{(.*?)\}", lambda match: flat[match[1]], text)
    bon = results["sampling"].get("bon", {})
    if {"best_of", "pool"} <= bon.keys():
        how = "drawn again and again from a pool of" if shares(results) else "each time others, out of"
        yield "best-of-N", f"the highest-scored of {bon['best_of']} SFT samples, {how} {bon['pool']} samples a prompt"
    if results["judge"]:
        yield "judge of win rates", JUDGES.get(results["judge"], str(results["judge"]))
    if flat.get("paper_compat", flat.get("evaluation.paper_compat")) == "True":
        yield "metrics", "as the paper's released code computes them (paper_compat)"


def shares(results: Mapping[str, Any]) -> bool:
    """Whether best-of-N responses to one prompt were picked from the same samples, and so repeat each other."""
    bon = results["sampling"].get("bon", {})
    drawn = max((m.get("samples_per_prompt", 1) for m in results["policies"].get("bon", {}).values()), default=1)
    return "pool" in bon and bon["pool"] < bon["best_of"] * drawn


def _samples(workdir: Path, found: Found) -> Iterator[dict[str, Any]]:
    """The first prompts of each split, with each policy's first responses side by side.

    Files are found by listing, never by a name that results.json gives.
    """
    listed = {p.name: p for p in sorted((workdir / "samples").glob("*")) if p.is_dir()}
    files = {p: {f.stem: f for f in sorted(listed[p].glob("*.jsonl"))} for p in found.looks if p in listed}
    for split in found.splits:
        rows = {p: read_records(f[split], ("id", "prompt", "responses")) for p, f in files.items() if split in f}
        by_id = {p: {r["id"]: r for r in records} for p, records in rows.items()}
        for first in next(iter(rows.values()), [])[:SHOWN_PROMPTS]:
            held = {p: known[first["id"]] for p, known in by_id.items() if first["id"] in known}
            answers = {p: list(_answers(r)) for p, r in held.items()}
            yield {"split": split, "prompt": first["prompt"], "reference": first.get("reference"), "answers": answers}


def _answers(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for i, text in enumerate(record["responses"][:SHOWN_RESPONSES]):
        numbers = {name: record[key][i] for name, key in (("score", "scores"), ("gold", "gold")) if key in record}
        yield {"text": text, "numbers": numbers}


def _decided(found: Found) -> Iterator[tuple[str, list[findings.Verdict]]]:
    """Of each measure, its verdict on each pair of policies."""
    for place in found.places:
        held = [findings.differences(found, a, b, place) for a, b in findings.pairs(found)]
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
    """Of each split: policies, and rows of a length in words with each policy's main per-input diversity."""
    varied = findings.variety(found)
    for split in found.splits:
        rows = found.results["diversity_by_length"].get(split, [])
        policies = [p for p in found.looks if any(p in row["policies"] for row in rows)]
        if varied and policies:
            cells = [[row["policies"].get(p, {}).get(varied[2]) for p in policies] for row in rows]
            names = [f"{row['words'][0]:.0f} to {row['words'][1]:.0f}" for row in rows]
            yield split, policies, list(zip(names, cells, strict=True))


def _rows(found: Found) -> Iterator[tuple[str, str, str, Estimate]]:
    """Every estimate of results.json: (policy or pair, split, what, estimate)."""
    names = {p: look.label for p, look in found.looks.items()}
    for policy, splits in found.results["policies"].items():
        for split, measured in splits.items():
            for place, e in findings.walk(measured):
                yield policy, split, figures.label(place), e
    for policy, splits in found.results["generalisation_gap"].items():
        for split, measured in splits.items():
            for place, e in findings.walk(measured):
                yield policy, split, f"gap in {figures.label(place)}", e
    for d in found.results["differences"]:
        pair = f"{names.get(d['a'], d['a'])} minus {names.get(d['b'], d['b'])}"
        for place, e in findings.walk(d):
            measure = figures.label(place[1:]) if place[0] == "gap" else figures.label(place)
            yield pair, d["split"], f"difference in the gap in {measure}" if place[0] == "gap" else measure, e
    for c in found.results["comparisons"]:
        yield c["a"], c["split"], f"wins against {names.get(c['b'], c['b'])}", c["win_rate"]
    for place, e in findings.walk(found.results["judge_report"]):
        yield "the judge", ALL, figures.label(place), e


def _absent(found: Found, shown: Mapping[str, Any]) -> Iterator[str]:
    """What this page would show, and why it does not."""
    if ("win_rate",) not in found.places:
        yield "Win rates: nothing compared the outputs with a reference."
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
    ran = [s for s in TRAINED if s not in METHODS or s in found.results["policies"]]
    stages: Sequence[str] = [TITLES[s] for s in ran if TITLES[s] not in shown["curves"]]
    if stages:
        yield f"Training curves ({', '.join(stages)}): no metrics.jsonl there."
    if not shown["accuracy"]:
        yield "Accuracy of the reward model: no reward/summary.json that has it."
    if not shown["samples"]:
        yield "Sample outputs: no samples/<policy>/<split>.jsonl."
