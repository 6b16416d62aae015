"""The paper's experiment in miniature, on the embedded world: the first thing to run.

    jaxrlhf run --config=configs/quickstart.py --workdir=runs/quickstart          # under 5 minutes on 2 CPU cores
    jaxrlhf run --config=configs/quickstart.py:smoke --workdir=runs/smoke         # about a minute, numbers mean little
    jaxrlhf run --config=configs/quickstart.py --workdir=runs/kl --config.ppo.kl_coef=0.2
    jaxrlhf run --config=configs/quickstart.py --workdir=runs/scratch --config.pretrain.init=scratch

Generated forum posts are summarised by a decoder of 0.3 million parameters. SFT learns from imperfect demonstrations,
the reward model from simulated annotators, PPO from the reward model; a gold judge knows the truth.
"""

from ml_collections import ConfigDict

from jaxrlhf.config import default


def get_config(variant: str = "") -> ConfigDict:
    c = default()
    c.name = "quickstart"
    c.task = "world"
    c.model.update(layers=6, width=64, heads=2, ff_width=192, prompt_length=80, response_length=24)
    c.model.freeze_layers = 0.8  # the paper's share: 4 of 6 blocks, with embeddings and output head
    c.pretrain.init = "world"  # made by this recipe with --config.pretrain.init=scratch; see jaxrlhf/assets
    c.pretrain.batch_size = 64
    c.pretrain.loop.update(steps=1500, log_every=50, eval_every=500, save_every=250)
    c.pretrain.optim.update(lr=3e-3, warmup=50, b2=0.98)
    c.sft.batch_size = 32
    c.sft.loop.update(steps=200, log_every=20, eval_every=100, save_every=50)
    c.sft.optim.update(lr=3e-3, b2=0.98)
    c.reward.batch_size = 32
    c.reward.loop.update(steps=160, log_every=10, eval_every=80, save_every=40)
    c.reward.optim.update(lr=1.5e-3, b2=0.98)
    c.ppo.update(batch_size=128, epochs=4, minibatches=2, kl_coef=0.05)
    c.ppo.loop.update(steps=25, log_every=1, save_every=5)
    c.ppo.optim.update(lr=1e-3)
    # What --config.methods=dpo,rloo,grpo trains beside PPO, on as many pairs or responses.
    c.dpo.loop.update(steps=160, log_every=10, eval_every=80, save_every=40)
    c.dpo.optim.update(lr=5e-4, b2=0.98)
    for method in (c.rloo, c.grpo):
        method.update(batch_size=32, samples=4)
        method.loop.update(steps=25, log_every=1, save_every=5)
        method.optim.update(lr=1e-3)
    c.world.evaluation_prompts = 96  # three whole batches of sampling
    c.sampling.update(samples_per_prompt=6, best_of=6, pool=36)
    if variant == "smoke":
        smoke(c)
    elif variant:
        raise ValueError(f"configs/quickstart.py:{variant}: known is smoke")
    return c


def smoke(c: ConfigDict) -> None:
    """Every stage, as little of each as still does its work."""
    c.world.update(documents=500, demonstrations=300, preference_prompts=64, ppo_prompts=128, evaluation_prompts=12)
    c.pretrain.loop.update(steps=4, log_every=2, save_every=2)
    c.sft.loop.update(steps=10, log_every=5, eval_every=5, save_every=5)
    c.reward.loop.update(steps=6, log_every=2, eval_every=3, save_every=3)
    c.reward.normalise_samples = 32
    c.ppo.update(batch_size=16)
    c.ppo.loop.update(steps=4, save_every=2)
    c.dpo.loop.update(steps=4, log_every=2, eval_every=2, save_every=2)
    for method in (c.rloo, c.grpo):
        method.update(batch_size=4)
        method.loop.update(steps=4, save_every=2)
    c.sampling.update(samples_per_prompt=4, best_of=4, pool=8, batch_size=12)
    c.evaluation.bootstrap = 200
