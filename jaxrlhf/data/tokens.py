"""Tokenizers: words for the embedded world, byte-level BPE for real text, and those of imported models."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxrlhf.files import UserError, read_json, read_text, write_json, write_text

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
OWN_PAD = "<|pad|>"
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")  # one of them makes a tokenizer
# Some templates name the day. One day for all runs: what a run writes must not depend on the clock.
DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class Chat:
    """What a chat template puts around a message; special tokens are special in it, and nowhere else."""

    before: str
    after: str
    engine: Engine  # that reads special tokens' names as special tokens


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; `decode(encode(text)) == text` for text that the vocabulary covers."""

    engine: Engine
    pad_id: int = 0
    eos_id: int = 1
    bos: tuple[int, ...] = ()  # what it puts before a text: before prompts, never before responses
    theirs: Any = None  # transformers' tokenizer, where it is an imported one
    chat: Chat | None = None  # where prompts are chats

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.engine.get_vocab().values()) + 1

    @property
    def hash(self) -> str:
        """Equal tokenizers, equal hashes."""
        around = (self.chat.before, self.chat.after) if self.chat else ()
        told = repr((self.engine.to_str(), self.pad_id, self.eos_id, self.bos, around))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end-of-text token; special tokens' names in the text are plain text."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on all cores."""
        whole = [_without_surrogates(text) for text in texts]
        return [found.ids for found in self.engine.encode_batch_fast(whole, add_special_tokens=False)]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt: of a text after the tokenizer's bos, of a chat with its template's special tokens."""
        if self.chat is None:
            return [[*self.bos, *ids] for ids in self.encode_many(texts)]
        engine, special = self.chat.engine, _special(self.chat.engine)
        around = [i for part in (self.chat.before, self.chat.after) for i in _read(engine, part).ids]
        wanted = sum(i in special for i in around)
        found = [e.ids for e in engine.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [
            ids if sum(i in special for i in ids) == wanted else _safe_chat(self, self.chat, text)
            for ids, text in zip(found, texts, strict=True)
        ]

    def encode_joined(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """The ids of prompt and response as one text. Where a token spans both, they are not those of each apart."""
        texts = [p + r for p, r in zip(prompts, responses, strict=True)]
        if self.chat is None:
            return [[*self.bos, *ids] for ids in self.encode_many(texts)]
        return [found.ids for found in self.chat.engine.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; padding and end-of-text are dropped."""
        return self.engine.decode([i for i in ids if i not in (self.pad_id, self.eos_id)], skip_special_tokens=False)

    def decode_response(self, ids: Sequence[int]) -> str:
        """The same of ids that follow a prompt: with the space that some imported tokenizers strip from a text."""
        if self.theirs is None:
            return self.decode(ids)
        before = self.encode("a")
        return self.decode([*before, *ids])[len(self.decode(before)) :]

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


