"""The report's matrices: expert load per layer and domain, and how alike the domains are."""

import base64
import struct
import zlib

import numpy as np

from . import svg
from .facts import Array, Facts

LEVELS = 12  # classes h0 .. h11 of style.css
# Above this many cells the map becomes one PNG: rectangles with tooltips would be megabytes.
MAX_CELLS = 24_000
# Light to dark, for the PNG; the same hues as style.css in the light page.
PNG_COLOURS = ((0xEE, 0xF3, 0xFA), (0x0B, 0x3C, 0x8C))


def level(load: Array) -> np.ndarray:
    """Load relative to the average -> 0..11: 0 is idle, 4 the average, 11 three times the average and up."""
    return np.clip(np.rint(4 * np.power(np.maximum(load, 0.0), 0.92)), 0, LEVELS - 1).astype(int)


def load_map(facts: Facts) -> str:
    """Rows: for each MoE layer its domains. Columns: experts, busiest of the layer first."""
    order = np.argsort(-facts.pooled_load, axis=-1, kind="stable")
    num_domains, num_layers, num_experts = facts.load.shape
    left, width, top = 120.0, 980.0, 8.0
    cell = (width - left - 8) / num_experts
    tall = 15.0 if num_layers * num_domains <= 60 else 7.0 if num_layers * num_domains <= 200 else 3.0
    gap = tall * 0.6
    parts = []
    y = top
    as_png = facts.load.size > MAX_CELLS
    for row, layer in enumerate(facts.moe_layers):
        block = np.stack([facts.load[d, row, order[row]] for d in range(num_domains)])
        middle = y + tall * num_domains / 2 + 4
        parts.append(svg.text(4, middle, f"layer {layer}", "row-label", "start"))
        if as_png:
            parts.append(_png_block(block, left, y, width - left - 8, tall * num_domains))
        else:
            parts += _cells(facts, layer, block, order[row], left, y, cell, tall)
        if tall >= 10:
            parts += [
                svg.text(left - 6, y + tall * (d + 0.76), name, "row-note", "end")
                for d, name in enumerate(facts.domains)
            ]
        y += tall * num_domains + gap
    parts.append(svg.text((left + width) / 2, y + 14, "experts, busiest of the layer first", "axis-label"))
    return svg.image(width, y + 22, *parts, label="Expert load per layer and domain")


def _cells(
    facts: Facts,
    layer: int,
    block: Array,
    experts: np.ndarray,
    left: float,
    y: float,
    cell: float,
    tall: float,
) -> list[str]:
    levels = level(block)
    out = []
    for d, domain in enumerate(facts.domains):
        for e, expert in enumerate(experts):
            title = f"layer {layer}, expert {int(expert)}, {domain}: {block[d, e]:.2f} x the average load"
            out.append(
                svg.tag(
                    "rect",
                    svg.tooltip(title),
                    x=left + e * cell,
                    y=y + d * tall,
                    width=cell - min(1.0, cell * 0.15),
                    height=tall - min(1.0, tall * 0.15),
                    class_=f"h{levels[d, e]}",
                )
            )
    return out


def _png_block(block: Array, x: float, y: float, width: float, height: float) -> str:
    share = level(block)[..., None] / (LEVELS - 1)
    low, high = (np.array(c, dtype=np.float64) for c in PNG_COLOURS)
    pixels = np.rint(low + (high - low) * share).astype(np.uint8)
    href = "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")
    box = {"x": x, "y": y, "width": width, "height": height}
    return svg.tag("image", href=href, preserveAspectRatio="none", class_="pixels", **box)


def png(pixels: np.ndarray) -> bytes:
    """An RGB image [H, W, 3] uint8 as a PNG file (one IDAT, filter 0)."""
    height, width, _ = pixels.shape
    raw = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )


def load_scale() -> str:
    """The key of the load map: level classes with what they mean."""
    swatches = [svg.tag("i", class_=f"swatch h{i}") for i in range(LEVELS)]
    return svg.tag("div", "idle ", *swatches, " 3 x the average load or more", class_="legend scale")


def similarity(facts: Facts) -> str:
    """Jensen-Shannon divergence of expert load between domains in bits, mean over layers."""
    if len(facts.domains) < 2:
        return ""
    mean = facts.divergence.mean(axis=0)
    highest = max(float(mean.max()), 1e-9)
    left, top, size = 78.0, 30.0, min(58.0, 360.0 / len(facts.domains))
    parts = []
    for i, name in enumerate(facts.domains):
        parts.append(svg.text(left - 8, top + size * (i + 0.5) + 4, name, "row-label", "end"))
        parts.append(svg.text(left + size * (i + 0.5), top - 9, name, "row-label"))
        for j, other in enumerate(facts.domains):
            parts += _similarity_cell(
                name, other, float(mean[i, j]), highest, left + size * j, top + size * i, size
            )
    side = size * len(facts.domains)
    return svg.image(left + side + 10, top + side + 8, *parts, label="Domain similarity")


def _similarity_cell(
    name: str, other: str, value: float, highest: float, x: float, y: float, size: float
) -> list[str]:
    shade = round((LEVELS - 1) * 0.85 * value / highest)
    ink = "on-dark" if shade > 5 else "on-light"
    title = svg.tooltip(f"{name} / {other}: {value:.4f} bits")
    box = {"x": x, "y": y, "width": size - 2, "height": size - 2}
    cell = svg.tag("rect", title, rx=4, class_="diagonal" if name == other else f"h{shade}", **box)
    if name == other:
        return [cell]
    return [cell, svg.text(x + size / 2 - 1, y + size / 2 + 4, f"{value:.3f}".lstrip("0"), f"cell {ink}")]


def divergence_by_layer(facts: Facts) -> str:
    """Mean divergence over pairs of domains, per layer: where the model tells domains apart."""
    if len(facts.domains) < 2:
        return ""
    pairs = np.triu_indices(len(facts.domains), 1)
    values = facts.divergence[:, pairs[0], pairs[1]].mean(axis=-1)
    layers = facts.moe_layers
    plot = svg.Plot(
        (min(layers) - 0.6, max(layers) + 0.6),
        (0, max(float(values.max()) * 1.15, 1e-6)),
        label="Divergence between domains per layer",
        x_label="model layer",
        y_label="JS divergence (bits)",
        width=440,
        height=260,
    )
    thickness = min(46.0, 0.72 * (plot.width - plot.LEFT - plot.RIGHT) / len(layers))
    for layer, value in zip(layers, values, strict=True):
        plot.bar(layer, float(value), thickness, "c1", f"layer {layer}: {value:.4f} bits")
    stride = max(1, -(-len(layers) // 16))
    return plot.render([float(layer) for layer in layers[::stride]])
