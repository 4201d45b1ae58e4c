"""SVG from Python strings: escaped tags, and a plot frame with linear or logarithmic axes.

Colours are CSS classes of style.css, so that one picture serves the light and the dark page.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element. class_ -> class, stroke_width -> stroke-width; children are markup already."""
    parts = []
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    return f"<{name}{''.join(parts)}>{''.join(children)}</{name}>"


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "middle", **more: object) -> str:
    return tag("text", escape(content), x=x, y=y, class_=class_ or None, text_anchor=anchor, **more)


def tooltip(content: str) -> str:
    return tag("title", escape(content))


def image(width: float, height: float, *children: str, label: str) -> str:
    """The outer element; it scales with its column. label: for screen readers."""
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", *children, viewBox=box, role="img", aria_label=label, style=f"max-width:{width:g}px")


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    span = max(high - low, 1e-12)
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten inside [low, high]; only powers where that would be many, and evenly
    spaced numbers where it would be one or two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(powers) > 4 else (1, 2, 5)
    found = [m * 10.0**p for p in powers for m in steps if low * 0.999 <= m * 10.0**p <= high * 1.001]
    return found if len(found) > 2 else linear_ticks(low, high)


def short(value: float) -> str:
    """A tick's label: 0.002, 0.5, 12."""
    return f"{value:.6g}"


class Axis:
    """A scale from data to pixels. is_log: positive numbers only."""

    def __init__(self, low: float, high: float, start: float, stop: float, is_log: bool = False) -> None:
        self.is_log = is_log
        self.low, self.high = (low, high) if high > low else (low, low + 1.0)
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low * 1e-3))
        return self._start + (value - low) / (high - low) * (self._stop - self._start)

    def ticks(self, count: int = 5) -> list[float]:
        return log_ticks(self.low, self.high) if self.is_log else linear_ticks(self.low, self.high, count)


class Plot:
    """A frame with grid, axes and marks in data coordinates; render() gives the SVG."""

    LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 14.0, 44.0

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        label: str,
        x_label: str,
        y_label: str,
        width: float = 680,
        height: float = 360,
        log_x: bool = False,
        log_y: bool = False,
        flip_x: bool = False,
    ) -> None:
        self.width, self.height = width, height
        ends = (self.LEFT, width - self.RIGHT)
        start, stop = reversed(ends) if flip_x else ends
        self.x = Axis(*x, start, stop, log_x)
        self.y = Axis(*y, height - self.BOTTOM, self.TOP, log_y)
        self._label, self._x_label, self._y_label = label, x_label, y_label
        self._marks: list[str] = []

    def add(self, *markup: str) -> None:
        self._marks += markup

    def line(self, points: Sequence[tuple[float, float]], class_: str, title: str = "") -> None:
        path = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        children = [tooltip(title)] if title else []
        self.add(tag("polyline", *children, points=path, class_=f"line {class_}"))

    def band(self, points: Sequence[tuple[float, float, float]], class_: str) -> None:
        """points: (x, low, high)."""
        outline = [(a, low) for a, low, _ in points] + [(a, high) for a, _, high in reversed(points)]
        path = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in outline)
        self.add(tag("polygon", points=path, class_=f"band {class_}"))

    def interval(self, a: float, low: float, high: float, class_: str) -> None:
        x = self.x(a)
        self.add(tag("line", x1=x, x2=x, y1=self.y(low), y2=self.y(high), class_=f"interval {class_}"))

    def dot(self, a: float, b: float, class_: str, title: str, radius: float = 4.0) -> None:
        self.add(tag("circle", tooltip(title), cx=self.x(a), cy=self.y(b), r=radius, class_=f"dot {class_}"))

    def bar(self, a: float, b: float, thickness: float, class_: str, title: str) -> None:
        """A bar from the lower end of the y axis; thickness in pixels."""
        top, bottom = self.y(b), self.height - self.BOTTOM
        box = {"x": self.x(a) - thickness / 2, "y": top, "width": thickness, "height": max(bottom - top, 0.0)}
        self.add(tag("rect", tooltip(title), rx=min(3.0, thickness / 4), class_=f"bar {class_}", **box))

    def render(
        self,
        x_ticks: Iterable[float] | None = None,
        show_x: Callable[[float], str] = short,
        show_y: Callable[[float], str] = short,
    ) -> str:
        bottom, right = self.height - self.BOTTOM, self.width - self.RIGHT
        frame = []
        for value in self.y.ticks():
            y = self.y(value)
            frame.append(tag("line", x1=self.LEFT, x2=right, y1=y, y2=y, class_="grid"))
            frame.append(text(self.LEFT - 8, y + 4, show_y(value), "tick", "end"))
        for value in self.x.ticks() if x_ticks is None else x_ticks:
            x = self.x(value)
            frame.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
            frame.append(text(x, bottom + 18, show_x(value), "tick"))
        frame.append(tag("line", x1=self.LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
        middle = (self.LEFT + right) / 2
        frame.append(text(middle, self.height - 6, self._x_label, "axis-label"))
        at = (self.TOP + bottom) / 2
        frame.append(text(13, at, self._y_label, "axis-label", transform=f"rotate(-90 13 {at:.0f})"))
        return image(self.width, self.height, *frame, *self._marks, label=self._label)
