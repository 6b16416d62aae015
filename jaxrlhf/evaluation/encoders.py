"""Text encoders, jitted: sentence embeddings and pair classification, for Sentence-BERT and NLI diversity.

BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) are one post-norm transformer that sees in both directions; the
family is a row of options. `encoder_weights` reads both kinds of encoder from Hugging Face directories.

Axis letters: B batch, T tokens, D width, F feed-forward width, H heads, K head width, L layers, C labels, U texts.
Everything is computed in f32, matrix products too, which accelerators would otherwise round to fewer bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.logs import progress
from jaxrlhf.types import Params

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
POOLINGS = ("mean", "cls")
CHUNK = 1024  # texts tokenised at once: the tokenizer returns Python lists, which take ten times an array's memory
BATCH = 2048  # tokens computed at once, padding included: more fall out of a CPU's cache, a fifth slower
AHEAD = 4  # batches under way
HIDDEN = -1e30  # added to what attention gives to padding
Tokenise = Callable[[Sequence[Any]], list[np.ndarray]]


@dataclass(frozen=True)
class Architecture:
    """Sizes and options of an encoder; hashable, so that it can be static under `jit`."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    ff_width: int
    max_positions: int  # rows of the table of positions
    token_types: int
    norm_eps: float
    activation: str
    pad_id: int
    after_pad: bool  # positions begin after row `pad_id`, which a pad token has that is spelt out within a text

    @property
    def first_position(self) -> int:
        """The row of a text's first token in the table of positions."""
        return self.pad_id + 1 if self.after_pad else 0

    @property
    def context(self) -> int:
        """The most tokens that a text can have."""
        return self.max_positions - self.first_position


@dataclass(frozen=True)
class SentenceEncoder:
    """What `embed` needs: a text's hidden states are pooled, and scaled to length 1 where `normalise` says so."""

    arch: Architecture
    params: Params
    tokenizer: Any  # transformers' PreTrainedTokenizerFast
    max_length: int  # tokens, special ones included; longer texts are cut
    pooling: str
    normalise: bool


@dataclass(frozen=True)
class Classifier:
    """What `classify` needs; `labels` in the order of the logits."""

    arch: Architecture
    params: Params
    tokenizer: Any
    max_length: int
    labels: tuple[str, ...]


