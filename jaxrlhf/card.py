"""The model card of an exported model: how it was trained and what was measured, as Markdown.

Texts from files, such as a config's names and splits, are escaped: they can neither format nor link.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxrlhf import names
from jaxrlhf.config import Experiment, Optim
from jaxrlhf.data.selection import main_prompt

TITLES = {p: f"{names.TITLES[p]} policy" for p in names.POLICIES if p != "bon"} | {"reward": "reward model"}
TASKS = {
    "world": "generated forum posts to summarise, the embedded world of jaxrlhf",
    "files": "texts from files",
    "datasets": "public or own datasets",
}
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
MEASURES = ("win_rate", "gold", "score", "length")
LIMITS = {
    "policy": (
        "It was made to study what RLHF does to generalisation and diversity, not to be deployed; nobody checked its "
        "answers for harm or truth.",
        "A win rate judged by the reward model that a policy was trained against flatters it.",
    ),
    "reward": (
        "Its scores compare responses to one prompt; they are no measure of truth, and a policy that is optimised "
        "against them finds where they err.",
        "A score is read at a text's last token: end the text of a finished answer with the end-of-text token, and of "
        "an unfinished one with none.",
    ),
}
MARKED = re.compile(r"[^\w .,:/=+()-]")  # all that Markdown, HTML or YAML could read as its own


@dataclass(frozen=True)
class Told:
    """What a card is made of."""

    policy: str  # of TITLES
    config: Experiment
    family: str
    parameters: int
    base: str  # hub id of the base, where it has one
    summaries: Mapping[str, Mapping[str, Any]]  # of the stages behind it
    results: Mapping[str, Any]  # results.json, or {}


def card(told: Told) -> str:
    """The README.md of an exported directory."""
    return "\n".join((*_head(told), *_trained(told), *_measured(told), *_use(told), *_limits(told))) + "\n"


def safe(text: object) -> str:
    """Text of others as one line that Markdown, HTML and YAML read as text."""
    return MARKED.sub(lambda m: f"&#{ord(m[0])};", " ".join(str(text).split()))


def estimate(e: Mapping[str, Any]) -> str:
    """A number with its 95 % interval and the number of items behind it."""
    return f"{e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}], n = {e['n']}"


def _head(told: Told) -> Iterator[str]:
    kind = "text-classification" if told.policy == "reward" else "text-generation"
    yield from ("---", "library_name: transformers", f"pipeline_tag: {kind}")
    if HUB.fullmatch(told.base):
        yield f"base_model: {told.base}"
    yield from (f"tags: [jaxrlhf, rlhf, {told.policy}]", "---", "")
    yield from (f"# {safe(told.config.name)}: {TITLES[told.policy]}", "")
    yield f"A decoder of the {told.family} family with {told.parameters:,} parameters, trained with jaxrlhf on"
    yield from (f"{TASKS[told.config.task]}.", "")


def _trained(told: Told) -> Iterator[str]:
    yield from ("## How it was trained", "")
    yield from _table(("what", "how"), _facts(told))


def _facts(told: Told) -> Iterator[tuple[str, str]]:
    c = told.config
    own = "pretrained here" if c.pretrain.init == "scratch" else f"{c.pretrain.init}, shipped with jaxrlhf"
    yield "base", safe(told.base) or ("an imported model" if c.model.init else own)
    yield "frozen", f"{c.model.freeze_layers:g} of the layers, from the bottom, with embeddings and output head"
    yield "lengths", f"{c.model.prompt_length} tokens of prompt, {c.model.response_length} of response"
    if c.task == "files":
        yield "prompt format", safe(c.files.prompt.replace("\n", "\\n"))
        yield "sources", safe(", ".join(c.files.id_sources))
    if c.task == "datasets":
        yield "prompt format", safe(main_prompt(c.datasets).replace("\n", "\\n"))
        yield "datasets", safe(", ".join(dict.fromkeys((c.datasets.sft, c.datasets.preferences, *c.datasets.far))))
        yield "in-distribution", f"split {c.datasets.split}, {c.datasets.subset:g} of its training records"
    examples = told.summaries["sft"].get("examples")
    yield "SFT", f"{c.sft.loop.steps} steps of {c.sft.batch_size}, {examples} demonstrations, {_optim(c.sft.optim)}"
    reward = told.summaries.get("reward", {})
    if "init" in reward:
        yield "reward model", f"from elsewhere: {safe(str(reward['init']))}, read through {reward['reads']}"
    elif reward:
        pairs = reward.get("pairs", {}).get("train")
        by = "simulated annotators" if c.task == "world" else "the files' verdicts"
        yield (
            "reward model",
            f"from SFT; {c.reward.loop.steps} steps of {c.reward.batch_size}, {pairs} pairs by {by}, "
            f"{_optim(c.reward.optim)}{_ensemble(c)}",
        )
    if "ppo" in told.summaries:
        yield (
            "PPO",
            f"from SFT; {c.ppo.loop.steps} steps of {c.ppo.batch_size} prompts, {c.ppo.epochs} epochs of "
            f"{c.ppo.minibatches} minibatches, KL coefficient {c.ppo.kl_coef:g}, {_optim(c.ppo.optim)}",
        )
    yield from _method(told)
    yield "seed", str(c.seed)


def _method(told: Told) -> Iterator[tuple[str, str]]:
    c = told.config
    if "dpo" in told.summaries:
        pairs = told.summaries["dpo"]["pairs"]["train"]
        how = f"{c.dpo.loop.steps} steps of {c.dpo.batch_size}, {pairs} pairs, loss {c.dpo.loss}, beta {c.dpo.beta:g}"
        yield "DPO", f"from SFT; {how}, {_optim(c.dpo.optim)}"
    for stage, m in (("rloo", c.rloo), ("grpo", c.grpo)):
        if stage in told.summaries:
            how = f"{m.loop.steps} steps of {m.batch_size} prompts, {m.samples} responses to each"
            yield names.TITLES[stage], f"from SFT; {how}, KL coefficient {m.kl_coef:g}, {_optim(m.optim)}"


def _ensemble(c: Experiment) -> str:
    return f"; {c.reward.ensemble} members, combined by {safe(c.reward.combine)}" if c.reward.ensemble > 1 else ""


def _optim(o: Optim) -> str:
    return f"AdamW, learning rate {o.lr:g}, {safe(o.schedule)}"


def _measured(told: Told) -> Iterator[str]:
    yield from ("", "## What was measured", "")
    rows = list(_accuracy(told) if told.policy == "reward" else _numbers(told))
    if not rows:
        yield "Nothing yet: the workdir had no results when this was written."
        return
    if told.policy == "reward":
        yield from ("How often the preferred response of a held-out pair scores higher:", "")
        yield from _table(("split", "accuracy"), rows)
        return
    c = told.config
    yield f"{c.sampling.samples_per_prompt} responses a prompt at temperature {c.sampling.temperature:g}; win rates"
    yield f"against the reference response, judged by the {safe(told.results.get('judge', c.evaluation.judge))} judge,"
    yield from ("draws counting half; 95 % intervals. Splits named ood are out of distribution.", "")
    yield from _table(("split", *(m.replace("_", " ") for m in MEASURES), "per-input EAD"), rows)


def _accuracy(told: Told) -> Iterator[tuple[str, str]]:
    for split, e in told.summaries["reward"].get("accuracy", {}).items():
        yield safe(split), estimate(e)


def _numbers(told: Told) -> Iterator[tuple[str, ...]]:
    for split, found in told.results.get("policies", {}).get(told.policy, {}).items():
        ead = found.get("diversity", {}).get("per_input", {}).get("ead")
        cells = [*(found.get(m) for m in MEASURES), ead]
        yield safe(split), *(estimate(e) if e else "not measured" for e in cells)


def _use(told: Told) -> Iterator[str]:
    kind = "SequenceClassification" if told.policy == "reward" else "CausalLM"
    yield from ("", "## Use", "", "```python")
    yield f"from transformers import AutoModelFor{kind}, AutoTokenizer"
    yield from ("", 'tokenizer = AutoTokenizer.from_pretrained("DIR")')
    yield from (f'model = AutoModelFor{kind}.from_pretrained("DIR")', "```", "")
    if told.policy != "reward":
        yield "Prompts must have the form that it was trained on. `generation_config.json` says how it was sampled."
        return
    n = told.summaries["reward"].get("normalisation", {})
    yield f"Scores have mean 0 and standard deviation 1 on {n.get('n')} samples of the SFT policy, once"
    yield "`jaxrlhf_score_bias` of config.json is added: transformers has no place for a bias. Comparisons need none."


def _limits(told: Told) -> Iterator[str]:
    yield from ("", "## Limits", "")
    yield from (f"- {line}" for line in LIMITS["reward" if told.policy == "reward" else "policy"])
    cuts = [
        (stage, split, n) for stage, s in told.summaries.items() for split, n in s.get("truncated", {}).items() if n
    ]
    for stage, split, n in cuts:
        yield f"- {n} prompts of {stage} ({safe(split)}) were too long and lost their left end."


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
