"""The host reads a batch while the device works on the next: the same results, in the same order."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import model, policies, sampling, sharding
from jaxrlhf.config import Mesh
from jaxrlhf.data import batches, tokens
from jaxrlhf.split import split
from jaxrlhf.types import ScalarHead, Scorer

WORDS = ["red", "blue", "one", "two", "A:"]
TOKENIZER = tokens.word_tokenizer(WORDS)
RECORDS = [{"prompt": p} for p in (" red one\nA:", " two\nA:", " blue two one\nA:", " one\nA:", " red\nA:")]
B, P, R, N = 2, 6, 5, 3
ARCH = model.Architecture(
    **model.FAMILIES["llama"], vocab_size=TOKENIZER.size, layers=2, width=16, heads=4, kv_heads=2, head_width=4,
    ff_width=24, max_positions=P + R,
)  # fmt: skip


@pytest.mark.parametrize(
    ("count", "order"), [(0, ""), (1, "launch 0, read 0"), (3, "launch 0, launch 1, read 0, launch 2, read 1, read 2")]
)
def test_the_next_is_launched_before_the_last_is_read(count, order):
    seen = []
    for i in sharding.ahead(lambda i: seen.append(f"launch {i}") or i, range(count)):
        seen.append(f"read {i}")
    assert ", ".join(seen) == order


def test_an_error_of_a_launch_is_raised_where_it_is_read():
    found = sharding.ahead(lambda i: 1 / (2 - i), range(5))
    assert next(found) == 1 / 2
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_responses_are_those_of_one_batch_at_a_time():
    """Five prompts in batches of two; two scores a response, one read by the host, one by the device."""
    params = jax.tree.map(lambda x: x * 3, model.init(ARCH, jax.random.key(1)))
    frozen, top = split(params, 0.5)
    scorer = Scorer(top=top, head=ScalarHead(w_D=jnp.arange(16.0) - 7.5, b=jnp.float32(0.25)))
    key, gen = jax.random.key(5), sampling.Generation(R, eos_id=TOKENIZER.eos_id)
    config = SimpleNamespace(sampling=SimpleNamespace(batch_size=B), model=SimpleNamespace(prompt_length=P))
    task = SimpleNamespace(tokenizer=TOKENIZER)
    run = SimpleNamespace(
        base=(frozen, top), arch=ARCH, config=config, task=task, title="", mesh=sharding.make_mesh(Mesh())
    )
    on_device = policies.on_trunk(run, scorer)
    lengths = lambda prompts, drawn, samples: np.asarray(drawn.mask_BR).sum(-1)  # noqa: E731
    both = lambda *asked: [on_device(*asked), lengths(*asked)]  # noqa: E731
    found = policies.respond(run, top, RECORDS, samples=N, key=key, generation=gen, scored_by=both)
    one = policies.respond(run, top, RECORDS, samples=N, key=key, generation=gen, scored_by=on_device)

    texts, finished, scores = [], [], []
    for i, (batch, valid) in enumerate(batches.eval_prompt_batches(RECORDS, TOKENIZER, batch_size=B, prompt_length=P)):
        drawn = sampling.sample(
            ARCH, gen, frozen, top, batch.tokens_BP, batch.mask_BP, jax.random.fold_in(key, i), samples=N
        )
        for row in range(valid * N):
            kept = np.asarray(drawn.mask_BR[row]) > 0
            texts.append(TOKENIZER.decode(np.asarray(drawn.tokens_BR[row])[kept].tolist()))
            finished.append(bool(drawn.finished_B[row]))
            prompt = np.asarray(batch.tokens_BP[row // N])[np.asarray(batch.mask_BP[row // N]) > 0]
            whole = np.concatenate([prompt, np.asarray(drawn.tokens_BR[row])[kept]])[None]
            alone = policies.score(ARCH, frozen, scorer, whole, np.ones(whole.shape, np.float32))
            scores.append((float(alone[0]), float(kept.sum())))
    assert [text for some in found.texts for text in some] == texts
    assert [len(some) for some in found.texts] == [N] * 5
    assert found.finished_BN.reshape(-1).tolist() == finished
    assert found.scores_BN.shape == (5, N, 2)
    np.testing.assert_allclose(found.scores_BN.reshape(-1, 2), scores, atol=1e-4)
    assert np.array_equal(one.scores_BN, found.scores_BN[..., 0])
    assert len(set(texts)) > 3
    assert 0 < sum(finished) < len(finished)
