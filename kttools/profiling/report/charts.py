"""The report's curves, bars and scatter plots: facts -> SVG. Each returns "" when the facts are not there."""

import math

from . import svg
from .facts import Facts, Series, number

# Fixed colours for what a reader compares; everything else takes the next free one. See style.css.
FAMILY_CLASSES = {
    "static": "c0",
    "adaptive": "c1",
    "flat": "c7",
    "flat-alpha": "c2",
    "ser": "c3",
    "top-p": "c4",
    "naee": "c5",
}


def colour(index: int) -> str:
    return f"c{index % 8}"


def family_colour(name: str, index: int) -> str:
    return FAMILY_CLASSES.get(name, colour(index))


def legend(entries: list[tuple[str, str]]) -> str:
    """HTML above a chart. entries: (class, label)."""
    items = [
        svg.tag("span", svg.tag("i", class_=f"swatch {class_}"), svg.escape(label), class_="key")
        for class_, label in entries
    ]
    return svg.tag("div", *items, class_="legend")


def pareto(facts: Facts) -> str:
    """Mean KL against realised mean k, with 95 % intervals: lower and further right is better."""
    curves = facts.pareto
    if not curves:
        return ""
    points = [point for curve in curves for point in curve.points]
    values = [v for _, kl, low, high in points for v in (kl, low, high) if v > 0]
    smallest, largest = min(p[0] for p in points), max(p[0] for p in points)
    if largest - smallest < 0.5:  # one mean: it stands in the middle
        middle = round((smallest + largest) / 2)
        smallest, largest = middle - 1.0, middle + 1.0
    plot = svg.Plot(
        (math.floor(smallest), math.ceil(largest)),
        (min(values) / 1.25, max(values) * 1.25),
        label="Mean KL divergence against experts per token, by policy",
        x_label=f"experts per token, realised mean (the model's own: {facts.k_native})",
        y_label="mean KL to the full model (nats, log)",
        width=980,
        height=440,
        log_y=True,
        flip_x=True,
    )
    judged = facts.judged
    ours = [c.name for c in curves if c.name in ("static", "adaptive")]
    # Ours last, so that they are drawn on top.
    for index, curve in sorted(enumerate(curves), key=lambda pair: pair[1].name in ours):
        _pareto_curve(plot, curve, family_colour(curve.name, index), curve.name in ours)
    if judged:
        pooled = judged["metrics"]["pooled"]
        plot.dot(
            judged["k_mean"], pooled["kl_mean"], "ring", f"this table: {judged.get('label', '')}", radius=9.0
        )
    keys = [(family_colour(c.name, i), c.label) for i, c in enumerate(curves)]
    ticks = [float(k) for k in range(math.floor(smallest), math.ceil(largest) + 1)]
    return legend(keys) + plot.render(ticks)


def _pareto_curve(plot: svg.Plot, curve: Series, class_: str, is_ours: bool) -> None:
    bounded = [(k, low, high) for k, _, low, high in curve.points if low > 0 and high > 0]
    if is_ours and len(bounded) > 1:
        plot.band(bounded, class_)
    plot.line(
        [(k, kl) for k, kl, _, _ in curve.points], f"{class_}{' strong' if is_ours else ''}", curve.label
    )
    for k, low, high in bounded:
        plot.interval(k, low, high, class_)
    for k, kl, low, high in curve.points:
        interval = f" [{low:.4g}, {high:.4g}]" if low > 0 else ""
        plot.dot(
            k, kl, class_, f"{curve.label}\n{k:.2f} experts: KL {kl:.4g}{interval}", 4.5 if is_ours else 3.2
        )


