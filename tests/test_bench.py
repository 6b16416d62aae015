"""`jaxrlhf bench`: the arithmetic that it counts, sides that take turns, and its one table."""

import dataclasses
import json
import sys
from contextlib import ExitStack

import jax
import pytest

from jaxrlhf import model
from jaxrlhf.bench import command, floor, ours
from jaxrlhf.bench.work import of_shape
from jaxrlhf.files import Failure
from jaxrlhf.main import main
from jaxrlhf.split import split

SIDE = """
import sys
from jaxrlhf.bench.work import over, serve
left = {times}
def once():
    global left
    print("noise")
    if (left := left - 1) < 0:
        sys.exit("out\\nof memory")
print("noise")
sys.stdout.flush()
serve({{"device": "none"}}, over(once))
"""


def test_the_least_of_a_block_by_hand():
    """Width 4, two heads of 2 over one of keys and values, feed-forward 6: two rows of three tokens."""
    arch = model.Architecture(
        **model.FAMILIES["llama"],
        vocab_size=9, layers=1, width=4, heads=2, kv_heads=1, head_width=2, ff_width=6, max_positions=8,
    )  # fmt: skip
    q_and_o, k_and_v, ff, pair = 2 * 4 * 4, 2 * 4 * 2, 3 * 4 * 6, 2 * 4
    whole = 2 * 2 * (3 * (q_and_o + k_and_v + ff) + (1 + 2 + 3) * pair)
    last = 2 * 2 * (q_and_o + ff + 3 * k_and_v + 3 * pair)
    assert floor._block(arch, 2, 3) == whole
    assert floor._block(arch, 2, 3, 1) == last
    assert floor._head(arch, 5) == 2 * 5 * 4 * 9


@pytest.mark.parametrize("freeze_layers", [0.8, 0.0])
@pytest.mark.parametrize(
    ("step", "texts"),
    [
        ("sample", {}),
        ("sft", {}),
        ("sft", {"uneven": True}),
        ("sft", {"prompt_weight": 1.0}),
        ("reward", {}),
        ("reward", {"uneven": True}),
        ("ppo", {}),
    ],
)
def test_programs_do_little_more_than_the_least(step, texts, freeze_layers):
    """Within 15 % at the sizes that are measured; traced, not run. Packed rows are not quite full."""
    work = of_shape(step, "small", freeze_layers, **texts)
    arch, flops = ours.architecture(work), []

    def program(key):
        frozen, top = split(model.init(arch, key), freeze_layers)
        flops.append(ours.PROGRAMS[step](work, arch, frozen, top)[0])

    jax.eval_shape(program, jax.random.key(0))
    assert 1 <= flops[0] / floor.least(work, arch) < (1.35 if work.uneven else 1.15)


def test_prompts_without_weight_are_left_out_where_their_states_are_not_needed():
    """The head runs on 48 of 255 predictions; each piece of work says which of both it is."""
    on_both, on_responses = (of_shape("sft", "small", 0.8, prompt_weight=w) for w in (1.0, 0.0))
    arch = ours.architecture(on_both)
    last = floor._trained(arch, 7, 16, 256, 255) - floor._trained(arch, 7, 16, 256, 48)
    heads = 2 * floor._head(arch, 16 * (255 - 48))
    assert floor.least(on_both, arch) - floor.least(on_responses, arch) == last + heads
    assert [w.title for w in (on_both, on_responses)] == ["sft, small, loss on prompts too", "sft, small"]
    assert of_shape("sft", "small", 0.8, uneven=True).title == "sft, small, uneven"
    assert command.Work.read(str(on_both)) == on_both


def test_a_pair_needs_its_prompt_once():
    """Two texts' blocks less the prompt's, which is run once; nothing frozen, one layer, states at two ends."""
    work = of_shape("reward", "tiny", 0.0)
    arch = dataclasses.replace(ours.architecture(work), layers=1)
    p, q, r = 7, 3, 5
    apart = sum(floor._trained(arch, 0, 1, p + n, 1) for n in (q, r))
    prompt_keys = 3 * 2 * p * 2 * arch.width * arch.width  # keys and values, forward and backward
    assert floor._pair(arch, 0, p, q, r) == apart - prompt_keys


def test_uneven_texts_are_the_same_for_both_sides():
    work = of_shape("sft", "small", 0.8, uneven=True)
    assert work.lengths(16) == command.Work.read(str(work)).lengths(16)
    lengths = work.lengths(1000)
    assert max(p + max(q, r) for p, q, r in lengths) <= 256
    assert 0.45 < sorted(p for p, _, _ in lengths)[500] / 208 < 0.55


def sides(stack, **spent):
    """Processes that do nothing, as often as `spent` says, and end with an error when told to do it once more."""
    found = [command.start(n, [sys.executable, "-c", SIDE.format(times=t)], {}, stack) for n, t in spent.items()]
    assert [command.read(side) for side in found] == [{"device": "none"}] * len(found)
    return found


