"""Makes configs/smoke: small files in the formats of the real datasets, on which recipes' smoke variants run.

    python launch/make_smoke_data.py configs/smoke

Every text is of the embedded world (`jaxrlhf/data/world.py`); nothing is copied from the datasets themselves.
"""

import json
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxrlhf.data import world
from jaxrlhf.files import write_json, write_text

POST = re.compile(r"SUBREDDIT: r/(?P<subreddit>.*)\nTITLE: (?P<title>.*)\nPOST: (?P<post>.*)\nTL;DR:")
KINDS = ("id", "ood_subreddit", "ood_length", "ood_sentiment")


def made(use: str, count: int, kinds: Sequence[str] = KINDS) -> list[dict[str, str]]:
    """Records of the world, of each kind in turn."""
    seed = zlib.crc32(use.encode()) % 2**31
    return [world.post(seed, "evaluation", kinds[i % len(kinds)], i) for i in range(count)]


def posts(use: str, count: int) -> list[dict[str, str]]:
    """`vwxyzjn/summarize_from_feedback_tldr_3_filtered`."""
    found = []
    for i, r in enumerate(made(use, count)):
        match = POST.fullmatch(r["prompt"])
        assert match is not None
        found.append({"id": f"t3_{use}{i}", **match.groupdict(), "summary": r["response"].strip()})
    return found


def comparisons(split: str, count: int) -> list[dict[str, object]]:
    """`openai/summarize_from_feedback`: the post's own summary against another post's."""
    found = posts(f"pairs {split}", count)
    records = []
    for i, (post, other) in enumerate(zip(found, found[1:] + found[:1], strict=True)):
        sides = [{"text": f" {p['summary']}", "policy": "world", "note": None} for p in (post, other)]
        info = {k: post[k] for k in ("id", "post", "title", "subreddit")}
        kept = {"worker": "world", "batch": "batch0", "split": split, "extra": {"confidence": None}}
        records.append({"info": info, "summaries": sides[:: 1 - 2 * (i % 2)], "choice": i % 2, **kept})
    return records


def instructions(use: str, count: int) -> list[dict[str, str]]:
    """AlpacaFarm's instruction, input and output."""
    found = []
    for i, post in enumerate(posts(use, count)):
        asked = ("Sum up this post.", "What is this post about?", f"Sum up: {post['post']}")[i % 3]
        found.append({"instruction": asked, "input": post["post"] if i % 3 < 2 else "", "output": post["summary"]})
    return found


def lines(path: Path, records: Iterable[object]) -> None:
    write_text(path, "".join(json.dumps(r) + "\n" for r in records))


def write(folder: Path) -> None:
    for split, count in (("train", 96), ("validation", 16), ("test", 48)):
        lines(folder / "tldr" / f"{split}.jsonl", posts(split, count))
    lines(folder / "tldr_comparisons.jsonl", comparisons("train", 64) + comparisons("valid2", 32))
    news = made("news", 8, ["ood_news"])
    articles = [r["prompt"].removeprefix("ARTICLE: ").removesuffix("\nTL;DR:") for r in news]
    rows = zip(articles, news, strict=True)
    cnn = [{"id": str(i), "article": a, "highlights": r["response"].strip()} for i, (a, r) in enumerate(rows)]
    lines(folder / "cnn_dailymail" / "test.jsonl", cnn)
    for name, count in (("sft", 64), ("unlabeled", 48), ("val", 12)):
        write_json(folder / "alpaca_farm" / f"{name}.json", instructions(name, count))
    pairs = instructions("preference", 64)
    rated = []
    for i, (r, other) in enumerate(zip(pairs, pairs[1:] + pairs[:1], strict=True)):
        outputs = [r["output"], other["output"]][:: 1 - 2 * (i % 2)]
        asked = {"instruction": r["instruction"], "input": r["input"]}
        rated.append(asked | {"output_1": outputs[0], "output_2": outputs[1], "preference": 1 + i % 2})
    write_json(folder / "alpaca_human_preference.json", rated)
    lines(folder / "alpaca_farm_id_test.jsonl", instructions("id test", 12))
    far = [r | {"dataset": "world", "generator": "world"} for r in instructions("alpaca eval", 8)]
    write_json(folder / "alpaca_eval.json", far)
    steps = [
        {
            "instruction": f"{r['instruction']} Then ask a question.",
            "instances": [{k: r[k] for k in ("input", "output")}],
        }
        for r in instructions("sequential", 8)
    ]
    lines(folder / "sequential_instructions.jsonl", steps)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
