"""Each dataset on small files in its real source's format; the content is made up."""

import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxrlhf.config_data import Source
from jaxrlhf.data import datasets, sources
from jaxrlhf.files import UserError, read_json

POST = {"id": "t3_aa1", "subreddit": "tifu", "title": "TIFU by {post}", "post": "I left  the gate open.\n\nIt ran."}
TLDR = POST | {"summary": "gate open, dog ran"}
INFO = {**POST, "site": None, "article": None}
PAIR = {
    "info": INFO,
    "summaries": [
        {"text": " dog ran", "policy": "sup1", "note": "ok"},
        {"text": " gate", "policy": "ref", "note": None},
    ],
    "choice": 1,
    "worker": "w7",
    "batch": "batch3",
    "split": "valid2",
    "extra": {"confidence": 4},
}
NEWS = PAIR | {
    "info": {"id": "n1", "site": "cnn", "title": "T", "article": "It rained."},
    "split": "valid1",
    "choice": 0,
}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: What's 1+1?\n\nAssistant:"


def lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def prepare(name, source, tmp_path, splits=("train", "validation", "test", "prompts", "cnndm"), at_most=0.5, log=print):
    return datasets.prepare(name, datasets.DATASETS[name], source, splits, tmp_path / "made", at_most, log)


def read(name, path, tmp_path, **kwargs):
    found = prepare(name, Source(path=str(path)), tmp_path, **kwargs)
    return {split: list(texts) for split, texts in found.splits.items()}


def test_tldr_in_parquet(tmp_path):
    for split, records in {"train": [TLDR, TLDR | {"id": "t3_b"}], "validation": [TLDR], "test": [TLDR]}.items():
        pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / f"{split}-00000-of-00001.parquet")
    found = read("tldr", tmp_path, tmp_path)
    row = POST | {"response": "gate open, dog ran"}
    assert found == {"train": [row, row | {"id": "t3_b"}], "validation": [row], "test": [row]}


def test_comparisons_go_by_their_own_split(tmp_path):
    lines(tmp_path / "raw" / "batch3.json", [PAIR, PAIR | {"split": "train", "choice": 0}])
    lines(tmp_path / "raw" / "cnndm0.json", [NEWS])
    row = POST | {"article": "", "chosen": " gate", "rejected": " dog ran"}
    assert read("tldr_comparisons", tmp_path / "raw", tmp_path) == {
        "test": [row],
        "train": [row | {"chosen": " dog ran", "rejected": " gate"}],
        "cnndm": [
            {"id": "n1", "subreddit": "", "title": "", "post": "", "article": "It rained."}
            | {"chosen": " dog ran", "rejected": " gate"}
        ],
    }
    pa.parquet.write_table(pa.Table.from_pylist([PAIR]), tmp_path / "0000.parquet")  # as the hub's converter writes it
    assert read("tldr_comparisons", tmp_path / "0000.parquet", tmp_path) == {"test": [row]}


def test_cnn_dailymail_in_csv(tmp_path):
    with (tmp_path / "test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("id", "article", "highlights"))
        writer.writeheader()
        writer.writerow({"id": "h1", "article": 'He said, "no".\nThen left.', "highlights": "A man\nleft"})
    row = {"id": "h1", "article": 'He said, "no".\nThen left.', "response": "A man\nleft"}
    assert read("cnn_dailymail", tmp_path, tmp_path) == {"test": [row]}


def test_alpaca_farm_as_on_the_hub(tmp_path):
    for name in ("sft", "preference", "unlabeled", "val"):
        record = ALPACA | {"input": "" if name == "val" else name}
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))
    found = read("alpaca_farm", tmp_path, tmp_path)
    assert {s: [r["input"] for r in rows] for s, rows in found.items()} == {
        "train": ["sft"],
        "prompts": ["unlabeled"],
        "validation": [""],
    }
    assert found["train"][0] | {"id": ""} == {"id": "", "instruction": "Add.", "input": "sft", "response": "3"}


def test_alpaca_farm_preferences(tmp_path):
    asked = {"instruction": "Add.", "input": "", "output_1": "3", "output_2": "4"}
    path = tmp_path / "alpaca_human_preference.json"
    path.write_text(json.dumps([asked | {"preference": p} for p in (1, 2, 0, 1.5)]))
    found = prepare("alpaca_farm_preferences", Source(path=str(path)), tmp_path)
    assert [(r["chosen"], r["rejected"]) for r in found.splits["train"]] == [("3", "4"), ("4", "3")]
    assert found.malformed == 2


