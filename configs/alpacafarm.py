"""Kirk et al. 2024, instruction following: AlpacaFarm, with AlpacaEval and Sequential Instructions as the far sets.

    jaxrlhf run --config=configs/alpacafarm.py --workdir=runs/alpacafarm
    jaxrlhf run --config=configs/alpacafarm.py:smoke --workdir=runs/alpaca-smoke   # about a minute on 2 CPU cores

SFT on the split `sft`, the reward model on the human preferences, PPO on the prompts of `unlabeled`. The argument names
a model: llama-7b (the default), or `smoke`, a tiny LLaMA with random weights on generated instructions.

Models and data come from the hub, or from your copies: --config.model.init=DIR, --config.datasets.alpaca_farm.path=DIR,
.alpaca_farm_preferences.path, .alpaca_farm_id_test.path, .alpaca_eval.path, .sequential_instructions.path. Without
access to UCL-DARK's in-distribution test set, hold some of `sft` out: --config.datasets.test=''. Win rates are the
reward model's own, which flatter PPO: --config.evaluation.judge=openai:MODEL asks a model. Nobody has run this recipe
at full size yet. Sources of numbers: AlpacaFarm's scripts, in parentheses.
"""

from ml_collections import ConfigDict

from jaxrlhf.config import default
from jaxrlhf.names import TRAINED

MODELS = {"llama-7b": "huggyllama/llama-7b", "smoke": ""}


def get_config(variant: str = "llama-7b") -> ConfigDict:
    if variant not in MODELS:
        raise ValueError(f"configs/alpacafarm.py:{variant}: known are {', '.join(MODELS)}")
    c = default()
    c.name = "alpacafarm"
    c.task = "datasets"
    c.datasets.update(sft="alpaca_farm", preferences="alpaca_farm_preferences", test="alpaca_farm_id_test")
    c.datasets.far = ("alpaca_eval", "sequential_instructions")
    c.datasets.evaluation_prompts = 0  # AlpacaEval's 805, and all of the others
    c.datasets.held_out = 0.05  # of the preferences, close to the 500 of 9 691 (examples/reward_modeling.py)
    c.model.init = MODELS[variant]
    # 512 tokens in all (data_preprocessor.py), 300 of them for the response (rlhf_ppo.sh). There, PPO drops prompts of
    # more than 192 tokens; here, those of more than 212 lose their left end, which is counted.
    c.model.update(prompt_length=212, response_length=300, freeze_layers=0.0)
    if variant != "smoke":
        c.mesh.update(data=1, fsdp=8, tensor=-1)  # its batches divide over 8; more chips divide the layers
    c.sft.batch_size = 128  # (sft.sh)
    c.sft.loop.update(steps=234, log_every=5, eval_every=78, save_every=78)  # 3 epochs of 10 000 (sft.sh)
    c.sft.optim.update(lr=2e-5, schedule="cosine", warmup=7, weight_decay=0.0)  # warm-up 3 % (sft.sh)
    c.reward.batch_size = 16  # (reward_modeling.sh)
    c.reward.loop.update(steps=575, log_every=10, eval_every=100, save_every=100)  # 1 epoch
    c.reward.optim.update(lr=3e-6, schedule="cosine", warmup=17, weight_decay=0.0)  # warm-up 3 % (reward_modeling.sh)
    # rlhf_ppo.sh: 512 rollouts, steps of 256, 2 epochs. README: best after 20 to 80 steps; KL .02 with human verdicts.
    c.ppo.update(batch_size=512, epochs=2, minibatches=2, kl_coef=0.02, gamma=1.0, lam=1.0, clip=0.2, value_clip=0.2)
    c.ppo.update(kl_estimator="k1", value_coef=0.1, whiten_rewards=True, value_init="zero", temperature=1.0)
    c.ppo.loop.update(steps=80, log_every=1, save_every=20)
    c.ppo.optim.update(lr=1e-5, eps=1e-5, warmup=5, schedule="constant")  # (rl/ppo_trainer.py)
    c.sampling.update(
        samples_per_prompt=16, best_of=16, pool=32, temperature=1.0, top_p=1.0, batch_size=8
    )  # as in tldr
    c.evaluation.update(judge="reward", judge_template="instructions")
    if variant == "smoke":
        smoke(c)
    return c


def smoke(c: ConfigDict) -> None:
    """Every stage on generated instructions in the sources' formats, with a tiny LLaMA and a tokenizer learnt here."""
    c.datasets.alpaca_farm.path = "configs/smoke/alpaca_farm"
    for name, file in (
        ("alpaca_farm_preferences", "alpaca_human_preference.json"),
        ("alpaca_farm_id_test", "alpaca_farm_id_test.jsonl"),
        ("alpaca_eval", "alpaca_eval.json"),
        ("sequential_instructions", "sequential_instructions.jsonl"),
    ):
        c.datasets[name].path = f"configs/smoke/{file}"
    c.datasets.update(evaluation_prompts=6, vocab_size=384, held_out=0.2)
    c.model.update(family="llama", layers=3, width=32, heads=2, ff_width=64, prompt_length=128, response_length=24)
    for stage, steps in {**dict.fromkeys(TRAINED, 2), "pretrain": 4, "sft": 4, "reward": 4}.items():
        c[stage].batch_size = 8
        c[stage].loop.update(steps=steps, log_every=2, eval_every=0, save_every=2)
        c[stage].optim.update(lr=1e-3, warmup=0)
    c.reward.normalise_samples = 16
    c.sampling.update(samples_per_prompt=3, best_of=3, pool=6, batch_size=8)
    c.evaluation.bootstrap = 200
