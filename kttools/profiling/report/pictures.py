"""PNGs of the main charts, for places that show no HTML. Needs matplotlib: pip install 'kttools[report]'."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kttools.bundle.atomic import replacing

from .facts import Facts

COLOURS = ("#1f5fd6", "#0d9488", "#d97706", "#c92a4b", "#7c3aed", "#8a5a2b", "#3f7d20", "#64748b")
FAMILY_COLOURS = {"static": 0, "adaptive": 1, "flat": 7, "flat-alpha": 2, "ser": 3, "top-p": 4, "naee": 5}


def write_pictures(facts: Facts, directory: Path) -> list[Path]:
    """pareto.png, k-per-layer.png, load.png, similarity.png as the facts allow; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    drawn = {
        "pareto.png": _pareto,
        "k-per-layer.png": _k_per_layer,
        "load.png": _load,
        "similarity.png": _similarity,
    }
    written = []
    for name, draw in drawn.items():
        figure = _figure()
        if draw(facts, figure):
            with replacing(directory / name) as path:
                figure.savefig(path, format="png", dpi=160, metadata={"Software": None})
            written.append(directory / name)
    return written


def _figure() -> Any:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(figsize=(7.5, 4.5), layout="constrained")


def _axes(figure: Any, title: str, x_label: str, y_label: str) -> Any:
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _pareto(facts: Facts, figure: Any) -> bool:
    if not facts.pareto:
        return False
    axes = _axes(
        figure, f"{facts.model_name}: what fewer experts cost", "experts per token", "mean KL (nats)"
    )
    for index, curve in enumerate(facts.pareto):
        points = np.array(curve.points)
        low, high = points[:, 1] - points[:, 2], points[:, 3] - points[:, 1]
        errors = None if np.isnan(points[:, 2:]).any() else np.maximum([low, high], 0.0)
        colour = COLOURS[FAMILY_COLOURS.get(curve.name, index % 8)]
        axes.errorbar(points[:, 0], points[:, 1], errors, label=curve.label, color=colour, marker="o", ms=4)
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    return True


def _k_per_layer(facts: Facts, figure: Any) -> bool:
    if not facts.k_per_layer:
        return False
    axes = _axes(figure, f"{facts.model_name}: experts kept per layer", "model layer", "experts per token")
    layers, kept = zip(*facts.k_per_layer, strict=True)
    axes.bar(layers, kept, color=COLOURS[0], width=0.7)
    axes.set_ylim(0, facts.k_native)
    return True


def _load(facts: Facts, figure: Any) -> bool:
    order = np.argsort(-facts.pooled_load, axis=-1)
    sorted_load = np.stack([np.take_along_axis(load, order, axis=-1) for load in facts.load], axis=1)
    rows = sorted_load.reshape(-1, order.shape[-1])
    axes = _axes(
        figure, f"{facts.model_name}: expert load", "experts, busiest of the layer first", "layer, domain"
    )
    shown = axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=3, interpolation="nearest")
    if len(rows) <= 60:
        axes.set_yticks(
            range(len(rows)), [f"{n} {d}" for n in facts.moe_layers for d in facts.domains], fontsize=7
        )
    figure.colorbar(shown, label="load / average")
    return True


def _similarity(facts: Facts, figure: Any) -> bool:
    if len(facts.domains) < 2:
        return False
    axes = _axes(figure, f"{facts.model_name}: divergence of expert load (bits)", "", "")
    mean = facts.divergence.mean(axis=0)
    shown = axes.imshow(mean, cmap="Blues")
    axes.set_xticks(range(len(mean)), facts.domains)
    axes.set_yticks(range(len(mean)), facts.domains)
    for i, j in np.ndindex(*mean.shape):
        if i != j:
            ink = "white" if mean[i, j] > mean.max() / 2 else "black"
            axes.text(j, i, f"{mean[i, j]:.3f}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(shown)
    return True
