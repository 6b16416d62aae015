from collections import Counter
from dataclasses import fields, replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxrlhf.data import batches, packing, tokens
from jaxrlhf.types import CHOSEN, REJECTED

# 0 <pad>, 1 <eos>, 2 <unk>, 3 newline, then a..z from 4
LETTERS = tokens.word_tokenizer([chr(ord("a") + i) for i in range(26)])
A, B, C, D, E, F, EOS = 4, 5, 6, 7, 8, 9, 1
EXAMPLES = [{"prompt": " a b", "response": " c"}, {"prompt": " a b c d", "response": " e f a b"}]
NUMBERED = [{"prompt": f" {chr(ord('a') + i)}", "response": " z"} for i in range(7)]
SIZES = {"prompt_length": 3, "response_length": 4}


def sft(examples=EXAMPLES, batch_size=2, prompt_weight=0.25, seed=0, **sizes):
    return batches.sft_batches(
        examples, LETTERS, batch_size=batch_size, prompt_weight=prompt_weight, seed=seed, **(SIZES | sizes)
    )


def by_length(batch, *names):
    """Rows of a batch in the order of their lengths, so that a shuffled batch can be written down."""
    order = np.argsort(np.asarray(batch.mask_BT).sum(1), kind="stable")
    return [np.asarray(getattr(batch, name))[order].tolist() for name in names]


def first_prompts(batch):
    """The first token of each text, row by row."""
    begins_BT = np.diff(np.asarray(batch.mask_BT), axis=1, prepend=0) > 0
    return np.asarray(batch.tokens_BT)[begins_BT].tolist()


# ---- rows by hand


def test_sft_rows_by_hand():
    rows, masks, weights = by_length(sft()[0], "tokens_BT", "mask_BT", "weight_BT")
    # " a b c d" loses its left end to fit 3; " e f a b" and its end-of-text lose the latter to fit 4
    assert rows == [[A, B, C, EOS, 0, 0, 0, 0], [B, C, D, E, F, A, B, 0]]
    assert masks == [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 7 + [0]]
    assert weights == [[0, 0.25, 1, 1, 0, 0, 0, 0], [0, 0.25, 0.25, 1, 1, 1, 1, 0]]


def test_a_response_that_just_fits_keeps_its_end():
    rows, weights = by_length(sft(response_length=5)[0], "tokens_BT", "weight_BT")
    assert rows[1] == [B, C, D, E, F, A, B, EOS]
    assert weights[1][-1] == 1


def test_the_bos_survives_the_cut():
    import dataclasses

    bos = dataclasses.replace(LETTERS, bos=(9,))
    rows = batches.sft_batches(EXAMPLES, bos, batch_size=2, prompt_weight=0, seed=0, **SIZES)[0]
    assert by_length(rows, "tokens_BT") == [[[9, A, B, C, EOS, 0, 0, 0], [9, C, D, E, F, A, B, 0]]]
    prompt, _ = next(batches.eval_prompt_batches([{"prompt": " a b c d"}], bos, batch_size=1, prompt_length=1))
    assert prompt.tokens_BP.tolist() == [[9]]


def test_pairs_that_join_to_other_tokens_are_counted():
    from tokenizers import Tokenizer, models

    # "ab" is one token as a text, and two where "a" ends the prompt and "b" begins the response.
    engine = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    merging = tokens.Tokenizer(engine, pad_id=1, eos_id=0)
    pairs = [
        {"prompt": p, "chosen": c, "rejected": r} for p, c, r in (("a", "b", "a"), ("b", "b", "a"), ("a", "b", "ba"))
    ]
    found = batches.cut({"x": pairs}, merging, 9, 2, fields=("chosen", "rejected"))
    assert found == {"truncated": {"x": 0}, "overlong": {"x": 1}, "join_mismatch": {"x": 3}}
    assert "join_mismatch" not in batches.cut({"x": pairs}, merging, 9, 2)


