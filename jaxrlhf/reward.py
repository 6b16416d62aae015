"""The reward model: pairwise cross-entropy at the last real token (Stiennon et al. 2020), then normalised.

An ensemble's members have heads and orders of the pairs of their own, and learn side by side on one trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import hosts, hub, loop, losses, model, optim, policies, scoring, sharding
from jaxrlhf.data import batches
from jaxrlhf.evaluation.statistics import wilson
from jaxrlhf.experiment import Run
from jaxrlhf.files import UserError, read_records, write_records
from jaxrlhf.types import Ensemble, Frozen, PairBatch, ScalarHead, Scorer, Top, TrainState


def loss(
    arch: model.Architecture, frozen: Frozen, scorer: Scorer | Ensemble, batch: PairBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log sigmoid(score of the chosen - score of the rejected); summed over members, each with a batch of its own.

    An ensemble's batch is those of its members, one after the other. Metrics are means over members.
    """
    hidden_BTD = model.trunk(arch, frozen, batch.tokens_BT, batch.mask_BT)
    if isinstance(scorer, Scorer):
        E, score_BN2 = 1, policies.read_pairs(arch, scorer, batch, hidden_BTD)
    else:
        E = scorer.members.head.b.shape[0]
        own = jax.tree.map(lambda x: x.reshape(E, -1, *x.shape[1:]), (batch, hidden_BTD))
        score_EBN2 = jax.vmap(partial(policies.read_pairs, arch))(scorer.members, *own)
        score_BN2 = score_EBN2.reshape(batch.ends_BN2.shape)
    # Of micro-batches' pairs some may have more of one member than of another: all count alike.
    value, metrics = losses.reward_loss(score_BN2[..., 0], score_BN2[..., 1], batch.pair_BN)
    return E * value, metrics


