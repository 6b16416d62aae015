"""Who is the better of two answers: judges that read texts, and how far an LLM judge can be trusted.

`length` prefers the longer answer, a baseline that any other judge should beat. `openai:MODEL` is any server that
speaks the OpenAI chat API. `reward:DIRECTORY` prefers the answer that a reward model scores higher; see `proxy`. `gold`
and `reward` compare numbers that samples carry; see `results`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.evaluation import judge_prompts
from jaxrlhf.evaluation.generalisation import outcomes
from jaxrlhf.evaluation.statistics import mean_estimate, wilson
from jaxrlhf.files import Failure, UserError, write_records

OPENAI, REWARD = "openai:", "reward:"
ORDERS = ("both", "random")
MOST_FAILURES = 0.02  # share of replies without a verdict above which win rates would rest on what could be parsed


@dataclass(frozen=True)
class Judge:
    """Which judge, and what judges that read texts need to know; see `config.Evaluation` for what is not said here."""

    name: str
    base_url: str = "https://api.openai.com/v1"
    template: str = "instructions"
    order: str = "both"
    max_requests: int = 10_000
    concurrency: int = 8
    api_key_env: str = "OPENAI_API_KEY"
    prompt: str = (
        ""  # the prompt format in which a reward model reads bare instructions; "" = prompts are read as given
    )


@dataclass(frozen=True)
class Match:
    """Two policies' answers to the prompts of a split: key -> (prompt, a's responses, b's responses)."""

    split: str
    a: str
    b: str
    items: Mapping[Any, tuple[str, Sequence[str], Sequence[str]]]

    @property
    def longer(self) -> dict[Any, float]:
        """By how many characters a's responses are longer than b's."""
        return {key: longer(a, b) for key, (_, a, b) in self.items.items()}


@dataclass
class Pair:
    """Two different answers to one prompt, and what the judge said: in each order shown, whether a won."""

    match: Match
    key: Hashable
    text_a: str
    text_b: str
    shown: list[tuple[bool, judge_prompts.Question]] = field(default_factory=list)  # whether a is the first
    replies: list[str] = field(default_factory=list)

    def won(self) -> list[bool | None]:
        """Whether a is the better one, None where the reply does not say."""
        said = [judge_prompts.verdict(r, q.labels) for (_, q), r in zip(self.shown, self.replies, strict=True)]
        return [None if v is None else (v == 0) == first for (first, _), v in zip(self.shown, said, strict=True)]


Outcomes = dict[Any, float]  # of each prompt with a verdict: 1 where a is better, 0 where b is, .5 for a draw


def reads_texts(name: str) -> bool:
    """Whether a judge of that name decides by the texts alone."""
    return by_length(name) or name.startswith((OPENAI, REWARD))


def by_length(name: str) -> bool:
    """Whether a judge of that name goes by length alone."""
    return name == "length"


def compared(name: str, responses: Sequence[str]) -> Sequence[str]:
    """Of a policy's responses to a prompt, those that a judge of that name looks at."""
    return responses[:1] if name.startswith(OPENAI) else responses


def longer(responses: Sequence[str], others: Sequence[str]) -> float:
    """By how many characters the first are longer, on average."""
    return float(np.mean([len(t) for t in responses]) - np.mean([len(t) for t in others]))


def check(judge: Judge) -> None:
    """`UserError` for settings that no text judge could work with."""
    if not reads_texts(judge.name) or judge.name in (OPENAI, REWARD):
        raise UserError(f"judge={judge.name!r}: known are length, openai:MODEL, reward:DIRECTORY")
    if judge.name.startswith(REWARD):
        if not (directory := Path(judge.name.removeprefix(REWARD))).is_dir():
            raise UserError(f"judge={judge.name!r}: no such directory {directory}")
    elif judge.prompt:
        raise UserError(f"judge_prompt={judge.prompt!r}: only judge=reward:DIRECTORY reads prompts in a format")
    if judge.order not in ORDERS:
        raise UserError(f"judge_order={judge.order!r}: known are {', '.join(ORDERS)}")
    if judge.concurrency < 1 or judge.max_requests < 0:
        raise UserError("judge_concurrency must be at least 1, and max_requests at least 0 (no limit)")
    if judge.name.startswith(OPENAI):
        judge_prompts.read_template(judge.template)


def settings(judge: Judge) -> dict[str, Any]:
    """What results.json says of how a judge was asked; not where its key comes from."""
    asked = {"base_url", "template", "order", "max_requests", "concurrency"} if judge.name.startswith(OPENAI) else set()
    asked |= {"prompt"} if judge.name.startswith(REWARD) else set()
    return {"name": judge.name} | {k: v for k, v in asdict(judge).items() if k in asked}


def decide(
    judge: Judge, matches: Sequence[Match], workdir: Path, log: Callable[[str], None]
) -> tuple[list[Outcomes], dict[str, Any]]:
    """Each match's outcomes, and for an LLM judge the `judge_report` of results.json.

    `length` averages over all pairs of responses to a prompt; an LLM judge compares the first response of each policy.
    """
    if by_length(judge.name):
        return [_longer(match) for match in matches], {}
    return _by_llm(judge, matches, workdir, log)