def test_types():
    batch = sft()[0]
    assert (batch.tokens_BT.dtype, batch.mask_BT.dtype, batch.weight_BT.dtype) == (np.int32, np.float32, np.float32)


def test_pair_rows_by_hand():
    pair = {"prompt": " a b", "chosen": " c", "rejected": " d e f a", "chosen_finished": "1", "rejected_finished": "0"}
    batch = batches.pair_batches([pair], LETTERS, batch_size=1, seeds=[0], **SIZES)[0]
    assert batch.tokens_BT.tolist() == [[A, B, C, EOS, D, E, F, A]]
    assert batch.mask_BT.tolist() == [[1, 1, 1.25, 1.25, 1.5, 1.5, 1.5, 1.5]]
    assert (batch.ends_BN2.tolist(), batch.pair_BN.tolist()) == ([[[3, 7]]], [[1]])
    cut = pair | {"rejected": " d", "prompt": " f e d c b a"}
    batch = batches.pair_batches([cut], LETTERS, batch_size=1, seeds=[0], **SIZES)[0]
    assert batch.tokens_BT.tolist() == [[C, B, A, C, EOS, D, 0, 0]]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1.25, 1.25, 1.5, 0, 0]]
    assert batch.ends_BN2.tolist() == [[[4, 5]]]


def test_packed_pairs_by_hand():
    """An empty response ends where its prompt does."""
    long = {"prompt": " a b c", "chosen": " d e f", "rejected": " d", "rejected_finished": "1"}
    short = {"prompt": " f", "chosen": "", "rejected": " e", "chosen_finished": "0"}
    stream = batches.pair_batches([long, short], LETTERS, batch_size=2, seeds=[0], **SIZES)
    batch = with_shapes(stream, packing.Shape(1, 3, [8, 12, 16]))[0]
    assert batch.tokens_BT.tolist() == [[A, B, C, D, E, F, EOS, D, EOS, F, E, EOS]]
    assert batch.mask_BT.tolist() == [[1] * 3 + [1.25] * 4 + [1.5] * 2 + [2] + [2.5] * 2]
    assert batch.ends_BN2.tolist() == [[[6, 8], [9, 11], [0, 0]]]
    assert batch.pair_BN.tolist() == [[1, 1, 0]]


def pairs_of(rows):
    """Each pair of some rows: prompt, chosen and rejected tokens."""
    found = []
    for tokens_T, mask_T, ends_N2, pair_N in zip(*(getattr(rows, f.name) for f in fields(rows)), strict=True):
        for n, (ends_2, there) in enumerate(zip(ends_N2, pair_N, strict=True), 1):
            sides = [tokens_T[mask_T == n + side].tolist() for side in (0, CHOSEN, REJECTED)]
            assert any(sides) == there
            if there:
                assert [tokens_T[end] for end in ends_2] == [(sides[0] + side)[-1] for side in sides[1:]]
                found.append(sides)
    return sorted(found)


@pytest.mark.parametrize("ways", [1, 3])
def test_each_order_of_pairs_has_rows_of_its_own(ways):
    """As many, of one width; and the pairs are those of the order alone, none of them in two rows."""
    pairs = [r | {"chosen": r["response"], "rejected": " y" * (i % 3), "id": i} for i, r in enumerate(uneven())]
    make = partial(batches.pair_batches, tokenizer=LETTERS, prompt_length=8, response_length=4)
    both, shapes = make(pairs, batch_size=9, seeds=[2, 3], ways=ways), set()
    for step in range(15):
        batch = both[step]
        rows = len(batch.tokens_BT) // 2
        shapes.add(batch.tokens_BT.shape)
        assert rows % ways == 0
        for seed, start in ((2, 0), (3, rows)):
            order = batches.ids(pairs, batch_size=9, seed=seed)[step]
            alone = [make([pairs[i]], batch_size=1, seeds=[0])[0] for i in order]
            own = jax.tree.map(lambda x, at=start, rows=rows: x[at : at + rows], batch)
            assert pairs_of(own) == sorted(p for one in alone for p in pairs_of(one))
    assert 1 < len(shapes) <= 5


