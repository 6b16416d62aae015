"""One config describes one experiment: every key once, with its unit and reason, as frozen dataclasses.

A recipe (`configs/*.py`) starts from `default()`, an ml_collections ConfigDict of these, and changes keys;
`recipes.resolve` turns the ConfigDict back into the dataclasses, which are hashable and so can be static under `jit`.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_collections

from jaxrlhf import names
from jaxrlhf.config_data import Datasets
from jaxrlhf.evaluation.judge import Judge
from jaxrlhf.files import UserError, read_json


@dataclass(frozen=True)
class World:
    """The embedded world: how much of it is generated. Everything follows from `Experiment.seed`."""

    documents: int = 20_000  # pretraining documents, made only when the base is trained from scratch
    demonstrations: int = 6_000  # posts with an imperfect human summary
    preference_prompts: int = 1_500  # posts for which annotators compare pairs of SFT samples
    ppo_prompts: int = 4_000  # posts without a summary, for PPO
    evaluation_prompts: int = 100  # posts of each split
    annotator_temperature: float = 0.7  # P(a preferred) = sigmoid((gold_a - gold_b) / temperature)


@dataclass(frozen=True)
class Files:
    """Real files: paths are globs relative to `root`; see `configs/instructions.py`."""

    root: str = ""
    demonstrations: tuple[str, ...] = ()  # files of {instruction, output, dataset}
    annotations: tuple[str, ...] = ()  # files of {instruction, output_1, output_2, preference}
    reference: str = ""  # file of the reference answers, the baseline of win rates
    id_sources: tuple[str, ...] = ()  # values of `dataset` that are in-distribution
    ood_sources: tuple[str, ...] = ()  # values of `dataset` that are out of distribution, a split each
    ood_files: tuple[str, ...] = ()  # `name=path` of seed-task files, a split each
    held_out: float = 0.2  # share of in-distribution prompts kept for the `id` split
    # tldr | tldr_double | cnndm | cnndm_double | alpaca | chat (the imported tokenizer's template), or a text with
    # {field}s of the records; see jaxrlhf/data/prompts.py.
    prompt: str = "### Instruction:\n{instruction}\n\n### Response:\n"
    evaluation_prompts: int = 0  # at most so many prompts of each split; 0 = all
    vocab_size: int = 4096  # of the byte-level BPE tokenizer learnt from the demonstrations, where none is imported


@dataclass(frozen=True)
class Model:
    """The decoder. `family` sets the architecture's options (`model.FAMILIES`), sizes are here; or `init` sets both."""

    # A Hugging Face directory or hub id such as facebook/opt-125m, whose config, weights and tokenizer are the base;
    # "base" = what `jaxrlhf import` put into the workdir, which "" means too where there is such; "" = none.
    init: str = ""
    family: str = "llama"  # llama | mistral | qwen2 | qwen3 | gemma2 | opt | gpt2 | gpt_neox
    layers: int = 6
    width: int = 64
    heads: int = 4
    kv_heads: int = 0  # 0 = as many as heads
    ff_width: int = 192
    # float32 | bfloat16: of matrix products, activations and FROZEN. What is trained has f32 masters always, and norms,
    # softmax, logits and losses are f32. On a CPU bfloat16 is slower.
    dtype: str = "float32"
    # What the forward pass of a block keeps for gradients; the rest is computed again: none (keeps everything) | full
    # (keeps nothing) | dots | dots_no_batch (keeps matrix products, or those of parameters alone). Less memory, more
    # FLOPs, the same numbers but for rounding; `jaxrlhf plan` says how much of each. What is no product is made again
    # sooner than it is stored and read: on CPUs, steps with `dots` are faster than with `none`.
    remat: str = "dots"
    prompt_length: int = 64  # tokens; longer prompts lose their left end, which is counted and reported
    response_length: int = 24  # tokens, the end-of-text token included
    freeze_layers: float = (
        0.8  # share of the bottom blocks frozen, with embeddings and output head (paper: 0.8); 0 = nothing
    )


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 = the rest. Batches divide over data x fsdp, parameters over fsdp and tensor."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule over a stage's optimizer steps."""

    lr: float = 1e-3
    schedule: str = "cosine"  # constant | linear | cosine, down to 0
    warmup: int = 0  # steps from 0 to lr
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
    accumulate: int = 1  # parts that a step's (mini)batch is worked through in; the same step with less memory


@dataclass(frozen=True)
class Loop:
    """The host loop of a stage."""

    steps: int = 100
    log_every: int = 10
    eval_every: int = 50  # 0 = only at the end
    save_every: int = 50
    keep: int = 2  # newest checkpoints kept


