"""Prompt formats: how a record's fields become a prompt, and what its response begins with.

A format is a name of `FORMATS`, `chat`, or a text with `{field}`s. One format serves training, scoring and sampling, so
that no stage sees a prompt and response joined in another way than the rest (PROTOCOL D29).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxrlhf.data import tokens
from jaxrlhf.files import UserError

FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Format:
    """`text` with `{field}`s. `with_input` is for records that have an input; `before` begins every response."""

    text: str
    with_input: str = ""
    before: str = ""


_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
FORMATS = {
    # Kirk et al. 2024, released code: summarisation_formatting.py.
    "tldr": Format("SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:", before=" "),
    "cnndm": Format("ARTICLE: {article}\nTL;DR:", before=" "),
    # Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO": tldr_dataset.py.
    "tldr_double": Format("SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:", before=" "),
    "cnndm_double": Format("Article:\n{article}\n\nTL;DR:\n"),
    # Taori et al. 2023 and AlpacaFarm: v0_inputs_noinputs.json.
    "alpaca": Format(
        _ALPACA.format("") + "\n\n### Instruction:\n{instruction}\n\n### Response:",
        with_input=_ALPACA.format(", paired with an input that provides further context")
        + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    ),
}


@dataclass(frozen=True)
class Prompts:
    """`prompt` makes a record's prompt, `response` a text its response; `fields` are those that a record must have."""

    prompt: Callable[[Mapping[str, str]], str]
    response: Callable[[str], str]
    fields: frozenset[str]


def prompts(spec: str, tokenizer: tokens.Tokenizer | None = None, key: str = "config.files.prompt") -> Prompts:
    """The format that the config's `key` names or is.

    A record's `input` follows its instruction after a blank line where the format has no place for it.

    Args:
      spec: a name of `FORMATS`, "chat", or a text with `{field}`s.
      tokenizer: whose chat template "chat" means.
      key: for errors.

    Raises:
      UserError: no such format, or `chat` without a template; and, of a record, a field that it lacks.
    """
    if spec == "chat":
        if tokenizer is None or tokenizer.theirs is None:
            raise UserError(f"{key}='chat': a chat template comes with an imported model; set config.model.init")
        return Prompts(lambda r: tokens.render_chat(tokenizer, question(r)), str, frozenset(("instruction",)))
    if spec not in FORMATS and not FIELD.search(spec):
        raise UserError(f"{key}={spec!r}: known are {', '.join(FORMATS)}, chat, or a text with {{instruction}}")
    made = FORMATS.get(spec, Format(spec))
    fields = frozenset(FIELD.findall(made.text))

    def prompt(record: Mapping[str, str]) -> str:
        if record.get("input", "").strip() and made.with_input:
            return fill(made.with_input, record, key)
        joined = {"instruction": question(record)} if "instruction" in record and "input" not in fields else {}
        return fill(made.text, {**record, **joined}, key)

    def response(text: str) -> str:
        return made.before + text.lstrip() if made.before else text

    return Prompts(prompt, response, fields)


def fill(template: str, record: Mapping[str, str], key: str) -> str:
    """The template with each `{field}` replaced by the record's, once: braces in a record's text stay text."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in record:
            raise UserError(f"{key} asks for {{{match[1]}}}; the record has {', '.join(sorted(record)) or 'no field'}")
        return record[match[1]]

    return FIELD.sub(value, template)


def question(record: Mapping[str, str]) -> str:
    """What is asked: the instruction, and after a blank line its input, where there is one."""
    given = record.get("input", "")
    return f"{record.get('instruction', '')}\n\n{given}" if given.strip() else record.get("instruction", "")
