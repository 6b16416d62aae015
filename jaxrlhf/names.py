"""What stages and policies are called, in the order in which they come: the one place that lists them."""

from __future__ import annotations

from collections.abc import Collection

METHODS = ("dpo", "rloo", "grpo")  # trained beside PPO, where `config.methods` says so
CLIMBERS = ("ppo", "rloo", "grpo")  # learn from the reward model's score
TRAINED = ("pretrain", "sft", "reward", "ppo", *METHODS)
STAGES = (*TRAINED, "sample", "evaluate", "report")
POLICIES = ("sft", "bon", "ppo", *METHODS)
TITLES = {
    "pretrain": "Pretraining",
    "sft": "SFT",
    "reward": "Reward model",
    "ppo": "PPO",
    "dpo": "DPO",
    "rloo": "RLOO",
    "grpo": "GRPO",
}


def due(methods: Collection[str]) -> tuple[str, ...]:
    """The stages of a run that trains `methods` beside PPO."""
    return tuple(s for s in STAGES if s not in METHODS or s in methods)


def behind(stage: str) -> tuple[str, ...]:
    """The training stages that one follows from, itself last."""
    return (*TRAINED[: min(TRAINED.index(stage), TRAINED.index("ppo"))], stage)
