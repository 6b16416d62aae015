"""The reward model: pairwise cross-entropy at the last real token (Stiennon et al. 2020), then normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import hub, loop, losses, model, optim, policies, scoring, sharding
from jaxrlhf.data import batches
from jaxrlhf.evaluation.statistics import wilson
from jaxrlhf.experiment import Run
from jaxrlhf.files import UserError, read_records, write_records
from jaxrlhf.types import Frozen, PairBatch, ScalarHead, Scorer, Top, TrainState


def loss(
    arch: model.Architecture, frozen: Frozen, scorer: Scorer, batch: PairBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log sigmoid(score of the chosen - score of the rejected)."""
    hidden_BTD = model.trunk(arch, frozen, batch.tokens_BT, batch.mask_BT)
    score_2B = policies.read_out(arch, scorer, batch.tokens_BT, hidden_BTD, batch.mask_BT)
    chosen_B, rejected_B = jnp.split(score_2B, 2)
    return losses.reward_loss(chosen_B, rejected_B)


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
        lambda scorer, pairs: loss(arch, frozen, scorer, pairs), state.params, batch, parts, lambda _: jnp.float32(1)
    )
    state, norm = optim.update(tx, value, grads, state)
    state = state.replace(step=state.step + 1)  # pyright: ignore[reportAttributeAccessIssue]
    return state, metrics | norm | optim.left_out(state)


def reward(run: Run) -> None:
    """Trains the reward model on preferences, from SFT; reports its accuracy on every split; normalises it."""
    c = run.config.reward
    if c.init:
        return _adopt(run)
    sharding.check_divides("config.reward.batch_size", c.batch_size, run.mesh, c.optim.accumulate)
    pairs = preferences(run)
    if not pairs["train"]:
        raise UserError(
            f"{run.directory('reward')}: no pair to learn from, all SFT samples of a prompt are equal; "
            "raise config.sampling.temperature or config.reward.samples_per_prompt in another --workdir"
        )
    train_batches = batches.pair_batches(
        pairs["train"], run.task.tokenizer, batch_size=c.batch_size, seed=run.seed("reward"), **run.lengths
    )
    tx = optim.optimizer(c.optim, c.loop.steps)
    frozen = run.base[0]
    state = loop.run(
        stage="reward",
        title=run.title,
        directory=run.directory("reward"),
        loop=c.loop,
        state=optim.new_state(tx, Scorer(top=run.policy("sft"), head=new_head(run, "reward head")), run.mesh),
        meta=run.meta("reward"),
        step=lambda state, i: step(
            run.arch, tx, state, frozen, sharding.shard_batch(train_batches[i], run.mesh), c.optim.accumulate
        ),
        ids=lambda i: batches.ids(pairs["train"], batch_size=c.batch_size, seed=run.seed("reward"))[i],
        evaluate=lambda state: {
            f"accuracy_{s}": e["mean"] for s, e in accuracy(run, state.params, pairs)["accuracy"].items()
        },
    )
    by_split = accuracy(run, state.params, pairs)
    run.finish(
        "reward",
        {
            "steps": c.loop.steps,
            "pairs": {s: len(p) for s, p in pairs.items()},
            "normalisation": normalisation(run, state.params),
            **by_split,
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


def new_head(run: Run, what: str) -> ScalarHead:
    """A read-out drawn with standard deviation 1/sqrt(D + 1) (Stiennon et al. 2020), bias 0; `what` names its key."""
    w_D = jax.random.normal(run.key(what), (run.arch.width,), jnp.float32) * (run.arch.width + 1) ** -0.5
    return sharding.place(ScalarHead(w_D=w_D, b=jnp.zeros((), jnp.float32)), run.mesh)


def normalisation(run: Run, reward: scoring.Reward) -> dict[str, float]:
    """Mean and standard deviation of the scores of SFT samples, to which the reward model is then normalised."""
    c = run.config.reward
    prompts = min(-(-c.normalise_samples // c.samples_per_prompt), len(run.task.ppo_prompts))
    records = run.task.ppo_prompts[:prompts]
    drawn = policies.respond(
        run,
        run.policy("sft"),
        records,
        samples=c.samples_per_prompt,
        key=run.key("normalise"),
        generation=policies.generation(run),
        scored_by=scoring.scored_by(run, reward),
        title="normalise",
    )
    assert drawn.scores_BN is not None
    return {
        "mean": float(drawn.scores_BN.mean()),
        "std": max(float(drawn.scores_BN.std()), 1e-6),
        "n": drawn.scores_BN.size,
    }


def accuracy(run: Run, reward: scoring.Reward, pairs: Mapping[str, Sequence]) -> dict[str, dict[str, Any]]:
    """How often the chosen response scores higher, on every split but `train`; and the one that gold prefers."""
    found: dict[str, dict[str, Any]] = {"accuracy": {}, "gold_accuracy": {}}
    for split, records in ((s, r) for s, r in pairs.items() if s != "train" and r):
        chosen_B, rejected_B = (scoring.of_responses(run, reward, records, side) for side in ("chosen", "rejected"))
        margin_B = chosen_B - rejected_B
        found["accuracy"][split] = wilson(int((margin_B > 0).sum()), len(margin_B))
        if run.task.gold is not None:
            gold_B = np.array([float(r["gold_chosen"]) - float(r["gold_rejected"]) for r in records])
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
        if not path.exists():
            write_records(path, _compare(run, policy("sft"), split, records, i))
        found[split] = read_records(path)
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
        generation=policies.generation(run),
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