@dataclass(frozen=True)
class Pretrain:
    """The base model: shipped with the package, or made from scratch by this stage."""

    init: str = "scratch"  # scratch | the name of a base in jaxrlhf/assets
    batch_size: int = 64
    prompt_weight: float = 0.1  # loss weight of the prompt's tokens; the response's weigh 1
    loop: Loop = field(default_factory=Loop)
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning on demonstrations: loss on the response and its end-of-text."""

    batch_size: int = 32
    prompt_weight: float = 0.0  # loss weight of the prompt's tokens; the response's weigh 1 (N+ details: 1)
    loop: Loop = field(default_factory=Loop)
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class Reward:
    """The reward model: pairwise cross-entropy at the last real token, then normalised on SFT samples."""

    # "" = trained here, from SFT; or the Hugging Face directory or hub id of one from elsewhere, with one label, which
    # this stage then only tries and normalises. It reads the policy's ids where its tokenizer has the same, else texts.
    init: str = ""
    batch_size: int = 32  # pairs
    samples_per_prompt: int = 4  # SFT samples that simulated annotators compare in pairs
    normalise_samples: int = 512  # SFT samples on which scores get mean 0 and standard deviation 1
    unit_variance: bool = True  # False: mean 0 alone, as the N+ details have it; KL coefficients then weigh otherwise
    ensemble: int = 1  # members, each with a head and an order of the pairs of its own; see losses.combine_scores
    temperature: float = 1.0  # of the SFT samples that are compared, and of those that scores are normalised on
    combine: str = "mean"  # mean | worst | uncertainty: how the members' normalised scores become one
    uncertainty_coef: float = 0.5  # uncertainty: the mean less this much of the variance over members
    loop: Loop = field(default_factory=Loop)
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class Ppo:
    """PPO with a KL penalty to the SFT policy. A step is one rollout batch and its epochs of updates."""

    seed: int = 0  # of PPO's batches and samples alone, beside config.seed: another run from one SFT and reward model
    batch_size: int = 128  # prompts in a rollout batch, one response each
    epochs: int = 4
    minibatches: int = 2
    temperature: float = 1.0
    kl_coef: float = 0.05
    kl_estimator: str = "k1"  # k1 | k2 | k3, of each response token
    kl_target: float = 0.0  # nats a response; 0 = kl_coef stays fixed, else it adapts towards this
    kl_horizon: int = 10_000  # responses over which it adapts
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    value_init: str = "zero"  # zero | normal (1/sqrt(D+1)) | reward (the reward model's head)
    entropy_coef: float = 0.0
    forward_kl_coef: float = 0.0  # of KL(SFT || policy) a token, exact over the vocabulary, in the loss
    whiten_advantages: bool = True  # over the real tokens of the whole rollout batch
    whiten_rewards: bool = False  # scale without shift, as in the N+ details
    length_penalty: float = 0.0  # coefficient of -(length / response_length)^5
    eos_bonus: float = 0.0  # added to the score of a finished response
    eos_required: bool = False  # the score of an unfinished response is `eos_missing`
    eos_missing: float = -1.0
    loop: Loop = field(default_factory=Loop)
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class Dpo:
    """DPO on the reward model's pairs, from SFT, with SFT as reference."""

    loss: str = "sigmoid"  # sigmoid | ipo
    beta: float = 0.1  # pull to the reference: the implicit reward is beta * (logp - ref); ipo's tau
    batch_size: int = 32  # pairs
    loop: Loop = field(default_factory=Loop)
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class Rloo:
    """REINFORCE with a leave-one-out baseline. Scores are shaped by `ppo`'s penalties, so that all climb one reward."""

    batch_size: int = 32  # prompts in a rollout batch
    samples: int = 4  # responses to each
    minibatches: int = 2  # optimizer steps a rollout; each response is used once, as there is no ratio to correct by
    temperature: float = 1.0
    kl_coef: float = 0.05  # of KL(policy || SFT) a response, k1, in the return
    loop: Loop = field(default_factory=Loop)
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class Grpo:
    """Clipped policy gradient with advantages relative to a prompt's group; scores are shaped by `ppo`'s penalties."""

    batch_size: int = 32  # prompts in a rollout batch
    samples: int = 4  # responses to each, a group
    epochs: int = 1
    minibatches: int = 2
    temperature: float = 1.0
    kl_coef: float = 0.04  # of KL(policy || SFT) a token, k3, in the loss
    clip: float = 0.2
    # Dr. GRPO: no division by a group's standard deviation, nor by a response's own length, which else favours long bad
    # responses; lengths and diversity are what is measured here.
    unbiased: bool = False
    loop: Loop = field(default_factory=Loop)
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class Sampling:
    """How every policy is sampled for evaluation. The paper: 16 samples at temperature 1, nothing cut off."""

    samples_per_prompt: int = 16
    best_of: int = 16
    # SFT samples a prompt. With samples_per_prompt x best_of of them, each best-of-N response is picked from samples of
    # its own; with fewer, as in the paper, picks share samples and repeat each other, and the report says so.
    pool: int = 256
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    batch_size: int = 32  # prompts at a time