def test_prompts_are_padded_on_the_left():
    records = [{"prompt": " a"}, {"prompt": " a b c d"}, {"prompt": " a b"}]
    stream = batches.prompt_batches(records, LETTERS, batch_size=3, prompt_length=3, seed=0)
    batch = stream[0]
    order = np.argsort(batch.index_B)
    assert np.asarray(batch.index_B)[order].tolist() == [0, 1, 2]
    assert np.asarray(batch.tokens_BP)[order].tolist() == [[0, 0, A], [B, C, D], [0, A, B]]
    assert np.asarray(batch.mask_BP)[order].tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]


def test_padding_is_the_tokenizers():
    other = tokens.Tokenizer(LETTERS.engine, pad_id=2)
    found = next(
        batches.eval_prompt_batches([{"prompt": " a"}, {"prompt": " a b"}], other, batch_size=2, prompt_length=3)
    )
    assert found[0].tokens_BP.tolist() == [[2, 2, A], [2, A, B]]


def test_rows_are_as_long_as_the_longest_of_their_set_needs():
    long = [{"prompt": " a" * 50, "response": " b" * 50}]
    assert sft(long, 1, prompt_length=13, response_length=9)[0].tokens_BT.shape == (1, 24)
    assert sft(NUMBERED, 1, prompt_length=64, response_length=24)[0].tokens_BT.shape == (1, 8)


def test_empty_prompts_and_responses():
    batch = sft([{"prompt": "", "response": ""}, {"prompt": "", "response": " c"}])[0]
    assert batch.tokens_BT.tolist() == [[C, EOS, EOS, 0, 0, 0, 0, 0]]
    assert batch.mask_BT.tolist() == [[1, 1, 2, 0, 0, 0, 0, 0]]
    assert batch.weight_BT.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]  # nothing stands before a first token


# ---- packing


def uneven(seed=0, count=23):
    """Texts of 2 to 11 tokens with their end-of-text, each with a letter of its own."""
    rng = np.random.default_rng(seed)
    texts = [f" {chr(ord('a') + i)}" * rng.integers(1, 8) for i in range(count)]
    return [{"prompt": t, "response": " z" * rng.integers(0, 4)} for t in texts]


def texts_of(batch):
    """Tokens and weights of each text in a batch."""
    found = []
    for tokens_T, mask_T, weight_T in zip(batch.tokens_BT, batch.mask_BT, batch.weight_BT, strict=True):
        assert (np.diff(mask_T[mask_T > 0]) >= 0).all()
        found += [(tokens_T[mask_T == k].tolist(), weight_T[mask_T == k].tolist()) for k in set(mask_T[mask_T > 0])]
    return sorted(found)


@pytest.mark.parametrize("ways", [1, 2, 5])
def test_packed_rows_hold_each_text_whole_and_once(ways):
    examples, sizes = uneven(), {"prompt_length": 8, "response_length": 4}
    packed = sft(examples, 10, seed=3, ways=ways, **sizes)
    order = batches.ids([r | {"id": i} for i, r in enumerate(examples)], batch_size=10, seed=3)
    shapes = set()
    for step in range(12):
        alone = [sft([examples[i]], 1, **sizes)[0] for i in order[step]]
        assert texts_of(packed[step]) == sorted(t for batch in alone for t in texts_of(batch))
        rows = packed.parts(step)[0]
        shapes.add(packed[step].tokens_BT.shape)
        assert rows % ways == 0
    assert min(rows * width for rows, width in shapes) < 10 * 12
    assert len(shapes) <= 5


def with_shapes(packed, *shapes):
    return replace(packed, shapes=shapes)


