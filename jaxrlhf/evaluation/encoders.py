"""Text encoders, jitted: sentence embeddings and pair classification, for Sentence-BERT and NLI diversity.

BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) are one post-norm transformer that sees in both directions; the
family is a row of options. `encoder_weights` reads both kinds of encoder from Hugging Face directories.

Axis letters: B batch, T tokens, D width, F feed-forward width, H heads, K head width, L layers, C labels, U texts.
Everything is computed in f32, matrix products too, which accelerators would otherwise round to fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.files import UserError
from jaxrlhf.types import Params

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
POOLINGS = ("mean", "cls")
CHUNK = 1024  # texts tokenised at once: the tokenizer returns Python lists, which take ten times an array's memory


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


def embed(encoder: SentenceEncoder, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Embeddings of texts, in their order: f32 [U, D]. Equal texts are encoded once, and come out equal."""
    unique, index_U = _unique(texts)
    tokens = _tokenise(encoder.tokenizer, encoder.max_length, unique)
    forward = partial(_embed, encoder.arch, encoder.pooling, encoder.normalise, encoder.params)
    return _in_batches(forward, encoder.arch, tokens, encoder.arch.width, batch_size)[index_U]


def classify(classifier: Classifier, pairs: Sequence[tuple[str, str]], batch_size: int = 64) -> np.ndarray:
    """Logits of (premise, hypothesis) pairs, in their order: f32 [U, C]. Equal pairs are classified once.

    A pair that is too long loses tokens from the end of its longer text. An empty text is a text like others, as in
    transformers' calls on lists of pairs.
    """
    unique, index_U = _unique(pairs)
    tokens = _tokenise(classifier.tokenizer, classifier.max_length, [a for a, _ in unique], [b for _, b in unique])
    forward = partial(_classify, classifier.arch, classifier.params)
    return _in_batches(forward, classifier.arch, tokens, len(classifier.labels), batch_size)[index_U]


def encode(
    arch: Architecture, params: Params, token_BT: jax.Array, type_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """Final hidden states [B, T, D]; real tokens (`mask_BT`) neither see padding nor count it, left or right."""
    table = params["embed"]
    h_BTD = table["tokens"][token_BT] + table["positions"][positions(arch, token_BT, mask_BT)] + table["types"][type_BT]
    h_BTD = _norm(arch, table["norm"], h_BTD)
    mask_BTT = jnp.broadcast_to(mask_BT[:, None, :], (*mask_BT.shape, mask_BT.shape[1]))

    def block(h_BTD: jax.Array, w: Params) -> tuple[jax.Array, None]:
        q, k, v = (_linear(w[name], h_BTD).reshape(*h_BTD.shape[:2], arch.heads, -1) for name in "qkv")
        seen_BTD = jax.nn.dot_product_attention(q, k, v, mask=mask_BTT[:, None]).reshape(h_BTD.shape)
        h_BTD = _norm(arch, w["attn_norm"], h_BTD + _linear(w["o"], seen_BTD))
        hidden_BTF = ACTIVATIONS[arch.activation](_linear(w["up"], h_BTD))
        return _norm(arch, w["mlp_norm"], h_BTD + _linear(w["down"], hidden_BTF)), None

    return jax.lax.scan(block, h_BTD, params["blocks"])[0]


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


def _unique(items: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """The items without repeats, and which of them each one is."""
    numbers: dict[Any, int] = {}
    index_U = np.fromiter((numbers.setdefault(item, len(numbers)) for item in items), np.int64, len(items))
    return list(numbers), index_U


def _tokenise(
    tokenizer: Any, max_length: int, texts: Sequence[str], seconds: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Tokens and token types of each text, or pair of texts, cut to `max_length`: int32 [2, T] each."""
    out = []
    for i in range(0, len(texts), CHUNK):
        columns = [[_scalar_values(t) for t in column[i : i + CHUNK]] for column in (texts, seconds) if column]
        found = tokenizer(*columns, truncation="longest_first", max_length=max_length, padding=False)
        ids = found["input_ids"]
        types = found.get("token_type_ids") or [[0] * len(row) for row in ids]
        out += [np.array(both, np.int32) for both in zip(ids, types, strict=True)]
    return out


def _scalar_values(text: str) -> str:
    """Lone surrogates, which JSON can hold and tokenizers refuse, become the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _in_batches(
    forward: Callable[..., jax.Array],
    arch: Architecture,
    tokens: Sequence[np.ndarray],
    width: int,
    batch_size: int,
) -> np.ndarray:
    """`forward` of every text, like lengths together: f32 [U, width]. Few shapes, for each one is compiled."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")
    # The longest first: what does not fit in memory fails at once.
    order_U = np.argsort([-both.shape[1] for both in tokens], kind="stable")
    batches = [order_U[i : i + batch_size] for i in range(0, len(order_U), batch_size)]
    # Fetched only after all have been started, so that the device never waits for the host.
    found = [forward(*_padded([tokens[u] for u in batch], arch.pad_id, batch_size)) for batch in batches]
    out = np.empty((len(tokens), width), np.float32)
    for batch, array in zip(batches, found, strict=True):
        out[batch] = np.asarray(array)[: len(batch)]
    return out


def _padded(tokens: Sequence[np.ndarray], pad_id: int, batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, types and mask of a batch, each [B, T], with B and T rounded up."""
    B = min(batch_size, 1 << (len(tokens) - 1).bit_length())
    T = _rounded(max(both.shape[1] for both in tokens))
    token_BT = np.full((B, T), pad_id, np.int32)
    type_BT = np.zeros((B, T), np.int32)
    mask_BT = np.zeros((B, T), np.bool_)
    for i, both in enumerate(tokens):
        length = both.shape[1]
        token_BT[i, :length], type_BT[i, :length] = both
        mask_BT[i, :length] = True
    return token_BT, type_BT, mask_BT


def _rounded(length: int) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, ...: above 32, at most half as much again."""
    step = max(16, 1 << max((length - 1).bit_length() - 2, 0))
    return -(-length // step) * step