def embed(encoder: SentenceEncoder, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of texts, in their order: f32 [U, D]. Equal texts are encoded once, and come out equal."""
    tokenise = partial(_tokenise, encoder.tokenizer, encoder.max_length)
    forward = partial(_embed, encoder.arch, encoder.pooling, encoder.normalise, encoder.params)
    return _forwarded(forward, encoder.arch, tokenise, encoder.arch.width, texts, "embedding texts")


def classify(classifier: Classifier, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Logits of (premise, hypothesis) pairs, in their order: f32 [U, C]. Equal pairs are classified once.

    A pair that is too long loses tokens from the end of its longer text. An empty text is a text like others, as in
    transformers' calls on lists of pairs.
    """
    tokenise = partial(_tokenise, classifier.tokenizer, classifier.max_length)
    forward = partial(_classify, classifier.arch, classifier.params)
    return _forwarded(forward, classifier.arch, tokenise, len(classifier.labels), pairs, "comparing sentences")


def encode(
    arch: Architecture, params: Params, token_BT: jax.Array, type_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """Final hidden states [B, T, D]; real tokens (`mask_BT`) neither see padding nor count it, left or right."""
    table = params["embed"]
    h_BTD = table["tokens"][token_BT] + table["positions"][positions(arch, token_BT, mask_BT)] + table["types"][type_BT]
    h_BTD = _norm(arch, table["norm"], h_BTD)

    def block(h_BTD: jax.Array, w: Params) -> tuple[jax.Array, None]:
        q_BTD, k_BTD, v_BTD = (_linear(w[name], h_BTD) for name in "qkv")
        seen_BTD = _attend(q_BTD, k_BTD, v_BTD, mask_BT, arch.heads)
        h_BTD = _norm(arch, w["attn_norm"], h_BTD + _linear(w["o"], seen_BTD))
        hidden_BTF = ACTIVATIONS[arch.activation](_linear(w["up"], h_BTD))
        return _norm(arch, w["mlp_norm"], h_BTD + _linear(w["down"], hidden_BTF)), None

    return jax.lax.scan(block, h_BTD, params["blocks"])[0]


def _attend(q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, mask_BT: jax.Array, heads: int) -> jax.Array:
    """Attention of every head to all real tokens. [B, T, D].

    Heads first: as `jax.nn.dot_product_attention` lays it out, with heads beside their width, the whole encoder takes
    about a tenth longer at 256 tokens on XLA's CPU backend.
    """
    q_BHTK, k_BHTK, v_BHTK = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in (q_BTD, k_BTD, v_BTD))
    score_BHTT = (q_BHTK * q_BHTK.shape[-1] ** -0.5) @ k_BHTK.swapaxes(2, 3)
    score_BHTT += jnp.where(mask_BT, 0.0, HIDDEN)[:, None, None]
    share_BHTT = jnp.exp(score_BHTT - score_BHTT.max(-1, keepdims=True))
    seen_BHTK = (share_BHTT @ v_BHTK) / share_BHTT.sum(-1, keepdims=True)
    return seen_BHTK.swapaxes(1, 2).reshape(q_BTD.shape)


def positions(arch: Architecture, token_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Rows of the table of positions, counted from a text's first token. int32 [B, T]."""
    counted_BT = mask_BT & (token_BT != arch.pad_id) if arch.after_pad else mask_BT
    count_BT = jnp.cumsum(counted_BT, axis=-1, dtype=jnp.int32) * counted_BT
    return jnp.maximum(count_BT + arch.first_position - 1, 0)


def pool(hidden_BTD: jax.Array, mask_BT: jax.Array, pooling: str) -> jax.Array:
    """One vector a text: the mean over its real tokens, or its first token's. [B, D]."""
    if pooling == "cls":
        first_B = jnp.argmax(mask_BT, axis=-1)
        return jnp.take_along_axis(hidden_BTD, first_B[:, None, None], axis=1)[:, 0]
    mask_BT1 = mask_BT[..., None].astype(jnp.float32)
    return (hidden_BTD * mask_BT1).sum(1) / jnp.maximum(mask_BT1.sum(1), 1.0)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _embed(
    arch: Architecture,
    pooling: str,
    normalise: bool,
    params: Params,
    token_BT: jax.Array,
    type_BT: jax.Array,
    mask_BT: jax.Array,
) -> jax.Array:
    with jax.default_matmul_precision("float32"):
        pooled_BD = pool(encode(arch, params, token_BT, type_BT, mask_BT), mask_BT, pooling)
    if not normalise:
        return pooled_BD
    return pooled_BD / jnp.maximum(jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnums=0)
def _classify(
    arch: Architecture, params: Params, token_BT: jax.Array, type_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    with jax.default_matmul_precision("float32"):
        first_BD = pool(encode(arch, params, token_BT, type_BT, mask_BT), mask_BT, "cls")
        return _linear(params["head"]["out"], jnp.tanh(_linear(params["head"]["dense"], first_BD)))


def _linear(w: Params, x: jax.Array) -> jax.Array:
    return x @ w["kernel"] + w["bias"]


def _norm(arch: Architecture, w: Params, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + arch.norm_eps) * w["scale"] + w["bias"]


def _forwarded(
    forward: Callable[..., jax.Array],
    arch: Architecture,
    tokenise: Tokenise,
    width: int,
    items: Sequence[Any],
    title: str,
) -> np.ndarray:
    """`forward` of every text or pair, in their order: f32 [U, width].

    Each different one once, like lengths together, the longest first: what does not fit in memory fails at once. The
    batches hang on what there is alone and not on its order, and so do the last bits of the numbers.
    """
    rows = {item: u for u, item in enumerate(sorted(dict.fromkeys(items), key=lambda x: (-_characters(x), x)))}
    out = np.empty((len(rows), width), np.float32)
    # A few batches are under way while the host tokenises the next, so that the device never waits.
    under_way: deque[tuple[list[int], jax.Array]] = deque()
    with progress(title, sum(map(_characters, rows)), delay=2, unit="characters") as bar:
        held = list(rows)

        def fetch() -> None:
            index, array = under_way.popleft()
            out[index] = np.asarray(array)[: len(index)]
            bar.update(sum(_characters(held[u]) for u in index))

        for batch in _batches(tokenise, held):
            under_way.append(([u for u, _ in batch], forward(*_padded([both for _, both in batch], arch.pad_id))))
            if len(under_way) > AHEAD:
                fetch()
        while under_way:
            fetch()
    return out[[rows[item] for item in items]]


def _characters(item: Any) -> int:
    return len(item) if isinstance(item, str) else sum(map(len, item))


def _batches(tokenise: Tokenise, items: Sequence[Any]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Which items and their tokens, `BATCH` tokens at a time with what pads them to the longest."""
    left: list[tuple[int, np.ndarray]] = []
    for start in range(0, len(items), CHUNK):
        found = tokenise(items[start : start + CHUNK])
        left = sorted([*left, *enumerate(found, start)], key=lambda row: (-row[1].shape[1], row[0]))
        last = start + CHUNK >= len(items)
        while left and (last or len(left) >= _rows(left[0][1])):
            size = _rows(left[0][1])
            yield left[:size]
            left = left[size:]


def _tokenise(tokenizer: Any, max_length: int, items: Sequence[Any]) -> list[np.ndarray]:
    """Tokens and token types of each text, or pair of texts, cut to `max_length`: int32 [2, T] each."""
    columns = zip(*items, strict=True) if isinstance(items[0], tuple) else [items]
    cleaned = [[_scalar_values(t) for t in column] for column in columns]
    found = tokenizer(*cleaned, truncation="longest_first", max_length=max_length, padding=False)
    ids = found["input_ids"]
    types = found.get("token_type_ids") or [[0] * len(row) for row in ids]
    return [np.array(both, np.int32) for both in zip(ids, types, strict=True)]


def _scalar_values(text: str) -> str:
    """Lone surrogates, which JSON can hold and tokenizers refuse, become the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _padded(tokens: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, types and mask of a batch, the longest first, each [B, T], with B and T rounded up."""
    B, T = min(_rows(tokens[0]), 1 << (len(tokens) - 1).bit_length()), _rounded(tokens[0].shape[1])
    token_BT = np.full((B, T), pad_id, np.int32)
    type_BT = np.zeros((B, T), np.int32)
    mask_BT = np.zeros((B, T), np.bool_)
    for i, both in enumerate(tokens):
        length = both.shape[1]
        token_BT[i, :length], type_BT[i, :length] = both
        mask_BT[i, :length] = True
    return token_BT, type_BT, mask_BT


def _rows(longest: np.ndarray) -> int:
    """How many texts a batch has whose longest is this one."""
    return max(1, BATCH // _rounded(longest.shape[1]))


def _rounded(length: int) -> int:
    """The next of 8, 16, 24, ..., 64, 80, 96, ..., 128, 160, ...: at most eight a doubling, for each is compiled."""
    step = max(8, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step
