"""Labels of the natural language inference example, against every small world that its words allow."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def grammar(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("nli_grammar")


def kinds_above(kind, kinds):
    """A kind and all that it is: the tree read without the example's own functions."""
    while kind is not None:
        yield kind
        kind = kinds[kind]


def test_labels_are_those_of_all_models(grammar):
    """Entailment, contradiction and neutrality by looking at each world of one or two things.

    Two suffice. A sentence about all stays true where things are taken away, so a world in which the premise holds and
    the hypothesis does not can be cut down to one witness for what is said or supposed of each of the two sentences.
    """
    nouns, verbs = ("animal", "mammal", "dog", "cat"), ("act", "move", "walk", "rest")
    adjectives, adverbs = ("big", "old"), ("quickly",)
    acts = [None, *((verb, how) for verb in verbs for how in ("", *adverbs))]
    looks = [
        {a for a, has in zip(adjectives, mask, strict=True) if has} for mask in itertools.product((0, 1), repeat=2)
    ]
    things = list(itertools.product(nouns, looks, acts))
    sentences = [
        grammar.Sentence(*parts)
        for parts in itertools.product(
            grammar.QUANTIFIERS, ("", *adjectives), nouns, (False, True), verbs, ("", *adverbs)
        )
    ]

    def is_meant(sentence, thing):
        noun, look, _ = thing
        return sentence.noun in kinds_above(noun, grammar.NOUNS) and sentence.adjective in {"", *look}

    def does(sentence, thing):
        act = thing[2]
        done = (
            act is not None and sentence.verb in kinds_above(act[0], grammar.VERBS) and sentence.adverb in ("", act[1])
        )
        return done != sentence.negated

    meant = np.array([[is_meant(s, thing) for thing in things] for s in sentences])
    doing = meant & np.array([[does(s, thing) for thing in things] for s in sentences])
    first, second = np.array(list(itertools.combinations_with_replacement(range(len(things)), 2))).T
    num_meant = meant[:, first].astype(np.int8) + (meant[:, second] & (first != second))
    num_doing = doing[:, first].astype(np.int8) + (doing[:, second] & (first != second))
    says = {
        "all": num_doing == num_meant, "every": num_doing == num_meant, "some": num_doing > 0, "a": num_doing > 0,
        "no": num_doing == 0, "not all": num_doing < num_meant, "not every": num_doing < num_meant,
    }  # fmt: skip
    true = np.array([says[s.quantifier][i] for i, s in enumerate(sentences)])
    exist = (num_meant > 0).astype(np.float32)
    holds, fails = exist * true, exist * ~true
    never_fails, never_holds = holds @ fails.T == 0, holds @ holds.T == 0
    assert (holds @ exist.T > 0).all()  # no premise is absurd
    expected = np.where(never_fails, grammar.ENTAILMENT, np.where(never_holds, grammar.CONTRADICTION, grammar.NEUTRAL))

    rows = np.random.default_rng(0).permutation(len(sentences))[:200]  # each of them as premise of all
    labels = np.array([[grammar.label(sentences[i], hypothesis) for hypothesis in sentences] for i in rows])
    np.testing.assert_array_equal(labels, expected[rows])
    assert np.bincount(expected.ravel()).min() > 10_000


def test_pairs(grammar):
    train, test = (grammar.pairs(600, test=part, seed=0) for part in (False, True))
    assert train == grammar.pairs(600, test=False, seed=0)
    assert train != grammar.pairs(600, test=False, seed=1)
    for part in (train, test):
        assert len({pair[:2] for pair in part}) == 600
        assert np.bincount([label for _, _, label in part]).tolist() == [200, 200, 200]
    seen = {(s.noun, s.verb) for pair in train for s in pair[:2]}
    assert all(any((s.noun, s.verb) not in seen for s in pair[:2]) for pair in test)
    words = {word for pair in train for s in pair[:2] for word in s.words}
    assert words >= {word for pair in test for s in pair[:2] for word in s.words}
