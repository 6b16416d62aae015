"""The report: one self-contained page of a workdir, with no script and no remote asset."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxrlhf.evaluation import figures
from jaxrlhf.files import UserError, read_json, read_records, write_text

STAGES = ("pretrain", "sft", "reward", "ppo")
SHOWN_PROMPTS, SHOWN_RESPONSES = 3, 2
Estimate = Mapping[str, float]


def write_report(workdir: Path) -> Path:
    """Draws `report/index.html` and `report/figures/*.png` from what the workdir holds; returns the page's path.

    Raises:
      UserError: there are no results to show.
    """
    if not (workdir / "results.json").exists():
        raise UserError(f"{workdir}/results.json: no such file; run `jaxrlhf evaluate --workdir={workdir} …` first")
    results = read_json(workdir / "results.json")
    summaries = {s: read_json(p) for s in (*STAGES, "samples") if (p := workdir / s / "summary.json").exists()}
    metrics = {s: read_records(p) for s in STAGES if (p := workdir / s / "metrics.jsonl").exists()}
    drawn = figures.draw(results, metrics, workdir / "report" / "figures")
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    page = template.render(
        results=results,
        title=results["config"].get("name", "outputs"),
        run=list(_what_was_run(results)),
        headline=list(headline(results)),
        figures={n: base64.b64encode(p.read_bytes()).decode() for n, p in drawn.items()},
        curves=[n for n in drawn if n.startswith("training_")],
        best=figures.LABELS.get(figures.measure(results) or ""),
        accuracy=summaries.get("reward", {}).get("accuracy", {}),
        gold_accuracy=summaries.get("reward", {}).get("gold_accuracy", {}),
        truncated=list(_truncated(summaries)),
        samples=list(_samples(workdir, list(results["policies"]))),
        rows=list(_rows(results)),
        name=figures.name,
    )
    write_text(workdir / "report" / "index.html", page)
    return workdir / "report" / "index.html"


def headline(results: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers say, in sentences, and no more than their intervals support."""
    policies, best, scope = results["policies"], figures.measure(results), figures._scope(results)
    baseline = "sft" if "sft" in policies else next(iter(policies))
    for policy in policies:
        if policy == baseline:
            continue
        shared = [s for s in policies[baseline] if s in policies[policy]]
        if best is not None:
            pairs = [(s, policies[policy][s].get(best), policies[baseline][s].get(best)) for s in shared]
            yield from _verdict(policy, baseline, figures.LABELS[best], pairs, "does better", "does worse")
        pick = figures._diversity_of(scope, "ead")
        pairs = [(s, pick(policies[policy][s]), pick(policies[baseline][s])) for s in shared]
        label = f"EAD {figures.TITLES[scope]}"
        yield from _verdict(policy, baseline, label, pairs, "is more diverse", "is less diverse")
    for policy, splits in results["generalisation_gap"].items():
        known = [(s, e[best]) for s, e in splits.items() if best and best in e]
        if known and best:
            worse = [figures.name(s) for s, e in known if e["low"] > 0]
            yield (
                f"{figures.name(policy)} loses ground out of distribution on {len(worse)} of {len(known)} splits"
                f"{': ' + ', '.join(worse) if worse else ''} ({figures.LABELS[best]}, interval of the gap above 0)."
            )


def _verdict(policy: str, baseline: str, label: str, pairs: Sequence[tuple], more: str, less: str) -> Iterator[str]:
    pairs = [(s, a, b) for s, a, b in pairs if a and b]
    if not pairs:
        return
    above = [figures.name(s) for s, a, b in pairs if a["low"] > b["high"]]
    below = [figures.name(s) for s, a, b in pairs if a["high"] < b["low"]]
    said = [
        f"{verb} than {figures.name(baseline)} on {', '.join(on)}" for verb, on in ((more, above), (less, below)) if on
    ]
    open_ = len(pairs) - len(above) - len(below)
    if not said:
        both = f"{figures.name(policy)} and {figures.name(baseline)}"
        yield f"By {label}, {both} are not told apart on any of {len(pairs)} splits."
        return
    rest = f"; undecided on {open_} of {len(pairs)} splits" if open_ else ""
    yield f"By {label}, {figures.name(policy)} {' and '.join(said)}{rest}."


def _what_was_run(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    c = results["config"]
    if "model" not in c:
        for key, value in c.items():
            yield key, ", ".join(value) if isinstance(value, list) else str(value)
        return
    m = c["model"]
    yield "task", {"world": "the embedded world: forum posts to summarise", "files": "real text files"}[c["task"]]
    yield "model", f"{m['family']}, {m['layers']} layers of width {m['width']}; {m['freeze_layers']:.0%} of them frozen"
    yield "base", "trained from scratch" if c["pretrain"]["init"] == "scratch" else f"shipped ({c['pretrain']['init']})"
    yield "steps", ", ".join(f"{s} {c[s]['loop']['steps']}" for s in STAGES if s != "pretrain")
    yield (
        "PPO",
        f"KL coefficient {c['ppo']['kl_coef']} ({c['ppo']['kl_estimator']}), batches of {c['ppo']['batch_size']}",
    )
    s = c["sampling"]
    yield "sampling", f"{s['samples_per_prompt']} samples a prompt at temperature {s['temperature']}"
    yield "best-of-N", f"N = {s['best_of']}, drawn again and again from a pool of {s['pool']} SFT samples a prompt"
    judge = {
        "gold": "the gold judge, which knows the truth",
        "reward": "the reward model trained here, which flatters PPO",
    }
    yield "judge of win rates", judge[results["judge"]]
    yield "seed", str(c["seed"])


def _truncated(summaries: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    for stage, summary in summaries.items():
        for split, count in summary.get("truncated", {}).items():
            if count:
                yield stage, split, count


def _samples(workdir: Path, policies: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The first prompts of each split, with each policy's first responses side by side."""
    folder = workdir / "samples"
    found = [p for p in policies if p in ("sft", "bon", "ppo") and (folder / p).is_dir()]
    if not found:
        return
    splits = sorted((p.stem for p in (folder / found[0]).glob("*.jsonl")), key=lambda s: (s != "id", s))
    for split in splits:
        rows = {p: read_records(folder / p / f"{split}.jsonl")[:SHOWN_PROMPTS] for p in found}
        for i, record in enumerate(rows[found[0]]):
            yield {
                "split": split,
                "prompt": _visible(record["prompt"]),
                "reference": _visible(record["reference"]),
                "answers": [(p, list(_answers(rows[p][i]))) for p in found],
            }


def _answers(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for j, text in enumerate(record["responses"][:SHOWN_RESPONSES]):
        gold = record["gold"][j] if "gold" in record else None
        yield {"text": _visible(text), "score": record["scores"][j], "gold": gold}


def _visible(text: str) -> str:
    """Control characters shown as pictures of themselves, so that nothing hides in a text."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Estimate]]:
    """Every estimate of results.json: (policy, split, what, estimate)."""
    for policy, splits in results["policies"].items():
        for split, m in splits.items():
            for key in ("win_rate", "gold", "score", "length"):
                if key in m:
                    yield policy, split, figures.LABELS[key], m[key]
            for scope, found in m["diversity"].items():
                for metric, e in found.items():
                    yield policy, split, f"{figures.LABELS.get(metric, metric)} {figures.TITLES[scope]}", e
    for policy, splits in results["generalisation_gap"].items():
        for split, found in splits.items():
            for key, e in found.items():
                yield policy, split, f"gap in {figures.LABELS[key]}", e
    for c in results["comparisons"]:
        yield c["a"], c["split"], f"wins against {figures.name(c['b'])}", c["win_rate"]
