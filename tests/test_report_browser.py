"""The report in a browser: no errors, nothing leaves, nothing that was written by others runs; sorting, filtering."""

import json
import shutil

import pytest
from report_workdirs import SPLITS, around, outputs_results, recipe_workdir

from jaxrlhf.evaluation import report
from jaxrlhf.files import write_json, write_records

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")

# Every way to run that we know, in every place that ends what it is put in; each would call `alert` with its number.
ENDS = ("", "</script>", "</textarea>", "-->", '">', "'>", "</title>", "</style>", "]]>", "</noscript>")
RUNS = (
    "<script>alert({0})</script>",
    "<img src=x onerror=alert({0})>",
    "<svg onload=alert({0})>",
    '" onmouseover=alert({0}) autofocus onfocus=alert({0}) x="',
    "<iframe srcdoc='<script>parent.alert({0})</script>'></iframe>",
    "<details open ontoggle=alert({0})>",
    "<a href=javascript:alert({0})>{0}</a>",
    "{{{{ cycler.__init__.__globals__ }}}}<script>alert({0})</script>",
    "\\u003cscript\\u003ealert({0})\\u003c/script\\u003e\u2028alert({0})",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/{0}'><base href=//127.0.0.1:9/>",
)
STRINGS = [end + run.format(10 * i + j) for i, end in enumerate(ENDS) for j, run in enumerate(RUNS)]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """Opens a page and collects what must not happen: messages on the console, dialogs, errors, requests."""
    happened, contexts = [], []

    def opened(path, **how):
        context = browser.new_context(**how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: happened.append(m.text))
        page.on("pageerror", lambda e: happened.append(str(e)))
        page.on("dialog", lambda d: (happened.append(d.message), d.dismiss()))
        page.on("request", lambda r: happened.append(r.url) if not r.url.startswith(("data:", path.as_uri())) else None)
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert happened == []


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return report.write_report(recipe_workdir(tmp_path_factory.mktemp("recipe")))


def column(page, head):
    heads = page.locator("#every thead th").all_text_contents()
    return page.locator(f"#every tbody tr:not([hidden]) td:nth-child({heads.index(head) + 1})").all_text_contents()


def test_the_table_sorts_numbers_as_numbers_and_says_so(visit, recipe):
    page = visit(recipe)
    unsorted = [float(x) for x in column(page, "mean")]
    button = page.locator("#every thead button", has_text="mean")
    button.focus()
    page.keyboard.press("Enter")
    assert [float(x) for x in column(page, "mean")] == sorted(unsorted) != unsorted
    assert page.locator("#every th[aria-sort=ascending]").text_content() == "mean"
    button.click()
    assert [float(x) for x in column(page, "mean")] == sorted(unsorted, reverse=True)
    page.locator("#every thead button", has_text="split").click()
    assert column(page, "split") == sorted(column(page, "split"))
    assert page.locator("#every th[aria-sort]").count() == 1
    error = page.locator("#every thead button", has_text="standard error")
    for _ in range(2):
        error.click()
        cells = column(page, "standard error")
        filled = [c for c in cells if c]
        assert cells[: len(filled)] == filled


def test_the_table_filters_by_all_words(visit, recipe):
    page = visit(recipe)
    whole = len(column(page, "mean"))
    page.get_by_label("Only rows with").fill("PPO news gold")
    kept = list(zip(*(column(page, h) for h in ("policy", "against", "split", "measure")), strict=True))
    assert 0 < len(kept) < whole
    assert all("PPO" in a + b and c == "news" and d == "gold reward" for a, b, c, d in kept)
    assert f"{len(kept)} of {whole} rows" in page.locator("main, body").first.text_content()