def test_far_sets_of_instructions(tmp_path):
    (tmp_path / "alpaca_eval.json").write_text(
        json.dumps([{"dataset": "koala", "instruction": "Sing.", "output": "La", "generator": "davinci"}])
    )
    assert read("alpaca_eval", tmp_path / "alpaca_eval.json", tmp_path)["test"][0] == {
        "id": datasets.identity("Sing."),
        "instruction": "Sing.",
        "input": "",
        "response": "La",
    }
    seeds = {"instruction": "Do a, then b.", "instances": [{"input": "c", "output": "d"}], "is_classification": False}
    lines(tmp_path / "seq.jsonl", [seeds, {"instruction": "Do a, then b.", "input": "c", "output": "d"}])
    first, second = read("sequential_instructions", tmp_path / "seq.jsonl", tmp_path)["test"]
    assert first == second
    assert (first["input"], first["response"]) == ("c", "d")
    lines(tmp_path / "id.jsonl", [ALPACA])
    assert read("alpaca_farm_id_test", tmp_path / "id.jsonl", tmp_path)["test"][0]["response"] == "3"


def test_hh_shares_its_prompt(tmp_path):
    pair = {"chosen": HH + " Two.", "rejected": HH + " No."}
    odd = [
        pair | {"rejected": HH.replace("Hi", "Ho") + " No."},
        {"chosen": "Two.", "rejected": "No."},
        pair | {"chosen": HH + " Two.\n\nHuman: Sure?"},
    ]
    for folder in ("helpful-base", "harmless-base"):  # files of one name in two folders
        (tmp_path / folder).mkdir()
        with gzip.open(tmp_path / folder / "train.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, [pair, *odd])) + "\n")
    found = prepare("hh", Source(path=str(tmp_path)), tmp_path, at_most=0.75)
    row = {"id": datasets.identity(HH), "prompt": HH, "chosen": " Two.", "rejected": " No."}
    assert (list(found.splits["train"]), found.malformed) == ([row, row], 6)


def test_ones_own_files_by_a_field_map(tmp_path):
    lines(tmp_path / "mine.train.jsonl", [{"body": "x {y}", "tldr": "z", "subreddit": "s", "more": 1}])
    row = datasets.own("own", ["post"], "Sum up: {post}")
    source = Source(path=str(tmp_path), fields=("post=body", "response=tldr"))
    found = datasets.prepare("own", row, source, ("train",), tmp_path / "made", 0, print)
    assert list(found.splits["train"]) == [
        {"id": datasets.identity("x {y}"), "post": "x {y}", "subreddit": "s", "response": "z"}
    ]
    # A field of the map is never what happens to be called so.
    both = [{"post": "p", "body": "b", "response": "r"}] * 2 + [{"post": "p", "response": "r"}]
    lines(tmp_path / "both" / "mine.train.jsonl", both)
    source = Source(path=str(tmp_path / "both"), fields=("post=body",))
    found = datasets.prepare("own", row, source, ("train",), tmp_path / "made", 0.5, print)
    assert ([r["post"] for r in found.splits["train"]], found.malformed) == (["b", "b"], 1)
    nowhere = Source(path=str(tmp_path / "both"), fields=("post=body", "response=summry"))
    says = "own.fields has 'response=summry', but no record has a column 'summry'; there are body, post, response"
    with pytest.raises(UserError, match=says):
        datasets.prepare("own", row, nowhere, ("train",), tmp_path / "made", 1, print)
    with pytest.raises(UserError, match="fields has 'post'; it must be field=column"):
        datasets.prepare("own", row, Source(path=str(tmp_path), fields=("post",)), ("train",), tmp_path, 0, print)


@pytest.mark.parametrize(
    ("name", "record", "says"),
    [
        ("tldr", {k: v for k, v in TLDR.items() if k != "summary"}, "no field 'summary'"),
        ("tldr", TLDR | {"post": 3}, "field 'post' is int, not text"),
        ("tldr", TLDR | {"summary": " "}, "field 'summary' is empty"),
        ("tldr", [], "not an object"),
        ("tldr_comparisons", PAIR | {"choice": 2}, "field 'choice' is 2, not 0 or 1"),
        ("tldr_comparisons", PAIR | {"choice": True}, "field 'choice' is True"),
        ("tldr_comparisons", PAIR | {"split": "valid3"}, "known are train, valid1, valid2"),
        ("tldr_comparisons", PAIR | {"summaries": []}, "not a list of two"),
        ("tldr_comparisons", TLDR, "no field 'info'"),
        ("sequential_instructions", {"instruction": "a", "instances": []}, "field 'instances' is not a list of"),
    ],
)
def test_malformed_records_are_named_counted_and_bounded(tmp_path, name, record, says):
    good = TLDR if name == "tldr" else PAIR if name == "tldr_comparisons" else ALPACA
    path, said = tmp_path / "train.jsonl", []
    lines(path, [good, good, record, good])
    with path.open("a") as file:
        file.write('\n{"cut": \n')
    found = prepare(name, Source(path=str(path)), tmp_path, at_most=0.4, log=said.append)
    assert sum(map(len, found.splits.values())) == 3
    assert said[0].startswith(f"{path}:3: ")
    assert says in said[0]
    assert said[1].startswith(f"{path}:6: not valid JSON")
    assert [r["where"] for r in map(json.loads, next(tmp_path.rglob("malformed.jsonl")).open())] == [
        f"{path}:3",
        f"{path}:6",
    ]
    with pytest.raises(UserError, match=r"train\.jsonl:3: .*; 2 of 5 records are malformed, more than .*=0\.39") as e:
        prepare(name, Source(path=str(path)), tmp_path / "strict", at_most=0.39)
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "strict").rglob("source.json"))


