"""Pairs of sentences as arrays of words: made by the grammar of `nli_grammar`, or read from the files of SNLI."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import nli_grammar
import numpy as np

LABELS = nli_grammar.LABELS
PADDING, UNKNOWN = 0, 1  # words that fill sentences up, and that training did not have
_MAX_WORDS = 32  # of a sentence of SNLI; the rest is cut off
_WORDS = re.compile(r"\w+|[^\w\s]")

Pair = tuple[Sequence[str], Sequence[str], int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Sentences as int32[pairs, 2, length] (premise and hypothesis), labels as int32[pairs]."""

    name: str
    words: tuple[str, ...]
    train_sentences: np.ndarray
    train_labels: np.ndarray
    test_sentences: np.ndarray
    test_labels: np.ndarray


def load_grammar(num_train: int, num_test: int, seed: int) -> Data:
    """Pairs of the grammar; test sentences combine nouns with verbs as no training sentence does."""
    parts = [
        [(premise.words, hypothesis.words, label) for premise, hypothesis, label in pairs]
        for pairs in (
            nli_grammar.pairs(num_train, test=False, seed=seed),
            nli_grammar.pairs(num_test, test=True, seed=seed),
        )
    ]
    return _data("pairs of a small grammar", *parts)


def load_snli(directory: Path) -> Data:
    """`snli_1.0_train.jsonl` and `snli_1.0_test.jsonl` in a directory; pairs without a gold label are left out.

    Raises:
      OSError: a file cannot be read.
      ValueError: a file is not what its name says.
    """
    return _data("SNLI", *(_read(directory / f"snli_1.0_{part}.jsonl") for part in ("train", "test")))


def _read(path: Path) -> list[Pair]:
    pairs = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line.decode("utf-8"))
            label, *sentences = (entry[key] for key in ("gold_label", "sentence1", "sentence2"))
            if label in LABELS:
                pairs.append((*(_WORDS.findall(text.lower()) for text in sentences), LABELS.index(label)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"every line of {path} must be a JSON object in UTF-8 with gold_label, sentence1 and sentence2, but "
                f"line {number} gave {type(error).__name__}: {error}. Download it again."
            ) from error
    if not pairs:
        raise ValueError(f"{path} must hold labelled pairs, but has none. Download it again.")
    return pairs


def _data(name: str, train: Iterable[Pair], test: Iterable[Pair]) -> Data:
    """Numbers for words; those of the training pairs are known."""
    train, test = list(train), list(test)
    words = ("", "?", *sorted({word for *sentences, _ in train for sentence in sentences for word in sentence}))
    number = {word: i for i, word in enumerate(words)}
    longest = max(len(sentence) for *sentences, _ in (*train, *test) for sentence in sentences)
    length = min(max(longest, 1), _MAX_WORDS)  # sentences without a word are padding

    def arrays(pairs):
        sentences = np.full((len(pairs), 2, length), PADDING, np.int32)
        for i, (*pair, _) in enumerate(pairs):
            for j, sentence in enumerate(pair):
                numbers = [number.get(word, UNKNOWN) for word in sentence[:length]]
                sentences[i, j, : len(numbers)] = numbers
        return sentences, np.array([label for *_, label in pairs], np.int32)

    (train_sentences, train_labels), (test_sentences, test_labels) = arrays(train), arrays(test)
    return Data(
        name=name,
        words=words,
        train_sentences=train_sentences,
        train_labels=train_labels,
        test_sentences=test_sentences,
        test_labels=test_labels,
    )
