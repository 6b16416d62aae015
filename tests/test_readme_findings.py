"""The README's findings are the numbers of the stored results."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STORED = ROOT / "docs" / "findings.json"
SCRIPT = runpy.run_path(str(ROOT / "launch" / "readme_findings.py"))


def section():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text[text.index(SCRIPT["START"]) : text.index(SCRIPT["END"]) + len(SCRIPT["END"])]


def of(cell):
    """A cell's mean, low and high as they are written."""
    return re.findall(r"-?\d+\.\d+", cell)


@pytest.mark.skipif(not STORED.exists(), reason="configs/findings.py was not run: there is no docs/findings.json")
def test_the_readme_says_what_the_stored_results_say(tmp_path):
    results = json.loads(STORED.read_text(encoding="utf-8"))
    rows = [
        [c.strip() for c in line.strip("|\n").split("|")] for line in section().splitlines() if line.startswith("|")
    ]
    named = {row[0]: row[1:] for row in rows}
    for policy, name in (("sft", "SFT"), ("ppo", "PPO"), ("dpo", "DPO"), ("grpo", "GRPO")):
        splits = results["policies"][policy]
        found = [splits["id"]["win_rate"], splits["ood_news"]["win_rate"]]
        found += [splits["id"]["diversity"][scope]["ead"] for scope in ("per_input", "across_input")]
        for cell, e in zip(named[name], found, strict=False):
            for written, value in zip(of(cell), (e["mean"], e["low"], e["high"]), strict=True):
                assert written == f"{value:.{len(written.partition('.')[2])}f}"
    for p in (p for p in results["tradeoff"]["points"] if p["policy"] == "ppo"):
        kl = p["splits"]["id"]["kl"]["mean"]
        written = of(named[p["setting"]["ppo.kl_coef"]][0])[0]
        assert written == f"{kl:.{len(written.partition('.')[2])}f}"
    verdicts = re.findall(r"^- \*\*(\w+)\*\*: (.*?)\. ", section(), re.MULTILINE)
    assert verdicts == [(c["verdict"], c["claim"]) for c in results["claims"]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert SCRIPT["block"](SCRIPT["report"].read_results(tmp_path)) == section()