def domain_ratios(facts: Facts) -> str:
    """A forest plot: the table's KL over flat k's, per domain, with intervals; left of 1 is better."""
    flat, judged, evaluation = facts.flat_rival, facts.judged, facts.evaluation
    if flat is None or judged is None or evaluation is None:
        return ""
    scopes = ["pooled", *judged["metrics"]["domains"]]
    rows = [(scope, row) for scope in scopes if (row := facts.comparison(flat, scope))]
    if not rows:
        return ""
    highest = max(1.1, *(number(r.get("ratio_high", r["ratio"])) for _, r in rows)) * 1.04
    left, right, step, top = 112.0, 14.0, 30.0, 12.0
    height = top + step * len(rows) + 44
    width = 480.0
    axis = svg.Axis(0, highest, left, width - right)
    marks = []
    bottom = top + step * len(rows)
    for value in axis.ticks(6):
        x = axis(value)
        marks.append(svg.tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        marks.append(svg.text(x, bottom + 17, svg.short(value), "tick"))
    marks.append(svg.tag("line", x1=axis(1), x2=axis(1), y1=top, y2=bottom, class_="reference"))
    for index, (scope, row) in enumerate(rows):
        y = top + step * (index + 0.5)
        marks += _ratio_row(axis, y, scope, row, evaluation["data"].get(scope, {}))
    marks.append(
        svg.text((left + width - right) / 2, height - 6, f"mean KL relative to {flat}", "axis-label")
    )
    return svg.image(width, height, *marks, label=f"KL relative to {flat} per domain")


def _ratio_row(
    axis: svg.Axis, y: float, scope: str, row: dict[str, float], data: dict[str, object]
) -> list[str]:
    class_ = "c3" if row.get("is_worse") else "c0" if row.get("is_better") else "c7"
    low, high = number(row.get("ratio_low")), number(row.get("ratio_high"))
    note = "" if scope == "pooled" else "profiled" if data.get("profiled") else "never profiled"
    title = f"{scope}: {row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
    marks = [svg.text(100, y + 1, scope, "row-label", "end")]
    if note:
        marks.append(svg.text(100, y + 12, note, "row-note", "end"))
    if low == low and high == high:
        box = {"x1": axis(max(low, 0.0)), "x2": axis(high), "y1": y, "y2": y}
        marks.append(svg.tag("line", class_=f"interval wide {class_}", **box))
    radius = 6.5 if scope == "pooled" else 4.5
    marks.append(
        svg.tag("circle", svg.tooltip(title), cx=axis(row["ratio"]), cy=y, r=radius, class_=f"dot {class_}")
    )
    return marks


def k_per_layer(facts: Facts) -> str:
    """Experts kept in each MoE layer."""
    rows = facts.k_per_layer
    if not rows:
        return ""
    plot = _layer_plot(
        [layer for layer, _ in rows], (0, facts.k_native), "experts per token", "Experts kept per layer"
    )
    thickness = _thickness(plot, len(rows))
    for layer, k in rows:
        plot.bar(layer, facts.k_native, thickness, "ghost", f"layer {layer}: {k:.2f} of {facts.k_native}")
        plot.bar(layer, k, thickness, "c0", f"layer {layer}: {k:.2f} of {facts.k_native}")
        if len(rows) <= 32:
            plot.add(svg.text(plot.x(layer), plot.y(k) + (15 if k > 0.6 else -5), f"{k:.3g}", "bar-label"))
    return plot.render(_layer_ticks([layer for layer, _ in rows]))


def sensitivity(facts: Facts) -> str:
    """KL at the output when one layer alone runs with half of its experts, with standard errors."""
    rows = sorted(facts.sensitivity.items())
    if not rows:
        return ""
    highest = max(v["d"] + v.get("standard_error", 0.0) for _, v in rows) * 1.1
    k0 = (facts.table or {})["provenance"]["sensitivity"].get("k0")
    plot = _layer_plot(
        [layer for layer, _ in rows], (0, highest), f"KL at {k0} experts (nats)", "Sensitivity per layer"
    )
    thickness = _thickness(plot, len(rows))
    for layer, values in rows:
        d, error = values["d"], values.get("standard_error", 0.0)
        plot.bar(layer, d, thickness, "c4", f"layer {layer}: {d:.4g} +- {error:.2g} nats")
        plot.interval(layer, max(d - error, 0.0), d + error, "ink")
    return plot.render(_layer_ticks([layer for layer, _ in rows]))


def _layer_plot(layers: list[int], y: tuple[float, float], y_label: str, label: str) -> svg.Plot:
    x = (min(layers) - 0.6, max(layers) + 0.6)
    return svg.Plot(x, y, label=label, x_label="model layer", y_label=y_label, width=440, height=260)


def _thickness(plot: svg.Plot, bars: int) -> float:
    return min(46.0, 0.72 * (plot.width - plot.LEFT - plot.RIGHT) / max(bars, 1))


def _layer_ticks(layers: list[int]) -> list[float]:
    stride = max(1, math.ceil(len(layers) / 16))
    return [float(layer) for layer in layers[::stride]]


def predictions(facts: Facts) -> str:
    """KL predicted from layer errors and sensitivities against KL measured, one dot per allocation."""
    rows = facts.predictions
    if not rows:
        return ""
    values = [float(r[key]) for r in rows for key in ("kl_predicted", "kl_measured")]
    ends = (min(values) / 1.3, max(values) * 1.3)
    plot = svg.Plot(
        ends,
        ends,
        label="Predicted against measured KL",
        x_label="predicted KL (nats, log)",
        y_label="measured KL (nats, log)",
        width=440,
        height=340,
        log_x=True,
        log_y=True,
    )
    plot.line([(ends[0], ends[0]), (ends[1], ends[1])], "reference", "predicted = measured")
    for row in rows:
        name = f"k = {row['k']}" if row.get("k") is not None else str(row.get("name", ""))
        title = f"{name}\npredicted {row['kl_predicted']:.4g}, measured {row['kl_measured']:.4g}"
        plot.dot(row["kl_predicted"], row["kl_measured"], "c0", title, 4.5)
    return plot.render()


def lru(facts: Facts) -> str:
    """Hit rate of a least-recently-used cache of experts per layer, against its size."""
    curves = facts.lru
    if not curves:
        return ""
    num_experts = facts.counts.shape[-1]
    return _shares(
        curves, num_experts, "experts cached per layer", "hit rate", "LRU hit rate", "uniform, random routing"
    )


def hot_set(facts: Facts) -> str:
    """Share of all selections that the n busiest experts of each layer take."""
    coverage = facts.hot_coverage
    num_experts = coverage.shape[1] - 1
    mean = coverage.mean(axis=0)
    nan = math.nan
    curves = [
        Series("mean", "mean of layers", [(float(n), float(v), nan, nan) for n, v in enumerate(mean)]),
        Series(
            "least",
            "most even layer",
            [(float(n), float(v), nan, nan) for n, v in enumerate(coverage.min(axis=0))],
        ),
        Series(
            "most",
            "most uneven layer",
            [(float(n), float(v), nan, nan) for n, v in enumerate(coverage.max(axis=0))],
        ),
    ]
    return _shares(
        curves,
        num_experts,
        "busiest experts on the GPU, per layer",
        "share of selections",
        "GPU hot set",
        "even load",
    )


def _shares(
    curves: list[Series], num_experts: int, x_label: str, y_label: str, label: str, diagonal: str
) -> str:
    plot = svg.Plot(
        (0, num_experts), (0, 1), label=label, x_label=x_label, y_label=y_label, width=440, height=300
    )
    plot.line([(0, 0), (num_experts, 1)], "reference", diagonal)
    for index, curve in enumerate(curves):
        plot.line([(n, share) for n, share, _, _ in curve.points], colour(index), curve.label)
        stride = max(1, len(curve.points) // 16)
        for n, share, _, _ in curve.points[::stride]:
            plot.dot(
                n, share, colour(index), f"{curve.label}\n{n:g} of {num_experts} experts: {share:.1%}", 2.6
            )
    keys = [(colour(i), c.label) for i, c in enumerate(curves)]
    return legend([*keys, ("reference", diagonal)]) + plot.render(show_y=lambda v: f"{v:.0%}")
