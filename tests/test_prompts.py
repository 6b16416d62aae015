import pytest

from jaxrlhf.data.prompts import FORMATS, prompts
from jaxrlhf.files import UserError

POST = {"subreddit": "tifu", "title": "A {post}", "post": "I {title} {0} {x.__class__}\n"}


def test_summarisation_by_hand():
    """Kirk et al.: single newlines. The N+ details: double ones."""
    text = "SUBREDDIT: r/tifu{n}TITLE: A {{post}}{n}POST: I {{title}} {{0}} {{x.__class__}}\n{n}TL;DR:"
    assert prompts("tldr").prompt(POST) == text.format(n="\n")
    assert prompts("tldr_double").prompt(POST) == text.format(n="\n\n")
    assert prompts("cnndm").prompt({"article": "News."}) == "ARTICLE: News.\nTL;DR:"
    assert prompts("cnndm_double").prompt({"article": "News."}) == "Article:\nNews.\n\nTL;DR:\n"


def test_alpaca_by_hand():
    alone = prompts("alpaca").prompt({"instruction": "Add {input}."})
    assert alone == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {input}.\n\n### Response:"
    )
    assert prompts("alpaca").prompt({"instruction": "Add {input}.", "input": " "}) == alone
    assert prompts("alpaca").prompt({"instruction": "Add.", "input": "{instruction} 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n{instruction} 2\n\n### Response:"
    )


def test_free_text():
    asked = {"instruction": "Add.", "input": "1 2"}
    assert prompts("Q: {instruction}\nA:").prompt(asked) == "Q: Add.\n\n1 2\nA:"  # an input is never lost
    assert prompts("{input}|{instruction}|{}|{ a }").prompt(asked) == "1 2|Add.|{}|{ a }"
    assert prompts("{input} {title}").fields == {"input", "title"}


def test_a_response_joins_in_one_way_whatever_its_source():
    """The released code trained its reward model on two spaces and scored one (PROTOCOL D29)."""
    for name in ("tldr", "tldr_double", "cnndm"):
        assert {prompts(name).response(t) for t in ("a b", " a b", "  a b")} == {" a b"}
    for spec in ("cnndm_double", "alpaca", "Q: {instruction}"):
        assert prompts(spec).response(" a") == " a"


@pytest.mark.parametrize(
    ("spec", "says"),
    [("tdlr", "known are tldr, cnndm"), ("", "known are"), ("chat", "set config.model.init"), ("{}", "known are")],
)
def test_unknown_formats(spec, says):
    with pytest.raises(UserError, match=says):
        prompts(spec)


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match=r"asks for \{subreddit\}; the record has post, title"):
        prompts("tldr").prompt({k: v for k, v in POST.items() if k != "subreddit"})
    assert all(f.text.count("{") == f.text.count("}") for f in FORMATS.values())
