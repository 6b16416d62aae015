"""The report's figures: one function a picture, to a PNG whose bytes do not hang on the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Results = Mapping[str, Any]
# Okabe & Ito's colours, which stay apart for colour-blind eyes.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}
NAMES = {"sft": "SFT", "bon": "best-of-N", "ppo": "PPO", "id": "in-distribution"}
LABELS = {
    "win_rate": "win rate against the reference",
    "gold": "gold reward",
    "score": "reward-model score",
    "length": "words",
    "ead": "EAD",
    "distinct": "distinct-n",
    "cosine": "3-gram cosine diversity",
}
TITLES = {"per_input": "per input", "across_input": "across inputs"}
CURVES = {
    "pretrain": ("loss", "validation_loss"),
    "sft": ("loss", "validation_loss"),
    "reward": ("loss", "accuracy", "accuracy_id"),
    "ppo": ("score", "gold", "kl", "rollout_entropy", "length", "explained_variance"),
}


def draw(results: Results, metrics: Mapping[str, Sequence[Mapping[str, float]]], folder: Path) -> dict[str, Path]:
    """Draws every figure that the numbers allow into `folder`; name -> file, in the order of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    pictures: dict[str, Callable[[Results], Any]] = {
        "headline": _headline,
        "generalisation": _generalisation,
        "gap": _gap,
        "diversity": _diversity,
        "tradeoff": _tradeoff,
    }
    found = {}
    with plt.rc_context(STYLE):
        figures = {name: make(results) for name, make in pictures.items()}
        figures |= {f"training_{stage}": _curves(stage, rows) for stage, rows in metrics.items()}
        for name, figure in figures.items():
            if figure is not None:
                found[name] = folder / f"{name}.png"
                figure.savefig(found[name], dpi=130, bbox_inches="tight", metadata={"Software": None})
                plt.close(figure)
    return found


def name(key: str) -> str:
    """A policy's or split's name as a reader says it; from a file it may hold anything, so mathematics is disarmed."""
    return NAMES.get(key, key.removeprefix("ood_").replace("$", r"\$"))


def measure(results: Results) -> str | None:
    """What says best how well a policy does here: the gold reward, else the win rate, else the score."""
    held = [set(m) for splits in results["policies"].values() for m in splits.values()]
    return next((k for k in ("gold", "win_rate", "score") if any(k in h for h in held)), None)


def _splits(results: Results) -> list[str]:
    found = dict.fromkeys(split for splits in results["policies"].values() for split in splits)
    return [s for s in ("id", "all") if s in found] + [s for s in found if s not in ("id", "all")]


def _bars(ax: Axes, results: Results, label: str, pick: Callable[[Mapping], Mapping | None]) -> bool:
    """Points with intervals, a group for each split, a colour for each policy; whether anything was there to draw."""
    splits, policies = _splits(results), list(results["policies"])
    drawn = False
    for p, policy in enumerate(policies):
        xs, es = [], []
        for s, split in enumerate(splits):
            e = pick(results["policies"][policy].get(split, {}))
            if e:
                xs.append(s + (p - (len(policies) - 1) / 2) * 0.7 / len(policies))
                es.append(e)
        if es:
            drawn = True
            ax.errorbar(xs, [e["mean"] for e in es], _whiskers(es), fmt="o", ms=5, color=_colour(p), label=name(policy))
    ax.set_xticks(range(len(splits)), [name(s) for s in splits], rotation=20, ha="right")
    ax.set_ylabel(label)
    ax.grid(axis="x", visible=False)
    return drawn


def _whiskers(es: Sequence[Mapping[str, float]]) -> list[list[float]]:
    return [[max(e["mean"] - e["low"], 0) for e in es], [max(e["high"] - e["mean"], 0) for e in es]]


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _diversity_of(scope: str, metric: str) -> Callable[[Mapping], Mapping | None]:
    return lambda m: m.get("diversity", {}).get(scope, {}).get(metric)


