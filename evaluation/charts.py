"""Charts as inline SVG, readable without colour and by a screen reader. Knows no model and no file.

Each function returns an HTML string. Colours are CSS classes (`c-…` of the page's style sheet), so that a page can be dark;
lines also differ in their dashes. All text is escaped here.
"""

from __future__ import annotations

import html
import itertools
import math

from utils import printable

WIDTH, HEIGHT = 440, 250  # units of the view box; about px on a phone, so that text stays readable there
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
DASHES = {
    "c-aligned": "",
    "c-vae2": "7 3",
    "c-reencode": "2 3",
    "c-linear": "9 3 2 3",
    "c-untrained": "1 4",
    "c-other0": "12 4",
    "c-other1": "4 4",
    "c-other2": "12 3 3 3 3 3",
}
FILE_STYLE = (
    "<style>svg{background:#fff}text{font:13px sans-serif;fill:#222}.tick{font-size:11.5px;fill:#555}.grid{stroke:#ddd}"
    ".line{fill:none;stroke-width:2;stroke:currentColor}.c-aligned{color:#1f6feb}.c-reencode{color:#b3541e}</style>"
)
_numbers = itertools.count(1)


def text(value) -> str:
    """Anything as text of one line for HTML: escaped, with the escape of each character that cannot be shown."""
    return html.escape(printable(str(value)), quote=True)


def number(value: float | None) -> str:
    """A number to three digits, as on an axis; a dash for None."""
    if value is None:
        return "–"
    if not value:
        return "0"
    if value < 0:
        return "−" + number(-value)
    if not 1e-3 <= value < 1e5:
        return f"{value:.1e}".replace("e-", "e−")
    digits = max(0, 2 - math.floor(math.log10(value)))
    shown = f"{value:.{digits}f}"
    return shown.rstrip("0").rstrip(".") if digits else shown


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `wanted` of them."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= next((factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= wanted), 10)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def frame(title: str, description: str, body: str, height: float = HEIGHT, width: float = WIDTH) -> str:
    """An SVG with a title and a description for those who do not see it."""
    name = f"chart{next(_numbers)}"
    return (
        f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{text(title)}</title><desc id="{name}d">{text(description)}</desc>{body}</svg>'
    )


def as_file(chart: str) -> str:
    """A chart as an .svg file of its own: with a style sheet, on white, without the legend that stands below it on a page."""
    picture = chart[: chart.index("</svg>") + len("</svg>")]
    picture = picture.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" ', 1)
    return picture.replace("<title", FILE_STYLE + "<title", 1)


def legend(entries: list[tuple[str, str]], solid: bool = False) -> str:
    """The list of lines' labels, each (label, class) with a sample of its line; `solid`: with a square."""
    items = ""
    for label, colour in entries:
        sample = f'<line class="line {colour}"{_dash(colour)} x1="0" x2="28" y1="5" y2="5"/>'
        if solid:
            sample = f'<rect class="bar {colour}" x="9" y="0" width="10" height="10"/>'
        items += f'<li><svg class="key" viewBox="0 0 28 10" aria-hidden="true">{sample}</svg>{text(label)}</li>'
    return f'<ul class="legend">{items}</ul>'


def _dash(colour: str) -> str:
    return f' stroke-dasharray="{DASHES[colour]}"' if DASHES.get(colour) else ""


def _axes(x_marks, y_marks, x_label: str, y_label: str) -> str:
    """Level lines, numbers and labels of both axes; a mark is (place in the view box, number)."""
    body = ""
    for y, shown in y_marks:
        body += f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{number(shown)}</text>'
    for x, shown in x_marks:
        body += f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{number(shown)}</text>'
    across, down = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'{body}<text class="tick" text-anchor="middle" x="{across}" y="{HEIGHT - 6}">{text(x_label)}</text>'
        f'<text class="tick" text-anchor="middle" transform="translate(12 {down}) rotate(-90)">{text(y_label)}</text>'
    )


def _scale(low: float, high: float, start: float, end: float):
    """The linear map from `low` … `high` to `start` … `end`."""
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def _nothing(title: str) -> str:
    return f"<p>{text(title)}: nothing to draw.</p>"


