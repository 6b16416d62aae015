import numpy as np
import pytest

from jaxrlhf.data import batches, tokens, world

TOKENIZER = tokens.word_tokenizer(world.VOCABULARY)
EXAMPLES = [world.demonstration(3, i) for i in range(13)]
SIZES = {"prompt_length": 60, "response_length": 24}


def stream(seed=0, batch_size=4, examples=EXAMPLES, **sizes):
    return batches.sft_batches(
        examples, TOKENIZER, batch_size=batch_size, prompt_weight=0.25, seed=seed, **(SIZES | sizes)
    )


def test_a_batch_is_a_function_of_seed_and_step():
    assert (stream()[9].tokens_BT == stream()[9].tokens_BT).all()
    assert not (stream()[9].tokens_BT == stream(seed=1)[9].tokens_BT).all()
    assert not (stream()[9].tokens_BT == stream()[10].tokens_BT).all()


def test_each_epoch_visits_every_example_once_in_another_order():
    """13 examples in batches of 4: an epoch ends in the middle of a batch, and nothing is lost there."""
    source = stream()
    rows = [tuple(row) for step in range(13) for row in source[step].tokens_BT]
    epochs = [rows[i * 13 : (i + 1) * 13] for i in range(4)]
    assert all(len(set(epoch)) == 13 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_rows_hold_prompt_response_and_end_with_their_weights():
    batch = stream(batch_size=1, examples=EXAMPLES[:1])[0]
    prompt = TOKENIZER.encode(EXAMPLES[0]["prompt"])
    response = [*TOKENIZER.encode(EXAMPLES[0]["response"]), TOKENIZER.eos_id]
    n = len(prompt) + len(response)
    assert batch.tokens_BT[0, :n].tolist() == prompt + response
    assert batch.mask_BT[0].tolist() == [1] * n + [0] * (batch.mask_BT.shape[1] - n)
    weights = [0] + [0.25] * (len(prompt) - 1) + [1] * len(response)
    assert batch.weight_BT[0, :n].tolist() == weights
    assert not batch.weight_BT[0, n:].any()


def test_long_prompts_lose_their_left_end_and_long_responses_their_end_of_text():
    batch = stream(batch_size=1, examples=EXAMPLES[:1], prompt_length=5, response_length=3)[0]
    prompt, response = TOKENIZER.encode(EXAMPLES[0]["prompt"]), TOKENIZER.encode(EXAMPLES[0]["response"])
    assert batch.tokens_BT[0].tolist() == prompt[-5:] + response[:3]
    assert batches.truncation(EXAMPLES, TOKENIZER, 5) == 13
    assert batches.truncation(EXAMPLES, TOKENIZER, 60) == 0


def test_evaluation_takes_each_once_and_fills_the_last_batch_without_weight():
    found = list(batches.eval_sft_batches(EXAMPLES, TOKENIZER, batch_size=5, **SIZES))
    assert [valid for _, valid in found] == [5, 5, 3]
    assert all(batch.tokens_BT.shape[0] == 5 for batch, _ in found)
    assert not found[-1][0].weight_BT[3:].any()
    rows = [tuple(row) for batch, valid in found for row in batch.tokens_BT[:valid]]
    assert len(set(rows)) == 13


def test_prompts_are_padded_on_the_left_and_named():
    source = batches.prompt_batches(EXAMPLES, TOKENIZER, batch_size=4, prompt_length=60, seed=5)
    batch = source[2]
    for index, row, mask in zip(batch.index_B, batch.tokens_BP, batch.mask_BP, strict=True):
        prompt = TOKENIZER.encode(EXAMPLES[index]["prompt"])
        assert row[-len(prompt) :].tolist() == prompt
        assert mask.tolist() == [0] * (len(row) - len(prompt)) + [1] * len(prompt)


@pytest.mark.parametrize("finished", ["0", "1"])
def test_pairs_end_only_where_the_response_ended(finished):
    pair = {"id": "x", "prompt": EXAMPLES[0]["prompt"], "chosen": " my cat", "rejected": " so my cat sat"}
    pair |= {"chosen_finished": finished, "rejected_finished": "1"}
    batch = batches.pair_batches([pair], TOKENIZER, batch_size=2, seed=0, **SIZES)[0]
    assert batch.tokens_BT.shape[0] == 4
    last = [row[int(mask.sum()) - 1] for row, mask in zip(batch.tokens_BT, batch.mask_BT, strict=True)]
    assert (np.array(last) == TOKENIZER.eos_id).tolist() == [finished == "1"] * 2 + [True] * 2
