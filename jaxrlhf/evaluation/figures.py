"""The report's figures: numbers in, PNG bytes out, the same bytes for the same numbers.

Every panel is a picture of its own, narrow enough that its letters stay readable on a phone.
"""

from __future__ import annotations

import io
import math
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jaxrlhf.evaluation.measures import CUT, Place
from jaxrlhf.names import CLIMBERS

Estimate = Mapping[str, float]  # mean, low, high, n
Series = Mapping[str, Mapping[str, Estimate]]  # policy -> split -> estimate


class Look(NamedTuple):
    """How a policy is shown wherever it appears."""

    label: str
    colour: str
    marker: str


# Okabe & Ito's colours, which stay apart for colour-blind eyes; markers say the same again.
PALETTE = {"sft": "#0072B2", "bon": "#009E73", "ppo": "#D55E00", "reference": "#6B6B6B"}
PALETTE |= {"dpo": "#CC79A7", "rloo": "#E69F00", "grpo": "#56B4E9"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NEUTRAL = ("#444444", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#A5AA99")  # for what is not a policy
MARKERS = "osDv^PX*<>"
INK, SOFT, GRID = "#222222", "#555555", "#E4E4E4"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # names come from files and may hold dollar signs
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}
LABELS: dict[Place, str] = {
    ("win_rate",): "win rate against the reference",
    ("length_controlled",): "length-controlled win rate",
    ("gold",): "gold reward",
    ("score",): "reward-model score",
    ("proxy_score",): "proxy score, by the judge",
    ("length",): "length (words)",
    ("kl",): "KL to SFT (nats a response)",
}
# Not the reader's matplotlibrc: the picture is the same on every machine.
_styled = matplotlib.style.context(["default", STYLE])
_TEXT_METRICS = {
    "ead": "EAD",
    "distinct": "distinct-n",
    "cosine": "3-gram cosine",
    "self_bleu": "1 − Self-BLEU",
    "compression": "compressed share",
}
METRICS = {
    **_TEXT_METRICS,
    "sbert": "Sentence-BERT",
    "vendi": "Vendi score",
    "nli": "NLI",
    "clusters": "semantic clusters",
    "semantic_entropy": "semantic entropy",
    **{key + CUT: f"{name} at equal length" for key, name in _TEXT_METRICS.items()},
}
SCOPES = {"per_input": "per-input", "across_input": "across-input"}
# Of each stage: what a panel's y axis says, and the metrics drawn in it (`*` stands for a split).
CURVES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "pretrain": (("loss (nats a token)", ("loss", "validation_loss")),),
    "sft": (("loss (nats a token)", ("loss", "validation_loss")),),
    "reward": (
        ("loss (nats a pair)", ("loss", "validation_loss")),
        ("accuracy (share of pairs)", ("accuracy", "accuracy_*")),
    ),
    "ppo": (
        ("reward-model score", ("score",)),
        ("gold reward", ("gold",)),
        ("KL to SFT (nats a response)", ("kl",)),
        ("length (tokens)", ("length",)),
        ("entropy (nats a token)", ("rollout_entropy", "entropy")),
        ("finished responses (share)", ("finished",)),
    ),
    "dpo": (
        ("loss (a pair)", ("loss",)),
        ("accuracy (share of pairs)", ("accuracy", "accuracy_*")),
        ("implicit reward (nats x beta)", ("chosen_reward", "rejected_reward")),
    ),
}
CURVES |= dict.fromkeys(CLIMBERS, CURVES["ppo"])


def label(place: Place) -> str:
    """What the estimates at `place` measure, in words."""
    if place[0] == "diversity" and len(place) == 3:
        return f"{SCOPES.get(place[1], place[1])} {METRICS.get(place[2], place[2])}"
    return LABELS.get(place, " ".join(place).replace("_", " "))


