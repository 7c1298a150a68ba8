"""Curves of one or several runs as inline SVG, drawn by matplotlib, coloured by the page's own style sheet.

matplotlib knows no light and dark: it draws in stand-in colours, which become CSS variables afterwards, so that
one drawing serves both. Text stays text.
"""

import html
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from caco_scale.report.runs import Run, is_number
from caco_scale.run.alarm import LOW_RANKME, LOW_SPREAD

MAX_POINTS = 400  # of a drawn line; longer ones are averaged, with a band from least to greatest
WIDTH, HEIGHT = 5.0, 2.35  # inches of 72 points
STAND_INS = {"#010101": "--ink", "#020202": "--muted", "#030303": "--line"} | {
    f"#04040{number}": f"--run{number}" for number in range(6)
}


@dataclass(frozen=True)
class Panel:
    """A chart: which figure, its title, what it says, its unit and how its numbers are written.

    ``factor``: what a value is multiplied by. ``from_zero``: the axis begins at zero. ``reference``: function of a
    run that gives (value, words) of a horizontal line, or None. ``names_step``: its last value is of a step to be
    named, as it is measured now and then.
    """

    figure: str
    title: str
    explanation: str = ""
    unit: str = ""
    digits: int = 4
    factor: float = 1.0
    from_zero: bool = False
    reference: Callable[[Run], tuple[float, str] | None] | None = None
    names_step: bool = False


@dataclass(frozen=True)
class Axis:
    """What charts are drawn over: ``unit`` is "epoch" (of the data), or "step" where a run does not say its epochs."""

    unit: str
    end: float

    def place(self, run: Run, step: Any) -> Any:
        """Where a step of a run is, or an array of them."""
        return step / run.steps_per_epoch if self.unit == "epoch" else step


def axis_of(runs: Sequence[Run]) -> Axis:
    """One :class:`Axis` for all charts of some runs."""
    unit = "epoch" if all(run.steps_per_epoch for run in runs) else "step"
    end = max(Axis(unit, 0).place(run, run.last_step) for run in runs)
    return Axis(unit, end or 1.0)


def _raw_pixels(run):
    value = next(
        (r["knn_top1_raw_pixels"] for r in run.metrics if is_number(r.get("knn_top1_raw_pixels"))), None
    )
    return None if value is None else (value, "raw pixels")


def _low_spread(run):
    return LOW_SPREAD / math.sqrt(run.config.model.embedding_dim), "collapse alarm"


def _low_rankme(run):
    return min(LOW_RANKME, run.config.data.global_batch_size / 8), "collapse alarm"


TRAINING = (
    Panel("loss", "Loss", "contrastive loss of the global batch", digits=4),
    Panel(
        "knn_top1",
        "kNN top-1",
        "backbone features, labels used only here",
        "%",
        4,
        reference=_raw_pixels,
        names_step=True,
    ),
    Panel("lr", "Learning rate", "of the encoder, absolute", digits=3, from_zero=True),
    Panel("bank_lr", "Bank learning rate", "of the rows, absolute", digits=3, from_zero=True),
    Panel("key_momentum", "Key momentum", "of the key encoder's average", digits=6),
    Panel(
        "images_per_second", "Throughput", "all processes, evaluation excluded", "images/s", 3, from_zero=True
    ),
    Panel(
        "data_wait", "Data wait", "share of the time spent waiting for batches", "%", 3, 100, from_zero=True
    ),
    Panel("knn_seconds", "kNN evaluation", "time that training stood still for it", "s", 3, from_zero=True),
    Panel(
        "checkpoint_seconds",
        "Checkpoint",
        "from snapshot to complete, in the background",
        "s",
        3,
        from_zero=True,
    ),
)
HEALTH = (
    Panel(
        "bank_rows_used", "Rows used", "caco: share that was a positive in the last epoch", "%", 4, 100, True
    ),
    Panel(
        "bank_assignment_entropy",
        "Assignment entropy",
        "caco: 1 if all rows are used alike, 0 if one is all",
        digits=4,
    ),
    Panel("bank_row_norm", "Row norm", "mean norm of the bank's rows", digits=4),
    Panel(
        "positive_probability",
        "Positive probability",
        "softmax mass on the positive",
        digits=3,
        from_zero=True,
    ),
    Panel(
        "embedding_std", "Embedding spread", "standard deviation per dimension", "", 3, 1, True, _low_spread
    ),
    Panel("rankme", "RankMe", "effective rank of the features", "", 4, 1, True, _low_rankme),
)
NOT_FURTHER = {"skipped", "corrupt", "skipped_step", "knn_top1_raw_pixels"}


