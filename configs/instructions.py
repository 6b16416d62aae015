"""The same stages on real text: AlpacaEval's answers and GPT-4's verdicts, with a small model trained from scratch.

    jaxrlhf run --config=configs/instructions.py --workdir=runs/instructions --config.files.root=FOLDER
    jaxrlhf run --config=configs/instructions.py:smoke --workdir=runs/instructions-smoke

FOLDER holds, from github.com/tatsu-lab/alpaca_eval (results/<model>/) and github.com/yizhongw/self-instruct:

    alpaca_eval/outputs/<model>.json       model_outputs.json of several models: demonstrations
    alpaca_eval/annotations/<model>.json   annotations.json against text_davinci_003: preferences
    instructions/seed_tasks_sequential.jsonl   seed tasks of the far split

A model this small writes poor answers. What it shows is that real text of every length and script goes through every
stage and every measure. About 10 minutes on 2 CPU cores.
"""

from ml_collections import ConfigDict

from jaxrlhf.config import default
from jaxrlhf.names import TRAINED


def get_config(variant: str = "") -> ConfigDict:
    c = default()
    c.name = "instructions"
    c.task = "files"
    c.files.update(
        root="../shared/data",
        demonstrations=("alpaca_eval/outputs/*.json",),
        annotations=("alpaca_eval/annotations/*.json",),
        reference="alpaca_eval/outputs/text_davinci_003.json",
        id_sources=("selfinstruct", "oasst", "helpful_base"),
        ood_sources=("koala", "vicuna"),
        ood_files=("sequential=instructions/seed_tasks_sequential.jsonl",),
        held_out=0.2,
        vocab_size=2048,
        evaluation_prompts=40,
    )
    c.model.update(layers=5, width=128, heads=4, ff_width=384, prompt_length=128, response_length=64)
    c.model.freeze_layers = 0.8
    c.evaluation.judge = "reward"  # no gold judge here: the reward model itself, so win rates flatter PPO
    c.pretrain.batch_size = 16
    c.pretrain.prompt_weight = 1.0
    c.pretrain.loop.update(steps=200, log_every=20, eval_every=100, save_every=100)
    c.pretrain.optim.update(lr=2e-3, warmup=20, b2=0.98)
    c.sft.batch_size = 16
    c.sft.loop.update(steps=60, log_every=10, eval_every=30, save_every=30)
    c.sft.optim.update(lr=1e-3, b2=0.98)
    c.reward.update(batch_size=16, normalise_samples=64)
    c.reward.loop.update(steps=60, log_every=10, eval_every=30, save_every=30)
    c.reward.optim.update(lr=5e-4, b2=0.98)
    c.ppo.update(batch_size=32, epochs=2, minibatches=2)
    c.ppo.loop.update(steps=12, log_every=1, save_every=6)
    c.ppo.optim.update(lr=3e-4)
    c.dpo.batch_size = 16
    c.dpo.loop.update(steps=60, log_every=10, eval_every=30, save_every=30)
    c.dpo.optim.update(lr=2e-4, b2=0.98)
    for method in (c.rloo, c.grpo):
        method.update(batch_size=8, samples=4)
        method.loop.update(steps=12, log_every=1, save_every=6)
        method.optim.update(lr=3e-4)
    c.sampling.update(samples_per_prompt=4, best_of=4, pool=16, batch_size=8)
    if variant == "smoke":
        c.files.evaluation_prompts = 4
        for stage in TRAINED:
            c[stage].loop.update(steps=2, log_every=1, eval_every=0, save_every=1)
        c.model.update(layers=2, width=32, ff_width=64, prompt_length=64, response_length=16, freeze_layers=0.5)
        c.reward.normalise_samples = 8
        c.ppo.update(batch_size=8)
        c.rloo.batch_size = c.grpo.batch_size = 2
        c.sampling.update(samples_per_prompt=3, best_of=2, pool=4, batch_size=4)
        c.evaluation.bootstrap = 200
    elif variant:
        raise ValueError(f"configs/instructions.py:{variant}: known is smoke")
    return c
