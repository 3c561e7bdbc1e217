"""The charts' arithmetic, and that nothing leaves the picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from megatron_r1.reporting import scale, svg
from megatron_r1.reporting.svg import Series

LINE = [(float(x), x / 10) for x in range(11)]


def texts(chart: str) -> list[str]:
    return [t.text or "" for t in ET.fromstring(chart).iter("text")]


def path(chart: str, kind: str) -> list[tuple[float, float]]:
    [found] = [p.get("d") for p in ET.fromstring(chart).iter("path") if kind in p.get("class").split()]
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", found)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.0, 10_400.0, [0.0, 5000.0, 10_000.0]),
        (-0.2, 0.2, [-0.2, -0.1, 0.0, 0.1, 0.2]),
        (3.0, 3.0, [3.0]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert scale.ticks(low, high) == pytest.approx(expected)


def test_numbers_are_short_and_alike_on_an_axis():
    assert [scale.number(v) for v in (0.0, 0.25, 1200.0, 14_230.0, 2.5e6, 1.5e9, 3e-6)] == [
        "0",
        "0.25",
        "1,200",
        "14.2k",
        "2.5M",
        "1.5G",
        "3e-6",
    ]
    assert [scale.number(v, 2e4) for v in (0.0, 5000.0, 20_000.0)] == ["0", "5k", "20k"]


def test_a_line_is_where_its_numbers_are():
    drawn = path(svg.lines([Series(LINE)], x_title="steps", y_title="share", top=1.0), "line")
    assert drawn[0] == (svg.LEFT, svg.HEIGHT - svg.BOTTOM), "0 at step 0 is the origin"
    assert drawn[-1] == (svg.WIDTH - svg.RIGHT, svg.TOP), "1 at the last step is the upper right corner"
    assert drawn[5] == pytest.approx((sum(x for x, _ in drawn) / 11, sum(y for _, y in drawn) / 11), abs=0.1)


def test_decades_are_equally_far_apart_and_zeros_are_left_out_on_a_log_axis():
    drawn = path(svg.lines([Series([(0.0, 0.0), (1.0, 1e-6), (2.0, 1e-5), (3.0, 1e-4)])], x_title="x", y_title="y", log=True), "line")
    heights = [y for _, y in drawn]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_every_chart_names_both_axes():
    for chart in (
        svg.lines([Series(LINE)], x_title="optimizer steps", y_title="tokens"),
        svg.areas([Series(LINE), Series(LINE)], x_title="optimizer steps", y_title="tokens"),
    ):
        assert {"optimizer steps", "tokens"} <= set(texts(chart))


@pytest.mark.parametrize("value", [-3e5, -0.02, 0.0, 4e-7, 17.0, 6e8])
@pytest.mark.parametrize("log", [False, True])
def test_nothing_is_drawn_outside_the_picture(value, log):
    if log and value <= 0:
        return
    series = [Series([(1.0, value), (2.0, value * 2), (900.0, value / 3)], label=f"label {i}", color=i) for i in range(6)]
    chart = ET.fromstring(svg.lines(series, x_title="optimizer steps", y_title="y", log=log, marks=[2.0, 5000.0], mark_title="mark"))
    for text in chart.iter("text"):
        width, x = svg.CHARACTER * len(text.text), float(text.get("x"))
        start = {"end": x - width, "middle": x - width / 2}.get(text.get("text-anchor"), x)
        assert start >= -1, text.text
        assert start + width <= svg.WIDTH + 1, text.text
        assert 0 < float(text.get("y")) <= svg.HEIGHT
    for p in chart.iter("path"):
        for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", p.get("d")):
            assert 0 <= float(x) <= svg.WIDTH
            assert svg.TOP - 1 <= float(y) <= svg.HEIGHT - svg.BOTTOM + 1


def test_labels_at_the_same_height_are_moved_apart():
    series = [Series(LINE, label=f"curve {i}") for i in range(5)]
    chart = ET.fromstring(svg.lines(series, x_title="x", y_title="y"))
    heights = sorted(float(t.get("y")) for t in chart.iter("text") if "label" in t.get("class"))
    assert min(b - a for a, b in pairwise(heights)) >= svg.LINE - 0.2


def test_areas_stack():
    chart = svg.areas([Series([(0.0, 1.0), (1.0, 1.0)], color=0), Series([(0.0, 3.0), (1.0, 3.0)], color=1)], x_title="x", y_title="y")
    lower, upper = (path(chart, c) for c in ("c0", "c1"))
    floor = svg.HEIGHT - svg.BOTTOM
    assert floor - lower[0][1] == pytest.approx((floor - svg.TOP) / 4, abs=0.2)
    assert upper[0][1] == pytest.approx(svg.TOP, abs=0.2)
    assert upper[-1][1] == lower[0][1], "the second layer stands on the first"


def test_a_band_is_as_wide_as_it_says():
    chart = svg.lines([Series([(0.0, 0.5), (1.0, 0.5)], half_widths=[0.25, 0.5])], x_title="x", y_title="y", top=1.0)
    heights = [y for _, y in path(chart, "band")]
    whole = svg.HEIGHT - svg.BOTTOM - svg.TOP
    assert heights[3] - heights[0] == pytest.approx(whole / 2, abs=0.2)
    assert heights[2] - heights[1] == pytest.approx(whole, abs=0.2)


def test_long_lines_are_thinned_without_losing_a_spike():
    points = [(float(x), 0.0) for x in range(10_400)]
    points[5003] = (5003.0, 7.0)
    assert len(scale.extremes(points)) <= scale.POINTS
    assert (5003.0, 7.0) in scale.extremes(points)
    thin = scale.thinned(points)
    assert len(thin) == scale.POINTS
    assert (thin[0], thin[-1]) == (points[0], points[-1])


def test_the_moving_mean_keeps_a_constant_and_halves_noise():
    assert scale.smoothed([(float(x), 2.0) for x in range(100)]) == [(float(x), 2.0) for x in range(100)]
    noise = scale.smoothed([(float(x), float(x % 2)) for x in range(100)])
    assert all(0.25 < y < 0.75 for _, y in noise[1:-1])


def test_names_cannot_break_the_picture():
    chart = svg.lines([Series(LINE, label="<b>&", title='"><script>')], x_title="a & b", y_title="<y>")
    assert "<b>&" in texts(chart)
    assert not list(ET.fromstring(chart).iter("script"))
