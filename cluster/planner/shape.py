"""The shape of attainment over rate, from scores at some rates: it falls, however scores of short runs jump. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

LEAST_SLOPE = 0.2
"""Of the score, lost when the rate doubles: a flatter end of a shape is taken for noise."""


class Shape:
    """Straight lines between the means of neighbors that would rise (isotonic regression, by pooling adjacent
    violators), and on beyond both ends.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        """(rate, score), at least one."""
        blocks: list[list[float]] = []  # sum of rates, sum of scores, count
        for rate, score in sorted(points):
            blocks.append([rate, score, 1.0])
            while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] <= blocks[-1][1] * blocks[-2][2]:
                rates, scores, count = blocks.pop()
                blocks[-1] = [blocks[-1][0] + rates, blocks[-1][1] + scores, blocks[-1][2] + count]
        self._rates = [rates / count for rates, _, count in blocks]
        self._scores = [scores / count for _, scores, count in blocks]

    def at(self, rate: float) -> float:
        """The score there; may lie outside of 0 to 1 beyond the ends."""
        rates, scores = self._rates, self._scores
        if len(rates) == 1:
            return scores[0] - LEAST_SLOPE * (rate / rates[0] - 1.0)
        after = min(max(1, bisect_left(rates, rate)), len(rates) - 1)
        fall = (scores[after - 1] - scores[after]) / (rates[after] - rates[after - 1])
        if rate < rates[0]:
            return scores[0] + max(fall, LEAST_SLOPE / rates[0]) * (rates[0] - rate)
        if rate > rates[-1]:
            return scores[-1] - max(fall, LEAST_SLOPE / rates[-1]) * (rate - rates[-1])
        return scores[after - 1] - fall * (rate - rates[after - 1])

    def where(self, score: float) -> float:
        """The rate with that score, at least 0."""
        rates, scores = self._rates, self._scores
        for index in range(1, len(rates)):
            if scores[index - 1] >= score >= scores[index]:
                share = (scores[index - 1] - score) / (scores[index - 1] - scores[index])
                return rates[index - 1] + share * (rates[index] - rates[index - 1])
        end = 0 if score > scores[0] else -1
        if not rates[end]:
            return 0.0  # it begins there, and is higher nowhere
        fall = self.at(rates[end] * 1.5) - self.at(rates[end] * 2.0) if end else self.at(0.0) - self.at(rates[0])
        run = rates[end] * (0.5 if end else 1.0)
        return max(0.0, rates[end] - (score - scores[end]) * run / fall)
