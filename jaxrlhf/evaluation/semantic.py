"""How varied the meanings of texts are: Sentence-BERT, Vendi score, NLI and semantic clusters.

Of every metric, more is more varied. The models run in `encoders`, which is imported only where one is loaded.

Axis letters: B prompts, N responses to a prompt, D width of an embedding, P pairs.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from jaxrlhf.evaluation.diversity import Varied, by_blocks
from jaxrlhf.evaluation.statistics import blocks
from jaxrlhf.files import UserError

SENTENCES = 5  # of a text, at most
MEETINGS = 16  # pairs of prompts that a prompt's first responses start across inputs, shared out over its responses

Pair = tuple[str, str]
Key = TypeVar("Key", bound=Hashable)
Read = Callable[[Sequence[Pair]], np.ndarray]  # pairs -> -1 contradiction, 0 neutral, 1 entailment


class Responses(NamedTuple):
    """Texts [B][N] to measure, and each prompt's place in an order that hangs on the prompts alone."""

    texts_BN: Sequence[Sequence[str]]
    rank_B: np.ndarray


def measure(
    held: Mapping[Key, Responses], sentence_encoder: str, nli_model: str, paper_compat: bool
) -> dict[Key, list[Varied]]:
    """Every metric that the models given allow, of all responses; "" for a model that is not there.

    Each distinct text is encoded once, and each distinct pair is read once, over everything held.

    Raises:
      UserError: a model cannot be loaded, or the NLI model's labels are not those of NLI.
    """
    found: dict[Key, list[Varied]] = {key: [] for key in held}
    if sentence_encoder:
        embed = _embedder(sentence_encoder)
        texts = sorted({t for r in held.values() for row in r.texts_BN for t in row})
        row = {text: i for i, text in enumerate(texts)}
        unit_UD = _unit(embed(texts))
        for key, (texts_BN, rank_B) in held.items():
            found[key].append(of_embeddings(unit_UD[[[row[t] for t in texts] for texts in texts_BN]], rank_B))
    if nli_model:
        read = _reader(nli_model)
        for key, varied in of_sentences(held, read, paper_compat).items():
            found[key].append(varied)
        groups = list(dict.fromkeys(tuple(sorted(row)) for r in held.values() for row in r.texts_BN))
        sizes = dict(zip(groups, meanings(groups, read), strict=True))
        for key, (texts_BN, _) in held.items():
            if len(texts_BN[0]) > 1:
                found[key].append(Varied(of_clusters([sizes[tuple(sorted(row))] for row in texts_BN]), {}))
    return found


def of_embeddings(unit_BND: np.ndarray, rank_B: np.ndarray) -> Varied:
    """`sbert` and `vendi` of responses' embeddings, each of length 1; see there."""
    samples = unit_BND.shape[1]
    across = {
        "sbert": _cosine_across(unit_BND),
        "vendi": by_blocks(blocks(rank_B), lambda b: [vendi(unit_BND[b, j]) for j in range(samples)]),
    }
    if samples == 1:
        return Varied({}, across)
    own = {"sbert": [sbert(unit_ND) for unit_ND in unit_BND], "vendi": [vendi(unit_ND) for unit_ND in unit_BND]}
    return Varied({name: np.array(value_B) for name, value_B in own.items()}, across)


def sbert(unit_ND: np.ndarray) -> float:
    """Mean over pairs of 1 - cosine of their sentence embeddings (Reimers & Gurevych 2019; Tevet & Berant 2021).

    In [0, 2], in practice below 1; 0 for one text. Takes embeddings of length 1: all pairs' cosines sum to
    (|sum u|^2 - sum |u|^2) / 2. The released code has the same value from an encoding of every pair.
    """
    n = len(unit_ND)
    return 1 - _cosines(unit_ND) / (n * (n - 1) / 2) if n > 1 else 0.0


def vendi(unit_ND: np.ndarray) -> float:
    """Vendi score (Friedman & Dieng 2023): exp(-sum l log l), l the eigenvalues of K / N, K the embeddings' cosines.

    The effective number of different texts, from 1 (all alike) to N (none like another), so it depends on how many
    texts there are. Takes embeddings of length 1.
    """
    n, width = unit_ND.shape
    # K and the embeddings' second moment have the same eigenvalues but for zeros.
    smaller = unit_ND @ unit_ND.T if n <= width else unit_ND.T @ unit_ND
    value = np.linalg.eigvalsh(smaller) / n
    value = value[value > 1e-12]
    return float(np.exp(-(value * np.log(value)).sum()))


def sentences(text: str, paper_compat: bool = False) -> list[str]:
    """At most 5 sentences of a text, drawn by a seed that the text itself gives, in the order of the text.

    A sentence ends at a line's end, and after `.`, `!`, `?` or `…` before white space (so that abbreviations end one
    too), or after a full stop of Chinese or Japanese. With `paper_compat`, characters, as the released code draws them.
    """
    parts = list(text) if paper_compat else [s for s in map(str.strip, _ENDS.split(text)) if s]
    rng = np.random.default_rng(zlib.crc32(text.encode("utf-8", "surrogatepass")))
    return [parts[i] for i in sorted(rng.permutation(len(parts))[:SENTENCES])]


_ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|[\r\n]+")


def of_sentences(held: Mapping[Key, Responses], read: Read, paper_compat: bool) -> dict[Key, Varied]:
    """NLI diversity (after Stasaski & Hearst 2022; Kirk et al. 2024): 1 - mean over pairs of texts of their likeness.

    The likeness of two texts is the mean over pairs of sentences, both ways round, of 1 for entailment, 0 for neutral
    and -1 for contradiction, by the model's likeliest label; the first sentence drawn of one text meets the first of
    the other, and so on until one has no more. Without a pair of sentences it is 0. In [0, 2]: 0 all alike, 1 all
    unrelated, 2 all contradictory; 0 for one text. Across inputs, where all pairs would be too many, each prompt meets
    the few that follow it in a fixed order.

    With `paper_compat`, re-derived from a description of the released code and not checked against its output:
    1 - s / 5, s the mean over pairs of characters (not sentences) of both ways' contradictions minus entailments, so
    that the sign is turned and a mean is divided by the number drawn once more. In [.6, 1.4]; more is less varied.
    """
    drawn: dict[str, list[str]] = {}
    matched: dict[Pair, list[Pair]] = {}
    met: dict[Key, tuple[np.ndarray, np.ndarray]] = {}
    for key, (texts_BN, rank_B) in held.items():
        samples = len(texts_BN[0])
        own_P2 = np.array(list(combinations(range(samples), 2)), np.int64).reshape(-1, 2)
        met[key] = own_P2, _neighbours(rank_B, max(1, MEETINGS // samples))
        for a, b in chain(_own_pairs(texts_BN, own_P2), _across_pairs(texts_BN, met[key][1])):
            for text in (a, b):
                drawn.setdefault(text, sentences(text, paper_compat))
            matched.setdefault((a, b), list(zip(drawn[a], drawn[b], strict=False)))
    asked = list(dict.fromkeys(p for found in matched.values() for a, b in found for p in ((a, b), (b, a))))
    answer = dict(zip(asked, read(asked).tolist(), strict=True))
    likeness = {pair: [(answer[a, b] + answer[b, a]) / 2 for a, b in found] for pair, found in matched.items()}
    worth = {pair: _worth(found, paper_compat) for pair, found in likeness.items()}
    return {key: _nli(r.texts_BN, *met[key], worth, paper_compat) for key, r in held.items()}


def meanings(groups: Sequence[Sequence[str]], read: Read) -> list[list[int]]:
    """The sizes of each group's clusters of texts with one meaning (Kuhn et al. 2023, semantic entropy).

    A text joins the first cluster whose first text entails it and is entailed by it, else it starts one. Texts are
    taken in alphabetical order, so that the order of the samples does not matter; equal texts mean the same. Kuhn et
    al. put the question before each answer; here the answers are read alone.
    """
    counts = [Counter(group) for group in groups]
    left = [sorted(count) for count in counts]
    sizes: list[list[int]] = [[] for _ in groups]
    while any(left):
        asked = [(texts[0], text) for texts in left for text in texts[1:]]
        answer_P = np.asarray(read(asked + [(b, a) for a, b in asked])) == 1
        joins = iter((answer_P[: len(asked)] & answer_P[len(asked) :]).tolist())
        for g, texts in enumerate(left):
            joined = dict(zip(texts[1:], joins)) if texts else {}  # noqa: B905, joins holds all groups'
            if texts:
                sizes[g].append(sum(counts[g][t] for t in texts if joined.get(t, True)))
                left[g] = [t for t, yes in joined.items() if not yes]
    return sizes


def of_clusters(sizes: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Per input only: `clusters`, how many meanings N responses have, from 1 to N; `semantic_entropy`, of their shares.

    The entropy is -sum p log p over clusters, p the share of responses in one, in nats: from 0 to log N (Kuhn et al.
    2023, with counts for probabilities as in Farquhar et al. 2024). Neither has a use across inputs: responses to
    different prompts do not entail each other.
    """
    shares = [np.array(s) / sum(s) for s in sizes]
    entropy = [abs(float((p * np.log(p)).sum())) for p in shares]
    return {"clusters": np.array([len(s) for s in sizes], np.float64), "semantic_entropy": np.array(entropy)}


def likeness_of(labels: Sequence[str], where: str) -> np.ndarray:
    """What each label of an NLI model is worth: entailment 1, neutral 0, contradiction -1."""
    worth = {"entailment": 1, "neutral": 0, "contradiction": -1}
    named = [label.lower() for label in labels]
    if sorted(named) != sorted(worth):
        raise UserError(f"{where}: its labels are {', '.join(labels)}; an NLI model's are {', '.join(worth)}")
    return np.array([worth[name] for name in named])


def _nli(
    texts_BN: Sequence[Sequence[str]],
    own_P2: np.ndarray,
    across_P2: np.ndarray,
    worth: Mapping[Pair, tuple[float, int]],
    paper_compat: bool,
) -> Varied:
    """NLI diversity from what each pair of texts brings into the mean: a sum, and how much it counts."""

    def diversity(summed: np.ndarray) -> np.ndarray:
        mean = summed[..., 0] / np.maximum(summed[..., 1], 1)
        # The released similarity has the sign of contradiction, adds both ways, and is divided once too often.
        return 1 + 2 * mean / SENTENCES if paper_compat else np.where(summed[..., 1] > 0, 1 - mean, 0.0)

    prompts, samples = len(texts_BN), len(texts_BN[0])
    met_PN2 = np.array([worth[p] for p in _across_pairs(texts_BN, across_P2)]).reshape(-1, samples, 2)
    with_BN2 = np.zeros((prompts, samples, 2))
    for end in across_P2.T:
        np.add.at(with_BN2, end, met_PN2)
    whole_N = diversity(met_PN2.sum(0))
    left_BN2 = met_PN2.sum(0) - with_BN2
    without_BN = np.where(left_BN2[..., 1] > 0, diversity(left_BN2), whole_N)
    own = {}
    if samples > 1:
        own_BP2 = np.array([worth[p] for p in _own_pairs(texts_BN, own_P2)]).reshape(prompts, -1, 2)
        own = {"nli": diversity(own_BP2.sum(1))}
    return Varied(own, {"nli": (float(whole_N.mean()), without_BN.mean(1))})


def _worth(likeness: Sequence[float], paper_compat: bool) -> tuple[float, int]:
    total = float(sum(likeness))
    return (total, len(likeness)) if paper_compat else (total / max(len(likeness), 1), 1)


def _own_pairs(texts_BN: Sequence[Sequence[str]], own_P2: np.ndarray) -> Iterator[Pair]:
    pairs: list[tuple[int, int]] = own_P2.tolist()
    return ((row[i], row[j]) for row in texts_BN for i, j in pairs)


def _across_pairs(texts_BN: Sequence[Sequence[str]], across_P2: np.ndarray) -> Iterator[Pair]:
    pairs: list[tuple[int, int]] = across_P2.tolist()
    return (pair for i, j in pairs for pair in zip(texts_BN[i], texts_BN[j], strict=True))


def _neighbours(rank_B: np.ndarray, reach: int) -> np.ndarray:
    """Pairs of prompts [P, 2]: each with those that follow it within `reach` in a circle, none twice."""
    order, n = np.argsort(rank_B), len(rank_B)
    found = {tuple(sorted((i, (i + k) % n))) for i in range(n) for k in range(1, reach + 1)}
    return order[np.array(sorted((i, j) for i, j in found if i < j), np.int64).reshape(-1, 2)]


def _cosines(unit_ND: np.ndarray) -> float:
    return float(((unit_ND.sum(0) ** 2).sum() - (unit_ND**2).sum()) / 2)


def _cosine_across(unit_BND: np.ndarray) -> tuple[float, np.ndarray]:
    """`sbert` over one response to each prompt, and without each prompt; exact, as cosines only add."""
    prompts, samples = unit_BND.shape[:2]
    sum_ND = unit_BND.sum(0)
    total_N = np.array([_cosines(unit_BND[:, j]) for j in range(samples)])
    whole = float(np.mean([sbert(unit_BND[:, j]) for j in range(samples)]))
    if prompts < 3:
        return whole, np.full(prompts, whole)
    with_others_BN = np.einsum("bnd,bnd->bn", unit_BND, sum_ND - unit_BND)
    pairs = (prompts - 1) * (prompts - 2) / 2
    return whole, (1 - (total_N - with_others_BN) / pairs).mean(1)


def _unit(array_UD: np.ndarray) -> np.ndarray:
    array_UD = array_UD.astype(np.float64)
    return array_UD / np.maximum(np.linalg.norm(array_UD, axis=-1, keepdims=True), 1e-12)


def _embedder(directory: str) -> Callable[[Sequence[str]], np.ndarray]:
    from jaxrlhf.evaluation import encoder_weights, encoders

    encoder = encoder_weights.load_sentence_encoder(Path(directory))
    return partial(encoders.embed, encoder)


def _reader(directory: str) -> Read:
    from jaxrlhf.evaluation import encoder_weights, encoders

    classifier = encoder_weights.load_classifier(Path(directory))
    worth = likeness_of(classifier.labels, f"{directory}/config.json")

    def read(pairs: Sequence[Pair]) -> np.ndarray:
        if not pairs:
            return np.zeros(0, np.int64)
        return worth[encoders.classify(classifier, pairs).argmax(-1)]

    return read
