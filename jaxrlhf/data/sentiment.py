"""A small scorer of sentiment, and the index file that says which records are positive.

The paper's index files are opaque: no classifier was published (PROTOCOL D31). This scorer is a list of words, so that
anybody can check and repeat what it says; whoever has a better one gives its verdicts as an index file.

An index file is JSON: `labels` from the id of each record to whether it is in-distribution, and `sha256` of the labels
(`checksum`); what else is in it is for readers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

from jaxrlhf.files import UserError, read_json, write_json


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


POSITIVE = _words(
    """admire adore amazing awesome beautiful best better bless bonus brave bright calm care caring celebrate charming
    cheerful comfort comfortable confident congratulations cool cute dear delicious delight delighted eager easy enjoy
    enjoyed excellent excited exciting fabulous fair fantastic favorite favourite fine free fresh friend friendly
    friends fun funny generous gentle gift glad good gorgeous grateful great happily happiness happy healthy help
    helped helpful hilarious honest hope hopeful hug incredible inspired interesting joke joy kind kindness laugh
    laughed laughing laughs like liked love loved lovely loves loving loyal luckily lucky nice nicely optimistic
    outstanding paradise passionate patient peace peaceful perfect perfectly play playful pleasant pleased pleasure
    polite positive praise pretty pride promise promising proud recommend relax relaxed relief relieved respect reward
    romantic safe satisfied smart smile smiled smiling sober solved special strong succeed success successful super
    support supportive surprise sweet talented terrific thank thankful thanks thrilled trust welcome well win winner
    wise won wonderful worth wow yay"""
)
NEGATIVE = _words(
    """abandoned abuse abused abusive afraid aggressive alone angry anger annoyed annoying anxiety anxious argue argued
    argument ashamed asshole attack awful awkward bad badly betrayed bitter blame blamed bored boring bother break
    broke broken bully burden cancer cheat cheated cheating complain confused crap crash crazy cried cruel cry crying
    damage dangerous dead death debt depressed depressing depression desperate despise devastated die died dirty
    disappointed disappointing disaster disgusting distant divorce drunk dumb dumped embarrassed embarrassing empty
    enemy evil exhausted fail failed failure fake fault fear fight fighting fights fired freak freaked frustrated
    frustrating fuck fucked fucking furious grief guilt guilty harm hate hated hates heartbroken hell hopeless horrible
    horrified hostile hurt hurting hurts idiot ignore ignored ill insane insecure insult jealous jealousy jerk kill
    killed lazy leave liar lie lied lies lonely lose loser losing lost lying mad mean mess messed miserable miss
    mistake mistakes nasty negative nervous nightmare offended pain painful panic panicked pathetic poor problem
    problems puke rage regret reject rejected resent rude ruin ruined sad sadly scared scary scream screamed screaming
    selfish shame shit shitty shock shouting sick sorry stole stress stressed stressful stuck stupid suck sucks suffer
    suffering suicidal suicide terrible terrified threat threatened tired torn toxic trapped trauma trouble ugly unfair
    unhappy upset useless victim violent vomit weak weird worried worry worse worst worthless wrong
    yelled yelling"""
)
NEGATIONS = _words(
    """aint arent cannot cant couldnt didnt doesnt dont hardly hasnt havent isnt never no nobody none nor not nothing
    shouldnt wasnt werent without wont wouldnt"""
)
REACH = 3  # words that a negation turns round


def score(text: str) -> float:
    """Positive less negative words, over all words: in [-1, 1], 0 for an empty text.

    A word within 3 words after a negation counts as its opposite.
    """
    words = re.findall(r"[^\W\d_]+", re.sub("['’]", "", text.casefold()))
    total, negated = 0, 0
    for word in words:
        sign = (word in POSITIVE) - (word in NEGATIVE)
        total += -sign if negated else sign
        negated = REACH if word in NEGATIONS else max(negated - 1, 0)
    return total / max(len(words), 1)


def labels(texts: Mapping[str, str], training: Iterable[str]) -> tuple[dict[str, bool], float]:
    """Whether each text scores at least as high as the median of the training texts, and that median.

    Args:
      texts: from the id of each record to what it is about.
      training: ids of the training records; the paper takes about half of them, and so do we.
    """
    scores = {name: score(text) for name, text in texts.items()}
    middle = median(scores[name] for name in training)
    return {name: value >= middle for name, value in scores.items()}, middle


def checksum(found: Mapping[str, bool]) -> str:
    """SHA-256 of the labels as JSON, with sorted keys, no spaces, and all but ASCII escaped."""
    return hashlib.sha256(json.dumps(found, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(path: Path, found: Mapping[str, bool], middle: float) -> None:
    """Writes an index file of our own labels."""
    scorer = f"jaxrlhf/data/sentiment.py, at least {middle:.6g}"
    write_json(path, {"scorer": scorer, "sha256": checksum(found), "labels": dict(found)})


def read(path: Path) -> dict[str, bool]:
    """The labels of an index file; `UserError` if it is none, or its checksum is not that of its labels."""
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("labels"), dict) or "sha256" not in found:
        raise UserError(f'{path}: not a sentiment index; expected {{"sha256": …, "labels": {{id: true or false}}}}')
    for name, label in found["labels"].items():
        if not isinstance(label, bool):
            raise UserError(f"{path}: the label of {name!r} is {label!r}; it must be true or false")
    if found["sha256"] != (right := checksum(found["labels"])):
        raise UserError(f"{path}: its sha256 is not that of its labels, {right}; the file was changed or cut")
    return found["labels"]
