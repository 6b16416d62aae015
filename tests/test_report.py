"""The report: what it shows of a workdir, what it says, and that nothing in a workdir can harm its reader."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from report_workdirs import (
    SPLITS,
    around,
    estimates,
    outputs_results,
    outputs_workdir,
    recipe_config,
    recipe_results,
    recipe_workdir,
)

from jaxrlhf.evaluation import explorer, findings, report, results
from jaxrlhf.evaluation.page import FOLDER, PLAIN_PROMPTS
from jaxrlhf.files import UserError, write_json

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;{{7*7}}$x_"
HIDDEN = "a\x1b[31m\u202eb\ud800"


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.scripts = set(), [], "", []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self._in_script = tag == "script"

    def handle_endtag(self, tag):
        self._in_script &= tag != "script"

    def handle_data(self, data):
        if self._in_script:
            self.scripts.append(data)
        else:
            self.text += data


def written(workdir):
    return report.write_report(workdir).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe's workdir and its page."""
    path = recipe_workdir(tmp_path_factory.mktemp("recipe"))
    return path, written(path)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without pictures, for tests of their words."""
    monkeypatch.setattr(report.pictures, "draw", lambda found, accuracy: {})
    monkeypatch.setattr(report.figures, "curves", lambda stage, rows: iter(()))


def test_the_page_needs_nothing_but_itself(recipe):
    page = Page(recipe[1])
    links = [v for k, v in page.attributes if k in ("src", "href", "srcset")]
    assert all(v.startswith(("data:image/png;base64,", "#")) for v in links)
    assert {v[1:] for v in links if v.startswith("#")} <= {v for k, v in page.attributes if k == "id"}
    assert not page.tags & {"link", "iframe", "object", "form", "base"}
    assert "url(" not in recipe[1]
    assert "@import" not in recipe[1]
    policy = next(v for k, v in page.attributes if k == "content" and "default-src" in v)
    data, script = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"default-src 'none'; img-src data:; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
    assert policy == allowed + "base-uri 'none'; form-action 'none'"
    assert len(json.loads(data)["splits"]) == len(SPLITS)


def test_the_script_writes_no_markup_and_runs_no_text():
    script = (FOLDER / "report.js").read_text()
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval", "Function(", "fetch", "</"):
        assert word not in script


def test_every_figure_is_in_the_page_and_in_its_folder(recipe):
    workdir, page = recipe
    embedded = {base64.b64decode(d) for d in re.findall(r"data:image/png;base64,([\w+/=]+)", page)}
    files = {p.stem: p.read_bytes() for p in (workdir / "report" / "figures").iterdir()}
    assert set(files.values()) == embedded
    drawn = {"headline", "headline_narrow", "heads", "tradeoff", "accuracy", "training_sft_loss", "training_ppo_kl"}
    drawn |= {f"measure_{k}" for k in ("win_rate", "gold", "score", "length")} | {"gap_gold", "gap_win_rate"}
    drawn |= {f"{scope}_{k}" for scope in ("per_input", "across_input") for k in ("ead", "distinct", "cosine")}
    assert drawn <= set(files)
    assert all(png.startswith(b"\x89PNG") and b"Software" not in png and b"tIME" not in png for png in files.values())


def test_every_number_of_the_results_is_shown(recipe):
    workdir, page = recipe
    cells = [re.sub("<.*?>", "", c) for c in re.findall(r"<td.*?</td>", page)]
    held = list(estimates(json.loads((workdir / "results.json").read_text())))
    assert len(held) == 15 * (4 + 6) + 3 * 4 * 3 + 3 * 5 + 3 * (5 * (4 + 6) + 4 * 3)
    for e in held:
        assert f"{e['mean']:.6g}" in cells
        assert f"{e['low']:.6g}" in cells
        assert f"{e['high']:.6g}" in cells
        assert str(e["n"]) in cells
        assert "se" not in e or f"{e['se']:.6g}" in cells
    assert "100" in cells
    assert "16" in cells


def test_the_run_is_told(recipe):
    text = " ".join(Page(recipe[1]).text.split())
    for said in (
        "llama family, 6 layers of width 64",
        "the highest-scored of 16 SFT samples, drawn again and again from a pool of 64 samples",
        "come from a pool of 64 samples a prompt and so repeat each other",
        "the gold judge, which knows the truth",
        "3 in reward (train)",
        "0.700 [0.635, 0.765] of 200",
        "In distribution, per-input EAD: 0.595 [0.584, 0.606] for SFT",
        "By gold reward, PPO does worse than best-of-16 on 1 of 5 splits (news); 4 undecided.",
        "By per-input EAD, distinct-n and 3-gram cosine, PPO is less diverse than SFT on 5 of 5 splits.",
        "By head-to-head comparison, PPO loses to best-of-16 on 2 of 5 splits (length, news); 3 undecided.",
        "my neighbor polished the mirror in the yard and i feel relieved",
        "score 0.11, gold 3.00",
    ):
        assert said.replace("\N{NO-BREAK SPACE}", " ") in text.replace("\N{NO-BREAK SPACE}", " ")


def test_tokens_that_differ_where_texts_join_are_told(recipe):
    text = " ".join(Page(recipe[1]).text.split())
    assert "one after the other, as they are trained on: 1,234 in reward (train)." in text


def test_samples_are_the_first_of_each_split(recipe):
    text = Page(recipe[1]).text
    for split in SPLITS:
        assert all(f"help with my neighbor {split} {i}" in text for i in range(PLAIN_PROMPTS))
        assert f"help with my neighbor {split} {PLAIN_PROMPTS}" not in text
    assert text.count("cleaned something . 1") == len(SPLITS) * PLAIN_PROMPTS
    assert "cleaned something . 2" not in text


@pytest.mark.parametrize(
    ("e", "written"),
    [
        (around(0.12345, 0.05), "0.123 [0.073, 0.173]"),
        (around(4.163, 0.151), "4.16 [4.01, 4.31]"),
        (around(0.99925, 0.00021), "0.99925 [0.99904, 0.99946]"),
        (around(66.06, 3.72), "66.1 [62.3, 69.8]"),
        (around(1.0, 0.0), "1.000 [1.000, 1.000]"),
    ],
)
def test_estimates_are_rounded_by_their_interval(e, written):
    assert findings.estimate(e).replace("\N{NO-BREAK SPACE}", " ") == written


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page of which every text that comes from outside is hostile, figures and all."""
    path = tmp_path_factory.mktemp("hostile")
    results = outputs_results(names=(EVIL, HIDDEN, "../../etc", "sft", "長い" * 40), splits=("all", EVIL, HIDDEN))
    results["task"] = results["config"]["name"] = results["judge"] = EVIL
    del results["config"]["outputs"]
    for m in results["policies"]["sft"].values():
        m["diversity"]["across_input"][EVIL] = around(0.5, 0.1)
    row = {"id": EVIL, "prompt": EVIL, "reference": HIDDEN, "responses": [EVIL, f"{'long ' * 8000}{EVIL}"]}
    summary = {"truncated": {EVIL: 3}, "accuracy": {EVIL: around(0.7, 0.1)}}
    files = {"results.json": results, "samples/sft/all.jsonl": row, "reward/summary.json": summary}
    for name, value in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(value))
    return path, written(path)