def test_a_batch_gets_the_first_shape_that_it_fits():
    """No text is lost, whatever the shape."""
    packed = sft(uneven(), 16, seed=1, prompt_length=8, response_length=4)
    total = [sum(len(t) for t, _ in texts_of(packed[step])) for step in range(20)]
    found = with_shapes(packed, packing.Shape(1, 16, [90, 100]), packing.Shape(16, 1, [12]))
    shapes = [(1, 90) if n <= 90 else (1, 100) if n <= 100 else (16, 12) for n in total]
    assert len(set(shapes)) == 3
    for step, shape in enumerate(shapes):
        assert found[step].tokens_BT.shape == shape
        assert texts_of(found[step]) == texts_of(packed[step])


def test_what_stands_before_the_response_is_what_the_loss_asks_for():
    """Of the longer text, whose prompt has three tokens and whose response four, and of the shorter after it."""
    packed = sft(prompt_weight=0)
    batch = with_shapes(packed, packing.Shape(1, 2, [16], 8))[0]
    assert batch.tokens_BT.tolist() == [[B, C, D, E, F, A, B, A, B, C, EOS, *[0] * 5]]
    assert batch.before_BQ.tolist() == [[2, 3, 4, 5, 8, 9, 15, 15]]
    assert sft()[0].before_BQ is None
    # Of a row of 16, 10 are few enough to be worth it.
    found = [with_shapes(packed, packing.Shape(1, 2, [16], n))[0].before_BQ for n in (10, 11)]
    assert (found[0].shape, found[1]) == ((1, 10), None)


def test_a_batch_that_asks_for_more_than_others_gets_all_positions():
    packed = sft(uneven(), 16, 0, seed=1, prompt_length=8, response_length=4)
    answers = [int((packed[step].weight_BT > 0).sum()) for step in range(20)]
    found = with_shapes(packed, packing.Shape(1, 16, [200], 34))
    wanted = [(1, 34) if n <= 34 else None for n in answers]
    assert len(set(wanted)) == 2
    asked = [found[step].before_BQ for step in range(20)]
    assert [x if x is None else x.shape for x in asked] == wanted


