"""How often the 95 % intervals across inputs hold the truth, on outputs of your own.

    python launch/measure_coverage.py --n=100 --sets=400 --words=45 outputs/*.json

All outputs of the files are the population; a set is n of them without repeats, each cut to a random number of words
from a third of `--words` to all. The truth is the mean over the sets. Prints each metric's share of sets whose interval
holds it, beside the true deviation of the metric and the one that the intervals claim.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxrlhf.evaluation.diversity import of_texts
from jaxrlhf.evaluation.measures import LIMITS
from jaxrlhf.evaluation.statistics import Z, blocks, jackknife
from jaxrlhf.logs import progress


def population(files: Sequence[Path], words: int, rng: np.random.Generator) -> list[str]:
    """The outputs that are not empty, cut. What has no spaces counts as one word, and is left out if it is huge."""
    texts = [r["output"] for file in files for r in json.loads(file.read_text(encoding="utf-8"))]
    cut = [" ".join(t.split()[: rng.integers(words // 3, words + 1)]) for t in texts if t.strip()]
    return [t for t in cut if len(t) < 8 * words]


def main() -> None:
    """Draws the sets and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="alpaca_eval's model_outputs.json")
    for name, default in (("n", 100), ("sets", 400), ("words", 45)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    texts = population(given.files, given.words, rng)
    found: dict[str, list[tuple[float, float, float]]] = {}
    bar = progress(f"{given.sets} sets of {given.n} of {len(texts)}", given.sets)
    for _ in range(given.sets):
        drawn = [[texts[i]] for i in rng.choice(len(texts), given.n, replace=False)]
        for name, held in of_texts(drawn, blocks(np.arange(given.n)), paper_compat=False).across_input.items():
            e = jackknife(*held, LIMITS[name])
            found.setdefault(name, []).append((e["low"], e["mean"], e["high"]))
        bar.update()
    bar.close()
    print(f"{'metric':<14}{'held, %':>8}{'deviation':>12}{'claimed':>12}")
    for name, rows in found.items():
        low, mean, high = np.array(rows).T
        held = 100 * np.mean((low <= mean.mean()) & (mean.mean() <= high))
        print(f"{name:<14}{held:>8.1f}{mean.std():>12.5f}{((high - low) / 2 / Z).mean():>12.5f}")


if __name__ == "__main__":
    main()
