"""What processes that work together make and agree on; `test_hosts.py` runs this in each of them."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxrlhf import hosts, sharding
from jaxrlhf.config import Mesh
from jaxrlhf.data import batches, tokens
from jaxrlhf.files import Failure, UserError, write_text, writes

LETTERS = tokens.word_tokenizer([chr(ord("a") + i) for i in range(26)])
RECORDS = [
    {"id": str(i), "prompt": " a" * (i % 5 + 1) + " b", "response": " c" * (i % 3), "chosen": " d", "rejected": " e f"}
    for i in range(11)
]
SIZES = {"prompt_length": 6, "response_length": 3}


def streams():
    pairs = [batches.pair_batches(RECORDS, LETTERS, batch_size=8, seeds=s, ways=4, **SIZES) for s in ([2], [2, 3])]
    return {
        "sft": batches.sft_batches(RECORDS, LETTERS, batch_size=32, prompt_weight=0.5, seed=1, ways=4, **SIZES),
        "sft on responses": batches.sft_batches(
            RECORDS, LETTERS, batch_size=32, prompt_weight=0, seed=1, ways=4, **SIZES
        ),
        "prompts": batches.prompt_batches(RECORDS, LETTERS, batch_size=8, prompt_length=6, seed=5),
        "pairs": pairs[0],
        "joined": pairs[1],
    }


def made(stream, step: int, mesh) -> tuple[int, bool]:
    """How many rows this process made of a step's batch, and whether the mesh holds the batch that is one's alone."""
    counts, pad = [], batches.pad
    batches.pad = lambda rows, *rest, **more: (counts.append(len(rows)), pad(rows, *rest, **more))[1]
    placed = sharding.shard_step(stream, step, mesh)
    batches.pad = pad
    whole = jax.tree.map(np.array_equal, jax.tree.map(sharding.to_host, placed), stream[step])
    return sum(counts), all(jax.tree.leaves(whole))


def raised(work) -> str:
    try:
        return json.dumps(hosts.decided(work))
    except (UserError, Failure) as error:
        return f"{type(error).__name__}: {error}"


def fail(error: Exception):
    raise error


def main(folder: Path, patience: float) -> None:
    hosts.start()
    me = jax.process_index()
    found = {"process": me, "writes": writes(), "rows": {}}
    for sizes in ((1, 1, 4), (2, 1, 2), (2, 2, 1), (4, 1, 1)):
        mesh = sharding.make_mesh(Mesh(*sizes))
        found["rows"][str(sizes)] = {name: made(stream, 3, mesh) for name, stream in streams().items()}
    found["decided"] = raised(lambda: {"seen by": me})
    found["user"] = raised(lambda: fail(UserError("config.x=1: must be 2")))
    found["failure"] = raised(lambda: fail(Failure("the disk is full")))
    # Within a decision host 0 is alone: it waits for nobody, and has its own devices.
    found["alone"] = raised(lambda: [hosts.together(), hosts.decided(lambda: me), len(hosts.devices())])
    found["in turn"] = hosts.first_then_all(lambda: me)
    write_text(folder / "written", str(me))
    hosts.barrier("here we all are", 60)
    found["written"] = (folder / "written").read_text()
    if me == 1:
        time.sleep(patience + 1)
    try:
        hosts.barrier("the last step", patience)
    except Failure as failure:
        found["missing"] = str(failure)
    (folder / f"{me}.json").write_text(json.dumps(found))
    hosts.barrier("the end", 60)
    if me == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        sharding.to_host(sharding.shard_step(streams()["sft"], 0, mesh).tokens_BT)
    except Exception as error:
        print(hosts.gone(ValueError("an error of our own")), hosts.gone(error), sep="|", flush=True)
    os._exit(0)  # Python's own way out would wait for process 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