@dataclass(frozen=True)
class Evaluation:
    """What is measured and how sure it is."""

    # Who decides win rates against the reference and head to head: gold | reward (the scores that samples carry) |
    # length (the longer response, a baseline) | openai:MODEL (a server that speaks the OpenAI chat API) |
    # reward:DIRECTORY (another run's reward model, by its workdir, or a Hugging Face directory's).
    judge: str = "gold"
    judge_base_url: str = "https://api.openai.com/v1"
    judge_template: str = "tldr"  # tldr | cnndm | instructions | a file with {prompt}, {answer_1} and {answer_2}
    judge_order: str = "both"  # both | random: in which order a pair is shown; both costs twice and shows position bias
    max_requests: int = 10_000  # to the judge's server in one command, retries included; 0 = no limit
    judge_concurrency: int = 8  # requests under way at once
    judge_api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    paper_compat: bool = False  # every metric as the paper's released code computes it
    bootstrap: int = 2_000  # resamples of an interval
    cut_words: int = 0  # words that texts are cut to for metrics ending in _cut; 0 = the shortest policy's quartile
    sentence_encoder: str = ""  # a sentence-transformers directory, for sbert and vendi; "" = not measured
    nli_model: str = ""  # a directory of an NLI classifier, for nli and clusters; "" = not measured

    @property
    def text_judge(self) -> Judge:
        """The judge that reads texts."""
        return Judge(
            name=self.judge,
            base_url=self.judge_base_url,
            template=self.judge_template,
            order=self.judge_order,
            max_requests=self.max_requests,
            concurrency=self.judge_concurrency,
            api_key_env=self.judge_api_key_env,
        )


@dataclass(frozen=True)
class Experiment:
    """A whole experiment: its data, its model, its stages and its measurement."""

    name: str = "experiment"
    seed: int = 0
    task: str = "world"  # world | files | datasets
    # Axes of a sweep: runs with every combination are trained, and what they share only once; see jaxrlhf/sweep.py.
    # An axis is its values with semicolons between, of one key or several: "ppo.kl_coef=0.05; 0.2" or
    # "model.layers=4 model.width=32; model.layers=6 model.width=64". The first values are the base. A key that a value
    # does not name is as without the sweep.
    sweep: tuple[str, ...] = ()
    methods: str = ""  # trained beside PPO and compared with it: of dpo, rloo, grpo, with commas between
    world: World = field(default_factory=World)
    files: Files = field(default_factory=Files)
    datasets: Datasets = field(default_factory=Datasets)
    model: Model = field(default_factory=Model)
    mesh: Mesh = field(default_factory=Mesh)
    pretrain: Pretrain = field(default_factory=Pretrain)
    sft: Sft = field(default_factory=Sft)
    reward: Reward = field(default_factory=Reward)
    ppo: Ppo = field(default_factory=Ppo)
    dpo: Dpo = field(default_factory=Dpo)
    rloo: Rloo = field(default_factory=Rloo)
    grpo: Grpo = field(default_factory=Grpo)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a run, in order."""
        return names.due([m.strip() for m in self.methods.split(",")])


def default() -> ml_collections.ConfigDict:
    """The default experiment as a ConfigDict, for a recipe to change."""
    return ml_collections.ConfigDict(dataclasses.asdict(Experiment()))


def read(path: Path) -> Experiment:
    """The experiment of a workdir's config.json; `UserError` if the file is missing or is no such config."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object, the resolved config")
    return build(Experiment, found, "config")


def with_base(experiment: Experiment, workdir: Path) -> Experiment:
    """The experiment, which starts from the base that was imported to its workdir, unless it names another."""
    if experiment.model.init or not (workdir / "base").exists():
        return experiment
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, init="base"))


def build(kind: Any, values: dict[str, Any], name: str) -> Any:
    """The dataclass `kind` and its sections from plain values; `UserError` for a key that it does not have."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0.0)[0]
            raise UserError(f"{name}.{key}: no such key; the nearest is {name}.{near}")
    built = {}
    for key, value in values.items():
        default = fields[key].default_factory
        section = None if default is dataclasses.MISSING else default
        if section:
            built[key] = build(section, value, f"{name}.{key}")
        else:
            built[key] = tuple(value) if isinstance(value, list) else value  # JSON has lists
    return kind(**built)