@pytest.mark.parametrize("seed", range(5))
def test_texts_are_spread_over_rows_about_as_full(seed):
    """At most 4/3 of the best, which is no less than the mean and the longest; and no row has more than its most."""
    lengths = np.random.default_rng(seed).integers(0, 21, 60).tolist()
    for rows in (1, 7, 20, 60):
        placed = packing.spread(lengths, rows, 60)
        assert sorted(i for row in placed for i in row) == list(range(60))
        best = max(sum(lengths) / rows, *lengths)
        assert max(sum(lengths[i] for i in row) for row in placed) <= 4 / 3 * best
        assert max(len(row) for row in packing.spread(lengths, rows, -(-60 // rows))) == -(-60 // rows)
    assert packing.spread([5, 3, 9, 8, 5], 2, 4) == [[2, 4], [3, 0, 1]]
    assert packing.spread([9, 1, 1, 1], 2, 2) == [[0, 3], [1, 2]]


def test_texts_of_one_length_have_a_row_each():
    """As wide as they are: wider rows would cost more attention and save nothing."""
    assert packing.shapes([40] * 9, 12, 1) == [(12, 1, [40] * 4, 0), (12, 1, [40], 0)]
    assert packing.shapes([40] * 9, 12, 1, [9] * 9) == [(12, 1, [40] * 4, 16), (12, 1, [40], 16)]


@pytest.mark.parametrize(("batch_size", "ways"), [(16, 1), (64, 1), (64, 8), (30, 15)])
def test_little_of_uneven_batches_is_padding(batch_size, ways):
    """Of texts as long as real ones are; a row each would have half as much again, or more."""
    rng = np.random.default_rng(batch_size)
    lengths = np.clip(rng.lognormal(4.6, 0.6, 2000), 1, 208).astype(int) + rng.integers(16, 49, 2000)
    shapes, found = packing.shapes(lengths.tolist(), batch_size, ways), []
    for _ in range(200):
        batch = rng.choice(lengths, batch_size).tolist()
        found.append(min(fits(batch, shape) for shape in shapes) / sum(batch))
    assert {shape.rows % ways for shape in shapes} == {0}
    assert np.mean(found) < 1.2
    assert 256 / lengths.mean() > 1.5


def fits(batch, shape):
    """Positions that a batch takes in a shape."""
    needed = max(sum(batch[i] for i in row) for row in packing.spread(batch, shape.rows, shape.most))
    return shape.rows * min((w for w in shape.widths if w >= needed), default=np.inf)


def test_what_is_cut_is_counted():
    def cut(prompt_length, response_length, records=EXAMPLES, fields=("response",)):
        found = batches.cut({"train": records}, LETTERS, prompt_length, response_length, fields)
        return found["truncated"]["train"], found["overlong"]["train"]

    assert [cut(n, 9)[0] for n in (4, 3, 1)] == [0, 1, 2]
    # four tokens leave no room for the end of the longest
    assert [cut(9, n)[1] for n in (5, 4)] == [0, 1]


# ---- a pure function of (seed, step)


def test_the_same_seed_and_step_give_the_same_batch_in_any_order():
    wanted = [first_prompts(sft(NUMBERED, 3)[step]) for step in range(20)]
    stream = sft(NUMBERED, 3)
    assert [first_prompts(stream[step]) for step in reversed(range(20))] == wanted[::-1]
    assert [first_prompts(sft(NUMBERED, 3, seed=1)[step]) for step in range(20)] != wanted


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 20])
def test_each_epoch_visits_each_example_once(batch_size):
    """Seven examples, whether or not the batch divides them, or is larger than they are."""
    packed, epochs = sft(NUMBERED, batch_size), 20
    stream = replace(packed, shapes=packed.shapes[-1:])  # a row each, in order
    seen = [t for step in range(-(-7 * epochs // batch_size)) for t in first_prompts(stream[step])]
    orders = [tuple(seen[7 * e : 7 * e + 7]) for e in range(epochs)]
    assert all(sorted(order) == list(range(4, 11)) for order in orders)
    assert len(set(orders)) > epochs / 2


def test_seeds_do_not_share_an_order():
    epochs = {
        seed: [tuple(first_prompts(sft(NUMBERED, 7, seed=seed)[epoch])) for epoch in range(4)] for seed in range(5)
    }
    shared = Counter(order for found in epochs.values() for order in set(found))
    assert max(shared.values()) == 1


# ---- evaluation


@pytest.mark.parametrize(("batch_size", "valid"), [(3, [3, 3, 1]), (7, [7]), (10, [7])])
def test_evaluation_drops_nothing_and_counts_nothing_twice(batch_size, valid):
    found = list(batches.eval_prompt_batches(NUMBERED, LETTERS, batch_size=batch_size, prompt_length=4))
    assert [n for _, n in found] == valid
    assert all(batch.tokens_BP.shape[0] == batch_size for batch, _ in found)
    kept = [(i, t) for batch, n in found for i, t in zip(batch.index_B[:n], batch.tokens_BP[:n, -1], strict=True)]
    assert kept == [(i, i + 4) for i in range(7)]
    last, n = found[-1]
    assert last.index_B[n:].tolist() == [0] * (batch_size - n)

    sizes = {"batch_size": batch_size, **SIZES}
    found = list(batches.eval_sft_batches(NUMBERED, LETTERS, **sizes))
    assert [n for _, n in found] == valid
    assert [t for batch, n in found for t in first_prompts(batch)[:n]] == list(range(4, 11))
    assert sum(batch.weight_BT.sum() for batch, _ in found) == 7 * 2  # response and end-of-text of each, once
    assert all(batch.before_BQ.tolist() == [[0, 1, 6, 6]] * batch_size for batch, _ in found)
