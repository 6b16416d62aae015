"""Every estimate of results.json as rows: for the page, as CSV, and the main ones as a LaTeX table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxrlhf.evaluation import findings
from jaxrlhf.evaluation.figures import Estimate, label, visible
from jaxrlhf.evaluation.findings import Found
from jaxrlhf.evaluation.measures import ALL, Place

NUMBERS = ("mean", "low", "high", "n", "se", "p", "p_holm", "n_needed")
_LATEX = {c: f"\\{c}" for c in "{}$&#_%"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "\N{NO-BREAK SPACE}": "~",
    "\N{MINUS SIGN}": "$-$",
}


class Row(NamedTuple):
    """An estimate and what it is of; `kind` is "policy", "gap", "difference", … and `against` the other of a pair."""

    kind: str
    policy: str
    against: str
    split: str
    place: Place
    e: Estimate


def rows(found: Found) -> Iterator[Row]:
    """Every estimate of results.json."""
    results = found.results
    for kind, key in (("policy", "policies"), ("gap", "generalisation_gap")):
        for policy, splits in results[key].items():
            for split, measured in splits.items():
                for place, e in findings.walk(measured):
                    yield Row(kind, policy, "", split, place, e)
    for d in results["differences"]:
        for place, e in findings.walk(d):
            gap = place[0] == "gap"
            yield Row("difference" + " of gaps" * gap, d["a"], d["b"], d["split"], place[gap:], e)
    for c in results["comparisons"]:
        for place, e in findings.walk(c):
            yield Row("head to head", c["a"], c["b"], c["split"], place, e)
    for split, thirds in results["diversity_by_length"].items():
        for third in thirds:
            kind = "at {:.0f} to {:.0f} words".format(*third["words"])
            for policy, metrics in third["policies"].items():
                for place, e in findings.walk(metrics, ("diversity", "per_input")):
                    yield Row(kind, policy, "", split, place, e)
    for place, e in findings.walk(results["judge_report"]):
        yield Row("judge", "", "", ALL, place, e)


def numbers(held: list[Row]) -> tuple[str, ...]:
    """Which numbers any of the estimates has."""
    return tuple(k for k in NUMBERS if any(k in row.e for row in held))


def as_csv(held: list[Row]) -> str:
    """One line an estimate, numbers in full, names as results.json has them.

    A name that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    known = numbers(held)
    writer.writerow(("kind", "policy", "against", "split", "measure", *known))
    for row in held:
        names = (row.kind, row.policy, row.against, row.split, ".".join(row.place))
        writer.writerow([*map(_inert, names), *(repr(row.e[k]) if k in row.e else "" for k in known)])
    return out.getvalue()


def as_latex(found: Found) -> str:
    """The main measures of each policy and split, for the package booktabs; rounded by their intervals."""
    varied = findings.variety(found)
    wanted = [
        *findings.PERFORMANCE,
        ("length",),
        *([varied, ("diversity", "across_input", varied[2])] if varied else []),
    ]
    columns = [p for p in dict.fromkeys(wanted) if p in found.places]
    held = {p: findings.series(found, p) for p in columns}
    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{ll{'r' * len(columns)}}}",
        "\\toprule",
        _line(["split", "policy", *(label(p) for p in columns)]),
    ]
    for split, name in found.splits.items():
        lines.append("\\midrule")
        for policy, look in found.looks.items():
            if split in found.results["policies"][policy]:
                cells = [held[p].get(policy, {}).get(split) for p in columns]
                lines.append(_line([name, look.label, *(findings.estimate(e) if e else "" for e in cells)]))
    lines += ["\\bottomrule", "\\end{tabular}", "% Mean and 95 % interval [low, high]."]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    # After the end of a row TeX would take [ and * for options; a hyphen before a number is a minus sign.
    return (
        "{}" * cells[0].startswith(("[", "*"))
        + " & ".join(re.sub(r"(?<![\w-])-(?=\d)", "$-$", latex(c)) for c in cells)
        + r" \\"
    )


def latex(text: str) -> str:
    """`text` on one line, with nothing in it that TeX would obey."""
    return "".join(_LATEX.get(c, c) for c in re.sub(r"[\n\t]", " ", visible(text)))


def _inert(name: str) -> str:
    return f"'{name}" if name[:1] in tuple("=+-@\t\r") else name
