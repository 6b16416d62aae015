"""The pytrees that travel between the rooms. Axis letters: see `model.py`."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

Params = dict[str, Any]
CHOSEN, REJECTED = 0.25, 0.5  # what a pair's responses add to its number in `PairBatch.mask_BT`


@struct.dataclass
class SftBatch:
    """Prompt and response in one row, padded on the right; where they are packed, several in a row, B rows in all."""

    tokens_BT: jax.Array  # int32
    mask_BT: jax.Array  # f32, 1 = real token; of several texts in a row 1, 2, ..., as `model.causal` has it
    weight_BT: jax.Array  # f32, the loss weight of predicting this token (0 on padding)
    # int32, fewer than T, ascending: what stands before tokens that weigh anything, then the last. None = all positions
    before_BQ: jax.Array | None = None


@struct.dataclass
class PairBatch:
    """Up to N pairs a row, each the prompt once, the chosen response, the rejected one; these do not see each other."""

    tokens_BT: jax.Array  # int32, padded on the right
    mask_BT: jax.Array  # f32, of pair n = 1, 2, ...: n, n + CHOSEN, n + REJECTED; 0 = padding: see `model.causal`
    ends_BN2: jax.Array  # int32, where the last tokens of chosen and rejected responses stand
    pair_BN: jax.Array  # f32, 1 = there is such a pair


@struct.dataclass
class PromptBatch:
    """Prompts padded on the left; `index_B` names the prompts on the host."""

    tokens_BP: jax.Array  # int32
    mask_BP: jax.Array  # f32
    index_B: jax.Array  # int32


@struct.dataclass
class Frozen:
    """What no stage trains, one copy for all roles: empty where `freeze_layers` is 0."""

    embed: Params  # {} when the embeddings are trained
    blocks: Params  # leaves [k, ...]
    lm_head: Params  # {} when it is trained, or tied to the embeddings


@struct.dataclass
class Top:
    """What is trained: the upper blocks and the final norm, and everything else where nothing is frozen."""

    embed: Params
    blocks: Params  # leaves [L - k, ...]
    final_norm: Params
    lm_head: Params


@struct.dataclass
class ScalarHead:
    """A linear read-out of the final hidden state: h @ w + b."""

    w_D: jax.Array
    b: jax.Array


@struct.dataclass
class Scorer:
    """A reward model: a top of its own on the shared trunk, and its read-out."""

    top: Top
    head: ScalarHead


@struct.dataclass
class Ensemble:
    """Reward models on one trunk, and how their scores become one: see `losses.combine_scores`."""

    members: Scorer  # leaves [E, ...]
    combine: str = struct.field(pytree_node=False)
    uncertainty_coef: float = struct.field(pytree_node=False)


@struct.dataclass
class ActorCritic:
    """PPO's policy, and the value read off the same top.

    The value comes first: JAX 0.10 takes trees of two dataclasses for equal where their children are alike, and a cache
    within Adam, which the reward model's training fills, then gave PPO's update a `Scorer` now and then.
    """

    value: ScalarHead
    top: Top


@struct.dataclass
class Fixed:
    """What a policy's training holds still: the trunk that the roles share, the reference and the reward model."""

    frozen: Frozen
    ref: Top
    scorer: Scorer | Ensemble | None  # None where the reward model comes from elsewhere, with a trunk of its own


@struct.dataclass
class TrainState:
    """`params` is whatever the stage trains, and nothing else; Adam sees no more than that."""

    step: jax.Array  # int32
    params: Any
    opt_state: Any
    skipped: jax.Array  # int32: updates left out so far, as the loss or a gradient was not finite
    in_a_row: jax.Array  # int32: how many of them were the latest updates; see `optim.IN_A_ROW`
    kl_coef: jax.Array | None = None  # PPO's, where it adapts; None elsewhere


@struct.dataclass
class Sample:
    """Responses padded on the right; the end-of-text token is part of the response."""

    tokens_BR: jax.Array  # int32
    mask_BR: jax.Array  # f32
    logp_BR: jax.Array  # f32, under the distribution sampled from; 0 on padding
    finished_B: jax.Array  # bool: ended by itself, not by the length limit
    hidden_BTD: jax.Array | None = None  # the trunk's output at prompt and response, where it was asked for


@struct.dataclass
class Rollout:
    """A batch of responses with all that epochs on it need; nothing in it is recomputed."""

    tokens_BT: jax.Array  # prompt (left-padded) and response (right-padded)
    mask_BT: jax.Array
    response_mask_BR: jax.Array
    hidden_BTD: jax.Array  # the trunk's output, shared by policy, reference, reward and value
    logp_BR: jax.Array
    ref_logp_BR: jax.Array
    score_B: jax.Array  # reward-model score, penalties included


@struct.dataclass
class PpoRollout(Rollout):
    """With a value and an advantage of each token."""

    value_BR: jax.Array
    advantage_BR: jax.Array
    return_BR: jax.Array


@struct.dataclass
class GroupRollout(Rollout):
    """With an advantage of each response over others to its prompt, for RLOO and GRPO."""

    advantage_B: jax.Array