def _longer(match: Match) -> Outcomes:
    def words(texts: Sequence[str]) -> np.ndarray:
        return np.array([[len(t.split()) for t in texts]])

    return {key: float(outcomes(words(a), words(b))[0]) for key, (_, a, b) in match.items.items()}


def _by_llm(
    judge: Judge, matches: Sequence[Match], workdir: Path, log: Callable[[str], None]
) -> tuple[list[Outcomes], dict[str, Any]]:
    # Imported here: measuring without a server has no use for an HTTP client.
    from jaxrlhf.evaluation.judge_client import Server, replies

    template = judge_prompts.read_template(judge.template)
    pairs = [[_pair(match, key, template, judge.order) for key in match.items] for match in matches]
    asked = [pair for held in pairs for pair in held]
    server = Server(
        model=judge.name.removeprefix(OPENAI),
        base_url=judge.base_url,
        api_key_env=judge.api_key_env,
        concurrency=judge.concurrency,
        max_requests=judge.max_requests,
    )
    folder, start = workdir / "judge", time.perf_counter()
    found, usage = replies([q for p in asked for _, q in p.shown], server, folder / "replies.jsonl", log)
    said = iter(found)
    for pair in asked:
        pair.replies = [next(said) for _ in pair.shown]
    write_records(folder / "verdicts.jsonl", [record for pair in asked for record in _records(pair)])
    seconds = round(time.perf_counter() - start, 3)
    with (folder / "timings.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"seconds": seconds, "requests_sent": usage.sent, "cached": usage.cached}) + "\n")
    told = report(asked)
    _check_failures(told, server.model, folder, log)
    told = {"model": server.model, "template": judge.template, "order": judge.order} | told
    return [{p.key: o for p in held if (o := _outcome(p)) is not None} for held in pairs], {"judge_report": told}


def report(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What results.json says of an LLM judge.

    `consistency` is the share of pairs, of those judged in both orders, in which the same answer won both times; 1 for
    a judge that looks at nothing but the answers, 0.5 for a coin. `position_bias` is how often the answer shown first
    won, less one half: 0 for a fair judge, 0.5 for one that always takes the first. Intervals over pairs.
    """
    told: dict[str, Any] = {
        "n_pairs": len(pairs),
        "n_requests": sum(len(p.shown) for p in pairs),
        "parse_failures": sum(w is None for p in pairs for w in p.won()),
    }
    both = [won for p in pairs if len(won := p.won()) == 2 and None not in won]
    if both:
        told["consistency"] = wilson(sum(x == y for x, y in both), len(both))
    whole = [p for p in pairs if p.shown and None not in p.won()]
    first = [float(np.mean([w == shown for w, (shown, _) in zip(p.won(), p.shown, strict=True)])) - 0.5 for p in whole]
    if first:
        told["position_bias"] = mean_estimate(np.array(first))
    return told


def _pair(match: Match, key: Hashable, template: str, order: str) -> Pair:
    prompt, a, b = match.items[key]
    pair = Pair(match, key, a[0], b[0])
    if pair.text_a != pair.text_b:  # else a draw, whoever judges
        forward = judge_prompts.ask(template, prompt, pair.text_a, pair.text_b)
        backward = judge_prompts.ask(template, prompt, pair.text_b, pair.text_a)
        pair.shown = [(True, forward), (False, backward)]
        if order == "random":
            # By a hash of what is shown, so that the same pair is always asked in the same order.
            pair.shown = [max(pair.shown, key=lambda s: sorted(s[1].labels))]
    return pair


def _outcome(pair: Pair) -> float | None:
    """The mean over the orders shown; one order alone would bring its position bias in, so both must have a verdict."""
    won = [w for w in pair.won() if w is not None]
    if len(won) < len(pair.shown):
        return None
    return sum(won) / len(won) if won else 0.5


def _records(pair: Pair) -> list[dict[str, Any]]:
    """What the judge was shown and said, for whoever wants to check it."""
    who = {"split": pair.match.split, "a": pair.match.a, "b": pair.match.b, "prompt": pair.match.items[pair.key][0]}
    names = {True: "a", False: "b", None: None}
    return [
        {**who, "first": names[first], "winner": names[won], "reply": reply}
        for (first, _), won, reply in zip(pair.shown, pair.won(), pair.replies, strict=True)
    ]


def _check_failures(told: Mapping[str, Any], model: str, folder: Path, log: Callable[[str], None]) -> None:
    failed, n = told["parse_failures"], told["n_requests"]
    if failed:
        log(f"judge {model}: {failed} of {n} replies hold no verdict; see {folder / 'verdicts.jsonl'}")
    if failed > MOST_FAILURES * n:
        raise Failure(
            f"{failed} of {n} replies of judge {model} hold no verdict, more than {MOST_FAILURES:.0%}: "
            f"see {folder / 'verdicts.jsonl'}; another model or judge_template would be right"
        )
