"""Texts from policies: sampling records in batches, scoring them, and best-of-N."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import losses, model, sampling, sharding
from jaxrlhf.data import batches
from jaxrlhf.experiment import Run
from jaxrlhf.logs import progress
from jaxrlhf.types import Ensemble, Frozen, PairBatch, PromptBatch, Sample, Scorer, Top

Scores = jax.Array | np.ndarray
# Scores [B * N] of a batch of prompts' N responses each, as drawn, perhaps still under way; and one or several such.
Score = Callable[[PromptBatch, Sample, int], Scores]
SomeScores = Callable[[PromptBatch, Sample, int], Scores | Sequence[Scores]]


@dataclass(frozen=True)
class Responses:
    """N responses to each of B prompts, on the host."""

    texts: list[list[str]]  # [B][N]
    finished_BN: np.ndarray  # bool
    scores_BN: np.ndarray | None  # f32, where a reward model scored them; [B, N, E] where there were several scores


@jax.jit(static_argnames=("arch",))
def score(
    arch: model.Architecture, frozen: Frozen, scorer: Scorer | Ensemble, token_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """Reward-model scores [B], read at each row's last real token; padding on either side changes nothing."""
    hidden_BTD = model.trunk(arch, frozen, token_BT, mask_BT)
    return read_out(arch, scorer, token_BT, hidden_BTD, mask_BT)


def read_out(
    arch: model.Architecture,
    scorer: Scorer | Ensemble,
    token_BT: jax.Array,
    hidden_BTD: jax.Array,
    mask_BT: jax.Array,
) -> jax.Array:
    """The same from the trunk's hidden states, which all roles share, and all members of an ensemble."""
    if isinstance(scorer, Ensemble):
        score_EB = jax.vmap(lambda member: read_out(arch, member, token_BT, hidden_BTD, mask_BT))(scorer.members)
        return losses.combine_scores(score_EB, scorer.combine, scorer.uncertainty_coef)
    last_B1 = _last(mask_BT > 0)[:, None]
    return read_at(arch, scorer, token_BT, hidden_BTD, mask_BT, last_B1)[:, 0]


def read_pairs(arch: model.Architecture, scorer: Scorer, batch: PairBatch, hidden_BTD: jax.Array) -> jax.Array:
    """Scores [B, N, 2] of the chosen and the rejected responses, from the trunk's hidden states."""
    at_BQ = batch.ends_BN2.reshape(len(batch.ends_BN2), -1)
    return read_at(arch, scorer, batch.tokens_BT, hidden_BTD, batch.mask_BT, at_BQ).reshape(batch.ends_BN2.shape)


def _last(mask_BT: jax.Array) -> jax.Array:
    return mask_BT.shape[1] - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1)


def read_at(
    arch: model.Architecture,
    scorer: Scorer,
    token_BT: jax.Array,
    hidden_BTD: jax.Array,
    mask_BT: jax.Array,
    at_BQ: jax.Array,
) -> jax.Array:
    """Scores [B, Q] read at the positions `at_BQ` of each row."""
    row_B1 = jnp.arange(len(at_BQ))[:, None]
    final_BQD = model.run_top(arch, scorer.top, token_BT, hidden_BTD, mask_BT, lambda x: x[row_B1, at_BQ])
    return final_BQD.astype(jnp.float32) @ scorer.head.w_D + scorer.head.b


def respond(
    run: Run,
    top: Top,
    records: Sequence,
    *,
    samples: int,
    key: jax.Array,
    generation: sampling.Generation,
    scored_by: SomeScores | None = None,
    title: str = "",
) -> Responses:
    """Samples every record's prompt `samples` times, and scores the responses where a reward model is given."""
    frozen = run.base[0]
    batch_size = run.config.sampling.batch_size
    texts, finished, scores = [], [], []
    bar = progress(f"{run.title} {title}", len(records))
    prompt_batches = batches.eval_prompt_batches(
        records, run.task.tokenizer, batch_size=batch_size, prompt_length=run.config.model.prompt_length
    )

    def draw(numbered: tuple[int, tuple[PromptBatch, int]]) -> tuple[PromptBatch, int, Sample]:
        i, (batch, valid) = numbered
        batch = sharding.shard_batch(batch, run.mesh)
        drawn = sampling.sample(
            run.arch, generation, frozen, top, batch.tokens_BP, batch.mask_BP, jax.random.fold_in(key, i), samples
        )
        return batch, valid, drawn

    for batch, valid, drawn in sharding.ahead(draw, enumerate(prompt_batches)):
        if scored_by is not None:
            scores.append((scored_by(batch, drawn, samples), valid))
        decoded = decode(run, drawn.tokens_BR, drawn.mask_BR)[: valid * samples]
        texts += [decoded[j : j + samples] for j in range(0, len(decoded), samples)]
        finished.append(sharding.to_host(drawn.finished_B)[: valid * samples].reshape(-1, samples))
        bar.update(valid)
    bar.close()
    # Read last, as each comes after the next batch's samples.
    found = [_read(scored)[: valid * samples] for scored, valid in scores]
    scores_BN = np.concatenate([x.reshape(-1, samples, *x.shape[1:]) for x in found]) if found else None
    return Responses(texts, np.concatenate(finished), scores_BN)