def bars(title: str, rows: list[tuple[str, float | None, str, str]], unit: str = "") -> str:
    """Horizontal bars from zero. A row is (label, value or None, the value as shown, class); None has no bar."""
    largest = max((value for _, value, _, _ in rows if value is not None), default=0) or 1
    row_height, body = 40, ""
    for place, (label, value, shown, colour) in enumerate(rows):
        y = place * row_height
        body += f'<text x="0" y="{y + 13}">{text(label)}</text>'
        length = 0 if value is None else max(1, value / largest * (WIDTH - 75))
        body += f'<rect class="bar {colour}" x="0" y="{y + 18}" width="{length:.1f}" height="15"/>'
        shown += unit if value is not None else ""
        body += f'<text x="{length + 6:.1f}" y="{y + 30}" class="strong">{text(shown)}</text>'
    spoken = "; ".join(f"{label}: {shown}{unit}" for label, _, shown, _ in rows)
    return frame(title, spoken, body, len(rows) * row_height)


def lines(title, series, x_label, y_label, log_y=False, zero=False, fill=False, mark=None) -> str:
    """Lines over numbers. A series is (label, [(x, y or None), …], class).

    `log_y` draws a logarithmic axis and leaves out values that are not above zero; `zero` lets the axis begin there; `fill`
    shades the area below; `mark` is (x, label) of a vertical line, which is not drawn at the right end.
    """
    kept = []
    for label, points, colour in series:
        points = [(x, y) for x, y in points if y is not None and (y > 0 or not log_y)]
        if points:
            kept.append((label, points, colour))
    if not kept:
        return _nothing(title)
    scaled = math.log10 if log_y else float
    x_low, x_high = (limit(x for _, points, _ in kept for x, _ in points) for limit in (min, max))
    y_low, y_high = (scaled(limit(y for _, points, _ in kept for _, y in points)) for limit in (min, max))
    y_low = 0 if zero and not log_y else y_low
    margin = 0.05 * (y_high - y_low) or 0.5 * abs(y_high) or 1
    y_low, y_high = y_low - (0 if zero else margin), y_high + margin
    floor = HEIGHT - BOTTOM
    at_x, at_y = _scale(x_low, x_high, LEFT, WIDTH - RIGHT), _scale(y_low, y_high, floor, TOP)

    y_ticks = [(y, y) for y in ticks(y_low, y_high)]
    if log_y and y_high - y_low < 1.5:  # decades
        y_ticks = [(math.log10(y), y) for y in ticks(10**y_low, 10**y_high) if y > 0]
    elif log_y:
        y_ticks = [(decade, 10**decade) for decade in range(math.ceil(y_low), math.floor(y_high) + 1)]
    x_marks = [(at_x(x), x) for x in ticks(x_low, x_high)]
    body = _axes(x_marks, [(at_y(y), shown) for y, shown in y_ticks], x_label, y_label)
    if mark and x_low <= mark[0] < x_high:
        x = at_x(mark[0])
        side, offset = ("end", -4) if x > WIDTH / 2 else ("start", 4)
        body += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>'
        body += f'<text class="tick" text-anchor="{side}" x="{x + offset:.1f}" y="{TOP + 10}">{text(mark[1])}</text>'
    spoken = []
    for label, points, colour in kept:
        places = [f"{at_x(x):.1f},{at_y(scaled(y)):.1f}" for x, y in points]
        (first_x, first_y), (last_x, last_y) = points[0], points[-1]
        if fill:
            area = f"{at_x(first_x):.1f},{floor:.1f} {' '.join(places)} {at_x(last_x):.1f},{floor:.1f}"
            body += f'<polygon class="area {colour}" points="{area}"/>'
        if len(points) == 1:
            x, y = places[0].split(",")
            body += f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="3"/>'
        body += f'<polyline class="line {colour}"{_dash(colour)} points="{" ".join(places)}"/>'
        ends = [f"{number(y)} at {number(x)}" for x, y in ((first_x, first_y), (last_x, last_y))]
        spoken.append(f"{label}: from {ends[0]} to {ends[1]}")
    chart = frame(title, f"{y_label} over {x_label}. {'; '.join(spoken)}", body)
    return chart + legend([(label, colour) for label, _, colour in kept])


