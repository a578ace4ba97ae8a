"""A plot of the growth measurement as SVG: seconds and memory over the length of a row, both axes logarithmic."""
import math

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 430, 330, 62, 34, 46


def panel(x0, title, unit, points, curve, slope):
    """One pair of axes at `x0`: measured points, the fitted curve, and how pure proportion would grow."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
    if high / low < 11:
        low, high = min(ys) / 1.3, max(ys) * 1.3
    width, height = WIDTH - LEFT - 14, HEIGHT - TOP - BOTTOM
    place = lambda v, a, b: math.log(v / a) / math.log(b / a)
    x = lambda v: x0 + LEFT + width * (0.03 + 0.94 * place(v, xs[0], xs[-1]))
    y = lambda v: TOP + height * (1 - place(v, low, high))
    line = lambda f: " ".join(f"{x(v):.1f},{y(f(v)):.1f}" for v in samples if low <= f(v) <= high)
    samples = [xs[0] * (xs[-1] / xs[0]) ** (i / 60) for i in range(61)]
    out = [f'<rect x="{x0 + LEFT}" y="{TOP}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
           f'<text x="{x0 + LEFT}" y="{TOP - 12}" font-weight="bold">{title}</text>',
           f'<text x="{x0 + LEFT + width / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">tokens of a row</text>']
    for v in xs:
        out.append(f'<path d="M{x(v):.1f},{TOP}v{height}" stroke="#eee"/>')
        out.append(f'<text x="{x(v):.1f}" y="{TOP + height + 16}" text-anchor="middle">{v}</text>')
    ticks = [m * 10**e for e in range(-3, 7) for m in (1, 2, 5) if low <= m * 10**e <= high]
    for v in ticks:
        out.append(f'<path d="M{x0 + LEFT},{y(v):.1f}h{width}" stroke="#eee"/>')
        out.append(f'<text x="{x0 + LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}{unit}</text>')
    if slope:
        out.append(f'<polyline points="{line(slope)}" fill="none" stroke="#999" stroke-dasharray="4 4"/>')
    out.append(f'<polyline points="{line(curve)}" fill="none" stroke="#c33" stroke-width="1.5"/>')
    out += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5" fill="#036"/>' for a, b in points]
    return out


def growth(result):
    """Returns the SVG text."""
    a, b, c = result["time_fit"]["coefficients"]
    m, k = result["memory_fit"]["coefficients"]
    seconds = [(p["tokens"], p["median_seconds"]) for p in result["points"]]
    memory = [(p["tokens"], p["peak_rss_bytes"] / 2**20) for p in result["points"]]
    body = panel(0, "seconds a step (dashed: without the attention term)", " s", seconds, lambda n: a + b * n + c * n * n,
                 lambda n: a + b * n)
    body += panel(WIDTH, "peak memory", " MiB", memory, lambda n: (m + k * n) / 2**20, None)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {2 * WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="11">')
    return "\n".join([head, f'<rect width="{2 * WIDTH}" height="{HEIGHT}" fill="white"/>', *body, "</svg>", ""])
