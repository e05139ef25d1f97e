"""Builds a self-contained HTML page: tables, and charts as inline SVG; nothing is fetched."""

import html
import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""The x and y values of each label."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1320px;
       margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2.2em; border-bottom: 1px solid #d5dce3; }
h3 { margin-bottom: .3em; }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .6em; text-align: right; white-space: nowrap;
         font-size: 13px; border-bottom: 1px solid #e6ebf0; }
th { background: #f4f7fa; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr.ours td { background: #fff4e3; font-weight: 600; } tr.rival td { background: #eef5ff; }
.figures { display: flex; flex-wrap: wrap; gap: 1em; } .wide { overflow-x: auto; }
figure { margin: 0; } figcaption { color: #5b6b7b; font-size: .9em; max-width: 500px; }
svg { max-width: 100%; height: auto; }
"""
_HIGHLIGHT_COLOURS = {"ours": "#d9730d", "rival": "#2563eb"}
_COLOURS = ("#6b7f8f", "#4c9f70", "#a66fb5", "#b5a642", "#5ba4b5", "#c26d6d", "#7a7ac2", "#8a8a8a")


class HtmlPage:
    """Collects the blocks of a page in order, and draws its charts."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._highlights: dict[str, str] = {}
        self._blocks: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        self._blocks.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        self._blocks.append(f"<p>{html.escape(text)}</p>")

    def highlight(self, ours: str, rival: str | None) -> None:
        """From here on, let these labels stand out in tables and charts."""
        self._highlights = {ours: "ours"} | ({rival: "rival"} if rival else {})

    def highlighted(self) -> list[str]:
        """The labels that stand out, ours first."""
        return list(self._highlights)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = ["<div class=wide><table><tr>"]
        lines += [f"<th>{html.escape(cell)}</th>" for cell in header]
        for row in rows:
            kind = self._highlights.get(row[0], "")
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            lines.append(f'</tr>\n<tr class="{kind}">{cells}')
        self._blocks.append("".join(lines) + "</tr></table></div>")

    def figures(self, *pairs: tuple[str, str]) -> None:
        """Add captions and SVGs, side by side where there is room; an empty SVG is left out."""
        parts = [
            f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, svg in pairs
            if svg
        ]
        self._blocks.append(f'<div class="figures">{"".join(parts)}</div>')

    def line_chart(self, series: Series, x: str, y: str, dots: bool = False) -> str:
        """An SVG with one line per label; empty if there are no points."""
        if not any(len(xs) for xs, _ in series.values()):
            return ""
        figure, axes = _axes(x, y)
        for index, (label, (xs, ys)) in enumerate(series.items()):
            stands_out = label in self._highlights
            axes.plot(
                xs,
                ys,
                color=self._colour(label, index),
                label=label,
                marker="o" if dots else None,
                markersize=3.5,
                linewidth=2.4 if stands_out else 1.1,
                zorder=3 if stands_out else 2,
            )
        axes.legend(fontsize=7, ncols=1 + len(series) // 9, frameon=False)
        return _svg(figure)

    def bar_chart(
        self, categories: Sequence[str], series: Mapping[str, Sequence[float]], y: str
    ) -> str:
        """An SVG with one bar per category and label; empty if there are none."""
        if not categories or not series:
            return ""
        figure, axes = _axes("", y)
        width, count = 0.8 / len(series), len(categories)
        for index, (label, values) in enumerate(series.items()):
            places = [c + (index - (len(series) - 1) / 2) * width for c in range(count)]
            axes.bar(places, values, width, label=label, color=self._colour(label, index))
        turned = max(map(len, categories)) > 9
        angle, anchor = (60, "right") if turned else (0, "center")
        axes.set_xticks(range(count), categories, rotation=angle, ha=anchor, fontsize=8)
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False)
        return _svg(figure)

    def _colour(self, label: str, index: int) -> str:
        if kind := self._highlights.get(label):
            return _HIGHLIGHT_COLOURS[kind]
        return _COLOURS[index % len(_COLOURS)]

    def html(self) -> str:
        title = html.escape(self._title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
            + "\n".join(self._blocks)
            + "\n</body></html>\n"
        )


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e6ebf0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The svg element alone: the XML header names a DTD, which a page must not fetch."""
    out = io.StringIO()
    figure.tight_layout()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]