def _read(scored: Scores | Sequence[Scores]) -> np.ndarray:
    if isinstance(scored, jax.Array | np.ndarray):
        return sharding.to_host(scored)
    return np.stack([sharding.to_host(x) for x in scored], -1)


@jax.jit(static_argnames=("samples",))
def joined(prompts: PromptBatch, drawn: Sample, samples: int) -> tuple[jax.Array, jax.Array]:
    """Tokens and mask [B * N, T] of each response after its prompt."""
    prompts = repeated(prompts, samples)
    tokens_MT = jnp.concatenate([prompts.tokens_BP, drawn.tokens_BR], 1)
    return tokens_MT, jnp.concatenate([prompts.mask_BP, drawn.mask_BR], 1)


@jax.jit(static_argnames=("samples",))
def repeated(prompts: PromptBatch, samples: int) -> PromptBatch:
    """Each prompt as often as it has responses."""
    return jax.tree.map(lambda x: jnp.repeat(x, samples, 0), prompts)


def on_trunk(run: Run, scorer: Scorer | Ensemble) -> Score:
    """Scores by a reward model that shares the policy's trunk."""

    def score_drawn(prompts: PromptBatch, drawn: Sample, samples: int) -> jax.Array:
        return score(run.arch, run.base[0], scorer, *joined(prompts, drawn, samples))

    return score_drawn


def decode(run: Run, token_BR: jax.Array, mask_BR: jax.Array) -> list[str]:
    """Responses as text, end-of-text and padding apart."""
    lengths = sharding.to_host(mask_BR).sum(1).astype(int)
    rows = [row[:n].tolist() for row, n in zip(sharding.to_host(token_BR), lengths, strict=True)]
    return [run.task.tokenizer.decode_response(row) for row in rows]


def generation(run: Run) -> sampling.Generation:
    """How policies are sampled for measurement."""
    c = run.config.sampling
    return sampling.Generation(
        max_tokens=run.config.model.response_length,
        temperature=c.temperature,
        top_k=c.top_k,
        top_p=c.top_p,
        eos_id=run.task.tokenizer.eos_id,
        pad_id=run.task.tokenizer.pad_id,
    )


def uncut(run: Run, temperature: float) -> sampling.Generation:
    """How policies are sampled for training: no token is left out."""
    return sampling.Generation(
        max_tokens=run.config.model.response_length,
        temperature=temperature,
        eos_id=run.task.tokenizer.eos_id,
        pad_id=run.task.tokenizer.pad_id,
    )


def best_of_n(score_BM: np.ndarray, n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Indices [B, draws] of best-of-n picks from a pool of M samples a prompt: the highest score, the first on ties.

    A pool of n * draws or more gives each draw samples of its own, so that draws are independent. From a smaller pool
    each draw takes n of the M without replacement, as Kirk et al. (s. 4) simulate it: draws share samples, and are less
    diverse than best-of-n is.
    """
    B, M = score_BM.shape
    if n * draws <= M:
        subset_BDN = rng.permuted(np.broadcast_to(np.arange(M), (B, M)), axis=-1)[:, : n * draws].reshape(B, draws, n)
    else:
        subset_BDN = rng.permuted(np.broadcast_to(np.arange(M), (B, draws, M)), axis=-1)[..., :n]
    picked_BD = np.take_along_axis(score_BM[:, None], subset_BDN, -1).argmax(-1)
    return np.take_along_axis(subset_BDN, picked_BD[..., None], -1)[..., 0]


def best_of_n_kl(score_BM: np.ndarray, n: int) -> np.ndarray:
    """KL(best-of-n || policy) in nats [B], of the best of n draws from each prompt's pool of M samples.

    Samples of one score are one outcome, so equal responses must have equal scores. An outcome of probability p, with F
    at or below it, is the best with q = F^n - (F - p)^n, and KL = sum of q log(q / p) (Beirami et al. 2024).
    Taken of the pool, it is a little too low: by 0.01 nats for n = 16, M = 96 and fifty outcomes by Zipf's law. Where
    all M differ it comes close to the closed form `tradeoff.best_of_n_bound`, which is right for responses that never
    repeat and an upper bound for others.
    """
    found = []
    for score_M in score_BM:
        p = np.unique(score_M, return_counts=True)[1] / len(score_M)
        F = p.cumsum()
        q = F**n - np.maximum(F - p, 0.0) ** n
        found.append(float(np.sum(q * np.log(np.maximum(q, np.finfo(float).tiny) / p))))
    return np.array(found)