def scatter(title: str, points: list[tuple[str, float, float, str]], x_label: str, y_label: str) -> str:
    """Labelled points. A point is (label, x, y, class); the labels stand beside them, moved apart where they would meet."""
    if not points:
        return _nothing(title)

    def axis(values, start, end):
        least, most = min(values), max(values)
        margin = 0.08 * (most - least) or 0.5
        at = _scale(least - margin, most + margin, start, end)
        return at, [(at(value), value) for value in ticks(least - margin, most + margin)]

    at_x, x_marks = axis([x for _, x, _, _ in points], LEFT, WIDTH - RIGHT)
    at_y, y_marks = axis([y for _, _, y, _ in points], HEIGHT - BOTTOM, TOP)
    body, lowest = _axes(x_marks, y_marks, x_label, y_label), -math.inf
    for label, x, y, colour in sorted(points, key=lambda point: at_y(point[2])):
        lowest = max(at_y(y) + 4, lowest + 14)
        body += f'<circle class="dot {colour}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="5"/>'
        anchor, shift = ("end", -9) if at_x(x) > WIDTH / 2 else ("start", 9)
        body += f'<text text-anchor="{anchor}" x="{at_x(x) + shift:.1f}" y="{lowest:.1f}">{text(label)}</text>'
    spoken = "; ".join(f"{label}: {number(y)} at {number(x)}" for label, x, y, _ in points)
    return frame(title, f"{y_label} over {x_label}. {spoken}", body)


def columns(title: str, series: list[tuple[str, list[float | None], str]], x_label: str, y_label: str) -> str:
    """Grouped columns from zero, one group per place in the lists. A series is (label, values, class)."""
    values = [value for _, numbers, _ in series for value in numbers if value is not None]
    if not values:
        return _nothing(title)
    largest, groups = max(values) or 1, len(series[0][1])
    base, group = HEIGHT - BOTTOM, (WIDTH - LEFT - RIGHT) / groups
    one = 0.8 * group / len(series)
    at_y = _scale(0, largest, base, TOP)
    x_marks = [(LEFT + (place + 0.5) * group, place) for place in range(0, groups, -(-groups // 16))]
    body = _axes(x_marks, [(at_y(y), y) for y in ticks(0, largest)], x_label, y_label)
    for which, (_, numbers, colour) in enumerate(series):
        for place, value in enumerate(numbers):
            top, x = at_y(value or 0), LEFT + (place + 0.1) * group + which * one
            size = f'x="{x:.1f}" y="{top:.1f}" width="{one:.1f}" height="{base - top:.1f}"'
            body += f'<rect class="bar {colour}" {size}/>'
    spoken = "; ".join(f"{label}: {', '.join(number(value) for value in numbers)}" for label, numbers, _ in series)
    return frame(title, spoken, body) + legend([(label, colour) for label, _, colour in series], solid=True)


def histogram(title: str, series: list[tuple[str, list[int], str]], limit: float) -> str:
    """A small chart of counts over ±limit as shares, without axes but for its ends. A series is (label, counts, class)."""
    width, height, base = 130, 78, 62
    shares = [(label, [count / (sum(counts) or 1) for count in counts], colour) for label, counts, colour in series]
    peak = max((share for _, line, _ in shares for share in line), default=0) or 1
    body, spoken = f'<line class="grid" x1="0" x2="{width}" y1="{base}" y2="{base}"/>', []
    for label, line, colour in shares:
        middles = [(place + 0.5) / len(line) for place in range(len(line))]
        points = " ".join(f"{x * width:.1f},{base - share / peak * (base - 14):.1f}" for x, share in zip(middles, line))
        body += f'<polyline class="line {colour}"{_dash(colour)} points="{points}"/>'
        mean = sum(share * (x * 2 - 1) * limit for x, share in zip(middles, line))
        spoken.append(f"{label}: mean {number(mean)}")
    body += f'<text x="0" y="11">{text(title)}</text>'
    for anchor, x, shown in (("start", 0, f"−{number(limit)}"), ("middle", width / 2, "0"), ("end", width, number(limit))):
        body += f'<text class="tick" text-anchor="{anchor}" x="{x:g}" y="{height - 4}">{shown}</text>'
    return frame(title, "; ".join(spoken), body, height, width)
