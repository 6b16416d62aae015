"""How much host memory an export takes: a LLaMA of random f32 parameters as a base, a trained TOP, and their export.

    JAX_PLATFORMS=cpu python launch/measure_export.py [FOLDER [LAYERS [FREEZE]]]

FOLDER is a temporary one where none is given, and what is written there is removed after. 22 LAYERS (the default) are
1.1 billion parameters, which need 14 GB of disk and 7 GB of memory; 4 are 306 million. FREEZE is
`config.model.freeze_layers`, .8 by default. Prints the parameters' bytes, the highest resident memory of a new process
that does what `jaxrlhf export --policy=sft` does (on one CPU device, which holds the parameters too), and their ratio.
"""

import dataclasses
import json
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

from measure_import import write


def prepare(workdir: Path, freeze_layers: float) -> None:
    """A run whose SFT is finished: its config, its tokenizer, and a checkpoint of the base's TOP."""
    import optax

    from jaxrlhf import checkpoint, experiment, optim
    from jaxrlhf.config import Experiment, Model
    from jaxrlhf.data import task, tokens
    from jaxrlhf.files import write_json

    tokens.save_files(tokens.bpe_tokenizer(["a text"], 300), workdir / "base")
    config = Experiment(model=Model(init="base", freeze_layers=freeze_layers))
    write_json(workdir / "config.json", json.loads(json.dumps(dataclasses.asdict(config))))
    run = experiment.Run(config, workdir, task.Task(task.tokenizer(config, workdir)), "measure")
    state = optim.new_state(optax.identity(), run.base[1], run.mesh)
    with checkpoint.saver(run.directory("sft") / "checkpoints", 1, run.meta("sft")) as save:
        save(state)
    run.finish("sft", {"steps": 0})


def export(workdir: Path) -> int:
    """Exports it; returns this process's highest resident memory in bytes."""
    from jaxrlhf import exchange

    exchange.export(workdir, "sft", workdir / "exported")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Writes, exports in a process of its own, and prints."""
    folder, layers, freeze = (*sys.argv[1:], *("", "22", "0.8")[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory(dir=folder or None) as name:
        workdir = Path(name)
        (workdir / "base").mkdir()
        size = write(workdir / "base", int(layers))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process for each
            pool.apply(prepare, (workdir, float(freeze)))
            peak = pool.apply(export, (workdir,))
    print(json.dumps({"parameter_bytes": size, "peak_bytes": peak, "ratio": round(peak / size, 3)}))


if __name__ == "__main__":
    main()
