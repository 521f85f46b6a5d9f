"""Which choices of several alternatives cost least for what they achieve: a Pareto front, by dynamic programming."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

MAX_POINTS = 8192  # kept at a time: a budget is used up to within 1 / 8192 of the range of costs for each stage


@dataclasses.dataclass(frozen=True)
class Front:
    """Choices that no other choice beats, by increasing cost and strictly decreasing error.

    Attributes:
      costs: float64[points], sums of the costs chosen.
      errors: float64[points], sums of the errors chosen.
      choices: uint8[points, stages], which alternative each stage takes.
    """

    costs: np.ndarray
    errors: np.ndarray
    choices: np.ndarray

    def last_within(self, budget: float) -> int:
        """The point of least error whose cost is at most `budget`; -1 if every one costs more."""
        return int(np.searchsorted(self.costs, budget, side="right")) - 1


def pareto_front(costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], max_points: int = MAX_POINTS) -> Front:
    """The front of all choices of one alternative per stage, where costs and errors add up.

    Stage by stage, every point so far is extended by every alternative, and what another point beats in both sums is
    dropped, which loses nothing. Where more than `max_points` remain, one in each of as many equal intervals of cost
    is kept, the one of least error: the front is exact until then, and its points are feasible always.

    Args:
      costs: for each stage float64[alternatives].
      errors: for each stage float64[alternatives], finite, of either sign.
      max_points: how many points to keep.

    Returns:
      The front. It begins with the cheapest choice.

    References:
      G. L. Nemhauser, Z. Ullmann, Discrete Dynamic Programming and Capital Allocation, Management Science 15(9), 1969.
    """
    front = Front(np.zeros(1), np.zeros(1), np.zeros((1, 0), np.uint8))
    for cost, error in zip(costs, errors, strict=True):
        sums = [np.add.outer(a, b).ravel() for a, b in ((front.costs, cost), (front.errors, error))]
        kept = _thinned(_undominated(*sums), sums[0], max_points)
        points, alternatives = np.divmod(kept, len(cost))
        choices = np.column_stack([front.choices[points], alternatives.astype(np.uint8)])
        front = Front(sums[0][kept], sums[1][kept], choices)
    return front


def _undominated(costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Indices of the points that no other point beats, by increasing cost."""
    order = np.lexsort((errors, costs))
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], errors[order][:-1]]))
    return order[errors[order] < best_before]


def _thinned(kept: np.ndarray, costs: np.ndarray, max_points: int) -> np.ndarray:
    """At most `max_points` + 1 of the points; errors decrease along them, so the last of an interval has the least."""
    if len(kept) <= max_points:
        return kept
    offset = costs[kept] - costs[kept[0]]
    interval = (offset / offset[-1] * max_points).astype(np.int64)  # no product that overflows
    is_last = np.append(interval[1:] != interval[:-1], True)
    is_last[0] = True  # the cheapest
    return kept[is_last]
