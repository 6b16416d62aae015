"""The judge `reward:DIRECTORY`: answers scored by a reward model, which need not be the one that was trained against.

A reward model that a policy was trained against flatters it; the score of another one, trained on other pairs or from
another seed, is a proxy for the preferences behind both (Gao et al. 2023, arXiv 2210.10760, call the first the proxy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxrlhf.evaluation.judge import REWARD, Judge
from jaxrlhf.files import UserError
from jaxrlhf.logs import progress

if TYPE_CHECKING:
    from jaxrlhf.scoring import RewardModel

CHUNK = 256  # answers of like lengths that are padded to one length


class Answer(NamedTuple):
    """A response to a prompt, and whether it ended by itself."""

    prompt: str
    response: str
    finished: bool = True


def scores(judge: Judge, answers: Sequence[Answer]) -> np.ndarray:
    """Scores [N] of answers. Each different one is scored once, so that equal ones draw.

    A prompt and its response are read as one text, whole: the prompt as it is given, or in the format `judge.prompt`.

    Raises:
      UserError: the directory holds no reward model, an answer is too long for it, or the format does not fit.
    """
    from jaxrlhf import scoring  # imports JAX, for which no other judge has a use

    reward = scoring.of_directory(Path(judge.name.removeprefix(REWARD)))
    number: dict[Answer, int] = {}
    index_N = [number.setdefault(a, len(number)) for a in answers]
    order = sorted(number, key=lambda a: (-len(a.prompt) - len(a.response), a))  # what does not fit fails at once
    score_U = np.zeros(len(order))
    with progress("scoring", len(order)) as bar:
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            reward, told = _formatted(judge.prompt, reward, chunk)
            prompts, responses, finished = zip(*told, strict=True)
            try:
                score_U[[number[a] for a in chunk]] = scoring.score_texts(reward, prompts, responses, finished)
            except UserError as error:
                raise UserError(f"judge={judge.name!r}, its longest answers: {error}") from None
            bar.update(len(chunk))
    return score_U[index_N]


def _formatted(spec: str, reward: RewardModel, answers: Sequence[Answer]) -> tuple[RewardModel, Sequence[Answer]]:
    """The answers in a prompt format, and the reward model with a tokenizer that reads it."""
    if not spec:
        return reward, answers
    from jaxrlhf.data import prompts, tokens

    try:
        made = prompts.prompts(spec, reward.tokenizer)
        told = [Answer(made.prompt({"instruction": a.prompt}), made.response(a.response), a.finished) for a in answers]
        if spec == "chat":
            reward = replace(reward, tokenizer=tokens.with_chat(reward.tokenizer))
    except UserError as error:
        raise UserError(str(error).replace("config.files.prompt", "judge_prompt")) from None
    return reward, told