@partial(jax.jit, static_argnames=("arch", "tx", "parts"), donate_argnames=("state",))
def step(
    arch: model.Architecture,
    tx: optax.GradientTransformation,
    state: TrainState,
    frozen: Frozen,
    batch: PairBatch,
    parts: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the reward model's top and head, the batch in `parts` micro-batches."""
    value, metrics, grads = optim.gradients(
        lambda scorer, rows: loss(arch, frozen, scorer, rows),
        state.params,
        batch,
        parts,
        lambda rows: rows.pair_BN.sum(),
    )
    state, norm = optim.update(tx, value, grads, state)
    state = state.replace(step=state.step + 1)  # pyright: ignore[reportAttributeAccessIssue]
    return state, metrics | norm | optim.left_out(state)


def reward(run: Run) -> None:
    """Trains the reward model on preferences, from SFT; reports its accuracy on every split; normalises it."""
    c = run.config.reward
    if c.init:
        return _adopt(run)
    pairs = preferences(run)
    check_pairs(run, pairs)
    seeds = [run.seed("reward"), *(run.seed(f"reward {e}") for e in range(1, c.ensemble))]
    train_batches = batches.pair_batches(
        pairs["train"],
        run.task.tokenizer,
        batch_size=c.batch_size,
        seeds=seeds,
        ways=sharding.ways(run.mesh) * c.optim.accumulate,
        **run.lengths,
    )
    ids = [batches.ids(pairs["train"], batch_size=c.batch_size, seed=seed) for seed in seeds]
    tx = optim.optimizer(c.optim, c.loop.steps)
    tx = tx if c.ensemble == 1 else optim.of_each(tx)
    frozen = run.base[0]
    state = loop.run(
        stage="reward",
        title=run.title,
        directory=run.directory("reward"),
        remote=run.remote,
        loop=c.loop,
        state=optim.new_state(tx, _start(run), run.mesh),
        meta=run.meta("reward"),
        step=lambda state, i: step(
            run.arch, tx, state, frozen, sharding.shard_step(train_batches, i, run.mesh), c.optim.accumulate
        ),
        ids=lambda i: [name for member in ids for name in member[i]],
        evaluate=lambda state: {
            f"accuracy_{s}": e["mean"] for s, e in accuracy(run, state.params, pairs)["accuracy"].items()
        },
    )
    found = normalisation(run, state.params)
    run.finish(
        "reward",
        {
            "steps": c.loop.steps,
            "pairs": {s: len(p) for s, p in pairs.items()},
            "normalisation": found,
            **accuracy(run, run.normalised(state.params, found), pairs),
            **batches.cut(pairs, run.task.tokenizer, **run.lengths, fields=("chosen", "rejected")),
        },
    )


def _adopt(run: Run) -> None:
    """Takes a reward model from elsewhere: tries it on the splits' preferences, and normalises it."""
    init = run.config.reward.init
    directory = hub.directory_of(init, "config.reward.init")
    found = scoring.load(directory, run.mesh)
    pairs = {s: p for s, p in preferences(run, train=False).items() if s != "train"}
    run.finish(
        "reward",
        {
            "init": init,
            "sha256": scoring.sha256(directory),
            "reads": "ids" if scoring.same_ids(run.task.tokenizer, found.tokenizer) else "texts",
            "pairs": {s: len(p) for s, p in pairs.items()},
            "normalisation": normalisation(run, found),
            **accuracy(run, found, pairs),
        },
    )


def new_head(run: Run, what: str, member: int = 0) -> ScalarHead:
    """A read-out drawn with standard deviation 1/sqrt(D + 1) (Stiennon et al. 2020), bias 0; `what` names its key."""
    w_D = jax.random.normal(run.key(what, member), (run.arch.width,), jnp.float32) * (run.arch.width + 1) ** -0.5
    return sharding.place(ScalarHead(w_D=w_D, b=jnp.zeros((), jnp.float32)), run.mesh)


def _start(run: Run) -> Scorer | Ensemble:
    """SFT's top under new heads; an ensemble's first member is what a reward model alone would be."""
    top, size = run.policy("sft"), run.config.reward.ensemble
    heads = [new_head(run, "reward head", e) for e in range(size)]
    if size == 1:
        return Scorer(top=top, head=heads[0])
    members = jax.tree.map(lambda *x: jnp.stack(x), *(Scorer(top=top, head=h) for h in heads))
    return Ensemble(members=members, combine="mean", uncertainty_coef=0.0)


def check_pairs(run: Run, pairs: Mapping[str, Sequence]) -> None:
    """`UserError` where there is nothing to learn from."""
    if not pairs["train"]:
        raise UserError(
            f"{run.directory('reward')}: no pair to learn from, all SFT samples of a prompt are equal; "
            "raise config.reward.temperature or config.reward.samples_per_prompt in another --workdir"
        )


def normalisation(run: Run, reward: scoring.Reward) -> dict[str, Any]:
    """Mean and standard deviation of the scores of SFT samples, to which the reward model is then normalised.

    The deviation counts as 1 where `config.reward.unit_variance` is off.
    Of an ensemble, lists: each member is normalised by its own.
    """
    c = run.config.reward
    prompts = min(-(-c.normalise_samples // c.samples_per_prompt), len(run.task.ppo_prompts))
    records = run.task.ppo_prompts[:prompts]
    scorers = [scoring.scored_by(run, member) for member in scoring.members(reward)]
    drawn = policies.respond(
        run,
        run.policy("sft"),
        records,
        samples=c.samples_per_prompt,
        key=run.key("normalise"),
        generation=policies.uncut(run, run.config.reward.temperature),
        scored_by=lambda *asked: [score(*asked) for score in scorers],
        title="normalise",
    )
    assert drawn.scores_BN is not None
    each = [np.ascontiguousarray(x) for x in np.moveaxis(drawn.scores_BN, -1, 0)]
    means, stds = [float(x.mean()) for x in each], [max(float(x.std()), 1e-6) if c.unit_variance else 1.0 for x in each]
    alone = not isinstance(reward, Ensemble)
    return {"mean": means[0] if alone else means, "std": stds[0] if alone else stds, "n": each[0].size}


def accuracy(run: Run, reward: scoring.Reward, pairs: Mapping[str, Sequence]) -> dict[str, dict[str, Any]]:
    """How often the chosen response scores higher, on every split but `train`; and the one that gold prefers."""
    score = lambda records, side: scoring.of_responses(run, reward, records, side)  # noqa: E731
    return agreement(run, pairs, margins(pairs, score))


def margins(pairs: Mapping[str, Sequence], score: Callable[[Sequence, str], np.ndarray]) -> dict[str, np.ndarray]:
    """The number of each chosen response less that of the rejected one [N], for every split but `train`."""
    return {s: score(r, "chosen") - score(r, "rejected") for s, r in pairs.items() if s != "train" and r}


def agreement(run: Run, pairs: Mapping[str, Sequence], margins: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """How often margins are positive, and how often they have the sign of the gold judge's."""
    found: dict[str, dict[str, Any]] = {"accuracy": {}, "gold_accuracy": {}}
    for split, margin_B in margins.items():
        found["accuracy"][split] = wilson(int((margin_B > 0).sum()), len(margin_B))
        if run.task.gold is not None:
            gold_B = np.array([float(r["gold_chosen"]) - float(r["gold_rejected"]) for r in pairs[split]])
            right_B = (margin_B * np.sign(gold_B))[gold_B != 0] > 0
            found["gold_accuracy"][split] = wilson(int(right_B.sum()), len(right_B))
    return found


def preferences(run: Run, train: bool = True) -> Mapping[str, Sequence]:
    """Preference pairs of each split: the task's own, or SFT samples that its annotators compare.

    Without `train`, those samples are drawn for the evaluation splits alone.
    """
    if run.task.preferences is not None:
        return run.task.preferences
    folder = run.directory("reward") / "preferences"
    sources = {"train": run.task.preference_prompts, **run.task.splits}
    found, policy = {}, cache(run.policy)  # the checkpoint is checked and read once
    for i, (split, records) in enumerate(sources.items()):
        path = folder / f"{split}.jsonl"
        if split == "train" and not train:
            continue
        if hosts.decided(path.exists):
            found[split] = read_records(path)
        else:
            found[split] = _compare(run, policy("sft"), split, records, i)
            write_records(path, found[split])
    return found


def _compare(run: Run, top: Top, split: str, records: Sequence, index: int) -> list[dict[str, str]]:
    """Pairs of one prompt's SFT samples, in the order that a simulated annotator prefers; equal texts are no pair."""
    gold, prefers_first = run.task.gold, run.task.prefers_first
    assert gold is not None
    assert prefers_first is not None
    samples = run.config.reward.samples_per_prompt
    drawn = policies.respond(
        run,
        top,
        records,
        samples=samples,
        key=run.key("preferences", index),
        generation=policies.uncut(run, run.config.reward.temperature),
        title=f"preferences ({split})",
    )
    rng = np.random.default_rng([run.seed("annotators"), index])
    pairs = []
    for record, texts, finished_N in zip(records, drawn.texts, drawn.finished_BN, strict=True):
        golds = [gold(record["facts"], t, bool(f)) for t, f in zip(texts, finished_N, strict=True)]
        for a in range(0, samples - 1, 2):
            b = a + 1
            if texts[a] == texts[b]:
                continue
            if not prefers_first(golds[a], golds[b], run.config.world.annotator_temperature, rng):
                a, b = b, a
            pairs.append(
                {
                    "id": record["id"],
                    "prompt": record["prompt"],
                    "chosen": texts[a],
                    "rejected": texts[b],
                    "chosen_finished": str(int(finished_N[a])),
                    "rejected_finished": str(int(finished_N[b])),
                    "gold_chosen": repr(golds[a]),
                    "gold_rejected": repr(golds[b]),
                }
            )
    return pairs
