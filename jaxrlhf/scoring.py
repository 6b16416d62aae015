"""Scores by a reward model from elsewhere: on ids where its tokenizer is the policy's, else through text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxrlhf import model, policies, weights
from jaxrlhf.data import batches, tokens
from jaxrlhf.files import UserError
from jaxrlhf.split import split
from jaxrlhf.types import Frozen, Scorer


@dataclass(frozen=True)
class RewardModel:
    """A reward model with the tokenizer that it reads texts by."""

    arch: model.Architecture
    frozen: Frozen
    scorer: Scorer
    tokenizer: tokens.Tokenizer


def load(directory: Path) -> RewardModel:
    """Reads what `jaxrlhf export --policy=reward` or transformers wrote; `UserError` if a part is missing or wrong."""
    arch, params, head = weights.load_reward(directory, dtype=jnp.float32)
    tokenizer = tokens.pretrained(directory)
    if tokenizer.size > arch.vocab_size:
        raise UserError(f"{directory}: its tokenizer has {tokenizer.size} ids, its embeddings {arch.vocab_size} rows")
    frozen, top = split(params, 0)
    return RewardModel(arch, frozen, Scorer(top=top, head=head), tokenizer)


def score_texts(
    reward: RewardModel,
    prompts: Sequence[str],
    responses: Sequence[str],
    finished: Sequence[bool] | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """Scores [N] of responses, each read with its prompt as one text after the reward model's bos.

    Args:
      reward: the reward model.
      prompts: N texts.
      responses: N texts, as they follow the prompts.
      finished: whether each response ended by itself, and so is followed by end-of-text; all did where none is given.
        An unfinished answer must not look finished (PROTOCOL D13).
      batch_size: texts at a time.

    Raises:
      UserError: a text has more tokens than the model has positions for.
    """
    rows = reward.tokenizer.encode_joined(prompts, responses)
    ended = [True] * len(rows) if finished is None else finished
    rows = [ids + [reward.tokenizer.eos_id] * bool(end) for ids, end in zip(rows, ended, strict=True)]
    return _score(reward, rows, batch_size)


def score_ids(
    reward: RewardModel,
    tokenizer: tokens.Tokenizer,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    batch_size: int = 16,
) -> np.ndarray:
    """Scores [N] of responses as a policy with `tokenizer` drew them, end-of-text included where it was drawn.

    With the same tokenizer, the reward model reads these very ids; with another one, the texts that they spell, for
    prompts without bos.
    """
    if same_ids(tokenizer, reward.tokenizer):
        return _score(reward, [[*p, *q] for p, q in zip(prompts, responses, strict=True)], batch_size)
    bare = [p[len(tokenizer.bos) :] if tuple(p[: len(tokenizer.bos)]) == tokenizer.bos else p for p in prompts]
    prompt_texts, response_texts = map(tokenizer.decode, bare), map(tokenizer.decode_response, responses)
    finished = [bool(q) and q[-1] == tokenizer.eos_id for q in responses]
    return score_texts(reward, list(prompt_texts), list(response_texts), finished, batch_size)


def same_ids(policy: tokens.Tokenizer, reward: tokens.Tokenizer) -> bool:
    """Whether every id of the policy's means to the reward model what it means to the policy."""
    theirs = reward.engine.get_vocab()
    ends = (policy.bos, policy.eos_id) == (reward.bos, reward.eos_id)
    return ends and all(theirs.get(token) == i for token, i in policy.engine.get_vocab().items())


def _score(reward: RewardModel, rows: Sequence[Sequence[int]], batch_size: int) -> np.ndarray:
    longest = max(map(len, rows), default=1)
    if reward.arch.positions == "learned" and longest > reward.arch.max_positions:
        row = max(range(len(rows)), key=lambda i: len(rows[i]))
        raise UserError(f"text {row + 1} has {longest} tokens; the reward model reads {reward.arch.max_positions}")
    width = -(-longest // batches.WIDTHS) * batches.WIDTHS
    width = min(width, reward.arch.max_positions) if reward.arch.positions == "learned" else width
    scores = []
    for start in range(0, len(rows), batch_size):
        some = [list(r) for r in rows[start : start + batch_size]]
        whole = some + [some[0]] * (batch_size - len(some))  # one shape to compile
        token_BT, mask_BT = (jnp.asarray(x) for x in batches.pad(whole, width, reward.tokenizer.pad_id))
        found_B = policies.score(reward.arch, reward.frozen, reward.scorer, token_BT, mask_BT)
        scores.append(np.asarray(found_B)[: len(some)])
    return np.concatenate(scores) if scores else np.zeros(0, np.float32)
