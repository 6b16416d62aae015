from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrlhf import experiment, weights
from jaxrlhf.config import Experiment, Model
from jaxrlhf.files import UserError

OPT = Path(__file__).parent / "golden" / "hf" / "opt"  # 53 tokens, 24 positions
CONFIG = Experiment(model=Model(init=str(OPT), prompt_length=16, response_length=8))


def run(config, tmp_path, tokens=53):
    task = SimpleNamespace(tokenizer=SimpleNamespace(size=tokens))
    return experiment.Run(config, tmp_path, task, "test")  # pyright: ignore


def test_an_experiment_starts_from_an_imported_base(tmp_path):
    imported = run(CONFIG, tmp_path, tokens=40)
    arch, params = weights.load(OPT)
    assert imported.arch == replace(arch, remat="dots")
    assert imported.arch.vocab_size == 53
    frozen, top = imported.base
    assert top.blocks["q"]["kernel"].shape[0] == 1  # of three layers, .8 frozen
    assert np.array_equal(frozen.embed["tokens"], params["embed"]["tokens"])
    assert np.array_equal(top.blocks["q"]["kernel"], params["blocks"]["q"]["kernel"][2:])
    assert {x.dtype for x in jax.tree.leaves((frozen, top))} == {np.dtype(np.float32)}


def test_a_base_that_does_not_fit_the_texts_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"embeddings for 53 tokens, its tokenizer 54"):
        _ = run(CONFIG, tmp_path, tokens=54).arch
    long = replace(CONFIG, model=replace(CONFIG.model, prompt_length=17))
    with pytest.raises(UserError, match=r"response_length = 25.*positions for 24"):
        _ = run(long, tmp_path).arch
