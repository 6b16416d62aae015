"""Which decoder: sizes and options as data, and what sets one family apart from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Sizes and options of a decoder; hashable, so that it can be static under `jit`."""

    family: str  # whose names a checkpoint of it has
    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    max_positions: int  # of learned positions; rotary ones have no limit
    norm: str = "rms"  # rms | rms_plus_one (its scale is 1 + the parameter) | layer
    norm_eps: float = 1e-5
    norm_place: str = "pre"  # pre | post | both: before a branch, on the sum after it, before and after the branch
    final_norm: bool = True
    qk_norm: bool = False  # of each head's queries and keys
    positions: str = "rope"  # rope | learned
    position_offset: int = 0  # OPT's table starts two rows later
    rope_theta: float = 10_000.0
    rope_share: float = 1.0  # of a head's width is rotated, rounded down
    rope_scaling: tuple[float, ...] = ()  # (factor,) linear; (factor, low, high, original context) LLaMA 3's; () none
    query_scalar: float = 0.0  # scores are divided by its root; 0 = the head width
    attn_softcap: float = 0.0  # c * tanh(score / c); 0 = off
    final_softcap: float = 0.0  # the same on the logits
    windows: tuple[int, ...] = ()  # keys that each layer's queries see, their own included; 0 = all; () = no windows
    parallel: bool = False  # attention and feed-forward read the same input
    activation: str = "silu"  # silu | relu | gelu | gelu_tanh
    gated: bool = True  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    embed_scaled: bool = False  # embeddings times the root of the width
    embed_width: int = 0  # of tokens, projected in and out; 0 = the width, no projections
    tied: bool = True  # the output head is the embedding table
    dtype: str = "float32"  # of matrix products and activations; norms, softmax, logits and losses are f32 always
    remat: str = "none"  # one of `model.REMAT`

    @property
    def query_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return (self.query_scalar or self.head_width) ** -0.5

    @property
    def token_width(self) -> int:
        """The width of token embeddings and of the output head."""
        return self.embed_width or self.width


_BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
_LEARNED = {"norm": "layer", "positions": "learned", "gated": False} | _BIASES
# What differs from LLaMA, whose options are the defaults.
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": _LEARNED | {"position_offset": 2, "activation": "relu"},
    "gpt2": _LEARNED | {"activation": "gelu_tanh"},
    "mistral": {},
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-6},
    "qwen3": {"qk_norm": True, "norm_eps": 1e-6},
    "gpt_neox": _BIASES
    | {"norm": "layer", "gated": False, "activation": "gelu", "parallel": True, "rope_share": 0.25, "tied": False},
    "gemma2": {
        "norm": "rms_plus_one",
        "norm_eps": 1e-6,
        "norm_place": "both",
        "query_scalar": 256,
        "attn_softcap": 50.0,
        "final_softcap": 30.0,
        "activation": "gelu_tanh",
        "embed_scaled": True,
    },
}
FAMILIES: dict[str, dict[str, Any]] = {family: {"family": family} | options for family, options in _OPTIONS.items()}
