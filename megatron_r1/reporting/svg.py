"""Charts as inline SVG: lines with bands, and stacked areas, each with named axes. Numbers in, text out.

A chart is about as wide as a phone's page, so that its text is readable there, and scales up on a larger page. Colours are classes
(c0, c1, ... of page.css), so that one page serves light and dark. Legends are HTML beside the chart and can be as long as they need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_r1.reporting import scale

WIDTH, HEIGHT = 380, 228
LEFT, TOP, BOTTOM, RIGHT = 44, 24, 36, 20
CHARACTER = 6.2  # width of one at 10.5 px, on the wide side of the system fonts
LINE = 13.0  # least distance of two labels
SMOOTH_FROM, DOTS = 40, 24  # a line is smoothed from so many points, dotted up to so many


@dataclass(frozen=True)
class Series:
    """One line: where it goes, what it is called at its end, how it looks."""

    points: list[tuple[float, float]]  # (x, y), x ascending
    label: str = ""  # at the line's end; "" for none
    title: str = ""  # what a pointer shows of a point
    color: int = 0
    dash: int = 0  # 0 solid, 1 dashed, 2 dotted, 3 dash-dotted
    half_widths: list[float] | None = None  # of the band around each y
    smooth: bool = False


@dataclass(frozen=True)
class Frame:
    """The plot's rectangle and what its edges stand for."""

    x0: float
    x1: float
    y0: float
    y1: float
    right: float  # px left free for labels
    log: bool = False

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - self.right)

    def y(self, value: float) -> float:
        low, high, v = (math.log10(n) for n in (self.y0, self.y1, max(value, self.y0))) if self.log else (self.y0, self.y1, value)
        return HEIGHT - BOTTOM - (v - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def lines(
    series: list[Series],
    *,
    x_title: str,
    y_title: str,
    marks: Sequence[float] = (),
    mark_title: str = "",
    log: bool = False,
    top: float | None = None,
) -> str:
    """A line chart. `marks` are vertical lines at x, `top` an upper end of y that is always shown. Needs a point."""
    values = [y for s in series for _, y in s.points]
    values += [y + sign * w for s in series for (_, y), w in zip(s.points, s.half_widths or []) for sign in (1, -1)]
    if log:
        series = [s for s in (_positive(s) for s in series) if s.points]
        values = [v for v in values if v > 0]
    labels = [s.label for s in series if s.label]
    right = max([RIGHT, *(10 + CHARACTER * len(label) for label in labels)])
    xs = [x for s in series for x, _ in s.points]
    low, high = _limits(values, log=log, top=top)
    frame = Frame(min(xs), max(max(xs), min(xs) + 1), low, high, right, log)
    inside = [_marks(frame, marks, mark_title), *(_band(frame, s) for s in series), *(_line(frame, s) for s in series)]
    return _chart(frame, [*inside, _labels(frame, series)], x_title=x_title, y_title=y_title)


def areas(layers: list[Series], *, x_title: str, y_title: str) -> str:
    """Layers that all have the same x, stacked from the first at the bottom to the last."""
    layers = [Series(scale.thinned(layer.points, scale.POINTS // 3), title=layer.title, color=layer.color) for layer in layers]
    xs = [x for x, _ in layers[0].points]
    sums, drawn = [0.0] * len(xs), []
    tops: list[list[float]] = []
    for layer in layers:
        sums = [total + y for total, (_, y) in zip(sums, layer.points, strict=True)]
        tops.append(sums)
    frame = Frame(xs[0], max(xs[-1], xs[0] + 1), *_limits([0.0, *sums], log=False, top=None), RIGHT)
    below = [0.0] * len(xs)
    for layer, above in zip(layers, tops):
        edge = [*zip(xs, above), *reversed([*zip(xs, below)])]
        drawn.append(f'<path class="area c{layer.color}" d="{_path(frame, edge)}Z"><title>{escape(layer.title)}</title></path>')
        below = above
    return _chart(frame, drawn, x_title=x_title, y_title=y_title)


def _positive(s: Series) -> Series:
    return Series([p for p in s.points if p[1] > 0], s.label, s.title, s.color, s.dash, smooth=s.smooth)


def _limits(values: list[float], *, log: bool, top: float | None) -> tuple[float, float]:
    """What y runs from and to: powers of ten, or from 0 (below where values are) to a little above the largest."""
    if log:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return 10.0**low, 10.0 ** max(high, low + 1)
    low, high = min(0.0, *values), max(values)
    if top is not None:
        return low, max(high, top)
    grid = scale.ticks(low, high if high > low else low + 1.0)
    step = grid[1] - grid[0] if len(grid) > 1 else 1.0
    return math.floor(low / step + 1e-9) * step, max(math.ceil(high / step - 1e-9) * step, low + step)


def _path(frame: Frame, points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)


def _band(frame: Frame, s: Series) -> str:
    if not s.half_widths or len(s.points) < 2:
        return ""
    upper = [(x, y + w) for (x, y), w in zip(s.points, s.half_widths)]
    lower = [(x, y - w) for (x, y), w in zip(s.points, s.half_widths)]
    return f'<path class="band c{s.color}" d="{_path(frame, [*upper, *reversed(lower)])}Z"/>'


def _line(frame: Frame, s: Series) -> str:
    drawn, style = [], f"c{s.color} d{s.dash}"
    if s.smooth and len(s.points) >= SMOOTH_FROM:
        drawn.append(f'<path class="raw c{s.color}" d="{_path(frame, scale.extremes(s.points))}"/>')
        drawn.append(f'<path class="line {style}" d="{_path(frame, scale.thinned(scale.smoothed(s.points)))}"/>')
    else:
        drawn.append(f'<path class="line {style}" d="{_path(frame, scale.extremes(s.points))}"/>')
    for x, y in s.points if len(s.points) <= DOTS else ():
        said = escape(f"{s.title}: {scale.number(y)} at {scale.number(x)}")
        drawn.append(f'<circle class="dot c{s.color}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.4"><title>{said}</title></circle>')
    return "".join(drawn)


def _labels(frame: Frame, series: list[Series]) -> str:
    """The names at the lines' ends, moved apart where they would touch."""
    ends = []
    for s in series:
        shown = scale.smoothed(s.points) if s.smooth and len(s.points) >= SMOOTH_FROM else s.points
        ends += [(frame.y(shown[-1][1]), s)] if s.label else []
    ends.sort(key=lambda end: end[0])
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + LINE) if places else max(y, TOP))
    floor = HEIGHT - BOTTOM + 2
    for i in reversed(range(len(places))):
        places[i] = min(places[i], floor - LINE * (len(places) - 1 - i))
    x = WIDTH - frame.right + 6
    named = [(y + 3.5, s) for y, (_, s) in zip(places, ends)]
    return "".join(f'<text class="label c{s.color}" x="{x:.1f}" y="{y:.1f}">{escape(s.label)}</text>' for y, s in named)


def _marks(frame: Frame, marks: Sequence[float], title: str) -> str:
    bottom = HEIGHT - BOTTOM
    inside = [x for x in marks if frame.x0 < x <= frame.x1]
    drawn = [
        f'<path class="mark" d="M{frame.x(x):.1f} {TOP}V{bottom}"><title>{escape(title)} {scale.number(x)}</title></path>' for x in inside
    ]
    return "".join(drawn)


def _chart(frame: Frame, inside: list[str], *, x_title: str, y_title: str) -> str:
    """Grid, ticks and titles around what is drawn."""
    bottom, end = HEIGHT - BOTTOM, WIDTH - frame.right
    powers = [10.0**p for p in range(round(math.log10(frame.y0)), round(math.log10(frame.y1)) + 1)] if frame.log else []
    every = math.ceil(len(powers) / 5)
    grid = []
    for value in powers[::every] if frame.log else scale.ticks(frame.y0, frame.y1):
        y, said = frame.y(value), scale.number(value, 0.0 if frame.log else frame.y1)
        grid.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{end:.1f}"/>')
        grid.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{said}</text>')
    for value in scale.ticks(frame.x0, frame.x1, 4):
        grid.append(
            f'<text class="tick" x="{frame.x(value):.1f}" y="{bottom + 14}" text-anchor="middle">{scale.number(value, frame.x1)}</text>'
        )
    grid.append(f'<path class="axis" d="M{LEFT} {bottom}H{end:.1f}"/>')
    grid.append(f'<text class="axis-title" x="4" y="11">{escape(y_title)}</text>')
    grid.append(f'<text class="axis-title" x="{(LEFT + end) / 2:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    label = escape(f"{y_title} over {x_title}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join([*grid, *inside])}</svg>'
