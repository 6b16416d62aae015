"""Writes diversity_released.json: made-up texts, and the metrics of the paper's released code on them.

Written from the formulas alone, in loops over plain lists, so that it shares nothing with what ships:

    python tests/golden/make_diversity_released.py
"""

import json
import math
from pathlib import Path

V = 50257
SETS = {
    "plain": ["the cat sat on the mat today", "the cat sat on a mat and slept", "dogs bark at the cat on the mat"],
    "repeats": ["so it goes so it goes so it goes", "so it goes so it goes", "so it goes"],
    "identical": ["one two three four five six"] * 4,
    "identical and too short": ["two words"] * 3,
    "full stops and newlines join": [
        "The U.S. is 3.5\nmiles  wide.",
        "Wide.\n\nThe U.S. is",
        " . .\n",
        "3.5 miles wide",
    ],
    "capitals, tabs and scripts": ["Yes yes YES\tyes", "日本 は 広い です よ", "naïve café, naïve café, naïve café"],
    "empty texts": ["", "", "a b c d e f g"],
    "all empty": ["", " "],
    "short": ["a", "a b", "a b c", "a b c d"],
}


def grams(text, n):
    kept = ""
    for letter in text:
        if letter not in ".\n":
            kept += letter
    words = [w for w in kept.split(" ") if w != ""]
    found = []
    start = 0
    while start + n <= len(words):
        found.append(tuple(words[start : start + n]))
        start += 1
    return found


def distinct_and_ead(texts):
    distinct = ead = 0.0
    for n in (1, 2, 3, 4, 5):
        pool = []
        for text in texts:
            pool += grams(text, n)
        if pool:
            seen = []
            for gram in pool:
                if gram not in seen:
                    seen.append(gram)
            distinct += len(seen) / len(pool)
            ead += len(seen) / (V * (1 - ((V - 1) / V) ** len(pool)))
    return distinct / 5, ead / 5


def cosine(texts):
    distances = []
    for i in range(len(texts)):
        for j in range(i):
            a, b = grams(texts[i], 3), grams(texts[j], 3)
            dot = sum(1 for x in a for y in b if x == y)
            length_a = math.sqrt(sum(1 for x in a for y in a if x == y))
            length_b = math.sqrt(sum(1 for x in b for y in b if x == y))
            distances.append(1 - dot / (length_a * length_b) if dot else 1.0)
    return sum(distances) / len(distances)


if __name__ == "__main__":
    golden = {}
    for name, texts in SETS.items():
        distinct, ead = distinct_and_ead(texts)
        golden[name] = {"texts": texts, "distinct": distinct, "ead": ead, "cosine": cosine(texts)}
    path = Path(__file__).with_name("diversity_released.json")
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