def test_prepared_once_for_each_state_of_the_files(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    lines(path, [TLDR])
    first = prepare("tldr", Source(path=str(path)), tmp_path)
    about = read_json(next((tmp_path / "made").rglob("source.json")))
    assert about == {
        "from": str(path),
        "revision": "",
        "files": {"train": {"train.jsonl": hashlib.sha256(path.read_bytes()).hexdigest()}},
        "records": {"train": 1},
        "malformed": 0,
    }
    with monkeypatch.context() as patch:
        patch.setattr(sources, "raw", lambda path: pytest.fail("read again"))
        assert list(prepare("tldr", Source(path=str(path)), tmp_path).splits["train"]) == list(first.splits["train"])
    lines(path, [TLDR | {"summary": "other"}])
    assert prepare("tldr", Source(path=str(path)), tmp_path).splits["train"][0]["response"] == "other"
    assert prepare("tldr", Source(path=str(path)), tmp_path).mark != first.mark
    for marker in (tmp_path / "made").rglob("fingerprint.txt"):
        marker.unlink()
    with pytest.raises(UserError, match="is not whole any more; delete it"):
        prepare("tldr", Source(path=str(path)), tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("latest", "train"),
        ("retrieval", "train"),
        ("mine", "train"),
        ("my_test", "test"),
        ("valid-1", "validation"),
        ("validation", "validation"),
        ("training", "train"),
    ],
)
def test_the_split_of_a_file_is_a_word_of_its_name(tmp_path, name, split):
    lines(tmp_path / f"{name}.jsonl", [{"post": "p", "response": "r"}])
    source = Source(path=str(tmp_path / f"{name}.jsonl"))
    row = datasets.own("own", ["post"], "Sum up: {post}")
    splits = ("train", "validation", "test")
    assert list(datasets.prepare("own", row, source, splits, tmp_path / "made", 0, print).splits) == [split]


def test_a_body_is_the_post_under_whatever_title():
    titled = {"id": "1", "title": "a", "text": "b c", "subreddit": "s", "response": "r"}
    assert datasets.body(titled) == datasets.body(titled | {"title": "x", "response": "q"}) == "b c"
    assert datasets.body({"id": "1", "title": "a", "subreddit": "s", "response": "r"}) == "s\na"
    assert datasets.body({"question": "q", "context": "c", "chosen": "x"}) == "c\nq"


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.xlsx").write_text("x")
    (tmp_path / "train.parquet").write_text("x")
    (tmp_path / "train.csv").write_text('id,post\n1,"a\n')
    (tmp_path / "train.json").write_text("[1,")
    for path, says in (
        ("nothing", "no such file or folder"),
        ("empty", "no file there is named for a split; expected train or val or test in the name"),
        ("a.xlsx", "unknown kind of file"),
        ("train.parquet", "cannot be read as Parquet"),
        ("train.csv", r"train\.csv:\d: not valid CSV"),
        ("train.json", r"train\.json: not valid JSON"),
    ):
        with pytest.raises(UserError, match=says) as e:
            read("tldr", tmp_path / path, tmp_path, splits=("train", "validation", "test"))
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"config\.datasets\.own\.path is empty"):
        datasets.prepare("own", datasets.own("own", ["post"], ""), Source(), ("train",), tmp_path, 0, print)


