"""Small charts as inline SVG text, for the report's page: lines, dots with intervals, bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 28, 40
COLORS = ("#2563a8", "#d9730d", "#2e7d4f", "#9c3587", "#7a6a00", "#5b5b5b")


@dataclass(frozen=True)
class Series:
    """Points (x, y), or (x, y, low, high) with an interval; ``kind`` is line, dots or bars."""

    label: str
    points: Sequence[Sequence[float]]
    kind: str = "line"


def chart(
    title: str,
    xlabel: str,
    ylabel: str,
    series: Sequence[Series],
    *,
    xlim: tuple[float, float] = (0.0, 1.0),
    ylim: tuple[float, float] = (0.0, 1.0),
    names: Sequence[str] = (),
    mark: float | None = None,
    diagonal: bool = False,
) -> str:
    """An ``<svg>`` element. ``names`` label whole numbers on the x axis; ``mark`` draws a vertical line."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(value: float) -> float:
        return LEFT + wide * (value - xlim[0]) / ((xlim[1] - xlim[0]) or 1)

    def y(value: float) -> float:
        return TOP + high * (1 - (value - ylim[0]) / ((ylim[1] - ylim[0]) or 1))

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="16" class="t">{escape(title)}</text>',
    ]
    for step in range(5):
        value = ylim[0] + (ylim[1] - ylim[0]) * step / 4
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="g"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(value) + 3.5:.1f}" text-anchor="end">{_short(value)}</text>')
    ticks: list[tuple[float, str]] = [(at, str(name)) for at, name in enumerate(names)] or [
        (xlim[0] + (xlim[1] - xlim[0]) * step / 4, _short(xlim[0] + (xlim[1] - xlim[0]) * step / 4))
        for step in range(5)
    ]
    room = max(4, 60 // max(len(ticks), 1))  # signs that fit under one of them
    parts += [
        f'<text x="{x(at):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">'
        f"<title>{escape(name)}</title>{escape(shortened(name, room))}</text>"
        for at, name in ticks
    ]
    parts.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(xlabel)}</text>')
    parts.append(
        f'<text transform="translate(11 {TOP + high / 2}) rotate(-90)" text-anchor="middle">{escape(ylabel)}</text>'
    )
    if diagonal:
        parts.append(f'<line x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}" class="d"/>')
    if mark is not None:
        parts.append(f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP}" y2="{TOP + high}" class="d"/>')
    bars = [one for one in series if one.kind == "bars"]
    for number, one in enumerate(series):
        color = COLORS[number % len(COLORS)]
        if one.kind == "bars":
            breadth = wide / max(len(names), 1) * 0.7 / len(bars)
            offset = (bars.index(one) - (len(bars) - 1) / 2) * breadth
            for at, value, *interval in one.points:
                left = x(at) + offset - breadth / 2
                tall = max(y(ylim[0]) - y(value), 0)
                parts.append(
                    f'<rect x="{left:.1f}" y="{y(value):.1f}" width="{breadth:.1f}" height="{tall:.1f}" '
                    f'fill="{color}"/>'
                )
                parts += _interval(x(at) + offset, interval, y, "#222")
            continue
        if one.kind == "line" and one.points:
            path = " ".join(f"{x(point[0]):.1f},{y(point[1]):.1f}" for point in one.points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if one.kind == "dots":
            for at, value, *interval in one.points:
                parts.append(f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="3" fill="{color}"/>')
                parts += _interval(x(at), interval, y, color)
    for number, one in enumerate(series if len(series) > 1 else ()):
        color, down = COLORS[number % len(COLORS)], TOP + 8 + 13 * number
        parts.append(f'<rect x="{LEFT + 6}" y="{down - 7}" width="9" height="9" fill="{color}" opacity=".9"/>')
        parts.append(f'<text x="{LEFT + 19}" y="{down + 1}" class="l">{escape(shortened(one.label, 40))}</text>')
    return "".join([*parts, "</svg>"])


def shortened(name: str, limit: int = 28) -> str:
    """A name on one line with at most ``limit`` signs: of a longer one the beginning and the end."""
    line = " ".join(name.split())
    if len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return f"{line[: limit - 1 - tail]}…{line[-tail:]}"


def _interval(at: float, interval: Sequence[float], y: Callable[[float], float], color: str) -> list[str]:
    if len(interval) != 2:
        return []
    low, high = (y(value) for value in interval)
    return [f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{color}" stroke-width="1.2"/>']


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:.0f}"


def histogram(values: Sequence[float], low: float, high: float, bins: int) -> list[tuple[float, float]]:
    """(bin number, count) of values between ``low`` and ``high``."""
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / ((high - low) or 1) * bins), bins - 1)] += 1
    return [(float(index), float(count)) for index, count in enumerate(counts)]
