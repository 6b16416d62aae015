"""Tokenizers: words for the embedded world, byte-level BPE for real text; both one `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxrlhf.files import UserError, read_text, write_text

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; `decode(encode(text)) == text` for text that the vocabulary covers."""

    engine: Engine
    pad_id: int = 0
    eos_id: int = 1

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.engine.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end-of-text token; special tokens' names in the text are plain text."""
        return self.engine.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on all cores."""
        return [found.ids for found in self.engine.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; padding and end-of-text are dropped."""
        return self.engine.decode([i for i in ids if i not in (self.pad_id, self.eos_id)], skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Writes `tokenizer.json`."""
        write_text(path, self.engine.to_str(pretty=True))


def load(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json` that `save` wrote; `UserError` if it is missing or does not parse."""
    text = read_text(path)
    try:
        return _plain(Engine.from_str(text))
    except Exception as error:  # the Rust library raises no narrower kind
        raise UserError(f"{path}: not a tokenizer.json ({error})") from None


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Whole words. A word carries the space before it; those that end in ":" begin a line and carry none."""
    pieces = [w if len(w) > 1 and w.endswith(":") else f"▁{w}" for w in words]
    # No piece of text ends in ▁, so that no text can spell a special token.
    vocabulary = {piece: i for i, piece in enumerate([f"{PAD}▁", f"{EOS}▁", UNKNOWN, "\n", *pieces])}
    engine = Engine(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), spaces])
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return _plain(engine)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE learnt from texts: every script goes in and comes out as it was."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return _plain(engine)


def _plain(engine: Engine) -> Tokenizer:
    """Text that spells a special token is text: nobody's answer may end itself or others."""
    engine.encode_special_tokens = True
    return Tokenizer(engine)
