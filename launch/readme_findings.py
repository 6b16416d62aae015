"""Puts what `configs/findings.py` found into the README, from a workdir's results.json, and stores that file in docs/.

    python launch/readme_findings.py runs/findings

Run in the repository's root. The block between the two marks is replaced, or stands before "Measure anybody's outputs"
where there is none; docs/findings.json and docs/findings*.png are written. A test compares the two.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.evaluation import captions, claims, report
from jaxrlhf.evaluation.findings import Found, estimate
from jaxrlhf.evaluation.measures import walk
from jaxrlhf.files import read_json, read_text, write_json, write_text

START, END, BEFORE = "<!-- findings -->\n", "<!-- /findings -->\n", "## Measure anybody's outputs\n"
FIGURES = {"findings.png": "headline.png", "findings_kl.png": "curve_kl_0_win_rate.png"}
KL, WON, NEAR = ("kl",), ("win_rate",), "In distribution"
EAD = tuple(("diversity", scope, "ead") for scope in ("per_input", "across_input"))
COLUMNS = (
    ("win rate, in distribution", "id", WON),
    ("win rate, far (news)", "ood_news", WON),
    ("per-input EAD", "id", EAD[0]),
    ("across-input EAD", "id", EAD[1]),
    ("KL to SFT (nats)", "id", KL),
)
CURVE = (("KL to SFT (nats)", "id", KL), *COLUMNS[:3])


def block(found: Found) -> str:
    """The README's section, marks included."""
    r = found.results
    told = r["tradeoff"]
    (key, base), *_ = told["base"].items()
    policies = [([found.looks[p].label], splits) for p, splits in r["policies"].items()]
    swept = [([p["setting"][key]], p["splits"]) for p in told["points"] if p["policy"] == "ppo"]
    lost = (
        f" Points that failed: {'; '.join(f'{k} ({v})' for k, v in told['failed'].items())}." if told["failed"] else ""
    )
    lines = [
        "## What it finds",
        "",
        f"`jaxrlhf run --config=configs/findings.py --workdir=runs/findings`, {len(r['seeds'])} seeds of the embedded "
        f"world, each with data and every stage of its own; PPO at {key} {base}. Means over seeds, with Student's 95 % "
        f"intervals.{lost} All numbers: [`docs/findings.json`](docs/findings.json).",
        "",
        "![How well each policy does and how varied it is, over seeds](docs/findings.png)",
        "",
        *_table("policy", COLUMNS, policies),
        "",
        "The findings of Kirk et al. 2024, at this scale:",
        "",
        *(_claim(c) for c in r["claims"]),
        "",
        claims.RULE,
        "",
        f"PPO over {key}, in distribution but for the far split:",
        "",
        *_table(key, CURVE, sorted(swept, key=lambda row: float(row[0][0]))),
        "",
        "![Win rate over the KL to SFT](docs/findings_kl.png)",
        "",
        *_equal(found),
    ]
    return START + "\n".join(lines) + "\n" + END


def _table(first: str, columns: Any, rows: Any) -> Iterator[str]:
    yield f"| {' | '.join([first, *(name for name, _, _ in columns)])} |"
    yield "| --- " * (len(columns) + 1) + "|"
    for name, splits in rows:
        held = {s: dict(walk(m)) for s, m in splits.items()}
        cells = [estimate(held[s][p]) if p in held[s] else "0" if p == KL else "–" for _, s, p in columns]
        yield f"| {' | '.join([*name, *cells])} |"


def _claim(c: dict[str, Any]) -> str:
    measured = "; ".join(f"{name} {estimate(e)}" for name, e in c["measured"].items())
    return f"- **{c['verdict']}**: {c['claim']}. {c['number'][0].upper()}{c['number'][1:]}: {measured}."


def _equal(found: Found) -> Iterator[str]:
    lines = [line for line in captions.equal_kl(found) if line.startswith(NEAR)]
    yield from (line for line in lines if "win rate" in line or "nothing" in line)
    bound = next(p["kl_bound"] for p in found.results["tradeoff"]["points"] if p["policy"] == "bon")
    yield f"By the closed form, log N − (N−1)/N, best-of-N's KL is at most {bound:.3f} nats."


def main(workdir: Path) -> None:
    found = report.read_results(workdir)
    readme, text = Path("README.md"), block(found)
    old = read_text(readme)
    if START in old:
        head, _, rest = old.partition(START)
        new = head + text + rest.partition(END)[2]
    else:
        new = old.replace(BEFORE, f"{text}\n{BEFORE}", 1)
    write_json(Path("docs/findings.json"), read_json(workdir / "results.json"))
    for name, drawn in FIGURES.items():
        shutil.copy(workdir / "report" / "figures" / drawn, Path("docs") / name)
    write_text(readme, new)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