def visible(text: str) -> str:
    """`text` with characters that do not show, or that reorder others, replaced by their code points."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    if text.isprintable():
        return text
    found = {ord(c) for c in set(text) - {"\n", "\t"} if unicodedata.category(c) in hidden}
    return text.translate({c: f"⟨U+{c:04X}⟩" for c in found}) if found else text


def looks(labels: Mapping[str, str]) -> dict[str, Look]:
    """A colour and a marker for each policy; SFT, best-of-N, PPO and the reference keep theirs in every report."""
    spare = cycle([c for c in COLOURS if c not in {PALETTE[p] for p in labels if p in PALETTE}] or COLOURS)
    return {
        policy: Look(text, PALETTE[policy] if policy in PALETTE else next(spare), MARKERS[i % len(MARKERS)])
        for i, (policy, text) in enumerate(labels.items())
    }


@_styled
def by_split(
    series: Series, shown: Mapping[str, Look], splits: Mapping[str, str], place: Place, zero: str = ""
) -> bytes:
    """A panel of one measure: a row for each split, a point with its interval for each policy.

    `splits` maps splits to their labels in order; `zero` labels a line at 0 where there is one to draw.
    """
    figure = Figure((4.3, _height(series, splits)))
    ax = figure.subplots()
    _dots(ax, series, shown, splits, f"{zero}{label(place)}")
    if zero:
        ax.axvline(0, color=SOFT, lw=1, zorder=1)
    _legend(figure, [shown[p] for p in series], 46)
    return _png(figure)


@_styled
def headline(
    panels: Sequence[tuple[str, Series, Place]], shown: Mapping[str, Look], splits: Mapping[str, str], wide: bool
) -> bytes:
    """The paper's figure 1: how well each policy does, beside how varied its outputs are. Narrow: one above the other.

    `panels` holds a title, the estimates and where they come from.
    """
    policies = dict.fromkeys(p for _, series, _ in panels for p in series)
    height = max(_height(series, splits) for _, series, _ in panels) + 0.2
    figure = Figure((4.4 * len(panels) if wide else 4.3, height if wide else height * len(panels)))
    rows, columns = (1, len(panels)) if wide else (len(panels), 1)
    for i, (ax, (title, series, place)) in enumerate(
        zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True)
    ):
        _dots(ax, series, shown, splits, label(place))
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
        if wide and i:
            ax.tick_params(labelleft=False)
    _legend(figure, [shown[p] for p in policies], 110 if wide else 46)
    return _png(figure)


@_styled
def tradeoff(
    points: Mapping[str, Mapping[str, tuple[Estimate, Estimate]]],
    shown: Mapping[str, Look],
    splits: Mapping[str, str],
    x_label: str,
    y_label: str,
) -> bytes:
    """Each policy and split as a point (x, y) with both intervals; the colour is the policy, the shape the split."""
    figure = Figure((5.2, 4.2 + 0.2 * math.ceil(len(splits) / 3)))
    ax = figure.subplots()
    markers = dict(zip(splits, cycle(MARKERS), strict=False))
    for policy, found in points.items():
        for split, (x, y) in found.items():
            ax.errorbar(
                x["mean"],
                y["mean"],
                _whiskers([y]),
                _whiskers([x]),
                fmt=markers[split],
                color=shown[policy].colour,
                ms=6,
                lw=1,
            )
    ax.set(xlabel=_short(x_label, 60), ylabel=_short(y_label, 48))
    _legend(figure, [shown[p]._replace(marker="o") for p in points], 54)
    _legend(figure, [Look(text, SOFT, markers[s]) for s, text in splits.items()], 54, "outside lower left")
    return _png(figure)


@_styled
def shares(series: Series, splits: Mapping[str, str], x_label: str, half: str) -> bytes:
    """A panel of shares between 0 and 1, whatever they are of, with a line at one half that is called `half`."""
    shown = {k: Look(k, NEUTRAL[i % len(NEUTRAL)], MARKERS[i % len(MARKERS)]) for i, k in enumerate(series)}
    figure = Figure((4.3, _height(series, splits)))
    ax = figure.subplots()
    _dots(ax, series, shown, splits, x_label)
    ax.axvline(0.5, color=SOFT, lw=1, ls="--", zorder=1)
    _legend(figure, [*shown.values(), Look(half, SOFT, "")], 46)
    return _png(figure)


@_styled
def sweep(
    lines: Mapping[str, Sequence[tuple[float, Estimate]]],
    shown: Mapping[str, Look],
    title: str,
    x_label: str,
    y_label: str,
) -> bytes:
    """A measure over a number that runs were made with: a line for each policy, a point for each run."""
    figure = Figure((4.3, 3.2))
    ax = figure.subplots()
    for policy, points in lines.items():
        look, es = shown[policy], [e for _, e in points]
        xs, ys = [x for x, _ in points], [e["mean"] for e in es]
        ax.errorbar(xs, ys, _whiskers(es), fmt=f"{look.marker}-", color=look.colour, ms=5, lw=1.3)
    xs = sorted({x for points in lines.values() for x, _ in points})
    if xs[0] > 0 and xs[-1] >= 8 * xs[0]:
        ax.set_xscale("log")
        ticks = xs[:: math.ceil(len(xs) / 6)]
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.set_xticks([], minor=True)
    ax.set(xlabel=_short(x_label, 50), ylabel=_short(y_label, 34))
    ax.set_title(_short(title, 40), loc="left", fontsize=11, fontweight="bold")
    _legend(figure, [shown[p] for p in lines], 46)
    return _png(figure)


@_styled
def against_kl(
    lines: Mapping[str, Sequence[tuple[Estimate, Estimate]]],
    shown: Mapping[str, Look],
    bounds: Sequence[float],
    title: str,
    y_label: str,
) -> bytes:
    """A measure over the KL to SFT, both with intervals: a line for each policy, dashed ones at best-of-N's bounds."""
    figure = Figure((4.3, 3.6 + 0.2 * (len(lines) // 3)))
    ax = figure.subplots()
    for policy, points in lines.items():
        x, y = zip(*points, strict=True)
        xs, ys = [e["mean"] for e in x], [e["mean"] for e in y]
        look = shown[policy]
        ax.errorbar(xs, ys, _whiskers(y), _whiskers(x), fmt=f"{look.marker}-", color=look.colour, ms=5, lw=1.2)
    entries = [shown[p] for p in lines]
    for bound in bounds:
        ax.axvline(bound, color=shown["bon"].colour, lw=1, ls="--", zorder=1)
    if bounds:
        entries.append(Look("closed form", shown["bon"].colour, ""))
    ax.set(xlabel=label(("kl",)), ylabel=_short(y_label, 34))
    ax.set_title(_short(title, 40), loc="left", fontsize=11, fontweight="bold")
    _legend(figure, entries, 46)
    return _png(figure)


def curves(stage: str, rows: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str, bytes]]:
    """(name, label, picture) of each panel of a stage's training curves that the logged rows allow."""
    logged = dict.fromkeys(k.removeprefix(f"{stage}/") for row in rows for k in row)
    for title, wanted in CURVES[stage]:
        found = {}
        for key in dict.fromkeys(k for w in wanted for k in logged if fnmatchcase(k, w)):
            points = [(r["step"], r[f"{stage}/{key}"]) for r in rows if f"{stage}/{key}" in r]
            found[key] = [p for p in points if all(isinstance(v, int | float) and math.isfinite(v) for v in p)]
        found = {k: v for k, v in found.items() if v}
        if found:
            yield f"training_{stage}_{wanted[0]}", title, _lines(found, title)


@_styled
def _lines(found: Mapping[str, Sequence[tuple[float, float]]], title: str) -> bytes:
    figure = Figure((4.3, 2.8 + 0.2 * ((len(found) - 1) // 2)))
    ax = figure.subplots()
    handles = []
    for (key, points), colour in zip(found.items(), cycle(NEUTRAL), strict=False):
        marker = "o" if len(points) < 12 else ""
        text = _short(key.replace("_", " "), 22)
        handles += ax.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=4, lw=1.5, label=text)
    ax.set(xlabel="step", ylabel=title)
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=9)
    return _png(figure)


def _dots(ax: Axes, series: Series, shown: Mapping[str, Look], splits: Mapping[str, str], x_label: str) -> None:
    step = 0.68 / max(len(series), 1)
    for p, (policy, found) in enumerate(series.items()):
        held = [(i, found[s]) for i, s in enumerate(splits) if s in found]
        ax.errorbar(
            [e["mean"] for _, e in held],
            [i + (p - (len(series) - 1) / 2) * step for i, _ in held],
            xerr=_whiskers([e for _, e in held]),
            fmt=shown[policy].marker,
            color=shown[policy].colour,
            ms=5,
            lw=1.6,
        )
    ax.set_yticks(range(len(splits)), [_short(text, 22) for text in splits.values()])
    ax.set_ylim(len(splits) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    for edge in range(1, len(splits)):
        ax.axhline(edge - 0.5, color=GRID, lw=0.8, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_xlabel(_short(x_label, 50))


def _whiskers(es: Sequence[Estimate]) -> list[list[float]]:
    return [[max(e["mean"] - e["low"], 0) for e in es], [max(e["high"] - e["mean"], 0) for e in es]]


def _height(series: Series, splits: Mapping[str, str]) -> float:
    return min(1.2 + len(splits) * (0.2 + 0.13 * len(series)) + 0.2 * (len(series) // 4), 30)


def _legend(figure: Figure, entries: Sequence[Look], letters: int, loc: Any = "outside upper left") -> None:
    """One row of about `letters` letters, or as many rows as it takes."""
    labels = [_short(e.label, 28) for e in entries]
    columns = max(1, min(len(labels), letters // (max(map(len, labels), default=0) + 5)))
    lines = [Line2D([], [], color=e.colour, marker=e.marker, ls="" if e.marker else "--", ms=6) for e in entries]
    figure.legend(lines, labels, loc=loc, ncols=columns, handletextpad=0.4, columnspacing=1.4)


def _short(text: str, most: int) -> str:
    """One line of at most `most` characters; matplotlib would leave out a legend entry that starts with `_`."""
    text = " ".join(visible(text).split())
    text = text if len(text) <= most else text[: most - 1] + "…"
    return f" {text}" if text.startswith("_") else text


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes here and in full beside the figure.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
