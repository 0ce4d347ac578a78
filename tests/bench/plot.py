"""The plot: requests a second above, p99 below, a column a load; SVG drawn by hand, so that no library is needed."""

from html import escape
from math import ceil, floor, log10

from loads import LOADS

WIDTH, HEIGHT = 300, 210  # of one plot
LEFT, TOP, GAP_X, GAP_Y, LEGEND = 60, 40, 70, 60, 50
# One each, whoever else takes part, so that two plots can be compared.
COLORS = {"plugrack": "#c2410c", "plugrack-nginx": "#64748b", "go": "#f59e0b", "fastcgi": "#1d4ed8", "goplugin": "#0f766e",
          "plugrack-python": "#7c3aed", "uwsgi": "#be185d"}


def draw(results):
    """The plot of all contenders that were measured, as the text of an SVG file."""
    keys = list(results.contenders)
    width = LEFT + len(LOADS) * (WIDTH + GAP_X)
    height = TOP + 2 * (HEIGHT + GAP_Y) + LEGEND
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">'
             % (width, height),
             '<rect width="100%" height="100%" fill="#fff"/>']
    for column, load in enumerate(LOADS):
        x = LEFT + column * (WIDTH + GAP_X)
        parts.append(_text(x, TOP - 18, load.title, weight="bold"))
        for row, (field, title, logarithmic) in enumerate((("rate", "requests/s", False), ("p99", "p99 in ms", True))):
            y = TOP + row * (HEIGHT + GAP_Y)
            parts.append(_text(x, y - 4, title))
            parts += _plot(results, load.key, field, x, y, keys, logarithmic)
    for at, key in enumerate(keys):
        x, y = LEFT + at % 4 * 250, height - LEGEND + at // 4 * 20
        parts.append('<line x1="%d" y1="%d" x2="%d" y2="%d" stroke="%s" stroke-width="%g"/>'
                     % (x, y - 4, x + 20, y - 4, COLORS[key], _stroke(key)))
        parts.append(_text(x + 26, y, results.contenders[key].name))
    return "\n".join(parts + ["</svg>"]) + "\n"


def _plot(results, load, field, x, y, keys, logarithmic):
    connections = results.connections(load)
    lines = {key: [(at, results.value(load, c, key, field)) for at, c in enumerate(connections)] for key in keys}
    lines = {key: [(at, value) for at, value in line if value] for key, line in lines.items()}
    values = [value for line in lines.values() for _, value in line]
    if not values:
        return []
    ticks = _decades(values) if logarithmic else _steps(max(values))
    scale = log10 if logarithmic else float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def place(at, value):
        return (x + (at + 0.5) * WIDTH / len(connections), y + HEIGHT - (scale(value) - low) / (high - low) * HEIGHT)

    parts = []
    for tick in ticks:
        level = place(0, tick)[1]
        parts.append('<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#ddd"/>' % (x, level, x + WIDTH, level))
        parts.append(_text(x - 6, level + 4, "%g" % tick if tick < 10000 else "%gk" % (tick / 1000), anchor="end"))
    for at, count in enumerate(connections):
        parts.append(_text(place(at, ticks[-1])[0], y + HEIGHT + 16, str(count), anchor="middle"))
    parts.append(_text(x + WIDTH / 2, y + HEIGHT + 32, "connections", anchor="middle"))
    for key, line in reversed(list(lines.items())):  # the host's, the first, lies above the others
        points = [place(at, value) for at, value in line]
        parts.append('<polyline fill="none" stroke="%s" stroke-width="%g" points="%s"/>'
                     % (COLORS[key], _stroke(key), " ".join("%.1f,%.1f" % point for point in points)))
        parts += ['<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>' % (point + (COLORS[key],)) for point in points]
    return parts


def _stroke(key):
    return 3 if key == "plugrack" else 1.5


def _steps(most):
    """From 0 to above the most, in four or five even steps."""
    size = 10 ** floor(log10(most))
    step = next(size * factor for factor in (0.25, 0.5, 1, 2, 2.5) if size * factor * 5 >= most)
    return [step * at for at in range(ceil(most / step) + 1)]


def _decades(values):
    first, last = floor(log10(min(values))), ceil(log10(max(values)))
    return [10.0 ** power for power in range(first, max(last, first + 1) + 1)]


def _text(x, y, text, anchor="start", weight="normal"):
    return '<text x="%.1f" y="%.1f" text-anchor="%s" font-weight="%s">%s</text>' % (x, y, anchor, weight, escape(text))