def test_a_csv_row_of_another_width_is_malformed(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("id,article,highlights\n1,a,b\n2,c\n3,d,e,f\n")
    assert [(where, isinstance(r, sources.Malformed)) for where, r in sources.raw(path)] == [
        (f"{path}:2", False),
        (f"{path}:3", True),
        (f"{path}:4", True),
    ]


def test_lone_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"instruction": "a \\ud83d b", "output": "\\ud83d\\ude00"}\n')
    row = read("alpaca_eval", tmp_path / "test.jsonl", tmp_path)["test"][0]
    assert (row["instruction"], row["response"]) == ("a \ufffd b", "😀")


REAL = Path(__file__).parents[1] / "../shared/data"


@pytest.mark.skipif(not REAL.exists(), reason="the real files are not here")
def test_real_files(tmp_path):
    seeds = read("sequential_instructions", REAL / "instructions/seed_tasks_sequential.jsonl", tmp_path, at_most=0)
    answers = read("alpaca_eval", REAL / "alpaca_eval/outputs/text_davinci_003.json", tmp_path, at_most=0)
    assert (len(seeds["test"]), len(answers["test"])) == (42, 805)


SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "3.0.0/test-00000-of-00001.parquet": None,
    "3.0.0/train-00000-of-00001.parquet": b"must not be asked for",
    "1.0.0/test-00000-of-00001.parquet": b"must not be asked for",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as serves one dataset at one commit."""

    def do_GET(self):
        name = self.path.partition(f"/resolve/{SHA}/")[2]
        if "/tree/" in self.path:
            self.give(
                json.dumps([{"type": "file", "path": n, "size": len(b or b""), "oid": n} for n, b in FILES.items()])
            )
        elif "/api/datasets/" in self.path:
            self.give(json.dumps({"id": "a/b", "sha": SHA, "siblings": [{"rfilename": n} for n in FILES]}))
        elif name == "3.0.0/test-00000-of-00001.parquet":
            self.give(FILES[name])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def give(self, body):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(200)
        for key, value in (("ETag", '"e"'), ("X-Repo-Commit", SHA), ("Content-Length", str(len(body)))):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_the_hub_is_asked_once_for_what_is_needed_and_its_commit_is_kept(tmp_path):
    row = {"id": "h1", "article": "It rained.", "highlights": "rain"}
    pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "test.parquet")
    FILES["3.0.0/test-00000-of-00001.parquet"] = (tmp_path / "test.parquet").read_bytes()
    code = """
        import sys
        from pathlib import Path
        from jaxrlhf.config_data import Source
        from jaxrlhf.data import datasets
        from jaxrlhf.files import UserError
        row = datasets.DATASETS["cnn_dailymail"]
        for folder in sys.argv[1:]:
            try:
                made = datasets.prepare("cnn_dailymail", row, Source(), {"test"}, Path(folder), 0, print)
                print(list(made.splits["test"]))
            except UserError as error:
                print(error)
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}

    def run(cache, *folders):
        command = [sys.executable, "-c", textwrap.dedent(code), *(str(tmp_path / f) for f in folders)]
        done = subprocess.run(command, env=env | {"HF_HOME": str(tmp_path / cache)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    try:
        first = run("cache", "made")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert first == [str([{"article": "It rained.", "id": "h1", "response": "rain"}])]
    about = read_json(next((tmp_path / "made").rglob("source.json")))
    digest = hashlib.sha256(FILES["3.0.0/test-00000-of-00001.parquet"]).hexdigest()
    assert about["revision"] == SHA
    assert about["files"] == {"test": {"3.0.0/test-00000-of-00001.parquet": digest}}
    again, other = run("empty cache", "made", "elsewhere")  # the server is gone
    assert again == first[0]
    assert other.startswith(
        "config.datasets.cnn_dailymail: the hub's dataset 'abisee/cnn_dailymail' at 'main' is not to"
    )
    assert other.endswith("set config.datasets.cnn_dailymail.path to a copy")