def further_panels(runs: Sequence[Run]) -> list[Panel]:
    """A panel for every other figure that the metrics hold."""
    known = {panel.figure for panel in TRAINING + HEALTH} | NOT_FURTHER
    names = dict.fromkeys(name for run in runs for name in run.figures())
    return [Panel(name, name.replace("_", " ")) for name in names if name not in known]


def draw_panels(
    panels: Iterable[Panel], runs: Sequence[Run], resumes: Sequence[Sequence[float]], axis: Axis
) -> list[dict[str, Any]]:
    """The charts that at least one run has figures for -> list of dicts for the page.

    ``resumes``: for every run the steps at which it was resumed.
    """
    charts = []
    for panel in panels:
        series = [run.series(panel.figure) for run in runs]
        if any(np.isfinite(one.value).any() for one in series):
            charts.append(_chart(panel, runs, series, resumes, axis))
    return charts


def _chart(panel, runs, series, resumes, axis):
    lines = [_thinned(one, panel.factor) for one in series]
    for run, line in zip(runs, lines, strict=True):
        line["place"] = axis.place(run, line["step"])
    svg, frame = _draw(panel, runs, lines, resumes, axis)
    data = {
        "title": panel.title,
        "figure": panel.figure,
        "digits": panel.digits,
        "unit": panel.unit,
        "axis": axis.unit,
    }
    data |= {"frame": frame, "lines": [_for_script(run, line) for run, line in zip(runs, lines, strict=True)]}
    return {
        "title": panel.title,
        "explanation": panel.explanation,
        "svg": svg,
        "last": [_last(one, panel) for one in series],
        "data": json.dumps(data, separators=(",", ":")),
        "averaged": max(line["per_point"] for line in lines),
    }


def _last(series, panel):
    """The last value in words, or None."""
    value, step = series.last(), series.last_step()
    if value is None:
        return None
    text = write_number(value * panel.factor, panel.digits, panel.unit)
    if not panel.names_step:
        return text
    return f"{text} at step {step:,}" if step else f"{text} before training"


def _for_script(run, line):
    """A line for the page's script: places on the axis, steps, values, of means also the least and greatest."""
    numbers = {"e": _plain(line["place"], 4), "s": _plain(line["step"], 0), "v": _plain(line["mean"], 6)}
    if line["band"]:
        least, greatest = (_plain(values, 6) for values in line["band"])
        numbers |= {"least": least, "greatest": greatest}
    return {"run": run.name, **numbers}


def _plain(values, digits):
    """Numbers for JSON: NaN is null."""
    if digits == 0:
        return [int(v) for v in values]
    return [float(f"{v:.{digits + 2}g}") if math.isfinite(v) else None for v in values]


def write_number(value: float, digits: int, unit: str = "") -> str:
    """A figure for people: so many significant digits, thousands apart, the unit behind it."""
    if value == 0:
        text = "0"
    elif 1e-4 <= abs(value) < 1e7:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{places}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{value:.{max(0, digits - 1)}e}"
    space = "" if unit == "%" else " "
    return f"{text}{space}{unit}" if unit else text


