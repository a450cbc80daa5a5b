"""The pictures of a training report, as SVG in two languages; the browser draws the text, so no font is needed here."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# matplotlib is imported where a picture is drawn: that takes half a second, and most runs draw none.

CHINESE = {
    "update": "训练步",
    "bits per character": "每字符比特数",
    "training": "训练集",
    "held out": "验证集",
    "best": "最佳",
    "counting (n-gram)": "计数（n-gram）",
    "learning rate": "学习率",
    "tokens per second": "token/秒",
}
"""The labels of the pictures, by their English."""

_BLUE, _LIGHT_BLUE, _ORANGE, _GREEN, _GREY = "#2563a8", "#b7cfe8", "#c8541b", "#3b7d3b", "#666666"


def loss_picture(figures: Mapping[str, Any]) -> str:
    """Training and held-out loss in bits per character, with what counting needs as a line."""
    training, validation = figures["training"], figures["validation"]
    figure, (axes,) = _figure(1, height=3.6)
    updates, bits = _numbers(training["update"]), _numbers(training["bits_per_character"])
    axes.plot(updates, bits, color=_LIGHT_BLUE, linewidth=0.8)
    axes.plot(updates, smoothed(bits), color=_BLUE, linewidth=1.6, label="training")
    levels = [smoothed(bits)[len(bits) // 20 :]]
    if validation:
        measured, their_bits = _numbers(validation["update"]), _numbers(validation["bits_per_character"])
        axes.plot(measured, their_bits, color=_ORANGE, linewidth=1.6, marker="o", markersize=4, label="held out")
        best = int(np.nanargmin(their_bits))
        axes.plot(measured[best], their_bits[best], color=_ORANGE, marker="*", markersize=13, ls="", label="best")
        levels.append(their_bits)
    if figures["yardstick"] is not None:
        counting = figures["yardstick"]["bits_per_character"]
        axes.axhline(counting, color=_GREEN, linestyle="--", linewidth=1.4, label="counting (n-gram)")
        levels.append(np.array([counting]))
    shown = np.concatenate(levels)
    shown = shown[np.isfinite(shown)]
    if len(shown):
        margin = 0.06 * (shown.max() - shown.min()) + 0.02
        axes.set_ylim(max(0.0, shown.min() - margin), shown.max() + margin)
    axes.set_xlabel("update")
    axes.set_ylabel("bits per character")
    axes.legend(frameon=False, loc="upper right")
    return _svg(figure, "loss")


def speed_picture(figures: Mapping[str, Any]) -> str:
    """The learning rate and the throughput."""
    training = figures["training"]
    figure, both = _figure(2, height=2.3)
    updates = _numbers(training["update"])
    for axes, name, label, color in zip(
        both,
        ("learning_rate", "tokens_per_second"),
        ("learning rate", "tokens per second"),
        (_GREY, _BLUE),
        strict=True,
    ):
        axes.plot(updates, _numbers(training[name]), color=color, linewidth=1.2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("update")
        axes.set_ylabel(label)
    both[0].ticklabel_format(axis="y", style="plain", useOffset=False)
    return _svg(figure, "speed")


def smoothed(values: npt.NDArray[np.float64], width: int = 15) -> npt.NDArray[np.float64]:
    """The mean of each value and its neighbours, fewer at the ends; what is not finite is left out."""
    finite = np.isfinite(values)
    width = max(1, min(width, len(values) // 8)) | 1
    window = np.ones(width)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    counts = np.convolve(finite.astype(np.float64), window, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _numbers(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _figure(columns: int, *, height: float) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page, with its labels in both languages; the same figure gives the same text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # what is before it is for a file of its own
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r'\1role="img"', svg, count=1)
    svg = re.sub(r" id=\"(figure|axes|patch|line2d|xtick|ytick|text|legend|matplotlib)[^\"]*\"", "", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's
    for english, chinese in CHINESE.items():
        both = f'><tspan class="en">{escape(english)}</tspan><tspan class="zh">{chinese}</tspan></text>'
        svg = svg.replace(f">{escape(english)}</text>", both)
    return svg