def test_the_explorer_switches_and_filters(visit, recipe):
    page = visit(recipe)
    explorer = page.locator("#explorer")
    assert not page.locator("#plain").is_visible()
    assert "prompt 1, of the first 5 of 5" in explorer.text_content()
    assert explorer.locator(".answers .label").all_text_contents() == ["SFT", "PPO"]
    assert explorer.locator(".answers .text").count() == 8
    told = explorer.locator(".answers .meta").all_text_contents()
    assert told[:2] == ["score 0.11, gold 3.00", "score 1.11, gold 2.00, cut off"]
    explorer.get_by_role("button", name="next").click()
    assert "help with my neighbor id 1" in explorer.text_content()
    explorer.get_by_label("split").select_option(label="news")
    assert f"help with my neighbor {SPLITS[-1]} 0" in explorer.text_content()
    explorer.get_by_label("beside").select_option(label="best-of-16")
    assert explorer.locator(".answers .label").all_text_contents() == ["SFT", "best-of-16"]
    explorer.get_by_label("prompts with").fill("NEWS 3")
    assert "prompt 1 of 1 that match" in explorer.text_content()
    assert "ood_news 3" in explorer.text_content()
    assert explorer.get_by_role("button", name="next").is_disabled()
    explorer.get_by_label("prompts with").fill("no such words")
    assert "no prompt matches" in explorer.text_content()


def test_shared_words_are_marked(visit, recipe):
    page = visit(recipe)
    answer = page.locator("#explorer .answers .text").first
    assert answer.text_content() == " in the garden , my neighbor cleaned something . 0"
    assert answer.locator("mark").all_text_contents() == ["in the garden , my neighbor cleaned something ."]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_no_page_sideways(visit, recipe, scheme):
    page = visit(recipe, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for details in page.locator("details").all():
        details.evaluate("e => e.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 24)"
    assert dark == (scheme == "dark")


def test_without_a_script_everything_can_be_read(browser, recipe):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(recipe.as_uri())
    assert page.locator("#plain").is_visible()
    assert page.locator("#every tbody tr").count() > 100
    assert page.get_by_role("button").count() == 0
    context.close()


def test_none_of_100_hostile_strings_runs(visit, tmp_path):
    assert len(set(STRINGS)) == 100
    names = ("sft", *STRINGS[:3], "__proto__")
    results = outputs_results(names, ("all", *STRINGS[90:]))
    results["task"] = results["judge"] = results["config"]["name"] = STRINGS[7]
    results["policies"]["sft"]["all"]["diversity"]["across_input"][STRINGS[4]] = around(0.5, 0.1)
    del results["config"]["outputs"]
    write_json(tmp_path / "results.json", results)
    rows = [{"id": s, "prompt": s, "reference": s, "responses": [s, s + "x"]} for s in STRINGS]
    write_records(tmp_path / "samples" / "sft" / "all.jsonl", rows)
    page = visit(report.write_report(tmp_path))
    for details in page.locator("details").all():
        details.evaluate("e => e.open = true")
    explorer = page.locator("#explorer")
    seen = []
    for _ in STRINGS:
        seen.append(explorer.locator(".answers .text").first.text_content())
        explorer.locator(".answers .text").first.hover()
        if explorer.get_by_role("button", name="next").is_enabled():
            explorer.get_by_role("button", name="next").click()
    assert seen == [s.replace("\u2028", "⟨U+2028⟩") for s in STRINGS]
    elements = page.evaluate("[...document.querySelectorAll('*')].map(e => [e.tagName, ...e.getAttributeNames()])")
    assert not {e[0] for e in elements} & {"IFRAME", "BASE", "SVG", "A", "svg"} - {"A"}
    assert not [name for e in elements for name in e[1:] if name.startswith("on")]
    links = page.evaluate("[...document.querySelectorAll('a')].map(e => e.getAttribute('href'))")
    assert all(link.startswith("#") for link in links)
    page.wait_for_timeout(200)


def test_what_should_be_caught_is_caught(browser, tmp_path):
    """The collector above would see a string that ran."""
    (tmp_path / "bad.html").write_text(f"<body>{json.dumps(STRINGS[1])}</body>")
    said = []
    page = browser.new_page()
    page.on("dialog", lambda d: (said.append(d.message), d.dismiss()))
    page.goto((tmp_path / "bad.html").as_uri())
    page.wait_for_timeout(200)
    page.close()
    assert said == ["1"]