def pretrained(directory: Path) -> Tokenizer:
    """The fast tokenizer of a Hugging Face directory; no code of its is run, and nothing is fetched.

    Where it has no padding token, end-of-text pads: masks say what is padding, ids never do.

    Raises:
      UserError: there is none that transformers loads as a fast one, or it has no end-of-text token.
    """
    if not any((directory / name).exists() for name in FILES):  # transformers would make an empty one up
        raise UserError(f"{directory}: no tokenizer in it; expected tokenizer.json")
    _check_sentencepiece(directory)
    from transformers import AutoTokenizer  # seconds to import, and needed here only

    try:
        # Said outright that no code of theirs may run: else transformers would ask at the terminal.
        options = {"use_fast": True, "local_files_only": True, "trust_remote_code": False}
        theirs: Any = AutoTokenizer.from_pretrained(directory, **options)
        engine = Engine.from_str(theirs.backend_tokenizer.to_str())
    except Exception as error:  # whatever transformers or the Rust library raises, the files are the user's
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}: its tokenizer does not load as a fast one ({reason})") from None
    if theirs.eos_token_id is None:
        raise UserError(f"{directory}/tokenizer_config.json: no eos_token; responses could not end")
    engine.no_truncation()
    engine.no_padding()
    plain, full = (theirs("a", add_special_tokens=s)["input_ids"] for s in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    eos_id = theirs.eos_token_id
    pad_id = eos_id if theirs.pad_token_id is None else theirs.pad_token_id
    return replace(_plain(engine), pad_id=pad_id, eos_id=eos_id, bos=tuple(full[:start]), theirs=theirs)


def _check_sentencepiece(directory: Path) -> None:
    """Without the package, transformers takes a SentencePiece file for one of tiktoken's, and asks for that package."""
    if (directory / "tokenizer.json").exists() or importlib.util.find_spec("sentencepiece"):
        return
    for path in (directory / "tokenizer.model", directory / "spiece.model"):
        if path.exists() and path.read_bytes()[:1] == b"\n":  # how its first field begins; tiktoken's files are base64
            raise UserError(f"{path}: a SentencePiece tokenizer; pip install sentencepiece, which converts it")


def save_files(tokenizer: Tokenizer, folder: Path, padding_side: str = "", pad: bool = False) -> Tokenizer:
    """Writes the files from which transformers' AutoTokenizer loads it; returns it as it is then.

    Args:
      tokenizer: any.
      folder: that exists.
      padding_side: left | right, what it says of padding; "" leaves it as it is.
      pad: whether it must have a padding token of its own, which a reward model's reader tells texts' ends by. One
        that it gets has the first id that is free.
    """
    if tokenizer.theirs is None:
        _save_own(tokenizer, folder, padding_side or "left")
        return tokenizer
    theirs = copy.deepcopy(tokenizer.theirs)
    theirs.padding_side = padding_side or theirs.padding_side
    if pad and tokenizer.pad_id == tokenizer.eos_id:
        theirs.add_special_tokens({"pad_token": OWN_PAD})
    theirs.save_pretrained(folder)
    named = {k: str(v) for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
    write_json(folder / "special_tokens_map.json", named)
    path = folder / "tokenizer_config.json"
    # Where it was read from is nobody's business.
    private = ("name_or_path", "is_local", "local_files_only")
    write_json(path, {k: v for k, v in read_json(path).items() if k not in private})
    return pretrained(folder)


def _save_own(tokenizer: Tokenizer, folder: Path, padding_side: str) -> None:
    tokenizer.save(folder / "tokenizer.json")
    kinds = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    named = {kind: tokenizer.engine.id_to_token(i) for kind, i in kinds.items()}
    write_json(folder / "special_tokens_map.json", named)
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    options |= {"padding_side": padding_side}
    # As here, text that spells a special token is text.
    write_json(folder / "tokenizer_config.json", named | options | {"split_special_tokens": True})


def with_chat(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer for prompts that its own chat template makes; `UserError` where it has none that works."""
    before, after = _around(tokenizer)
    return replace(tokenizer, chat=Chat(before, after, Engine.from_str(tokenizer.engine.to_str())))


def render_chat(tokenizer: Tokenizer, message: str) -> str:
    """A user's message as the tokenizer's chat template puts it, up to where the answer begins."""
    theirs = tokenizer.theirs
    if theirs is None or not theirs.chat_template:
        raise UserError("config.files.prompt='chat': the tokenizer has no chat template; name another prompt format")
    chat = [{"role": "user", "content": message}]
    try:
        template = DATE + theirs.get_chat_template()
        return theirs.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is the user's, and can raise anything
        raise UserError(f"config.files.prompt='chat': the chat template fails ({error})") from None


def _around(tokenizer: Tokenizer) -> tuple[str, str]:
    probe = "Qx7probe"
    parts = render_chat(tokenizer, probe).split(probe)
    if len(parts) != 2:
        raise UserError(
            f"config.files.prompt='chat': the chat template shows a message {len(parts) - 1} times, not once"
        )
    return parts[0], parts[1]


def _read(engine: Engine, text: str) -> Any:
    return engine.encode(text, add_special_tokens=False)


def _without_surrogates(text: str) -> str:
    """Half a character, which JSON can spell and UTF-8 cannot, as U+FFFD, the character for such."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _special(engine: Engine) -> set[int]:
    return {i for i, token in engine.get_added_tokens_decoder().items() if token.special}


def _safe_chat(tokenizer: Tokenizer, chat: Chat, text: str) -> list[int]:
    """The ids of a chat whose message spells special tokens: those of the template are special, the rest is text."""
    if not (text.startswith(chat.before) and text.endswith(chat.after)):
        raise UserError("config.files.prompt='chat': a prompt that this tokenizer's chat template did not make")
    special, before, after = _special(chat.engine), _read(chat.engine, chat.before), _read(chat.engine, chat.after)
    start = max((o[1] for i, o in zip(before.ids, before.offsets, strict=True) if i in special), default=0)
    rest = min((o[0] for i, o in zip(after.ids, after.offsets, strict=True) if i in special), default=len(chat.after))
    end = len(text) - len(chat.after) + rest
    return [
        *_read(chat.engine, text[:start]).ids,
        *tokenizer.encode(text[start:end]),
        *_read(chat.engine, text[end:]).ids,
    ]


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
