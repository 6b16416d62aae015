"""The same steps as others take them: Hugging Face's `generate`, a plain torch loop, TRL's PPO.

What a process of `jaxrlhf bench` runs where they are installed; none of them is needed for anything else.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

from jaxrlhf.bench.work import MINILM, SHAPES, TEXTS, Work, over, serve

BOS, PAD, EOS, FIRST_TOKEN = 0, 1, 2, 4
# The best that is known of each; `generate` also as it comes.
PEERS = {
    "sample": ("generate", "generate, static cache"),
    "sft": ("torch loop",),
    "reward": ("torch loop",),
    "ppo": ("TRL PPO",),
    "diversity": ("released code",),
}
# TRL 1.12 is the last with PPO.
NEEDS = {
    "TRL PPO": ("torch", "transformers", "datasets", "trl.experimental.ppo"),
    # Kirk et al.'s, whose folder `rlvsil` is to be on PYTHONPATH.
    "released code": ("diversity", MINILM, "sentence_transformers", "sklearn", "scipy", "requests"),
}
SHARE = {"released code": 2}  # prompts that it measures at a time, of `TEXTS`
# Nothing of theirs goes out to the network.
_ALONE = {"HF_HUB_OFFLINE": "1", "TRL_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
# glibc's default gives large buffers back to the system at every step, which slows torch by up to a half.
_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def needs(peer: str) -> tuple[str, ...]:
    """The modules without which a peer is not measured."""
    return NEEDS.get(peer, ("torch", "transformers"))


def environment(peer: str) -> dict[str, str]:
    """What its process has besides; `generate` is measured as it comes, the others at their best."""
    return _ALONE if peer == "generate" else _ALONE | _ALLOCATOR


def times(peer: str) -> float:
    """How many times what a peer does at a time makes the whole work."""
    return TEXTS / SHARE[peer] if peer in SHARE else 1.0


def main(argv: list[str]) -> None:
    """Serves one peer's step: its name and the work, as JSON, in `argv`."""
    import torch

    peer, work = argv[1], Work.read(argv[2])
    torch.manual_seed(0)
    sides = {"sample": _sample, "sft": _sft, "reward": _reward, "ppo": _ppo, "diversity": _diversity}
    serve({"device": "cpu"}, sides[work.step](peer, work))


def _config(work: Work, **extra: Any) -> Any:
    """An OPT of the work's shape, as its `of_shape` has it."""
    from transformers import OPTConfig

    layers, width, heads, vocab_size = SHAPES[work.experiment.name]
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        ffn_dim=4 * width,
        num_attention_heads=heads,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        **extra,
    )


def _policy(work: Work) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(_config(work))


def _scorer(work: Work) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(_config(work, num_labels=1))


def _freeze(net: Any, share: float) -> Any:
    """Bottom blocks, embeddings and output head, as `split` has it."""
    decoder = net.model.decoder
    frozen = [decoder.embed_tokens, decoder.embed_positions, *decoder.layers[: int(share * len(decoder.layers))]]
    for module in frozen if share else ():
        module.requires_grad_(False)
    return net


