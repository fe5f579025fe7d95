"""Text to token ids and back: byte-level byte-pair encoding, as GPT-2 introduced it.

Text is cut into words, each word's UTF-8 bytes are written as 256 printable characters, and pairs
of neighbours are joined in the order in which training found them worth joining. Vocabulary and
merges come from the model's own file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from .gguf import GGUFError, GGUFFile

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
CONTROL = 3
"""Type of the tokens that no text stands for."""

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: `"system"`, `"user"` or `"assistant"`.
        content: Its text.
        tokens: The ids that the model answered with, for an assistant's turn. Text alone would not
            do: a model may spell a word otherwise than the encoder does, and then the chain of
            blocks breaks at that word.
    """

    role: str
    content: str = ""
    tokens: tuple[int, ...] | None = None


def _byte_letters() -> dict[int, str]:
    """Return a printable character for each byte; those that are printable stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(printable)))
    return letters


BYTE_LETTERS: Mapping[int, str] = _byte_letters()
LETTER_BYTES: Mapping[str, int] = {letter: byte for byte, letter in BYTE_LETTERS.items()}

# Python's `re` has no \p{L}, so the text is first written as a string of classes: L letter,
# N number, S the space, W other white space, O other.
_WORD = re.compile("S?L+|N|S?O+|[SW]+(?![LO])|[SW]+")


@lru_cache(maxsize=4096)
def _class_of(character: str) -> str:
    if character == " ":
        return "S"
    if character.isspace() and character not in "\x1c\x1d\x1e\x1f":
        return "W"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def split_words(text: str) -> Iterator[str]:
    """Cut text as the model's makers did: each digit alone, a space goes with the word after it."""
    classes = "".join(map(_class_of, text))
    at = 0
    while at < len(text):
        if text[at] == "'" and (found := [c for c in CONTRACTIONS if text.startswith(c, at)]):
            end = at + len(found[0])
        else:
            match = _WORD.match(classes, at)
            assert match is not None, "the classes are all in the pattern"
            end = match.end()
        yield text[at:end]
        at = end


class Tokenizer:
    """Encodes and decodes with one model's vocabulary.

    Raises:
        GGUFError: The file has no vocabulary of this kind.
    """

    def __init__(self, file: GGUFFile) -> None:
        if file.values.get("tokenizer.ggml.model") != "gpt2":
            raise GGUFError("the file's tokenizer is not byte-level BPE")
        self._tokens = file.strings("tokenizer.ggml.tokens")
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        kinds = file.integers("tokenizer.ggml.token_type")
        self._control = {index for index, kind in enumerate(kinds) if kind == CONTROL}
        merges = (merge.partition(" ") for merge in file.strings("tokenizer.ggml.merges"))
        self._ranks = {(left, right): rank for rank, (left, _, right) in enumerate(merges)}
        if missing := {left + right for left, right in self._ranks} - self._ids.keys():
            raise GGUFError(f"the vocabulary lacks {len(missing)} of the tokens that it merges to")
        self.end_of_turn = self._control_id("<|im_end|>")
        self._start_of_turn = self._control_id("<|im_start|>")
        self._words: dict[str, tuple[int, ...]] = {}

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; what looks like a control token in it is mere text."""
        ids: list[int] = []
        for word in split_words(text):
            if (known := self._words.get(word)) is None:
                if len(self._words) > 50_000:  # a bound; what people write repeats soon enough
                    self._words.clear()
                known = self._words[word] = self._encode_word(word)
            ids += known
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of some ids; a character may begin in one and end in the next."""
        letters = (letter for i in ids if i not in self._control for letter in self._tokens[i])
        return bytes(LETTER_BYTES[letter] for letter in letters)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids, control tokens left out."""
        return self.decode_bytes(ids).decode(errors="replace")

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt for the answer to the last message, in the model's chat template."""
        if not messages or messages[0].role != "system":
            messages = [Message("system", DEFAULT_SYSTEM), *messages]
        ids: list[int] = []
        for message in messages:
            ids.append(self._start_of_turn)
            if message.tokens is None:
                ids += self.encode(f"{message.role}\n{message.content}")
            else:
                ids += [*self.encode(f"{message.role}\n"), *message.tokens]
            ids += [self.end_of_turn, *self.encode("\n")]
        return [*ids, self._start_of_turn, *self.encode("assistant\n")]

    # Inside

    def _control_id(self, token: str) -> int:
        if token not in self._ids:
            raise GGUFError(f"the vocabulary has no {token}")
        return self._ids[token]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        parts = [BYTE_LETTERS[byte] for byte in word.encode(errors="surrogatepass")]
        while len(parts) > 1:
            never = len(self._ranks)
            ranks = [self._ranks.get(pair, never) for pair in pairwise(parts)]
            best = min(ranks)
            if best == never:
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        # A few bytes were in no text that the vocabulary was made from, some control characters
        # for instance. They are left out.
        return tuple(self._ids[part] for part in parts if part in self._ids)
