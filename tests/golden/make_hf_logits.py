"""Makes tests/golden/hf: tiny random Hugging Face models and their logits. Needs torch; the tests do not.

    python tests/golden/make_hf_logits.py

Every parameter is random, norms and biases too: at their defaults of 1 and 0, a forgotten one would not show.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "hf"
LENGTH = 12  # of every family's context
VOCAB = 53
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
            centre = 1.0 if re.search(r"(norm|ln_[12f])\.weight$", name) else 0.0
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
    import torch

    mask = torch.tensor(mask_BT, dtype=torch.long)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # OPT derives the same positions from the mask itself, and takes none on some versions.
    extra = {} if model.config.model_type == "opt" else {"position_ids": positions}
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens_BT, dtype=torch.long), attention_mask=mask, **extra)
    return out.logits.numpy()


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
        save_file(arrays, HERE / name / "logits.safetensors")


if __name__ == "__main__":
    main()
