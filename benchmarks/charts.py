"""Charts of results, as SVG with text that stays text: the same data gives the same file everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

COLOURS = {
    "paper": "#999999",
    "auto": "#1f77b4",
    "fast": "#e07b00",
    "two-pass": "#1f77b4",
    "one-pass": "#e07b00",
    "gather": "#2ca02c",
    "half": "#d62728",
    "sketch": "#9467bd",
    "waiting": "#d9d9d9",
    "arithmetic": "#1f77b4",
    "copies": "#e07b00",
    "weights": "#9467bd",
    "messages and Python": "#2ca02c",
}
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 820, 250, 30, 56, 20
_GREY = "#dddddd"


def ratios(title: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """A row of dots for every case: each contender's time over the average's."""
    every = [ratio for _, values in rows for ratio in values.values()]
    low, high = math.floor(math.log2(min(1, *every))), math.ceil(math.log2(max(1, *every)))
    bottom = _TOP + _ROW * len(rows)

    def x(ratio: float) -> float:
        return _LEFT + (math.log2(ratio) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    shapes = []
    for tick in (2.0**power for power in range(low, high + 1)):
        stroke = "#555555" if tick == 1 else _GREY
        shapes.append(_line(x(tick), _TOP, x(tick), bottom, stroke))
        shapes.append(_text(x(tick), bottom + 16, f"{tick:g}", "middle"))
    for number, (label, values) in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        shapes.append(_text(_LEFT - 10, y + 4, label, "end"))
        shapes += [_dot(x(ratio), y, COLOURS[name], f"{label}, {name}: {ratio:.2f}") for name, ratio in values.items()]
    names = dict.fromkeys(name for _, values in rows for name in values)
    return _picture(title, [*shapes, *_legend(names)], bottom + 30)


def expected(title: str, points: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A dot for every schedule in every case: measured milliseconds over expected ones, with the diagonal."""
    every = [ms for pairs in points.values() for pair in pairs for ms in pair]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    left, size = 200, 420
    bottom = _TOP + size

    def along(ms: float) -> float:
        return (math.log10(ms) - low) / (high - low) * size

    shapes = []
    for power in range(low, high + 1):
        at = along(10.0**power)
        shapes += [_line(left + at, _TOP, left + at, bottom, _GREY), _line(left, bottom - at, left + size, bottom - at)]
        shapes.append(_text(left + at, bottom + 16, f"{10.0**power:g}", "middle"))
        shapes.append(_text(left - 8, bottom - at + 4, f"{10.0**power:g}", "end"))
    shapes.append(_line(left, bottom, left + size, _TOP, "#555555"))
    shapes.append(_text(left + size / 2, bottom + 36, "expected, ms", "middle"))
    shapes.append(_text(left, _TOP - 8, "measured, ms", "end"))
    for name, pairs in points.items():
        for forecast, measured in pairs:
            title_of_dot = f"{name}: {forecast:g} ms expected, {measured:g} measured"
            shapes.append(_dot(left + along(forecast), bottom - along(measured), COLOURS[name], title_of_dot))
    return _picture(title, [*shapes, *_legend(points, left)], bottom + 50)


def shares(title: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """A bar for every case, with the share of each part in the whole."""
    bottom = _TOP + _ROW * len(rows)
    width = _WIDTH - _LEFT - _RIGHT
    shapes = []
    for number, (label, parts) in enumerate(rows):
        y = _TOP + _ROW * number
        shapes.append(_text(_LEFT - 10, y + 14, label, "end"))
        start, total = 0.0, sum(parts.values())
        for name, ms in parts.items():
            share = ms / total
            shapes.append(
                f'<rect x="{_LEFT + start * width:.1f}" y="{y + 3}" width="{share * width:.1f}" height="{_ROW - 6}" '
                f'fill="{COLOURS[name]}"><title>{escape(label)}, {name}: {ms:.3g} ms, {share:.0%}</title></rect>'
            )
            start += share
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    shapes += [_text(_LEFT + tick * width, bottom + 16, f"{tick:.0%}", "middle") for tick in ticks]
    names = dict.fromkeys(name for _, parts in rows for name in parts)
    return _picture(title, [*shapes, *_legend(names)], bottom + 30)


def _legend(names: Iterable[str], x: float = _LEFT) -> list[str]:
    shapes = []
    for name in names:
        shapes += [_dot(x + 5, 38, COLOURS[name], name), _text(x + 15, 42, name)]
        x += 34 + 7 * len(name)
    return shapes


def _dot(x: float, y: float, colour: str, title: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"><title>{escape(title)}</title></circle>'


def _line(x: float, y: float, to_x: float, to_y: float, stroke: str = _GREY) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{stroke}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _picture(title: str, shapes: Sequence[str], height: float) -> str:
    head = f'<text x="{_WIDTH / 2}" y="18" text-anchor="middle" font-size="15">{escape(title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif" '
        'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join([head, *shapes]) + "\n</svg>\n"
    )