def test_what_others_wrote_is_only_text(hostile):
    parsed = Page(hostile[1])
    assert not parsed.tags & {"form", "iframe"}
    assert len(parsed.scripts) == 2
    assert parsed.scripts[1] == (FOLDER / "report.js").read_text()
    assert not [k for k, _ in parsed.attributes if k.startswith("on")]
    assert all(v.startswith(("data:image/png;base64,", "#")) for k, v in parsed.attributes if k in ("src", "href"))
    assert not set("<>&") & set(parsed.scripts[0])
    assert parsed.text.count(EVIL) > 10
    assert "49" not in re.findall(r"&amp;amp;(\w+)", hostile[1])


def test_characters_that_hide_are_shown(hostile):
    _, page = hostile
    assert "a⟨U+001B⟩[31m⟨U+202E⟩b⟨U+D800⟩" in page
    assert not {"\x1b", "\u202e"} & set(page)


def test_long_texts_are_folded_and_cut(hostile):
    _, page = hostile
    text = Page(page).text
    assert text.count("long ") < explorer.LETTERS / 5 + 100
    assert f"… the other {len('long ' * 8000 + EVIL) - explorer.LETTERS:,} characters are in the file." in text


def test_names_from_files_name_no_file(hostile):
    workdir, _ = hostile
    inside = {p.name for p in (workdir / "report").rglob("*")}
    assert all(re.fullmatch(r"figures|index\.html|table\.(csv|tex)|[a-z0-9_]+\.png", name) for name in inside)


def test_the_same_numbers_give_the_same_bytes(hostile):
    workdir, page = hostile
    before = {p.name: p.read_bytes() for p in (workdir / "report" / "figures").iterdir()}
    assert written(workdir) == page
    assert {p.name: p.read_bytes() for p in (workdir / "report" / "figures").iterdir()} == before


def test_a_stale_figure_goes(tmp_path, undrawn):
    outputs_workdir(tmp_path)
    stale = tmp_path / "report" / "figures" / "training_ppo_gold.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    report.write_report(tmp_path)
    assert not stale.exists()


