"""Numbers made fit to be drawn and read: round ticks, short figures, long curves thinned and smoothed."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

Points = list[tuple[float, float]]  # (x, y), x ascending

POINTS = 240  # that a line is drawn with at most


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, beside: float = 0.0) -> str:
    """A figure as short as it can be said: 0  0.25  1,200  14.2k  3e-6; in the unit of a larger one `beside` it."""
    size = max(abs(value), beside)
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit:.3g}{letter}" if value else "0"
    return f"{value:,.0f}" if size >= 1e3 else f"{value:.3g}"


def thinned(points: Points, most: int = POINTS) -> Points:
    """At most so many points, each the mean of its neighbours; the first and the last stay what they are."""
    return points if len(points) <= most else [points[0], *map(_mean, _bins(points, most)[1:-1]), points[-1]]


def extremes(points: Points, most: int = POINTS) -> Points:
    """At most so many points, the lowest and the highest of their neighbours, so that no spike is lost."""
    if len(points) <= most:
        return points
    ends = [{min(b, key=lambda p: p[1]), max(b, key=lambda p: p[1])} for b in _bins(points, most // 2)]
    return [point for pair in ends for point in sorted(pair)]


def smoothed(points: Points) -> Points:
    """The moving mean over a twelfth of the points, centred, of those there are at the ends."""
    reach, sums = len(points) // 24, [0.0, *accumulate(y for _, y in points)]
    bounds = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, bounds)]


def _bins(points: Points, count: int) -> list[Points]:
    """The points in runs of equally many."""
    return [points[a:b] for a, b in pairwise(round(i * len(points) / count) for i in range(count + 1))]


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
