"""The embedded world's words: what its people talk about, and the sentences they say it in.

A concept is a tuple of synonyms, named by the first. A template is a sentence of literal words and of fields in braces:
the six slots of a fact, and the four words of a style's `voice`. Everything is lower case and separated by single
spaces, so that a word-level tokenizer can rebuild any text.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

Concept = tuple[str, ...]

SLOTS = ("who", "act", "object", "place", "feeling", "question")
KEYWORDS = ("SUBREDDIT:", "TITLE:", "POST:", "ARTICLE:", "TL;DR:", "COMMENT:")


@dataclass(frozen=True)
class Style:
    """How a kind of text is written: its voice, and its templates in each place of a post."""

    voice: dict[str, str]  # the fields my, i, i_feel, i_am
    titles: tuple[str, ...]  # none: the post is an `ARTICLE:`
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    events: tuple[str, ...]
    feelings: tuple[str, ...]
    questions: tuple[str, ...]
    asides: tuple[str, ...]  # how a sentence about somebody else begins


@dataclass(frozen=True)
class Topic:
    """What a post can be about: the concepts of every slot but feeling, which all topics share."""

    name: str
    style: Style
    concepts: dict[str, tuple[Concept, ...]]


def _concepts(words: str) -> tuple[Concept, ...]:
    return tuple(tuple(word.split("/")) for word in words.split())


POSITIVE = _concepts(
    "happy/glad proud/honored grateful/thankful excited/thrilled "
    "relieved/reassured amused/entertained hopeful/optimistic calm/peaceful"
)
NEGATIVE = _concepts(
    "sad/unhappy angry/furious scared/afraid jealous/envious "
    "worried/anxious confused/baffled ashamed/embarrassed lonely/isolated"
)

# What a sentence about somebody else tells; one of the style's asides comes before it.
ASIDES = (
    "{my} {who} {act} the {object} .",
    "{my} {who} {act} {my} {object} in the {place} .",
    "{my} {who} was {feeling} in the {place} .",
    "{my} {who} wanted to {question} .",
)

# With four asides the longest forum post has 80 tokens, line breaks included; with one it has 50.
FORUM = Style(
    voice={"my": "my", "i": "i", "i_feel": "i feel", "i_am": "i am"},
    titles=(
        "{my} {who} {act} {my} {object}",
        "a story about {my} {who}",
        "help with {my} {who}",
        "{my} {who} surprised me today",
        "{my} {who} and i",
    ),
    openers=("hi all .", "hello everyone .", "first post .", "throwaway account ."),
    closers=("thanks everyone .", "any advice ?", "please help ."),
    events=(
        "{my} {who} {act} the {object} in the {place} .",
        "yesterday {my} {who} {act} {my} {object} in the {place} .",
        "so {my} {who} {act} {my} {object} in the {place} .",
        "in the {place} , {my} {who} {act} {my} {object} .",
        "apparently {my} {who} {act} the {object} in the {place} .",
    ),
    feelings=(
        "honestly {i_am} {feeling} .",
        "now {i_am} {feeling} .",
        "{i_am} still {feeling} .",
        "{i_feel} {feeling} .",
    ),
    questions=(
        "should {i} {question} ?",
        "would you {question} ?",
        "is it right to {question} ?",
        "is it time to {question} ?",
    ),
    asides=("meanwhile", "earlier", "once"),
)

NEWS = Style(
    voice={"my": "the", "i": "people", "i_feel": "people feel", "i_am": "people are"},
    titles=(),
    openers=("breaking news .", "photo by staff .", "live report ."),
    closers=("more at noon .", "updates will follow .", "officials declined to comment ."),
    events=(
        "officials say {my} {who} {act} {my} {object} in the {place} .",
        "on monday {my} {who} {act} {my} {object} in the {place} .",
        "news from the {place} : {my} {who} {act} {my} {object} .",
        "according to reports {my} {who} {act} {my} {object} in the {place} .",
        "sources confirmed that {my} {who} {act} {my} {object} in the {place} .",
    ),
    feelings=(
        "residents said they were {feeling} .",
        "voters are {feeling} tonight .",
        "many {i_feel} {feeling} .",
    ),
    questions=(
        "analysts ask whether {i} should {question} .",
        "experts debate if {i} should {question} .",
        "will {i} {question} next ?",
    ),
    asides=("elsewhere", "overnight", "separately"),
)

RELATIONSHIPS = Topic(
    "relationships",
    FORUM,
    {
        "who": _concepts(
            "sister brother mother/mom father/dad wife husband girlfriend boyfriend roommate/flatmate "
            "neighbor cousin aunt uncle friend fiance grandmother/grandma grandfather/grandpa ex"
        ),
        "act": _concepts(
            "sold/auctioned borrowed/took painted/decorated hid/concealed found/discovered cleaned/polished "
            "repaired/fixed bought/purchased moved/shifted lost/misplaced wrapped/packed photographed dropped "
            "swapped/traded"
        ),
        "object": _concepts(
            "lamp guitar bicycle/bike sofa/couch ring mirror kettle suitcase camera teapot blanket vase piano tent "
            "clock toaster"
        ),
        "place": _concepts(
            "kitchen garden/yard garage attic/loft basement/cellar hallway library hotel cafe cabin park market bakery "
            "theater"
        ),
        "question": _concepts("talk/speak wait/stay leave/go apologize celebrate call/phone write/text visit"),
    },
)
JOBS = Topic(
    "jobs",
    FORUM,
    {
        "who": _concepts("boss coworker/colleague manager/supervisor intern client secretary"),
        "act": _concepts("signed printed/copied deleted/erased approved/accepted mailed shredded"),
        "object": _concepts("contract invoice laptop/computer calendar badge spreadsheet"),
        "place": _concepts("office lobby elevator warehouse cafeteria factory"),
        "question": _concepts("resign/quit negotiate/bargain apply retire"),
    },
)
PETS = Topic(
    "pets",
    FORUM,
    {
        "who": _concepts("dog/puppy cat/kitten parrot hamster rabbit/bunny turtle"),
        "act": _concepts("chewed/nibbled buried chased/hunted licked scratched stole/snatched"),
        "object": _concepts("slipper cushion/pillow carrot ball sandwich curtain"),
        "place": _concepts("bathtub kennel barn/stable hedge meadow pond"),
        "question": _concepts("whistle play cuddle/hug intervene"),
    },
)
SCHOOL = Topic(
    "school",
    FORUM,
    {
        "who": _concepts("teacher classmate tutor professor/lecturer principal coach"),
        "act": _concepts("graded/marked solved explained memorized/learned recited sketched/drew"),
        "object": _concepts("essay textbook poem puzzle/riddle map diploma"),
        "place": _concepts("classroom laboratory/lab gym auditorium dormitory/dorm playground"),
        "question": _concepts("study/revise enroll complain graduate"),
    },
)
WORLD_NEWS = Topic(
    "news",
    NEWS,
    {
        "who": _concepts("minister mayor governor scientist/researcher athlete pilot"),
        "act": _concepts("announced/unveiled banned/outlawed inspected praised/applauded launched rejected"),
        "object": _concepts("treaty budget satellite bridge medal railway"),
        "place": _concepts("capital stadium harbor/port airport parliament museum"),
        "question": _concepts("vote protest/march invest evacuate/flee"),
    },
)

SUBREDDITS = (RELATIONSHIPS, JOBS, PETS, SCHOOL)
TOPICS = (*SUBREDDITS, WORLD_NEWS)

# What a pretraining document's comment is made of: short sentences that each copy one to three facts. Between them they
# use every word of a summary, since the output head learns its words here and is frozen afterwards.
COMMENTS = (
    "{my} {who} {act} the {object} .",
    "it happened in the {place} .",
    "{i_feel} {feeling} .",
    "should {i} {question} ?",
    "someone {act} the {object} .",
    "{my} {who} {act} something .",
    "it was {my} {who} .",
    "all about the {object} .",
    "not sure if {i} should {question} .",
    "is it time to {question} ?",
    "it is about {my} {who} and the {object} .",
    "in the {place} , someone {act} {my} {object} .",
    "{i_am} {feeling} because {my} {who} {act} something .",
    "{my} {who} {act} something and {i_feel} {feeling} .",
    "it happened in the {place} so {i_am} {feeling} .",
)

# What a sloppy demonstrator puts around a summary.
HEDGES = ("long story short ,", "so basically", "in short ,", "well ,")
SIGN_OFFS = ("the end .", "what a week .", "any ideas ?", "thanks .")


@functools.cache
def summaries(kept: frozenset[str]) -> tuple[str, ...]:
    """Templates of a whole summary that tells the slots `kept` (at least one), and no others."""
    feelings = ("{i_feel} {feeling}", "{i_am} {feeling}") if "feeling" in kept else ("",)
    asked = ("should {i} {question} ?", "not sure if {i} should {question} .", "is it time to {question} ?")
    questions = asked if "question" in kept else ("",)
    told = [s for e, f in itertools.product(_clauses(kept) or ("",), feelings) for s in _joined(e, f)]
    orders = [order for t, q in itertools.product(told, questions) for order in (f"{t} {q}", f"{q} {t}")]
    return tuple(dict.fromkeys(order.strip() for order in orders))


def _clauses(kept: frozenset[str]) -> tuple[str, ...]:
    """Clauses that tell which of who, act, object and place are kept; none when none is."""
    place = " in the {place}" if "place" in kept else ""
    whos = ("{my} {who}",) if "who" in kept else ("someone",)
    objects = ("the {object}", "{my} {object}") if "object" in kept else ("something",)
    if "act" in kept:
        clauses = [f"{who} {{act}} {thing}{place}" for who, thing in itertools.product(whos, objects)]
        return (*clauses, *(f"in the {{place}} , {c.removesuffix(place)}" for c in clauses if place))
    if "who" in kept and "object" in kept:
        return tuple(f"it is about {who} and {thing}{place}" for who, thing in itertools.product(whos, objects))
    if "who" in kept or "object" in kept:
        return tuple(f"it is about {named}{place}" for named in (whos if "who" in kept else objects))
    return ("it happened in the {place}",) if place else ()


def _joined(event: str, feeling: str) -> tuple[str, ...]:
    if event and feeling:
        return (
            f"{event} . {feeling} .",
            f"{event} and {feeling} .",
            f"{event} so {feeling} .",
            f"{feeling} because {event} .",
        )
    return (f"{event}{feeling} .",) if event or feeling else ("",)


@functools.cache
def sentences() -> tuple[str, ...]:
    """Every sentence of bodies, comments and summaries, in both voices, with fields in place of fact words.

    A hedge is followed by the first word alone of whatever can follow it, which spares thousands of sentences.
    """
    kept = [frozenset(k) for n in range(1, 7) for k in itertools.combinations(SLOTS, n)]
    told = [template for k in kept for template in summaries(k)]
    hedged = [f"{hedge} {start}" for hedge in HEDGES for start in dict.fromkeys(t.split()[0] for t in told)]
    texts: list[str] = []
    for s in (FORUM, NEWS):
        body = (*s.openers, *s.closers, *s.events, *s.feelings, *s.questions)
        asides = [f"{start} {aside}" for start in s.asides for aside in ASIDES]
        fields = s.voice | {slot: f"{{{slot}}}" for slot in SLOTS}
        texts += [t.format_map(fields) for t in (*told, *hedged, *body, *asides, *COMMENTS, *SIGN_OFFS)]
    return tuple(dict.fromkeys(texts))


@functools.cache
def slot_words() -> dict[str, tuple[str, str]]:
    """Each fact word's slot and the name of its concept: {"mom": ("who", "mother"), ...}."""
    tables = [table for topic in TOPICS for table in topic.concepts.items()]
    tables += [("feeling", POSITIVE), ("feeling", NEGATIVE)]
    return {word: (slot, concept[0]) for slot, concepts in tables for concept in concepts for word in concept}


def _vocabulary() -> tuple[str, ...]:
    plain = {word for text in (*sentences(), *FORUM.titles) for word in text.split() if not word.startswith("{")}
    names = [f"r/{topic.name}" for topic in SUBREDDITS]
    return (*KEYWORDS, *names, *sorted(plain | slot_words().keys()))


VOCABULARY = _vocabulary()
