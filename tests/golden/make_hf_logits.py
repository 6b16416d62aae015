"""Makes tests/golden/hf: tiny random Hugging Face models, their logits and what they generate greedily.

    python tests/golden/make_hf_logits.py      # with torch 2.13.0, which the tests that read it do not need

Every parameter is random, norms and biases too: at their defaults of 1 and 0, a forgotten one would not show.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "hf"
LENGTH = 24  # of every family's context
NEW = 16  # tokens that are generated greedily
WINDOW = 5
VOCAB = 53
_SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": LENGTH,
}
_NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": LENGTH,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 40,
        "max_position_embeddings": LENGTH,
    },
    "llama_tied": {
        "model_type": "llama",
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "llama_untied": {
        "model_type": "llama",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
        "max_position_embeddings": LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": LENGTH,
    },
    # OPT-350m: norms after the sums, no final norm, narrow embeddings projected in and out.
    "opt_post_norm": {
        "model_type": "opt",
        "hidden_size": 24,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 40,
        "max_position_embeddings": LENGTH,
    },
    # An original context of 8 puts the three frequencies of a head in all three bands.
    "llama3": _SMALL
    | {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": _SMALL | {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": _SMALL | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _SMALL | {"model_type": "qwen3", "head_dim": 8},
    # Windows on the two upper of three layers.
    "qwen3_windows": _SMALL
    | {
        "model_type": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "gpt_neox": _NEOX | {"use_parallel_residual": True, "rotary_pct": 0.5},
    "gpt_neox_sequential": _NEOX | {"use_parallel_residual": False, "rotary_pct": 0.25},
    # A query scalar that is not the head's width; caps low enough to bend.
    "gemma2": _SMALL
    | {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 6,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}


def random_model(config: dict[str, Any], seed: int) -> Any:
    """A torch model of the config in f32, every parameter drawn, none left at its default."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2} | config
    family = settings.pop("model_type")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim > 1 and "wte" not in name and "embed" not in name
            spread = 1.5 * parameter.shape[-1] ** -0.5 if matrix else 0.4
            # Gemma 2 adds the 1 to its norms' weights itself.
            centre = 1.0 if family != "gemma2" and re.search(r"(norm|ln_[12f])\.weight$", name) else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    return model.float().eval()


def inputs(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Awkward (tokens, mask) pairs: padding on the left, on the right, one token, one row, the full context."""
    rng = np.random.default_rng(seed)

    def draw(rows: int, length: int) -> np.ndarray:
        return rng.integers(0, VOCAB, (rows, length)).astype(np.int32)

    real = np.array([10, 1, 6, 3])
    column = np.arange(10)
    return {
        "left": (draw(4, 10), (column >= 10 - real[:, None]).astype(np.float32)),
        "right": (draw(4, 10), (column < real[:, None]).astype(np.float32)),
        "length_1": (draw(3, 1), np.ones((3, 1), np.float32)),
        "batch_1": (draw(1, 7), np.ones((1, 7), np.float32)),
        "full": (draw(2, LENGTH), np.ones((2, LENGTH), np.float32)),
    }


def logits(model: Any, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """The torch model's logits, positions counted from the first real token. f32 [B, T, V]."""
    return forward(model, tokens_BT, mask_BT).logits.numpy()


def hidden_states(model: Any, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """What enters the first layer, and what leaves each; the last one's after the final norm. f32 [L + 1, B, T, D]."""
    return np.stack([h.numpy() for h in forward(model, tokens_BT, mask_BT, output_hidden_states=True).hidden_states])


def forward(model: Any, tokens_BT: np.ndarray, mask_BT: np.ndarray, **options: bool) -> Any:
    """A pass of the torch model."""
    import torch

    mask = torch.tensor(mask_BT, dtype=torch.long)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # OPT derives the same positions from the mask itself, and takes none on some versions.
    extra = {} if model.config.model_type == "opt" else {"position_ids": positions}
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens_BT, dtype=torch.long), attention_mask=mask, **extra, **options)


def greedy(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Two prompts, padded on the left, and NEW tokens after each, each the first argmax; nothing ends a row.

    The longer row fills the context. Of eight draws of prompts, the one whose tokens vary most, and where no two logits
    are too close to call.
    """
    length = LENGTH - NEW
    mask_BP = (np.arange(length) >= np.array([[0], [5]])).astype(np.float32)
    rng = np.random.default_rng(seed)
    found: list[tuple[int, dict[str, np.ndarray]]] = []
    for _ in range(8):
        prompt_BP = rng.integers(0, VOCAB, (2, length)).astype(np.int32)
        tokens_BT, mask_BT, margin = prompt_BP, mask_BP, np.inf
        for _ in range(NEW):
            next_BV = logits(model, tokens_BT, mask_BT)[:, -1]
            margin = min(margin, np.diff(np.sort(next_BV, -1)[:, -2:]).min())
            tokens_BT = np.concatenate([tokens_BT, next_BV.argmax(-1)[:, None].astype(np.int32)], 1)
            mask_BT = np.concatenate([mask_BT, np.ones((2, 1), np.float32)], 1)
        new_BR = np.ascontiguousarray(tokens_BT[:, length:])
        if margin > 1e-3:
            variety = sum(len(set(row)) for row in new_BR.tolist())
            found.append((variety, {"greedy/prompt": prompt_BP, "greedy/mask": mask_BP, "greedy/tokens": new_BR}))
    return max(found, key=lambda x: x[0])[1]


def main() -> None:
    """Writes every family's directory."""
    for seed, (name, config) in enumerate(FAMILIES.items()):
        model = random_model(config, seed)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        arrays = {}
        for case, (tokens_BT, mask_BT) in inputs(seed).items():
            arrays |= {f"{case}/tokens": tokens_BT, f"{case}/mask": mask_BT}
            arrays |= {f"{case}/logits": logits(model, tokens_BT, mask_BT)}
        if name == "gemma2":
            arrays["left/hidden"] = hidden_states(model, *inputs(seed)["left"])
        arrays |= greedy(model, seed)
        save_file(arrays, HERE / name / "golden.safetensors")


if __name__ == "__main__":
    main()
