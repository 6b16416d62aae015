"""Scores by the experiment's own reward model, on the shared trunk, or by one from elsewhere.

One from elsewhere reads ids where its tokenizer is the policy's, else texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import config as configs
from jaxrlhf import hub, model, policies, sharding, weights
from jaxrlhf.data import batches, task, tokens
from jaxrlhf.experiment import Run
from jaxrlhf.files import UserError, read_json
from jaxrlhf.split import split
from jaxrlhf.types import Ensemble, Frozen, PromptBatch, Sample, ScalarHead, Scorer, SftBatch


@dataclass(frozen=True)
class RewardModel:
    """A reward model with the tokenizer that it reads texts by."""

    arch: model.Architecture
    frozen: Frozen
    scorer: Scorer | Ensemble
    tokenizer: tokens.Tokenizer


Reward = Scorer | Ensemble | RewardModel


def of_run(run: Run) -> Reward:
    """The experiment's reward model, normalised: the one that it trained, or the one from elsewhere.

    Raises:
      UserError: stage `reward` is not finished, or another model stands now where `config.reward.init` points.
    """
    if not run.config.reward.init:
        return run.scorer()
    if not run.finished("reward"):
        raise UserError(f"{run.workdir}: stage 'reward' is not finished; run `jaxrlhf reward` first")
    found = run.summary("reward")
    directory = hub.directory_of(run.config.reward.init, "config.reward.init")
    if sha256(directory) != found["sha256"]:
        raise UserError(f"config.reward.init={run.config.reward.init!r}: not the model that stage 'reward' normalised")
    reward = load(directory, run.mesh)
    assert isinstance(reward.scorer, Scorer)
    mean, std = found["normalisation"]["mean"], found["normalisation"]["std"]
    head = ScalarHead(w_D=reward.scorer.head.w_D / std, b=(reward.scorer.head.b - mean) / std)
    return replace(reward, scorer=Scorer(top=reward.scorer.top, head=head))


def scored_by(run: Run, reward: Reward) -> policies.Score:
    """How samples of this run's policies are scored."""
    if not isinstance(reward, RewardModel):
        return policies.on_trunk(run, reward)

    def score_drawn(prompts: PromptBatch, drawn: Sample, samples: int) -> np.ndarray:
        asked = [p for p in _rows(prompts.tokens_BP, prompts.mask_BP) for _ in range(samples)]
        answered = _rows(drawn.tokens_BR, drawn.mask_BR)
        return score_ids(reward, run.task.tokenizer, asked, answered, run.config.sampling.batch_size)

    return score_drawn


def members(reward: Reward) -> list[Reward]:
    """The members of an ensemble, each a reward model; of any other, itself."""
    if not isinstance(reward, Ensemble):
        return [reward]
    return [jax.tree.map(lambda x, e=e: x[e], reward.members) for e in range(reward.members.head.b.shape[0])]


def of_responses(run: Run, reward: Reward, records: Sequence, field: str) -> np.ndarray:
    """Scores [N] of the responses that records have in `field`, cut to fit as training cuts them."""
    size = run.config.sampling.batch_size
    examples = [r | {"response": r[field], "response_finished": r.get(f"{field}_finished", "1")} for r in records]

    def launch(given: tuple[SftBatch, int]) -> tuple[policies.Scores, int]:
        batch, valid = given
        if isinstance(reward, RewardModel):
            responses = np.asarray(batch.weight_BT) > 0
            asked, answered = (_rows(batch.tokens_BT, batch.mask_BT * w) for w in (~responses, responses))
            return score_ids(reward, run.task.tokenizer, asked, answered, size), valid
        placed = sharding.shard_batch(batch, run.mesh)
        return policies.score(run.arch, run.base[0], reward, placed.tokens_BT, placed.mask_BT), valid

    each = batches.eval_sft_batches(examples, run.task.tokenizer, batch_size=size, **run.lengths)
    found = [sharding.to_host(scored)[:valid] for scored, valid in sharding.ahead(launch, each)]
    return np.concatenate([np.zeros(0, np.float32), *found])


def sha256(directory: Path) -> str:
    """Of a model directory's weights, config and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted((*directory.glob("*.safetensors"), *directory.glob("*.json"))):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def load(directory: Path, mesh: jax.sharding.Mesh | None = None) -> RewardModel:
    """Reads what `jaxrlhf export --policy=reward` or transformers wrote; `UserError` if a part is missing or wrong."""
    arch, params, head = weights.load_reward(directory, mesh, jnp.float32)
    tokenizer = tokens.pretrained(directory)
    if tokenizer.size > arch.vocab_size:
        raise UserError(f"{directory}: its tokenizer has {tokenizer.size} ids, its embeddings {arch.vocab_size} rows")
    frozen, top = split(params, 0)
    return RewardModel(arch, frozen, Scorer(top=top, head=head), tokenizer)


def of_directory(directory: Path) -> RewardModel:
    """The reward model of a Hugging Face directory, or of a workdir, normalised as its own run has it.

    Raises:
      UserError: there is none, a part of it is wrong, or the workdir's stage `reward` is not finished.
    """
    path = directory / "config.json"
    found = read_json(path) if path.exists() else {}
    if "model_type" in found:
        return load(directory)
    if "reward" not in found:
        raise UserError(
            f"{directory}: no reward model in it; expected a Hugging Face directory, or a workdir whose stage 'reward' "
            "is finished"
        )
    if not (directory / "reward" / "summary.json").exists():
        raise UserError(f"{directory}: stage 'reward' is not finished; run `jaxrlhf reward` there first")
    config = replace(configs.read(path), mesh=configs.Mesh())  # its own was that of other devices
    run = Run(config, directory, task.Task(task.tokenizer(config, directory)), "")
    reward = of_run(run)
    if isinstance(reward, RewardModel):
        return reward
    return RewardModel(run.arch, run.base[0], reward, run.task.tokenizer)


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


def _rows(token_BT: jax.Array, mask_BT: jax.Array) -> list[list[int]]:
    """The ids that are no padding."""
    kept = sharding.to_host(mask_BT) > 0
    return [row[k].tolist() for row, k in zip(sharding.to_host(token_BT), kept, strict=True)]


def _score(reward: RewardModel, rows: Sequence[Sequence[int]], batch_size: int) -> np.ndarray:
    longest = max(map(len, rows), default=1)
    if reward.arch.positions == "learned" and longest > reward.arch.max_positions:
        row = max(range(len(rows)), key=lambda i: len(rows[i]))
        raise UserError(f"text {row + 1} has {longest} tokens; the reward model reads {reward.arch.max_positions}")
    width = _bucket(longest)
    width = min(width, reward.arch.max_positions) if reward.arch.positions == "learned" else width

    def launch(start: int) -> tuple[jax.Array, int]:
        some = [list(r) for r in rows[start : start + batch_size]]
        whole = some + [some[0]] * (batch_size - len(some))  # one shape to compile
        token_BT, mask_BT = batches.pad(whole, width, reward.tokenizer.pad_id)  # each host has all of them
        return policies.score(reward.arch, reward.frozen, reward.scorer, token_BT, mask_BT), len(some)

    found = sharding.ahead(launch, range(0, len(rows), batch_size))
    return np.concatenate([np.zeros(0, np.float32), *(sharding.to_host(score_B)[:n] for score_B, n in found)])


def _bucket(longest: int) -> int:
    """A width for rows of so many tokens: four a doubling, so that few programs are compiled."""
    step = max(batches.WIDTHS, 2 ** (longest.bit_length() - 3))
    return -(-longest // step) * step
