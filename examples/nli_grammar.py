"""A small language of quantifiers, negation and kinds of things, whose sentences entail or contradict each other.

A sentence is a quantifier, a noun phrase and a verb phrase, without the inflections of English: "not every big poodle
not walk quickly". Nouns and verbs are trees of kinds: every poodle is a dog,
and whatever walks moves. Two verbs neither of which is a kind of the other exclude each other. A sentence about poodles
supposes that there are some. What follows is decided by monotonicity: "all a b" stays true for fewer a and for more b,
"some a b" for more of both.

References:
  S. Bowman, C. Potts, C. Manning. Recursive Neural Networks Can Learn Logical Semantics. 2015. arXiv 1406.1827.
  B. MacCartney, C. Manning. An extended model of natural logic. 2009.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

LABELS = ("entailment", "neutral", "contradiction")
ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)

# Each kind with the kind above it.
NOUNS = {
    "animal": None,
    "mammal": "animal", "bird": "animal", "fish": "animal",
    "dog": "mammal", "cat": "mammal", "horse": "mammal",
    "poodle": "dog", "terrier": "dog", "beagle": "dog",
    "siamese": "cat", "persian": "cat",
    "pony": "horse",
    "owl": "bird", "duck": "bird", "finch": "bird",
    "trout": "fish", "salmon": "fish",
}  # fmt: skip
VERBS = {
    "act": None,
    "move": "act", "rest": "act", "speak": "act",
    "walk": "move", "run": "move", "swim": "move",
    "sprint": "run", "stroll": "walk",
    "sleep": "rest", "sit": "rest",
    "bark": "speak", "sing": "speak",
}  # fmt: skip
ADJECTIVES = ("big", "old", "brown")
ADVERBS = ("quickly", "often")

# Is it about all, and is its verb phrase negated? "no a b" is "all a not b", "not every a b" is "some a not b".
QUANTIFIERS = {
    "all": (True, False), "every": (True, False),
    "some": (False, False), "a": (False, False),
    "no": (True, True),
    "not every": (False, True), "not all": (False, True),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One sentence; an empty adjective or adverb is none."""

    quantifier: str
    adjective: str
    noun: str
    negated: bool
    verb: str
    adverb: str

    @property
    def words(self) -> tuple[str, ...]:
        parts = (self.quantifier, self.adjective, self.noun, "not" * self.negated, self.verb, self.adverb)
        return tuple(" ".join(parts).split())

    @property
    def about_all(self) -> bool:
        """Whether it says something of all things, and not of some."""
        return QUANTIFIERS[self.quantifier][0]

    @property
    def denies(self) -> bool:
        """Whether what it says of them is that they do not."""
        return QUANTIFIERS[self.quantifier][1] != self.negated


def is_kind_of(kind: str, of: str, kinds: dict[str, str | None]) -> bool:
    """Whether everything that is `kind` is `of`."""
    while kind != of:
        above = kinds[kind]
        if above is None:
            return False
        kind = above
    return True


def is_among(p: Sentence, q: Sentence) -> bool:
    """Whether all things that `p` is about are among those that `q` is about."""
    return q.adjective in ("", p.adjective) and is_kind_of(p.noun, q.noun, NOUNS)


def does_imply(p: Sentence, q: Sentence) -> bool:
    """Whether whatever does what the verb of `p` says does what that of `q` says, negations aside."""
    return q.adverb in ("", p.adverb) and is_kind_of(p.verb, q.verb, VERBS)


def do_exclude(p: Sentence, q: Sentence) -> bool:
    """Whether nothing does both, negations aside."""
    return not is_kind_of(p.verb, q.verb, VERBS) and not is_kind_of(q.verb, p.verb, VERBS)


def says_more(p: Sentence, q: Sentence, *, q_denies: bool) -> bool:
    """Whether the predicate of `p`, with its negation, implies that of `q`, denied or not."""
    if p.denies:
        return q_denies and does_imply(q, p)
    return do_exclude(p, q) if q_denies else does_imply(p, q)


def follows(p: Sentence, q: Sentence, *, q_is_about_all: bool, q_denies: bool) -> bool:
    """Whether "all" or "some" of what `q` is about do, or do not, what it says, given `p`."""
    if not says_more(p, q, q_denies=q_denies):
        return False
    if p.about_all and q_is_about_all:
        return is_among(q, p)
    if p.about_all:  # something is among both, since neither is about nothing
        return is_among(q, p) or is_among(p, q)
    return not q_is_about_all and is_among(p, q)


def label(premise: Sentence, hypothesis: Sentence) -> int:
    """What the premise says of the hypothesis: 0 entailment, 1 neutral, 2 contradiction."""
    about_all, denies = hypothesis.about_all, hypothesis.denies
    if follows(premise, hypothesis, q_is_about_all=about_all, q_denies=denies):
        return ENTAILMENT
    # The opposite of "all do" is "some do not".
    if follows(premise, hypothesis, q_is_about_all=not about_all, q_denies=not denies):
        return CONTRADICTION
    return NEUTRAL


@functools.cache
def relatives(kind: str) -> tuple[str, ...]:
    """Nouns or verbs above and below one, and itself."""
    kinds = NOUNS if kind in NOUNS else VERBS
    return tuple(other for other in kinds if is_kind_of(kind, other, kinds) or is_kind_of(other, kind, kinds))


def random_sentence(rng: random.Random) -> Sentence:
    return Sentence(
        quantifier=rng.choice(tuple(QUANTIFIERS)),
        adjective=rng.choice(("", "", *ADJECTIVES)),
        noun=rng.choice(tuple(NOUNS)),
        negated=rng.random() < 0.3,
        verb=rng.choice(tuple(VERBS)),
        adverb=rng.choice(("", "", *ADVERBS)),
    )


def random_hypothesis(premise: Sentence, rng: random.Random) -> Sentence:
    """A sentence whose parts are those of the premise, or near to them, or now and then any."""
    other = random_sentence(rng)
    return Sentence(
        quantifier=rng.choice((premise.quantifier, other.quantifier)),
        adjective=rng.choice((premise.adjective, premise.adjective, "", other.adjective)),
        noun=rng.choice((premise.noun, other.noun, *2 * (rng.choice(relatives(premise.noun)),))),
        negated=other.negated,
        verb=rng.choice((premise.verb, other.verb, *2 * (rng.choice(relatives(premise.verb)),))),
        adverb=rng.choice((premise.adverb, premise.adverb, "", other.adverb)),
    )


def held_out(premise: Sentence, hypothesis: Sentence) -> bool:
    """Whether a pair is for testing: a sixth of the combinations of noun and verb is in no sentence of training."""
    nouns, verbs = list(NOUNS), list(VERBS)
    return any((nouns.index(s.noun) + 5 * verbs.index(s.verb)) % 6 == 0 for s in (premise, hypothesis))


def pairs(count: int, *, test: bool, seed: int) -> list[tuple[Sentence, Sentence, int]]:
    """Different pairs with their labels, as many of each label: those that are `held_out`, or of all others."""
    rng = random.Random(2 * seed + test)
    found: dict[tuple[Sentence, Sentence], int] = {}
    wanted = itertools.cycle(range(len(LABELS)))
    while len(found) < count:
        want = next(wanted)
        while True:
            premise = random_sentence(rng)
            pair = premise, random_hypothesis(premise, rng)
            if label(*pair) == want and held_out(*pair) == test and pair not in found:
                found[pair] = want
                break
    return [(*pair, want) for pair, want in found.items()]
