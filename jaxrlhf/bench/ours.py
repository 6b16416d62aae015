"""Our steps at given sizes, with random weights: what a process of `jaxrlhf bench` runs."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf import compiled, experiment, model, optim, ppo, reward, roofline, sampling, sft, sharding
from jaxrlhf.bench import floor
from jaxrlhf.bench.work import TEXTS, Work, over, serve
from jaxrlhf.data import batches, task, tokens
from jaxrlhf.evaluation import semantic
from jaxrlhf.evaluation.diversity import of_texts
from jaxrlhf.evaluation.statistics import blocks
from jaxrlhf.files import UserError
from jaxrlhf.logs import say
from jaxrlhf.split import split
from jaxrlhf.types import ActorCritic, Fixed, Frozen, PromptBatch, ScalarHead, Scorer, Top

NO_TOKEN = -1  # as end-of-text: every response has its full length


def main(argv: list[str]) -> int:
    """Serves one piece of work, as JSON in `argv`; exit status 2 and a line where it cannot be done."""
    try:
        work = Work.read(argv[1])
        if work.step == "diversity":
            encoder = work.experiment.evaluation.sentence_encoder
            serve({"device": jax.devices()[0].device_kind if encoder else "cpu"}, over(_diversity(work)))
            return 0
        arch, mesh = architecture(work), sharding.make_mesh(work.experiment.mesh)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    frozen, top = jax.jit(lambda key: split(model.init(arch, key), work.experiment.model.freeze_layers))(
        jax.random.key(0)
    )
    frozen, top = sharding.place(frozen, mesh), sharding.place(top, mesh)
    with jax.set_mesh(mesh):
        flops, once = PROGRAMS[work.step](work, arch, frozen, top)
        facts = {"flops": flops, "least_flops": floor.least(work, arch), "peak_flops_per_second": _peak(arch.dtype)}
        serve(facts | {"device": jax.devices()[0].device_kind}, over(once, compiled.tidy))  # as `loop.run` does
    return 0


def architecture(work: Work) -> model.Architecture:
    """The decoder; the task is loaded only where its tokenizer decides on the vocabulary."""
    if work.vocab_size:
        return experiment.architecture(work.experiment, work.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        data = task.load(work.experiment, Path(folder), say)
        return experiment.Run(work.experiment, Path(folder), data, "bench").arch


def _peak(dtype: str, repeats: int = 5) -> float:
    """The most operations a second that a matrix product reaches on the devices; a CPU second where CPUs compute."""
    cpu = jax.default_backend() == "cpu"
    clock, size = (time.process_time, 1024) if cpu else (time.perf_counter, 8192)
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    best = np.inf
    for _ in range(repeats + 1):
        started = clock()
        multiply(a, a).block_until_ready()
        best = min(best, clock() - started)
    return 2 * size**3 / best * (1 if cpu else jax.device_count())


def _diversity(work: Work) -> Callable[[], object]:
    """All text metrics in both scopes, and Sentence-BERT's and Vendi's where there is an encoder."""
    texts_BN, rank_B, encoder = work.texts(), np.arange(TEXTS), work.experiment.evaluation.sentence_encoder

    def once() -> None:
        of_texts(texts_BN, blocks(rank_B), paper_compat=False)
        semantic.measure({("", ""): semantic.Responses(texts_BN, rank_B)}, encoder, "", paper_compat=False)

    return once


def _sample(work: Work, arch: model.Architecture, frozen: Frozen, top: Top) -> tuple[float, Callable[[], None]]:
    c = work.experiment.sampling
    prompts = _prompts(c.batch_size, work, arch)
    gen = sampling.Generation(
        work.experiment.model.response_length, c.temperature, top_k=c.top_k, top_p=c.top_p, eos_id=NO_TOKEN
    )
    arguments = (arch, gen, frozen, top, prompts.tokens_BP, prompts.mask_BP, jax.random.key(1), c.samples_per_prompt)
    flops = roofline.flops(sampling.sample.trace(*arguments).jaxpr)
    return flops, lambda: _done(sampling.sample(*arguments))


def _sft(work: Work, arch: model.Architecture, frozen: Frozen, top: Top) -> tuple[float, Callable[[], None]]:
    c, mesh = work.experiment.sft, _mesh(work)
    texts = _texts(work, c.batch_size, ("response",))
    rows = batches.sft_batches(*texts, batch_size=c.batch_size, prompt_weight=c.prompt_weight, seed=0, **_sizes(work))
    batch = sharding.shard_batch(rows[0], mesh)
    tx = optim.optimizer(c.optim, 1000)
    return _steps(sft.step, arch, tx, optim.new_state(tx, top, _mesh(work)), frozen, batch)


def _reward(work: Work, arch: model.Architecture, frozen: Frozen, top: Top) -> tuple[float, Callable[[], None]]:
    c = work.experiment.reward
    texts = _texts(work, c.batch_size, ("chosen", "rejected"))
    rows = batches.pair_batches(*texts, batch_size=c.batch_size, seeds=[0], **_sizes(work))
    batch = sharding.shard_batch(rows[0], _mesh(work))
    tx = optim.optimizer(c.optim, 1000)
    state = optim.new_state(tx, Scorer(top=top, head=_head(arch, 2)), _mesh(work))
    return _steps(reward.step, arch, tx, state, frozen, batch)


def _sizes(work: Work) -> dict[str, int]:
    most = work.experiment.model.response_length
    return {"prompt_length": work.row_length - most, "response_length": most, "ways": sharding.ways(_mesh(work))}


WORDS_OF_TEXTS = [f"w{i}" for i in range(1000)]


def _texts(work: Work, count: int, fields: Sequence[str]) -> tuple[list[dict[str, str]], tokens.Tokenizer]:
    """Records of a prompt and responses, as many tokens as the work has it, and the tokenizer that counts them so."""
    rng = np.random.default_rng(0)
    text = lambda length: "".join(f" {w}" for w in rng.choice(WORDS_OF_TEXTS, length))  # noqa: E731
    records = [
        {"prompt": text(p)} | {field: text(n - 1) for field, n in zip(fields, responses, strict=False)}
        for p, *responses in work.lengths(count)
    ]
    return records, tokens.word_tokenizer(WORDS_OF_TEXTS)


def _steps(step: Any, arch: model.Architecture, tx: Any, state: Any, *given: Any) -> tuple[float, Callable[[], None]]:
    flops = roofline.flops(step.trace(arch, tx, state, *given).jaxpr)
    held = [state]

    def once() -> None:
        held[0], _ = step(arch, tx, held[0], *given)
        _done(held[0])

    return flops, once


def _ppo(work: Work, arch: model.Architecture, frozen: Frozen, top: Top) -> tuple[float, Callable[[], None]]:
    c = work.experiment.ppo
    prompts = _prompts(c.batch_size, work, arch)
    gen = sampling.Generation(work.experiment.model.response_length, c.temperature, eos_id=NO_TOKEN)
    copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(top)
    fixed = Fixed(frozen=frozen, ref=top, scorer=Scorer(top=copied, head=_head(arch, 2)))
    tx = optim.optimizer(c.optim, 1000)
    start = ActorCritic(top=top, value=_head(arch, 3))
    held = [optim.new_state(tx, start, _mesh(work), kl_coef=jnp.float32(c.kl_coef))]
    key = jax.random.key(4)

    def drawing(state: Any) -> tuple:
        return arch, gen, frozen, state.params.top, prompts.tokens_BP, prompts.mask_BP, key, 1, True

    def once() -> None:
        drawn = sampling.sample(*drawing(held[0]))
        rollout, _ = ppo.score(arch, c, fixed, held[0].params, held[0].kl_coef, prompts, drawn)
        held[0], _ = ppo.update(arch, tx, c, held[0], fixed, rollout, key)
        _done(held[0])

    # Shapes that lie on the mesh, as the arrays will: else the first step would trace all of it once more.
    here = NamedSharding(_mesh(work), PartitionSpec())
    lying = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)  # noqa: E731
    sampled = sampling.sample.trace(*drawing(held[0]))
    scored = ppo.score.trace(arch, c, fixed, held[0].params, held[0].kl_coef, prompts, lying(sampled.out_info))
    updated = ppo.update.trace(arch, tx, c, held[0], fixed, lying(scored.out_info[0]), key)
    return sum(roofline.flops(t.jaxpr) for t in (sampled, scored, updated)), once


def _done(tree: Any) -> None:
    jax.block_until_ready(tree)


def _mesh(work: Work) -> Any:
    return sharding.make_mesh(work.experiment.mesh)


def _head(arch: model.Architecture, seed: int) -> ScalarHead:
    w_D = np.random.default_rng(seed).normal(0, arch.width**-0.5, arch.width).astype(np.float32)
    return ScalarHead(w_D=jnp.asarray(w_D), b=jnp.asarray(np.float32(0)))


def _tokens(shape: tuple[int, int], arch: model.Architecture) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, arch.vocab_size, shape), jnp.int32)


def _prompts(count: int, work: Work, arch: model.Architecture) -> PromptBatch:
    """Left-padded prompts of half the length to all of it, as the peers have them."""
    P = work.experiment.model.prompt_length
    real_B = np.random.default_rng(1).integers(P // 2, P + 1, count)
    mask_BP = (np.arange(P) >= P - real_B[:, None]).astype(np.float32)
    batch = PromptBatch(
        tokens_BP=_tokens((count, P), arch),
        mask_BP=jnp.asarray(mask_BP),
        index_B=jnp.asarray(np.arange(count, dtype=np.int32)),
    )
    return sharding.shard_batch(batch, _mesh(work))


PROGRAMS = {"sample": _sample, "sft": _sft, "reward": _reward, "ppo": _ppo}

if __name__ == "__main__":
    sys.exit(main(sys.argv))
