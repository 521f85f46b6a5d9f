"""Text as tokens: frequent words are one token each, all others are spelled. Python brings the text, or a file does."""

from __future__ import annotations

import collections
import dataclasses
import pydoc_data.topics
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_WORDS = re.compile(r" ?\w+|\s+|[^\w\s]")  # their concatenation is the text
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for characters that the training text does not have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A text in two parts: int32[tokens] each, with the words or characters that the tokens stand for."""

    name: str
    tokens: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.tokens[token] for token in tokens)


def load_topics(vocabulary: int) -> Text:
    """The language reference in `pydoc_data.topics`; a tenth of its paragraphs are for testing.

    Some topics repeat parts of others: of each paragraph only the first is kept, so that none is in both parts.
    """
    topics = pydoc_data.topics.topics
    paragraphs = dict.fromkeys(part for name in sorted(topics) for part in topics[name].split("\n\n"))
    blocks = ["\n\n".join(list(paragraphs)[i : i + 8]) for i in range(0, len(paragraphs), 8)]
    test = "\n\n".join(blocks[9::10])
    train = "\n\n".join(block for i, block in enumerate(blocks) if i % 10 != 9)
    return encode("Python's language reference", train, test, vocabulary)


def load_file(path: Path, vocabulary: int) -> Text:
    """A text file in UTF-8; its last tenth is for testing.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no text, or a short one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"a text must be in UTF-8, but {path} is not: {error}.") from error
    if len(text) < 1000:
        raise ValueError(f"a text must have 1,000 characters or more, but {path} has {len(text)}.")
    cut = len(text) * 9 // 10
    return encode(path.name, text[:cut], text[cut:], vocabulary)


def encode(name: str, train: str, test: str, vocabulary: int) -> Text:
    """Tokens of both parts; the training part decides what is frequent."""
    words = _WORDS.findall(train)
    characters = [UNKNOWN, *sorted(set(train))]
    if vocabulary <= len(characters):
        raise ValueError(
            f"the vocabulary must have room for the {len(characters)} characters of the text, but got {vocabulary}."
        )
    counts = collections.Counter(word for word in words if len(word) > 1)
    frequent = [word for word, _ in counts.most_common(vocabulary - len(characters))]
    tokens = (*characters, *frequent)
    number = {token: i for i, token in enumerate(tokens)}

    def numbers(text: str) -> np.ndarray:
        spelled = ((word,) if word in number else word for word in _WORDS.findall(text))
        return np.array([number.get(token, 0) for word in spelled for token in word], np.int32)

    return Text(name=name, tokens=tokens, train=numbers(train), test=numbers(test))


def rows(tokens: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A text cut into rows, and for each token the one that follows: int32[num_rows, length] both."""
    length = (len(tokens) - 1) // num_rows
    size = num_rows * length
    return tokens[:size].reshape(num_rows, length), tokens[1 : size + 1].reshape(num_rows, length)
