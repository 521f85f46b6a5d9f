"""The search behind `pbjax.allocate`: measured errors propose allocations, and measured allocations decide."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pbjax._allocation.costs import Costs
from pbjax._allocation.front import Front, pareto_front
from pbjax._allocation.layers import StoredLayer
from pbjax._allocation.outcome import Allocation, AllocationRow, UniformRow
from pbjax._allocation.sensitivity import Sensitivity

_WHERE = "argument of allocate"
_ROUNDING = 1 + 1e-12  # sums of costs that are no integers round
_MOST_EXCHANGES = 32  # measured in one round

Singles = list[dict[int, float]]  # for each layer and number of bitlayers the error with only that changed


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An allocation int[layers] and its measured error."""

    allocation: tuple[int, ...]
    error: float


class Search:
    """Measured allocations, and proposals of others from what the measured errors add up to."""

    def __init__(
        self, layers: list[StoredLayer], choices: list[list[int]], sensitivity: Sensitivity, costs: Costs
    ) -> None:
        self._layers, self._choices, self._sensitivity, self._costs = layers, choices, sensitivity, costs
        self._bits = tuple(layer.bits for layer in layers)
        numbers = sorted(set().union(*choices))
        uniform = [tuple(max(c for c in allowed if c <= b) for allowed in choices) for b in numbers]
        self._full, *measured = self._measured([self._bits, *uniform])
        self._uniform = dict(zip(numbers, measured, strict=True))
        self._singles = self._single_changes(self._full)

    def best_within(self, name: str, limit: float, rounds: int, limited: Costs | None = None) -> Candidate:
        """The least measured error found among allocations whose costs add up to no more than `limit`.

        Args:
          name: of the limit, for the message.
          limit: largest cost.
          rounds: how often proposals are made, at most.
          limited: the costs that are limited, if not those that the search was given.
        """
        costs = limited or self._costs
        slack = limit * _ROUNDING
        least = sum(min(costs.of(i, b) for b in allowed) for i, allowed in enumerate(self._choices))
        if least > slack:
            raise ValueError(
                f"`{name}` must be at least {least:,.10g}, which the fewest bitlayers of each weight take, but got "
                f"{limit:,.10g} ({_WHERE}). Give more, or allow fewer bitlayers."
            )

        def fits(one: Candidate) -> bool:
            return costs.total(one.allocation) <= slack

        def propose(origin: Candidate) -> list[Candidate]:
            singles = self._singles_of(origin)
            front = self._front(costs, origin, singles)
            proposed = [self._allocation(front, front.last_within(slack))]
            if fits(origin):
                room = slack - costs.total(origin.allocation)
                changes = self._exchanges(origin, singles, costs, room)
                proposed += [change for _, change in heapq.nsmallest(_MOST_EXCHANGES, changes)]
            return self._measured(list(dict.fromkeys(proposed)))

        found = [one for one in self._uniform.values() if fits(one)]
        return _refine([*found, *propose(self._full)], propose, lambda one: (one.error,), rounds)

    def cheapest_within(self, tolerance: float, rounds: int) -> Candidate:
        """The least cost found among allocations whose measured error is at most `tolerance`."""

        def propose(origin: Candidate) -> list[Candidate]:
            return self._bisect(self._front(self._costs, origin, self._singles_of(origin)), tolerance)

        found = [one for one in self._uniform.values() if one.error <= tolerance] + propose(self._full)
        if not found:
            least = min(one.error for one in self._uniform.values())
            raise ValueError(
                f"`tolerance` must be at least {least:.3g}, the least error measured with the bitlayers allowed, but "
                f"got {tolerance:.3g} ({_WHERE}). Allow more bitlayers, or quantize to more bits."
            )
        return _refine(found, propose, lambda one: (self._costs.total(one.allocation), one.error), rounds)

    def _bisect(self, front: Front, tolerance: float) -> list[Candidate]:
        """Points of a front that are within the tolerance, among them the cheapest if errors fall along the front."""
        low, high = -1, len(front.choices)  # taken as too coarse, and as fine enough
        found = []
        while high - low > 1:  # as many points at once as one pass takes
            points = np.unique(np.linspace(low, high, self._sensitivity.batch_size + 2)[1:-1].astype(int))
            points = points[points > low].tolist()
            measured = self._measured([self._allocation(front, point) for point in points])
            within = [i for i, one in enumerate(measured) if one.error <= tolerance]
            found += [measured[i] for i in within]
            first = within[0] if within else len(points)
            low, high = (points[first - 1] if first else low), (points[first] if within else high)
        return found

    def _exchanges(
        self, origin: Candidate, singles: Singles, costs: Costs, room: float
    ) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Neighbours of an allocation that keep within `room`, each with the error that is expected of it.

        One layer gets more bitlayers, and where there is no room another gives up as few as make it. What one such
        exchange gains is not lost in the sum over all other layers, as it is when errors of many changes are added.
        """
        now = origin.allocation
        for i, allowed in enumerate(self._choices):
            for more in (b for b in allowed if b > now[i]):
                missing = costs.of(i, more) - costs.of(i, now[i]) - room
                raised = (*now[:i], more, *now[i + 1 :])
                if missing <= 0:
                    yield singles[i][more], raised
                    continue
                for j, others in enumerate(self._choices):
                    enough = [b for b in others if b < now[j] and costs.of(j, now[j]) - costs.of(j, b) >= missing]
                    if j != i and enough:
                        less = max(enough)
                        expected = singles[i][more] + singles[j][less] - origin.error
                        yield expected, (*raised[:j], less, *raised[j + 1 :])

    def outcome(self, chosen: Candidate, metric: str) -> Allocation:
        """The outcome as users see it."""
        costs = self._costs
        rows = tuple(
            AllocationRow(
                path=layer.path,
                index=layer.index,
                shape=layer.shape,
                bits=layer.bits,
                bitlayers=b,
                nbytes=layer.bytes_of(b),
                cost=costs.of(i, b),
                errors=self._singles[i],
            )
            for i, (layer, b) in enumerate(zip(self._layers, chosen.allocation, strict=True))
        )
        return Allocation(
            rows=rows,
            nbytes=self._nbytes(chosen.allocation),
            cost=costs.total(chosen.allocation),
            cost_unit=costs.unit,
            average=self._average(chosen.allocation),
            predicted_error=self._full.error + sum(row.errors[row.bitlayers] - self._full.error for row in rows),
            measured_error=chosen.error,
            metric=metric,
            uniform=tuple(
                UniformRow(
                    bitlayers=b,
                    nbytes=self._nbytes(one.allocation),
                    cost=costs.total(one.allocation),
                    average=self._average(one.allocation),
                    error=one.error,
                )
                for b, one in self._uniform.items()
            ),
        )

    def _singles_of(self, origin: Candidate) -> Singles:
        return self._singles if origin == self._full else self._single_changes(origin)

    def _single_changes(self, origin: Candidate) -> Singles:
        """For each layer the error at each of its numbers of bitlayers, with all others as in `origin`."""
        changes = [(i, b) for i, allowed in enumerate(self._choices) for b in allowed if b != origin.allocation[i]]
        allocations = [(*origin.allocation[:i], b, *origin.allocation[i + 1 :]) for i, b in changes]
        errors = dict(zip(changes, self._errors(allocations), strict=True))
        return [{b: errors.get((i, b), origin.error) for b in allowed} for i, allowed in enumerate(self._choices)]

    def _front(self, costs: Costs, origin: Candidate, singles: Singles) -> Front:
        stages = [np.array([costs.of(i, b) for b in allowed]) for i, allowed in enumerate(self._choices)]
        return pareto_front(stages, [np.array([*layer.values()]) - origin.error for layer in singles])

    def _allocation(self, front: Front, point: int) -> tuple[int, ...]:
        return tuple(allowed[i] for allowed, i in zip(self._choices, front.choices[point], strict=True))

    def _measured(self, allocations: Sequence[tuple[int, ...]]) -> list[Candidate]:
        return [Candidate(*pair) for pair in zip(allocations, self._errors(allocations), strict=True)]

    def _errors(self, allocations: Sequence[tuple[int, ...]]) -> list[float]:
        return self._sensitivity.errors(allocations).tolist() if allocations else []

    def _nbytes(self, allocation: Sequence[int]) -> int:
        return sum(layer.bytes_of(b) for layer, b in zip(self._layers, allocation, strict=True))

    def _average(self, allocation: Sequence[int]) -> float:
        weights = [layer.num_weights for layer in self._layers]
        return sum(w * b for w, b in zip(weights, allocation, strict=True)) / sum(weights)


def _refine(
    found: list[Candidate],
    propose: Callable[[Candidate], list[Candidate]],
    key: Callable[[Candidate], tuple[float, ...]],
    rounds: int,
) -> Candidate:
    """The least by `key` of what was found and, in further rounds, of what is proposed from the best so far."""
    best = min(found, key=key)
    for _ in range(rounds - 1):
        better = min([best, *propose(best)], key=key)
        if better == best:
            break
        best = better
    return best
