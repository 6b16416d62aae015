"""The page as HTML: the template, its script, and a policy that lets nothing else run and nothing leave."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from jaxrlhf.evaluation import explorer, figures, findings, tables
from jaxrlhf.evaluation.figures import visible
from jaxrlhf.evaluation.findings import Found

FOLDER = Path(__file__).parent / "templates"
# Shown where no script runs: the first prompts of each split, and each policy's first answers.
PLAIN_PROMPTS, PLAIN_ANSWERS = 3, 2
HEADS = {k: k for k in tables.NUMBERS} | {
    "se": "standard error",
    "p_holm": "p, Holm's correction",
    "n_needed": "n needed",
}


def render(found: Found, drawn: Mapping[str, bytes], context: Mapping[str, Any]) -> str:
    """The whole page; `context` holds what the template names."""
    script = (FOLDER / "report.js").read_text(encoding="utf-8")
    policies = [{"label": visible(look.label), "colour": look.colour} for look in found.looks.values()]
    number = {p: i for i, p in enumerate(found.looks)}  # a name could be one that objects of the script have anyway
    splits = [
        split
        | {"prompts": [q | {"answers": {number[p]: a for p, a in q["answers"].items()}} for q in split["prompts"]]}
        for split in context["explored"]
    ]
    return _template().render(
        found=found,
        images={n: base64.b64encode(png).decode() for n, png in drawn.items()},
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_data({"policies": policies, "splits": splits}),
        columns=tables.numbers(context["rows"]),
        names=HEADS,
        shared=explorer.SHARED,
        answers=explorer.ANSWERS,
        plain_prompts=PLAIN_PROMPTS,
        plain_answers=PLAIN_ANSWERS,
        **context,
    )


def _data(value: Any) -> Markup:
    """JSON that no HTML parser takes for markup and no script parser for a line's end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
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