def _thinned(series, factor):
    """At most MAX_POINTS points: the mean of neighbours, with the least and the greatest of them."""
    per_point = max(1, -(-len(series.value) // MAX_POINTS))
    value = series.value * factor
    if per_point == 1:
        return {"step": series.step, "mean": value, "band": None, "per_point": 1}
    starts = np.arange(0, len(value), per_point)
    groups = [value[start : start + per_point] for start in starts]
    finite = [group[np.isfinite(group)] for group in groups]
    ends = np.minimum(starts + per_point, len(value)) - 1
    reduce = lambda function: np.array([function(group) if len(group) else math.nan for group in finite])
    return {
        "step": series.step[ends],
        "mean": reduce(np.mean),
        "band": (reduce(np.min), reduce(np.max)),
        "per_point": per_point,
    }


def _draw(panel, runs, lines, resumes, axis):
    """The chart as SVG text, and where its axes are: shares of width and height, and the places they span."""
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": panel.figure,
        "font.size": 9.5,
        "text.color": "#020202",
        "axes.edgecolor": "#030303",
        "xtick.color": "#020202",
        "ytick.color": "#020202",
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.major.pad": 6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-3, 5),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0.125, 0.14, 0.86, 0.81))
        axes.grid(axis="y", color="#030303", linewidth=0.8)
        axes.set_axisbelow(True)
        for number, (run, line, steps) in enumerate(zip(runs, lines, resumes, strict=True)):
            marks = [axis.place(run, step) for step in steps]
            warmup = None if run.warmup_end() is None else axis.place(run, run.warmup_end())
            _line(axes, f"#04040{number}", line, marks, warmup, is_alone=len(runs) == 1)
        _references(axes, panel, runs, lines)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlim(-0.015 * axis.end, 1.015 * axis.end)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        frame = [*(round(float(v), 5) for v in (*axes.get_position().bounds, *axes.get_xlim()))]
    return _for_page(file.getvalue(), panel, axis), frame


def _line(axes, colour, line, resumed_at, warmup_end, is_alone):
    """One run's line, the end of its bank warm-up and its resumes."""
    if warmup_end is not None and is_alone:
        axes.axvspan(0, warmup_end, color=colour, alpha=0.07, linewidth=0)
    elif warmup_end is not None:  # shades of several runs would hide each other
        axes.axvline(warmup_end, color=colour, linewidth=0.9, alpha=0.45)
    for place in resumed_at:
        axes.axvline(place, color=colour, linewidth=1, linestyle=(0, (2, 3)), alpha=0.8)
    if line["band"]:
        axes.fill_between(line["place"], *line["band"], color=colour, alpha=0.2, linewidth=0)
    few = np.isfinite(line["mean"]).sum() <= 40
    axes.plot(
        line["place"], line["mean"], color=colour, linewidth=1.7, marker="o" if few else None, markersize=2.8
    )


def _references(axes, panel, runs, lines):
    """Horizontal lines that the figure is to be compared with, each once; their words on the side with fewer points."""
    if panel.reference is None:
        return
    ends = np.concatenate([line["mean"][-max(1, len(line["mean"]) // 4) :] for line in lines])
    near = 0.12 * np.ptp(axes.get_ylim())
    for value, words in dict.fromkeys(filter(None, map(panel.reference, runs))):
        axes.axhline(value, color="#020202", linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        is_below = np.sign(ends[np.abs(ends - value) < near] - value).sum() > 0
        axes.annotate(
            words, (0.995, value), xycoords=("axes fraction", "data"), xytext=(0, -3 if is_below else 3),
            textcoords="offset points", ha="right", va="top" if is_below else "bottom", fontsize=8.5, color="#020202",
        )  # fmt: skip


def _for_page(svg, panel, axis):
    """The SVG without its prologue, in the page's font and colours, as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    box = re.findall(r'viewBox="([^"]*)"', head)[0]
    rest = re.sub(r"<style.*?</style>", "", rest, flags=re.DOTALL)  # it would hold for the whole page
    svg = f'<svg viewBox="{box}" role="img" aria-label="{html.escape(panel.title)} over {axis.unit}s">{rest}'
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = svg.replace(' xlink:href="', ' href="')
    # Identifiers are unique in a page only with the chart's own name in them.
    own = re.sub(r"\W", "_", panel.figure)
    svg = re.sub(r' id="([^"]*)"', rf' id="{own}-\1"', svg)
    svg = re.sub(r'href="#([^"]*)"', rf'href="#{own}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{own}-\1)", svg)
    return re.sub(r"\n\s*", " ", svg)