def test_what_is_absent_is_said(tmp_path, undrawn):
    policies = {"mine": {"all": {"n_prompts": 3, "samples_per_prompt": 1}}}
    write_json(tmp_path / "results.json", {"schema": 1, "policies": policies})
    text = Page(written(tmp_path)).text
    for said in ("Win rates:", "Gold reward:", "Per-input diversity:", "Generalisation gap:", "Configuration:"):
        assert said in text
    for said in (
        "Training curves (Pretraining, SFT, Reward model, PPO)",
        "Accuracy of the reward model:",
        "Sample outputs:",
    ):
        assert said in text


def test_each_optional_file_can_be_missing(tmp_path, undrawn):
    whole = recipe_workdir(tmp_path / "whole")
    for gone in (
        "config.json",
        "sft/metrics.jsonl",
        "reward/summary.json",
        "samples/bon/id.jsonl",
        "samples/sft/id.jsonl",
    ):
        (whole / gone).unlink()
        assert "In short" in written(whole)


def test_config_json_stands_in_for_a_config_that_results_lack(tmp_path, undrawn):
    results = recipe_results()
    del results["config"]
    write_json(tmp_path / "results.json", results)
    write_json(tmp_path / "config.json", recipe_config())
    assert "llama family, 6 layers" in Page(written(tmp_path)).text


def test_a_reward_model_as_judge_is_warned_of(tmp_path, undrawn):
    write_json(tmp_path / "results.json", recipe_results() | {"judge": "reward"})
    assert "so they flatter PPO" in Page(written(tmp_path)).text


def test_without_results_the_user_is_told_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"results\.json.*jaxrlhf evaluate"):
        report.write_report(tmp_path)


def test_results_without_splits_are_refused(tmp_path):
    write_json(tmp_path / "results.json", {"policies": {"sft": {}, "ppo": {}}})
    with pytest.raises(UserError, match=r"results\.json: its policies have no splits"):
        report.write_report(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "text", ["[]", '{"policies": {}}', '{"policies": {"sft": 3}}', '{"policies": {"sft": {"id": 3}}}']
)
def test_a_file_that_is_no_results_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json.*no policies"):
        report.write_report(tmp_path)


def test_a_broken_sample_file_is_named_with_its_line(tmp_path, undrawn):
    path = recipe_workdir(tmp_path) / "samples" / "ppo" / "ood_news.jsonl"
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(UserError, match=r"ood_news\.jsonl:6"):
        report.write_report(tmp_path)


def test_diversity_at_equal_length_and_by_length(tmp_path):
    def file(name, lengths):
        texts = [[" ".join(f"{name}{i}{s}{w % 7}" for w in range(n)) for s in range(2)] for i, n in enumerate(lengths)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([{"instruction": f"q{i}", "output": t} for i, t in enumerate(texts)]))
        return f"{name}={path}"

    outputs = [file("short", range(4, 16)), file("long", range(10, 34, 2))]
    results.evaluate_outputs(outputs, "", [], False, tmp_path / "out", print, 50)
    page = Page(written(tmp_path / "out")).text
    said = " ".join(page.split())
    assert "as many for every policy of a split: 6 on all." in said
    assert "at least 83 % of each policy's texts have so many words" in said
    assert "all: per-input EAD" in said
    assert "4 to 10" in said
    assert "per-input 1 − Self-BLEU at equal length" in said
    assert "Sentence-BERT and Vendi score: no sentence encoder was given." in said
    pictures = {p.stem for p in (tmp_path / "out" / "report" / "figures").glob("*.png")}
    assert {"cut_per_input_ead_cut", "cut_across_input_compression_cut", "per_input_self_bleu"} <= pictures
    assert not any(p.startswith("other_") for p in pictures)


def test_results_without_cuts_or_lengths_have_no_such_section(tmp_path, undrawn):
    said = written(outputs_workdir(tmp_path))
    assert "<h3>At equal length" not in said
    assert "<h3>By length" not in said


def test_one_answer_a_prompt_has_diversity_by_length_across_inputs(tmp_path, undrawn):
    rows = [{"instruction": f"q{i}", "output": " ".join(f"w{i}{w}" for w in range(1 + i // 20))} for i in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    results.evaluate_outputs([f"a={tmp_path / 'a.json'}"], "", [], False, tmp_path / "out", print, 50)
    said = " ".join(Page(written(tmp_path / "out")).text.split())
    assert "Across-input diversity of prompts whose responses are short, middling or long" in said
    assert "as the one with the fewest there has" in said
    assert "3 to 3" in said
    assert "(n 20)" in said
