"""The config's section on datasets: which one each stage takes, where its files are, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Source:
    """Where the records of one dataset are."""

    # A file, or a folder whose files' names say their split: .jsonl, .json, .csv or .parquet, all but the last also
    # with .gz; "" = the hub.
    path: str = ""
    hub: str = ""  # dataset id on the hub; "" = the one in jaxrlhf/data/datasets.py
    revision: str = ""  # a commit or branch; "" = the default one. The commit and each file's SHA-256 are recorded
    fields: tuple[str, ...] = ()  # `field=column`, for columns that are called otherwise than in the dataset's format


@dataclass(frozen=True)
class Datasets:
    """Named datasets (rows of `jaxrlhf/data/datasets.py`) for each stage, and their structured splits."""

    sft: str = ""  # demonstrations, and their validation and test splits
    preferences: str = ""  # pairs
    prompts: str = ""  # PPO's prompts; "" = those of the demonstrations
    test: str = ""  # in-distribution test prompts; "" = the test split of `sft`
    far: tuple[str, ...] = ()  # far test sets, each the split ood_<name>
    # full | subreddit | length | sentiment: which part is in-distribution; training takes that part alone, and the rest
    # of the test set is the split ood_<split>.
    split: str = "full"
    subreddits: tuple[str, ...] = ("relationships",)  # in-distribution ones, for split=subreddit
    length: int = 245  # words that an in-distribution post has at most, for split=length (Kirk et al.)
    sentiment_index: str = ""  # index file for split=sentiment; "" = our scorer writes one, data/sentiment.json
    full_test: bool = False  # a split `full` too: the whole test set, whose prompts are those of id and ood_<split>
    subset: float = 1.0  # random share of each training set; smaller ones are part of larger ones
    subset_with_replacement: bool = False  # as in the released code (PROTOCOL D28), for the shares 0.1 and 0.5
    held_out: float = 0.05  # share of training posts for each of test and validation that a dataset lacks
    near_duplicate: float = 0.8  # Jaccard similarity of word 8-grams from which posts count as the same
    malformed: float = 0.01  # share of records that may be passed over as malformed; above it, an error
    evaluation_prompts: int = 500  # at most so many of each split (the paper: 500); 0 = all
    evaluation_pairs: int = 0  # the same of preference pairs
    prompt: str = ""  # prompt format, see `files.prompt`; "" = that of the `sft` dataset
    far_prompt: str = ""  # of the far test sets; "" = that of each
    vocab_size: int = 4096  # of the byte-level BPE tokenizer learnt from the demonstrations, where none is imported
    data_dir: str = ""  # where prepared datasets are kept and shared by runs; "" = data/ in the workdir
    tldr: Source = field(default_factory=Source)
    tldr_comparisons: Source = field(default_factory=Source)
    cnn_dailymail: Source = field(default_factory=Source)
    alpaca_farm: Source = field(default_factory=Source)
    alpaca_farm_preferences: Source = field(default_factory=Source)
    alpaca_farm_id_test: Source = field(default_factory=Source)
    alpaca_eval: Source = field(default_factory=Source)
    sequential_instructions: Source = field(default_factory=Source)
    hh: Source = field(default_factory=Source)
    own: Source = field(default_factory=Source)  # yours: the prompt format's fields, and `response`
    own_pairs: Source = field(default_factory=Source)  # yours: the prompt format's fields, `chosen` and `rejected`
    own_far: Source = field(default_factory=Source)  # yours, for `far`: as `own`
