"""An imported model with a tokenizer that has no padding token, through SFT and reward, and out again."""

import json

import jax
import numpy as np
import pytest
from test_tokens import imported

from jaxrlhf import config, exchange, model, scoring, stages, weights
from jaxrlhf.config import Experiment, Files, Loop, Model, Optim, Reward, Sampling, Sft, World
from jaxrlhf.data import task, tokens
from jaxrlhf.experiment import imported_architecture
from jaxrlhf.files import UserError, whole_folder, write_json
from jaxrlhf.store import Workdir

SHORT = Loop(steps=2, log_every=1, eval_every=0, save_every=2)
FAST = Optim(lr=0.05)


def base(folder, vocab_size=0, **options):
    """A directory with a tiny random model, whose embeddings have no row to spare."""
    tokenizer = imported(folder, **options)
    size = vocab_size or tokenizer.size
    arch = model.Architecture(
        vocab_size=size, layers=2, width=16, heads=2, kv_heads=2, head_width=8, ff_width=24, max_positions=512,
        **model.FAMILIES["llama"],  # pyright: ignore
    )  # fmt: skip
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    weights.export(folder, arch, model.init(arch, jax.random.key(0)), special)
    return folder


def experiment(init, **changed):
    world = World(demonstrations=16, preference_prompts=8, ppo_prompts=8, evaluation_prompts=4)
    return Experiment(
        world=world,
        model=Model(init=str(init), prompt_length=48, response_length=8, freeze_layers=0.5),
        sft=Sft(batch_size=4, loop=SHORT, optim=FAST),
        reward=Reward(batch_size=4, samples_per_prompt=2, normalise_samples=8, loop=SHORT, optim=FAST),
        sampling=Sampling(batch_size=4),
        **changed,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("imported")
    c = experiment(base(path / "theirs"))
    write_json(path / "run" / "config.json", json.loads(json.dumps(config.dataclasses.asdict(c))))
    stages.run_stages(c, Workdir(path / "run"), ("sft", "reward"), skip_finished=False)
    return path / "run"


def test_a_run_goes_on_without_the_tokenizer_that_it_began_with(workdir):
    c = config.read(workdir / "config.json")
    made = task.tokenizer(c, workdir)
    assert (made.bos, made.pad_id, made.eos_id) == ((0,), 1, 1)
    assert made.theirs.chat_template
    summary = json.loads((workdir / "sft" / "summary.json").read_text())
    assert summary["truncated"]["train"] > 0  # a 48th of a byte tokenizer's post
    assert summary["join_mismatch"] == {"train": 0}


def test_a_reward_model_whose_texts_end_with_what_pads_them(workdir, tmp_path):
    """transformers finds a text's end by its padding (PROTOCOL D15): so the export has a padding token of its own."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    exchange.export(workdir, "reward", tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    reader = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert reader.pad_token_id == theirs.config.pad_token_id == theirs.config.vocab_size - 1
    prompts, responses, finished = ["Once there", "a fox"], [" was a fox", " ünd"], [True, False]
    texts = [p + r + reader.eos_token * f for p, r, f in zip(prompts, responses, finished, strict=True)]
    with torch.no_grad():
        inputs = reader(texts, return_tensors="pt", padding=True)
        wanted = theirs(**inputs).logits[:, 0].numpy() + theirs.config.jaxrlhf_score_bias
    reward = scoring.load(tmp_path / "reward")
    assert np.abs(scoring.score_texts(reward, prompts, responses, finished) - wanted).max() < 1e-4
    policy = task.tokenizer(config.read(workdir / "config.json"), workdir)
    assert scoring.same_ids(policy, reward.tokenizer)
    ids = (
        policy.encode_prompts(prompts),
        [q + [1] * f for q, f in zip(policy.encode_many(responses), finished, strict=True)],
    )
    assert np.abs(scoring.score_ids(reward, policy, *ids) - wanted).max() < 1e-4
    assert abs(scoring.score_texts(reward, prompts, responses)[1] - wanted[1]) > 1e-3  # the end makes a difference


def test_what_goes_out_has_its_chat_template(workdir, tmp_path):
    exchange.export(workdir, "sft", tmp_path / "sft")
    exported = tokens.pretrained(tmp_path / "sft")
    assert tokens.with_chat(exported).chat.before == "<s><|im_start|>user\n"  # pyright: ignore
    assert "theirs" not in "".join(p.read_text() for p in (tmp_path / "sft").glob("*.[jm][sd]*[on]"))
    assert exchange.import_base(str(tmp_path / "sft"), tmp_path / "next").count("yes: --config.files.prompt=chat") == 1


def test_an_export_needs_a_finished_stage(workdir, tmp_path):
    with pytest.raises(UserError, match="stage 'ppo' is not finished"):
        exchange.export(workdir, "ppo", tmp_path / "ppo")
    assert list(tmp_path.iterdir()) == []


def test_ids_beyond_the_embeddings_are_refused(tmp_path):
    folder = base(tmp_path / "x", vocab_size=270)
    with pytest.raises(UserError, match=r"embeddings for 270 tokens, its tokenizer 300"):
        imported_architecture(experiment(folder), folder, tokens.pretrained(folder).size)
    with pytest.raises(UserError, match=r"its embeddings 270 rows"):
        exchange.import_base(str(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_become_chats_of_the_imported_model(tmp_path):
    answers = [
        {"instruction": f"say {i} <|im_end|>", "input": "in {tongues}", "output": f"{i}", "dataset": "near"}
        for i in range(20)
    ]
    verdicts = [r | {"output_1": "a", "output_2": "b", "preference": 1} for r in answers]
    for name, rows in (("a", answers), ("v", verdicts)):
        write_json(tmp_path / f"{name}.json", rows)
    files = Files(
        root=str(tmp_path), demonstrations=("a.json",), annotations=("v.json",), reference="a.json",
        id_sources=("near",), prompt="chat",
    )  # fmt: skip
    made = task.load(experiment(base(tmp_path / "theirs"), task="files", files=files), tmp_path / "run", print)
    prompt = made.demonstrations[0]["prompt"]
    assert prompt.startswith("<s><|im_start|>user\nsay ")
    assert prompt.endswith(" <|im_end|>\n\nin {tongues}<|im_end|>\n<|im_start|>assistant 26 Jul 2024\n")
    assert [i for i in made.tokenizer.encode_prompts([prompt])[0] if i < 4] == [0, 2, 3, 2]
    assert len(made.demonstrations) + len(made.validation) == 20
    assert f"say {made.splits['id'][0]['response']} " in made.splits["id"][0]["prompt"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    def fails():
        with whole_folder(tmp_path / "x") as folder:
            (folder / "half").write_text("")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with whole_folder(tmp_path / "x") as folder:
            (folder / text).write_text(text)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["x", "x/two"]