def _prompts(work: Work, count: int) -> tuple[Any, Any]:
    """Left-padded prompts of half the length to all of it, the first of the whole length."""
    import torch

    P = work.experiment.model.prompt_length
    ids = torch.randint(FIRST_TOKEN, work.vocab_size, (count, P))
    real = torch.randint(P // 2, P + 1, (count,))
    real[0] = P
    mask = (torch.arange(P) >= (P - real)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def _sample(peer: str, work: Work) -> Callable[[Callable[[], bool]], None]:
    import torch
    from transformers import GenerationConfig

    c = work.experiment
    net = _policy(work).eval()
    net.generation_config.eos_token_id = None
    ids, mask = _prompts(work, c.sampling.batch_size)
    extra = {"cache_implementation": "static"} if peer.endswith("static cache") else {}
    generation = GenerationConfig(
        max_new_tokens=c.model.response_length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=c.sampling.samples_per_prompt,
        pad_token_id=PAD,
        eos_token_id=None,
        disable_compile=True,
        **extra,
    )

    def once() -> None:
        with torch.inference_mode():
            out = net.generate(input_ids=ids, attention_mask=mask, generation_config=generation)
        assert out.shape[1] == c.model.prompt_length + c.model.response_length

    return over(once)


def _sft(peer: str, work: Work) -> Callable[[Callable[[], bool]], None]:
    net = _freeze(_policy(work), work.experiment.model.freeze_layers)
    c = work.experiment.sft
    lengths = work.lengths(c.batch_size)
    ids, mask = _rows(work, [p + q for p, q, _ in lengths])
    labels = ids.masked_fill(mask == 0, -100)
    for row, (prompt, *_) in zip(labels, lengths, strict=True):
        row[: 0 if c.prompt_weight else prompt] = -100
    return over(
        _training_step(net, lambda: net(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss)
    )


def _rows(work: Work, lengths: list[int]) -> tuple[Any, Any]:
    """Texts padded to the longest of the batch."""
    import torch

    ids = torch.randint(FIRST_TOKEN, work.vocab_size, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def _reward(peer: str, work: Work) -> Callable[[Callable[[], bool]], None]:
    import torch

    net = _freeze(_scorer(work), work.experiment.model.freeze_layers)
    pairs = work.lengths(work.experiment.reward.batch_size)
    ids, mask = _rows(work, [p + q for p, q, _ in pairs] + [p + r for p, _, r in pairs])

    def loss() -> Any:
        scores = net(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
        chosen, rejected = scores.chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    return over(_training_step(net, loss))


def _training_step(net: Any, loss: Callable[[], Any]) -> Callable[[], None]:
    import torch

    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    net.train()

    def once() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return once


def _ppo(peer: str, work: Work) -> Callable[[Callable[[], bool]], None]:
    """TRL's trainer, told apart into iterations by a callback: the first is the warm-up."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    c, most = work.experiment, 100  # iterations; `again` ends them
    policy, reference, value, reward = _policy(work), _policy(work), _scorer(work), _scorer(work)
    for net in (policy, value):
        _freeze(net, c.model.freeze_layers)
    for net in (reference, reward):
        net.requires_grad_(False)
    ids, _ = _prompts(work, c.ppo.batch_size)

    def run(again: Callable[[], bool]) -> None:
        class Turns(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                if not again():
                    raise _EnoughError

        with tempfile.TemporaryDirectory() as folder:
            settings = PPOConfig(
                output_dir=folder,
                total_episodes=c.ppo.batch_size * most,
                per_device_train_batch_size=c.ppo.batch_size,
                gradient_accumulation_steps=1,
                num_mini_batches=c.ppo.minibatches,
                num_ppo_epochs=c.ppo.epochs,
                local_rollout_forward_batch_size=c.ppo.batch_size,
                response_length=c.model.response_length,
                stop_token=None,
                temperature=c.ppo.temperature,
                learning_rate=3e-6,
                num_sample_generations=0,
                bf16=False,
                fp16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                eval_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1000,
            )
            trainer = PPOTrainer(
                args=settings,
                processing_class=_tokenizer(),
                model=policy,
                ref_model=reference,
                reward_model=reward,
                value_model=value,
                train_dataset=Dataset.from_dict({"input_ids": ids.tolist() * most}),
                callbacks=[Turns()],
            )
            try:
                trainer.train()
            except _EnoughError:
                return

    return run


def _diversity(peer: str, work: Work) -> Callable[[Callable[[], bool]], None]:
    """EAD, distinct n-grams, n-gram cosine and Sentence-BERT, per input, with the encoder that ours has."""
    import sentence_transformers

    # It names an encoder of its own, and imports a server's client that none of these metrics needs.
    encoder, load = work.experiment.evaluation.sentence_encoder, sentence_transformers.SentenceTransformer
    sentence_transformers.SentenceTransformer = lambda _: load(encoder, device="cpu")
    client = ModuleType("openai.embeddings_utils")
    client.get_embeddings = None  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.update({"openai": ModuleType("openai"), client.__name__: client})
    from diversity import DEFAULT_CONFIGS, calculate_output_diversity, initialise_metrics

    wanted = ("ead_averaged_distinct_ngrams", "averaged_distinct_ngrams", "cosine_similarity_2d_diversity")
    metrics = initialise_metrics({name: DEFAULT_CONFIGS[name] for name in (*wanted, "sent_bert_from_sim")})
    texts_BN = work.texts(SHARE[peer])

    def once() -> None:
        for texts in texts_BN:
            assert len(calculate_output_diversity(texts, metrics)) == len(metrics)

    return over(once)


class _EnoughError(Exception):
    """The way out of a trainer's loop."""


def _tokenizer() -> Any:
    """Something that knows the special ids; the trainer is handed ids, never text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


if __name__ == "__main__":
    main(sys.argv)
