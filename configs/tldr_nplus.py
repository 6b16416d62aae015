"""Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO": TL;DR with Pythia, which has published results.

    jaxrlhf run --config=configs/tldr_nplus.py:1b --workdir=runs/nplus                # 1b, 2.8b or 6.9b
    jaxrlhf run --config=configs/tldr_nplus.py:smoke --workdir=runs/nplus-smoke       # minutes on 2 CPU cores

`smoke` is a tiny GPT-NeoX with random weights on generated posts. Models and data come from the hub, or from your
copies: --config.model.init=DIR, --config.datasets.tldr.path=DIR and so on. Nobody has run this recipe at full size yet.

What to compare with: TRL's documentation has Pythia 1B at 64.7 % of answers preferred to the reference after PPO, and
at 33.0 % after SFT, by GPT-4o mini (--config.evaluation.judge=openai:MODEL). Responses are sampled at temperature 0.01,
as there, and at 1, where diversity is measured; the second trains nothing again.

Sources of numbers: vwxyzjn/summarize_from_feedback_details, its files in parentheses. What differs from it: the value
is a head on the policy where there it is a model of its own, from the reward model; compared summaries are cut to 53
tokens where there they have room for 169; scores' mean is taken off on samples of SFT where there it is on references;
prompts that are too long lose their beginning where there the post loses its end.
"""

from ml_collections import ConfigDict

from jaxrlhf.config import default
from jaxrlhf.names import TRAINED

MODELS = {size: f"EleutherAI/pythia-{size}-deduped" for size in ("1b", "2.8b", "6.9b")} | {"smoke": ""}
POSTS, PAIRS, EPISODES = 116_722, 92_832, 1_000_000  # one epoch of the first two (sft.py, reward.py, ppo.py)


def get_config(variant: str = "1b") -> ConfigDict:
    if variant not in MODELS:
        raise ValueError(f"configs/tldr_nplus.py:{variant}: known are {', '.join(MODELS)}")
    c = default()
    c.name = "tldr_nplus"
    c.task = "datasets"
    # Double newlines (tldr_dataset.py).
    c.datasets.update(sft="tldr", preferences="tldr_comparisons", prompt="tldr_double")
    c.datasets.update(far=("cnn_dailymail",), far_prompt="cnndm_double", evaluation_prompts=500, evaluation_pairs=2000)
    c.model.init = MODELS[variant]
    # 512 tokens of prompt and 53 of response (tldr_dataset.py); nothing is frozen.
    c.model.update(prompt_length=512, response_length=53, freeze_layers=0.0)
    c.mesh.update(data=1, fsdp=-1)
    # 1 x 16 accumulated on 8 GPUs; loss on the prompt too (sft.py:40-127, 393-399).
    c.sft.update(batch_size=128, prompt_weight=1.0)
    c.sft.loop.update(steps=POSTS // 128, log_every=10, eval_every=200, save_every=100)
    # 1 x 8 on 8 GPUs; scores lose their mean and keep their spread (reward.py:40-90, 456-520).
    c.reward.update(batch_size=64, unit_variance=False)
    c.reward.loop.update(steps=PAIRS // 64, log_every=10, eval_every=500, save_every=200)
    # 64 x 8 episodes a batch, 4 epochs of one minibatch, an unfinished response scores -1 (ppo.py:41-160, 542-705).
    c.ppo.update(batch_size=512, epochs=4, minibatches=1, kl_coef=0.05, kl_estimator="k1", gamma=1.0, lam=0.95)
    c.ppo.update(clip=0.2, value_clip=0.2, value_coef=0.1, entropy_coef=0.0, temperature=0.7, value_init="reward")
    c.ppo.update(whiten_advantages=True, whiten_rewards=False, eos_required=True, eos_missing=-1.0)
    c.ppo.loop.update(steps=EPISODES // 512, log_every=1, save_every=100)
    for stage, schedule in (("sft", "cosine"), ("reward", "cosine"), ("ppo", "linear")):
        # AdamW of each file, with PyTorch's weight decay where none is given.
        c[stage].optim.update(lr=3e-6, eps=1e-5, schedule=schedule, warmup=0, weight_decay=0.01, clip_norm=0.0)
    # Kirk et al.'s numbers of samples (lab/args.py:66; calculate_diversity.py:52).
    c.sampling.update(samples_per_prompt=16, best_of=16, pool=32, batch_size=8)
    c.sweep = ("sampling.temperature=0.01; 1.0",)
    c.evaluation.update(judge="reward", judge_template="tldr")
    if variant == "smoke":
        smoke(c)
    return c


def smoke(c: ConfigDict) -> None:
    """Every stage on generated posts in the sources' formats, with a tokenizer learnt from them."""
    for name in ("tldr", "cnn_dailymail"):
        c.datasets[name].path = f"configs/smoke/{name}"
    c.datasets.tldr_comparisons.path = "configs/smoke/tldr_comparisons.jsonl"
    c.datasets.update(evaluation_prompts=6, vocab_size=384)
    c.model.update(family="gpt_neox", layers=3, width=32, heads=2, ff_width=64, prompt_length=96, response_length=24)
    for stage in TRAINED:
        c[stage].batch_size = 8
        c[stage].loop.update(steps=4, log_every=2, eval_every=0, save_every=2)
        c[stage].optim.lr = 1e-3
    c.reward.normalise_samples = 16
    c.sampling.update(samples_per_prompt=3, best_of=3, pool=6, batch_size=8)
    c.evaluation.bootstrap = 200