def _scope(results: Results) -> str:
    """Per input where any policy has several samples a prompt, else across inputs."""
    held = [m.get("diversity", {}) for splits in results["policies"].values() for m in splits.values()]
    return "per_input" if any("per_input" in h for h in held) else "across_input"


def _headline(results: Results) -> Any:
    best, scope = measure(results), _scope(results)
    figure, axes = plt.subplots(1, 2 if best else 1, figsize=(11 if best else 6, 4), squeeze=False)
    if best:
        _bars(axes[0, 0], results, LABELS[best], lambda m: m.get(best))
        axes[0, 0].set_title("Generalisation: how well each policy does")
    _bars(axes[0, -1], results, f"EAD {TITLES[scope]}", _diversity_of(scope, "ead"))
    axes[0, -1].set_title("Diversity: how varied its outputs are")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def _generalisation(results: Results) -> Any:
    held = {k for splits in results["policies"].values() for m in splits.values() for k in m}
    shown = [k for k in ("win_rate", "gold", "score", "length") if k in held]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 3.8), squeeze=False)
    for ax, key in zip(axes[0], shown, strict=True):
        _bars(ax, results, LABELS[key], lambda m, key=key: m.get(key))
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def _gap(results: Results) -> Any:
    gaps = results["generalisation_gap"]
    best = measure(results)
    if not best or not any(best in e for splits in gaps.values() for e in splits.values()):
        return None
    figure, ax = plt.subplots(figsize=(7, 3.6))
    _bars(ax, {"policies": gaps}, f"in- minus out-of-distribution,\n{LABELS[best]}", lambda m: m.get(best))
    ax.axhline(0, color="grey", lw=1)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _diversity(results: Results) -> Any:
    scopes = ("per_input", "across_input") if _scope(results) == "per_input" else ("across_input",)
    metrics = ("ead", "distinct", "cosine")
    figure, axes = plt.subplots(len(scopes), 3, figsize=(14, 3.7 * len(scopes)), squeeze=False)
    for row, scope in zip(axes, scopes, strict=True):
        for ax, metric in zip(row, metrics, strict=True):
            _bars(ax, results, LABELS[metric], _diversity_of(scope, metric))
            ax.set_title(TITLES[scope])
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def _tradeoff(results: Results) -> Any:
    best, scope = measure(results), _scope(results)
    if not best:
        return None
    figure, ax = plt.subplots(figsize=(7, 4.6))
    markers = "osD^vP*Xh<>"
    splits = _splits(results)
    for p, found in enumerate(results["policies"].values()):
        for split, m in found.items():
            x, y = _diversity_of(scope, "ead")(m), m.get(best)
            if x and y:
                marker = markers[splits.index(split) % len(markers)]
                ax.errorbar(
                    x["mean"], y["mean"], _whiskers([y]), _whiskers([x]), fmt=marker, color=_colour(p), ms=6, lw=1
                )
    for p, policy in enumerate(results["policies"]):
        ax.plot([], [], "o", color=_colour(p), label=name(policy))
    for s, split in enumerate(splits):
        ax.plot([], [], markers[s % len(markers)], color="grey", label=name(split))
    ax.set_xlabel(f"EAD {TITLES[scope]}")
    ax.set_ylabel(LABELS[best])
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _curves(stage: str, rows: Sequence[Mapping[str, float]]) -> Any:
    shown = [k for k in CURVES[stage] if any(f"{stage}/{k}" in r for r in rows)]
    if not shown:
        return None
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 2.8 * lines), squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, key in zip(axes.flat, shown, strict=False):
        points = [(r["step"], r[f"{stage}/{key}"]) for r in rows if f"{stage}/{key}" in r]
        ax.plot(*zip(*points, strict=True), color=COLOURS[0], marker="." if len(points) < 30 else None)
        ax.set_title(key.replace("_", " "))
        ax.set_xlabel("step")
    figure.tight_layout()
    return figure
