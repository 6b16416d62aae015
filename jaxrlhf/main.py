"""The command line: parse, pick the stage, turn a user's mistake into one clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxrlhf.files import Failure, Stopped, UserError, writes
from jaxrlhf.logs import say
from jaxrlhf.names import METHODS, STAGES

if TYPE_CHECKING:
    from jaxrlhf.config import Experiment
    from jaxrlhf.store import Workdir

USAGE = """jaxrlhf COMMAND [flags]

  run        every stage of a recipe, resumable:
             jaxrlhf run --config=configs/quickstart.py --workdir=runs/quickstart
  pretrain | sft | reward | ppo | dpo | rloo | grpo | sample | evaluate | report
             one stage:  jaxrlhf ppo --config=configs/quickstart.py --workdir=runs/quickstart
  evaluate   anybody's outputs, no config and no training:
             jaxrlhf evaluate --outputs sft=a.json --outputs rlhf=b.json [--reference=r.json]
                              [--annotations rlhf=ann.json] [--paper_compat] [--cut_words=K]
                              [--sentence_encoder=DIR] [--nli_model=DIR] --workdir=runs/mine
             who wins, by a judge: --judge=length, or --judge=openai:MODEL [--judge_base_url=http://…/v1]
                              [--judge_template=instructions|tldr|cnndm|FILE] [--judge_order=both|random]
                              [--max_requests=N, 0 = no limit] [--judge_concurrency=N] [--judge_api_key_env=NAME]
                              or --judge=reward:DIR, a reward model's [--judge_prompt=alpaca|chat|'…{instruction}…']
             for alpaca_eval: --export_alpaca_eval=FOLDER writes each as FOLDER/NAME/model_outputs.json
  report     the page of a workdir that has results:  jaxrlhf report --workdir=runs/mine
             of several: jaxrlhf report --workdir=runs/all --compare=runs/a --compare=runs/b
             over seeds: jaxrlhf report --workdir=runs/all --seeds=runs/s0 --seeds=runs/s1
  import     a Hugging Face directory or hub id as the base that a workdir's runs start from:
             jaxrlhf import --from=facebook/opt-125m --workdir=runs/opt
  export     a trained model as a directory that transformers loads:
             jaxrlhf export --workdir=runs/quickstart --policy=sft|ppo|dpo|rloo|grpo|reward --to=DIR
  bench      seconds and memory of a step, beside those of peers that are installed, as a JSON line or a table of all:
             jaxrlhf bench sample|sft|reward|ppo|diversity|start|all
                              [--shape=tiny|small|opt125m | --config=RECIPE] [--repeats=N]
  plan       a recipe's steps, compiled for a TPU that is not there: memory a chip, FLOPs, traffic, least seconds
             jaxrlhf plan --config=configs/tldr.py:llama-7b --topology=v5e:8x8 [--stages=sft,reward,ppo,sample]
                          [--search] ranks meshes and batch sizes, [--json] prints one line

Change any key of a recipe: --config.ppo.kl_coef=0.1 (after --config). Keys: jaxrlhf/config.py.
"""


def console() -> None:
    """The console script `jaxrlhf`: exit status 0 done or stopped, 2 the user's input is wrong, 1 anything else."""
    from jaxrlhf import compiled, preemption

    compiled.keep()
    recipe = len(sys.argv) > 1 and sys.argv[1] in ("run", *STAGES) and _has(sys.argv, "config")
    with preemption.leaving() if recipe else contextlib.nullcontext():
        try:
            status = main(sys.argv)
        except Exception as error:
            status = 1  # and out at once: Python's own way out would wait for other hosts, which wait for this one
            if "jaxrlhf.hosts" in sys.modules and (missing := sys.modules["jaxrlhf.hosts"].gone(error)):
                print(f"error: {missing}", file=sys.stderr)
            else:
                traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # an interrupted compilation can crash the interpreter's own way out


def main(argv: list[str]) -> int:
    """Runs one command; returns its exit status."""
    # transformers is here for its tokenizers, which need no torch; without this it advises to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        _dispatch(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        from jaxrlhf import preemption

        say(str(stopped))
        return preemption.status()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 1
    return 0


def _dispatch(argv: list[str]) -> None:
    command = argv[1] if len(argv) > 1 else "--help"
    if command in ("help", "-h", "--help", "--helpfull"):
        _tell(USAGE.rstrip())
        return
    others = {"import": _import, "export": _export, "plan": _plan, "bench": _bench}
    if command not in ("run", *STAGES, *others):
        raise UserError(f"{command!r} is no command; known are {', '.join(('run', *STAGES, *others))}")
    rest = [argv[0], *argv[2:]]
    if any(a in ("-h", "--help") for a in rest):
        _tell(USAGE.rstrip())
    elif command in others:
        others[command](rest)
    elif command == "evaluate" and not _has(rest, "config"):
        _evaluate_outputs(rest)
    elif command == "report" and not _has(rest, "config"):
        _report(rest)
    else:
        _run_stages(command, rest)


def _tell(text: str) -> None:
    """Prints, though nobody reads on: `head` leaves early, and what was done is done."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def _has(argv: list[str], flag: str) -> bool:
    return any(a.lstrip("-").split("=", 1)[0] == flag for a in argv if a.startswith("-"))


def _values() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "where the run lives", flag_values=values)
    return values


def _parse(argv: list[str], values: flags.FlagValues) -> Any:
    _finish_parsing(_flags(argv, values), values)
    return values


def _flags(argv: list[str], values: flags.FlagValues) -> list[str]:
    """Sets the flags; returns the words that are none."""
    try:
        return list(values(argv)[1:])
    except flags.Error as error:
        raise UserError(f"{str(error).splitlines()[0]}; see `jaxrlhf --help`") from None


def _finish_parsing(extra: list[str], values: flags.FlagValues) -> None:
    if extra:
        raise UserError(f"{extra[0]!r}: not a flag; see `jaxrlhf --help`")
    if not values["workdir"].value:
        raise UserError("--workdir=FOLDER is missing: where results go, for example --workdir=runs/mine")
    if "://" in values["workdir"].value:
        if "config" not in values:
            raise UserError("--workdir=URL goes with --config=RECIPE; for this command copy the workdir to a folder")
        return
    workdir = Path(str(values["workdir"].value))
    for place in (workdir, *workdir.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"--workdir={workdir}: a file stands there, at {place}; name a folder")


def _evaluate_outputs(argv: list[str]) -> None:
    from jaxrlhf.evaluation import outputs, results
    from jaxrlhf.evaluation.judge import Judge

    values = _values()
    flags.DEFINE_multi_string("outputs", [], "name=path", flag_values=values)
    flags.DEFINE_multi_string("annotations", [], "name=path", flag_values=values)
    flags.DEFINE_string("reference", "", "file of reference answers", flag_values=values)
    flags.DEFINE_bool("paper_compat", False, "metrics as the released code has them", flag_values=values)
    flags.DEFINE_integer(
        "cut_words", 0, "words that texts are cut to beside whole ones; 0 = automatic", 0, flag_values=values
    )
    flags.DEFINE_string("sentence_encoder", "", "sentence-transformers directory: sbert, vendi", flag_values=values)
    flags.DEFINE_string("nli_model", "", "directory of an NLI classifier: nli, clusters", flag_values=values)
    settings = dataclasses.asdict(Judge(""))
    del settings["name"]
    helps = {"max_requests": "requests that one command may send, retries included; 0 = no limit"}
    flags.DEFINE_string("judge", "", "length | openai:MODEL | reward:DIRECTORY", flag_values=values)
    for key, default in settings.items():
        define: Any = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_string
        define(_judge_flag(key), default, helps.get(key, "of a judge that reads texts"), flag_values=values)
    flags.DEFINE_string("export_alpaca_eval", "", "folder for alpaca_eval", flag_values=values)
    parsed = _parse(argv, values)
    if not parsed.outputs:
        raise UserError("evaluate takes --config=RECIPE, or --outputs NAME=FILE (once or more)")
    if parsed.export_alpaca_eval:
        outputs.export(parsed.outputs, parsed.reference, Path(parsed.export_alpaca_eval), say)
    found = results.evaluate_outputs(
        outputs=parsed.outputs,
        reference=parsed.reference,
        annotations=parsed.annotations,
        paper_compat=parsed.paper_compat,
        workdir=Path(parsed.workdir),
        log=say,
        cut_words=parsed.cut_words,
        sentence_encoder=parsed.sentence_encoder,
        nli_model=parsed.nli_model,
        judged_by=Judge(parsed.judge, **{k: parsed[_judge_flag(k)].value for k in settings}) if parsed.judge else None,
    )
    _tell(results.table(found))
    say(f"{parsed.workdir}/results.json written; `jaxrlhf report --workdir={parsed.workdir}` draws it")


def _judge_flag(key: str) -> str:
    return key if key == "max_requests" else f"judge_{key}"


def _report(argv: list[str]) -> None:
    from jaxrlhf.evaluation import compare, report, seeds

    values = _values()
    flags.DEFINE_multi_string("seeds", [], "workdir of one of several seeds", flag_values=values)
    flags.DEFINE_multi_string("compare", [], "a workdir with results", flag_values=values)
    parsed = _parse(argv, values)
    if parsed.compare and parsed.seeds:
        raise UserError("--compare and --seeds are two reports; give one of them, each a --workdir of its own")
    if parsed.compare:
        compare.write_comparison(parsed.compare, Path(parsed.workdir))
    if parsed.seeds:
        missing = seeds.write_combined(parsed.seeds, Path(parsed.workdir))["missing"]
        if missing:
            say(f"{len(missing)} parts are not in every seed and have no mean over seeds; the report names them")
    _tell(str(report.write_report(Path(parsed.workdir))))


def _import(argv: list[str]) -> None:
    values = _values()
    flags.DEFINE_string("from", "", "Hugging Face directory or hub id", flag_values=values)
    parsed = _parse(argv, values)
    source, workdir = str(values["from"].value), parsed.workdir
    if not source:
        raise UserError("--from=DIR is missing: a Hugging Face directory or hub id, for example facebook/opt-125m")
    from jaxrlhf import exchange

    _tell(str(exchange.import_base(source, Path(workdir))))
    say(f"{workdir}/base written; `jaxrlhf run --config=RECIPE --workdir={workdir}` starts from it")


def _export(argv: list[str]) -> None:
    values = _values()
    flags.DEFINE_string("policy", "", "a policy, or reward", flag_values=values)
    flags.DEFINE_string("to", "", "folder to write", flag_values=values)
    parsed = _parse(argv, values)
    for name, what in (("policy", "sft, ppo, dpo, rloo, grpo or reward"), ("to", "the folder to write")):
        if not values[name].value:
            raise UserError(f"--{name} is missing: {what}")
    from jaxrlhf import exchange

    exchange.export(Path(parsed.workdir), parsed.policy, Path(parsed.to))
    say(f"{parsed.to} written; transformers loads it")


def _plan(argv: list[str]) -> None:
    from jaxrlhf import recipes

    values = flags.FlagValues()
    flags.DEFINE_string("topology", "", "CHIP:SHAPE, such as v5e:8x8", flag_values=values)
    flags.DEFINE_string(
        "stages", "", "those to compile, with commas between; all that the recipe has", flag_values=values
    )
    flags.DEFINE_bool("search", False, "rank meshes and batch sizes", flag_values=values)
    flags.DEFINE_bool("json", False, "one line of JSON", flag_values=values)
    parsed, extra = recipes.parse(argv, values)
    if extra:
        raise UserError(f"{extra[0]!r}: not a flag; see `jaxrlhf --help`")
    experiment = recipes.resolve(parsed)
    if not values["topology"].value:
        raise UserError("--topology=CHIP:SHAPE is missing: the TPU slice, for example v5e:8x8")
    from jaxrlhf import plan, plan_search

    due = plan.due(experiment)
    stages = tuple(str(values["stages"].value).split(",")) if values["stages"].value else due
    for stage in stages:
        if stage not in due:
            raise UserError(f"--stages={stage}: the recipe's are {', '.join(due)}")
    how = plan_search.told if values["search"].value else plan.told
    _tell(how(experiment, str(values["topology"].value), stages, bool(values["json"].value)))


def _bench(argv: list[str]) -> None:
    from jaxrlhf import recipes
    from jaxrlhf.bench import command
    from jaxrlhf.bench.work import SHAPES, STEPS, Work, of_recipe, of_shape

    values = flags.FlagValues()
    flags.DEFINE_enum("shape", "small", list(SHAPES), "of an OPT with random weights", flag_values=values)
    flags.DEFINE_integer("repeats", 3, "steps that are measured, after a warm-up", 1, flag_values=values)
    config, extra = recipes.parse(argv, values) if _has(argv, "config") else (None, _flags(argv, values))
    if len(extra) != 1 or extra[0] not in (*STEPS, "start", "all"):
        raise UserError(f"bench takes one of {', '.join(STEPS)}, start, all; it was given {' '.join(extra) or 'none'}")
    if config is not None and _has(argv, "shape"):
        raise UserError("--shape and --config both say what is measured; give one of them")
    what, shape, repeats = extra[0], str(values["shape"].value), int(str(values["repeats"].value))

    def work(step: str, freeze_layers: float = 0.8, **texts: Any) -> Work:
        if config is not None:
            return of_recipe(step, recipes.resolve(config))
        return of_shape(step, shape, freeze_layers, **texts)

    steps = STEPS if what == "all" else (what,) if what != "start" else ()
    texts = {"sft": [{}, {"uneven": True}, {"prompt_weight": 1.0}], "reward": [{}, {"uneven": True}]}
    works = []
    for step in steps:
        several = texts.get(step, ()) if config is None else ()
        works += [work(step, k, **t) for t in several for k in (0.8, 0.0)] or [work(step)]
    found = []
    for w in works:
        say(f"{w.title}, {w.experiment.model.freeze_layers:g} frozen")
        found.append(command.measure(w, repeats, with_peers=config is None))
        if what != "all":
            _tell(json.dumps(found[-1]))
    if what == "all":
        _tell(command.table(found))
    if what in ("start", "all"):
        started = command.measure_start(work("ppo"))
        _tell(json.dumps(started) if what == "start" else f"\n{command.start_line(started)}")


def _run_stages(command: str, argv: list[str]) -> None:
    from jaxrlhf import recipes
    from jaxrlhf.config import with_base

    values = _values()
    if any(a in ("--config", "-config") for a in argv):
        raise UserError("write --config=RECIPE, with an equals sign")
    parsed, extra = recipes.parse(argv, values)
    _finish_parsing(extra, values)
    experiment = recipes.resolve(parsed)
    if command in METHODS and command not in experiment.stages:
        raise UserError(f"config.methods={experiment.methods!r} does not name {command}; nothing would measure it")
    from jaxrlhf import hosts, store

    hosts.start()
    with store.opened(str(values["workdir"].value)) as kept:
        experiment = with_base(experiment, kept.local)
        if experiment.sweep:
            _run_sweep(kept, command, experiment)
        else:
            _run_in(kept, command, experiment)


def _run_sweep(kept: Workdir, command: str, experiment: Experiment) -> None:
    from jaxrlhf import hosts, sweep

    if command != "run":
        raise UserError(f"{command}: a sweep runs as a whole, by `jaxrlhf run`; its points are runs of their own")
    if kept.remote or hosts.together():
        raise UserError("config.sweep: a sweep takes one process and a local --workdir; run its points one by one")
    sweep.run(experiment, kept.local)


def _run_in(kept: Workdir, command: str, experiment: Experiment) -> None:
    from jaxrlhf import hosts
    from jaxrlhf.claim import claim

    workdir = kept.local
    unclaimed = hosts.decided(lambda: claim(workdir, experiment))
    kept.send()
    if kept.remote is None:
        hosts.shared(workdir / "config.json")
    stages = experiment.stages if command == "run" else (command,)
    from jaxrlhf import stages as runner

    try:
        runner.run_stages(experiment, kept, stages, skip_finished=command == "run")
    except UserError:
        if unclaimed and writes() and not any((workdir / s).exists() for s in (*STAGES, "samples")):
            (workdir / "config.json").unlink()  # nothing was made yet: the corrected config may have the workdir
        raise
