"""How much host memory an import takes: makes an 8-shard LLaMA of 1.1 billion random f32 parameters and reads it.

    JAX_PLATFORMS=cpu python launch/measure_import.py [FOLDER [LAYERS]]

Needs 4.4 GB of disk in FOLDER (a temporary one where none is given; removed after) and 6 GB of memory; takes about a
minute. With fewer LAYERS than 22 it is smaller: 306 million parameters with 4. Prints the parameters' bytes, the
highest resident memory of the process that reads them (which starts anew, and on one CPU device holds the parameters
too), and their ratio.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SHARDS = 8
# TinyLlama's sizes: 22 layers of 44 million parameters, and two tables of 65 million.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2_048,
    "intermediate_size": 5_632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2_048,
    "tie_word_embeddings": False,
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Their tensors' names and shapes, bottom to top."""
    width, hidden, kv_width = CONFIG["hidden_size"], CONFIG["intermediate_size"], 4 * 64
    found = {"model.embed_tokens.weight": (CONFIG["vocab_size"], width)}
    for i in range(layers):
        layer = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv_width, width),
            "self_attn.v_proj": (kv_width, width),
            "self_attn.o_proj": (width, width),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (CONFIG["vocab_size"], width)}


def write(directory: Path, layers: int) -> int:
    """Writes the directory; returns the parameters' bytes."""
    rng = np.random.default_rng(0)
    sizes = shapes(layers)
    names = list(sizes)
    index = {}
    for i, part in enumerate(np.array_split(np.array(names), SHARDS), 1):
        file = f"model-{i:05}-of-{SHARDS:05}.safetensors"
        save_file({str(n): rng.standard_normal(sizes[str(n)], np.float32) for n in part}, directory / file)
        index |= {str(n): file for n in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return sum(4 * int(np.prod(shape)) for shape in sizes.values())


def read(directory: Path) -> int:
    """Imports the directory; returns this process's highest resident memory in bytes."""
    import jax

    from jaxrlhf import weights

    _, params = weights.load(directory)
    jax.block_until_ready(params)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Writes, reads in a process of its own, and prints."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        size = write(Path(folder), int(sys.argv[2]) if len(sys.argv) > 2 else CONFIG["num_hidden_layers"])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(read, (Path(folder),))
    print(json.dumps({"parameter_bytes": size, "peak_bytes": peak, "ratio": round(peak / size, 3)}))


if __name__ == "__main__":
    main()