def test_sides_take_turns_and_one_that_ends_early_is_left_out_with_its_last_words():
    absent = {}
    with ExitStack() as stack:
        runs, peaks = command.take_turns(sides(stack, jaxrlhf=9, peer=9, short=2, dead=0), 3, absent)
    assert {name: len(r) for name, r in runs.items()} == {"jaxrlhf": 3, "peer": 3}
    assert all(0 <= r["cpu_seconds"] <= 1 and r["seconds"] >= 0 for r in runs["peer"])
    assert set(peaks) == {"jaxrlhf", "peer"}
    assert 5e6 < peaks["peer"] < 1e9
    assert absent == {"short": "of memory", "dead": "of memory"}


def test_ours_ending_early_is_a_failure():
    with ExitStack() as stack, pytest.raises(Failure, match="the measured process ended: of memory"):
        command.take_turns(sides(stack, jaxrlhf=1, peer=9), 3, {})


def test_a_peer_that_measures_two_prompts_counts_for_all_five_hundred(monkeypatch):
    monkeypatch.setattr(command, "_missing", lambda modules: "")
    monkeypatch.setattr(command, "read", lambda side, word="": {"device": "cpu"})
    monkeypatch.setattr(command, "start", lambda name, *_: name)
    runs = {name: [{"seconds": 2.0, "cpu_seconds": 3.0}] for name in ("jaxrlhf", "released code")}
    monkeypatch.setattr(command, "take_turns", lambda *_: (runs, dict.fromkeys(runs, 1e9)))
    work = of_shape("diversity", "tiny", 0.8)
    found = command.measure(work, 1, with_peers=True)
    assert (found["seconds"], found["peers"]["released code"]["seconds"]) == (2.0, 500.0)
    assert found["peers"]["released code"]["cpu_times_as_fast"]["median"] == 250
    assert work.texts()[:2] == command.Work.read(str(work)).texts(2)
    assert len({text for texts in work.texts() for text in texts}) == 500 * 16


def test_a_package_within_one_is_missed_by_its_whole_name():
    assert command._missing(("json", "email.mime")) == ""
    assert command._missing(("json", "email.rhyme")) == "email.rhyme"
    assert command._missing(("nowhere.at", "json")) == "nowhere.at"


def test_ratios_are_of_turns_and_the_table_says_what_is_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(command, "_missing", lambda modules: modules[0])
    monkeypatch.setattr(command, "read", lambda side, word="": {"device": "cpu"})
    monkeypatch.setattr(command, "start", lambda *_: None)
    runs = {"jaxrlhf": [{"seconds": s, "cpu_seconds": 2 * s} for s in (1.0, 2.0, 4.0)]}
    monkeypatch.setattr(command, "take_turns", lambda *_: (runs, {"jaxrlhf": 2e9}))
    found = command.measure(of_shape("sample", "tiny", 0.8), 3, with_peers=True)
    assert (found["seconds"], found["cpu_seconds"], found["tokens_per_second"]) == (2.0, 4.0, 8 * 16 * 48 / 2)
    assert found["not_measured"] == dict.fromkeys(("generate", "generate, static cache"), "torch is not installed")
    found["peers"] = {
        "peer": {"cpu_seconds": 9, "peak_memory": 1e9, "cpu_times_as_fast": {"median": 2.25, "low": 1, "high": 3}}
    }
    head, line, *rows = command.table([found]).split("\n")
    assert {row.count(" | ") for row in (head, line, *rows)} == {11}
    assert "**2.2** (1.0 to 3.0)" in rows[0]
    assert "torch is not installed" in rows[1]
    theirs = [{"cpu_seconds": s} for s in (6.0, 4.0, 8.0)]
    assert command._ratio(theirs, runs["jaxrlhf"], "cpu_seconds") == {"median": 1.0, "low": 1.0, "high": 3.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speed"], "bench takes one of sample, sft, reward, ppo, diversity, start, all; it was given speed"),
        ([], "it was given none"),
        (["sft", "--shape=huge"], "--shape=huge"),
        (["sft", "--repeats=0"], "--repeats=0"),
        (["sft", "--shape=tiny", "--config=configs/quickstart.py"], "give one of them"),
        (["ppo", "--config=configs/quickstart.py", "--config.reward.ensemble=2"], "config.reward.ensemble=2"),
    ],
)
def test_wrong_words_are_told_in_one_line(words, said, capsys):
    assert main(["jaxrlhf", "bench", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_recipes_step_is_measured_in_a_process_of_its_own(capfd):
    assert main(["jaxrlhf", "bench", "sft", "--config=configs/quickstart.py:smoke", "--repeats=2"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["bench"], found["repeats"], found["peers"]) == ("sft", 2, {})
    assert 1 <= found["gflop"] / found["least_gflop"] < 2
    assert 0 < found["share_of_floor"] < 1
    assert found["peak_memory"] > 1e8


def test_a_recipe_that_does_not_fit_the_devices_is_told_by_its_key(capsys):
    assert main(["jaxrlhf", "bench", "sft", "--config=configs/quickstart.py:smoke", "--config.mesh.data=3"]) == 2
    assert "error: config.mesh: data x fsdp x tensor = 3" in capsys.readouterr().err
