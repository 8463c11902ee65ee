"""Every plot that the chapters share; each function returns a matplotlib figure and computes nothing."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# Okabe-Ito: distinguishable with every common colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
TRUTH, PREDICTED, DOUBT = "#F0E442", "#D55E00", "magma"
VERDICTS = {
    "supported": ("●", "#009E73"),
    "not supported": ("✕", "#D55E00"),
    "inconclusive": ("◐", "#B8860B"),
    "not run": ("○", "#7F7F7F"),
}
STYLE = {
    "figure.dpi": 110,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "prompt-to-mask",
}


def style() -> None:
    """Apply the book's matplotlib style to the running session."""
    plt.rcParams.update(STYLE)


def overlays(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[np.ndarray]],
    rows: Sequence[str],
    threshold: float = 0.5,
) -> Figure:
    """Show each image once plain and once per column with truth and prediction outlined.

    `images` and `truths` are [H, W]; `columns` maps a title to one [H, W] probability map per image.
    """
    titles = ["image", *columns]
    figure, axes = plt.subplots(
        len(images), len(titles), figsize=(1.55 * len(titles), 1.62 * len(images)), squeeze=False
    )
    for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
        for j, title in enumerate(titles):
            axis = axes[i, j]
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if j:
                _outline(axis, truth > 0.5, TRUTH)
                _outline(axis, columns[title][i] > threshold, PREDICTED)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0:
                axis.set_title(title, fontsize=8, loc="center")
        axes[i, 0].set_ylabel(rows[i], fontsize=7, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    return figure


def _outline(axis, mask: np.ndarray, colour: str) -> None:
    if mask.any() and not mask.all():
        axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.1)


def intervals(table: pd.DataFrame, xlabel: str, group: str | None = None, reference: float | None = None) -> Figure:
    """Plot one dot with its 95 % interval per row of `table` (columns label, mean, low, high, and `group`)."""
    labels = list(dict.fromkeys(table["label"]))
    groups = list(dict.fromkeys(table[group])) if group else [None]
    figure, axis = plt.subplots(figsize=(6.4, 0.6 + 0.2 * len(labels) * (1 + 0.45 * (len(groups) - 1)) + 0.35))
    step = 0.62 / max(len(groups), 1)
    for k, name in enumerate(groups):
        part = table if group is None else table[table[group] == name]
        y = np.array([labels.index(label) for label in part["label"]]) + step * (k - (len(groups) - 1) / 2)
        error = np.abs(part[["low", "high"]].to_numpy(float).T - part["mean"].to_numpy(float))
        axis.errorbar(part["mean"], y, xerr=error, fmt="o", ms=4, lw=1.4, color=COLOURS[k % len(COLOURS)], label=name)
    if reference is not None:
        axis.axvline(reference, color="0.6", lw=0.9, ls="--", zorder=0)
    axis.set(yticks=range(len(labels)), yticklabels=labels, xlabel=xlabel, ylim=(len(labels) - 0.5, -0.5))
    axis.grid(axis="x", color="0.92")
    axis.set_axisbelow(True)
    if group:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    return figure


def sweep(table: pd.DataFrame, x: str, xlabel: str, ylabel: str, group: str = "label") -> Figure:
    """Plot mean with its 95 % band against `x` (columns x, mean, low, high), one line per `group`."""
    figure, axis = plt.subplots(figsize=(5.2, 3.0))
    for k, (name, part) in enumerate(table.groupby(group, sort=False)):
        part = part.sort_values(x)
        colour = COLOURS[k % len(COLOURS)]
        axis.plot(part[x], part["mean"], "o-", color=colour, ms=4, label=name)
        axis.fill_between(
            part[x].to_numpy(float),
            part["low"].to_numpy(float),
            part["high"].to_numpy(float),
            color=colour,
            alpha=0.15,
            lw=0,
        )
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(color="0.92")
    outside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if table[group].nunique() > 3 else {}
    axis.legend(fontsize=8, **outside)  # many lines leave no room for it among them
    figure.tight_layout()
    return figure


def learning_curves(logs: Mapping[str, Sequence[pd.DataFrame]], score: str = "Dice") -> Figure:
    """Plot training loss and validation score by step; one colour per arm, one thin line per seed."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.7))
    for k, (arm, runs) in enumerate(logs.items()):
        for s, log in enumerate(runs):
            line = {"color": COLOURS[k % len(COLOURS)], "lw": 1.1, "alpha": 0.85}
            label = arm if s == 0 else None
            axes[0].plot(log["step"], log["loss"], **line)
            axes[1].plot(log["step"], log["valid_score"], label=label, **line)
    axes[0].set(xlabel="step", ylabel="training loss")
    axes[1].set(xlabel="step", ylabel=f"validation {score}")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    return figure


def doubt(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[np.ndarray]],
    rows: Sequence[str],
    top: float = np.log(2),
) -> Figure:
    """Show each image with the truth outlined, and one [H, W] map per column from 0 (dark) to `top` (bright)."""
    size = (1.55 * (1 + len(columns)) + 0.5, 1.62 * len(images))
    figure, axes = plt.subplots(len(images), 1 + len(columns), figsize=size, squeeze=False, layout="constrained")
    for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
        for axis, (title, maps) in zip(axes[i], [("image", None), *columns.items()], strict=True):
            if maps is None:
                axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                shown = axis.imshow(maps[i], cmap=DOUBT, vmin=0, vmax=top, interpolation="nearest")
            _outline(axis, truth > 0.5, TRUTH if maps is None else "white")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0:
                axis.set_title(title, fontsize=8, loc="center")
        axes[i, 0].set_ylabel(rows[i], fontsize=7, rotation=0, ha="right", va="center")
    figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.01).ax.tick_params(labelsize=7)
    return figure


def reliability(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Plot frequency against forecast (`lib.statistics.reliability`), one line per name; dots grow with the share."""
    figure, axis = plt.subplots(figsize=(3.9, 3.4))
    axis.plot([0, 1], [0, 1], color="0.6", lw=0.9, ls="--")
    for k, (name, table) in enumerate(curves.items()):
        colour = COLOURS[k % len(COLOURS)]
        axis.plot(table["forecast"], table["frequency"], color=colour, lw=1.2, label=name)
        axis.scatter(table["forecast"], table["frequency"], s=6 + 60 * table["share"] ** 0.5, color=colour)
    axis.set(xlabel="forecast probability of a lesion pixel", ylabel="how often it is one", aspect="equal")
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def survival_curves(curves: pd.DataFrame, xlabel: str = "days") -> Figure:
    """Draw the step curves of `lib.survival.kaplan_meier` (columns group, time, survival, low, high)."""
    figure, axis = plt.subplots(figsize=(5.2, 3.0))
    for colour, (name, curve) in zip(COLOURS, curves.groupby("group", sort=False), strict=False):
        axis.step(curve["time"], curve["survival"], where="post", color=colour, label=str(name))
        band = {"step": "post", "color": colour, "alpha": 0.15, "linewidth": 0}
        axis.fill_between(curve["time"], curve["low"], curve["high"], **band)
    axis.set(xlabel=xlabel, ylabel="share without event", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def flow(
    boxes: Mapping[str, tuple[float, float, str]],
    arrows: Sequence[tuple[str, str]],
    size: tuple[float, float] = (7.6, 3.4),
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Draw a block diagram: `boxes` maps a name to (x, y, text) in axis units 0–1, `arrows` are pairs of names."""
    figure, axis = plt.subplots(figsize=size)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.axis("off")
    patches = {}
    for name, (x, y, text) in boxes.items():
        colour = (colours or {}).get(name, "#E8EEF4")
        patches[name] = axis.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            fontsize=7.6,
            zorder=3,
            bbox={"boxstyle": "round,pad=0.42", "fc": colour, "ec": "0.35", "lw": 0.8},
        )
    figure.canvas.draw()
    for start, end in arrows:
        axis.annotate(
            "",
            xy=boxes[end][:2],
            xytext=boxes[start][:2],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "0.3",
                "lw": 0.9,
                "patchA": _frame(patches[start]),
                "patchB": _frame(patches[end]),
            },
        )
    return figure


def _frame(text) -> FancyBboxPatch:
    return text.get_bbox_patch()


def name_points(
    axis: Axes,
    x: Sequence[float],
    y: Sequence[float],
    names: Sequence[str],
    size: float = 7,
    colours: Sequence[str] | None = None,
    lift: float = 0,
) -> None:
    """Write a name to the right of each point, those of neighbours one above the other, with a line where one moved.

    Places are in points of the figure as it is laid out now: call this last. `lift`: so many points above the point's
    height, where a bar would run through its name.
    """
    axis.autoscale_view()
    points = axis.transData.transform(np.column_stack([x, y]).astype(float)) * 72 / axis.figure.dpi
    wide = 0.62 * size * np.array([len(name) for name in names])
    left, height = points[:, 0] + 4, 1.15 * size
    beside = (left[:, None] < (left + wide)) & (left < (left + wide)[:, None])
    order = np.argsort(np.argsort(points[:, 1], kind="stable"))
    above = np.sign(order[:, None] - order)  # 1 where the first of two belongs above the second
    place = points[:, 1] + lift
    for _ in range(200):
        missing = np.clip(height - above * (place[:, None] - place), 0, None) * beside * (above != 0)
        if missing.max(initial=0) < 0.1:
            break
        place += 0.3 * (missing * above).sum(1)
    colours = colours or ["0.15"] * len(names)
    for name, at, up, colour in zip(names, zip(x, y, strict=True), place - points[:, 1], colours, strict=True):
        line = {"arrowstyle": "-", "color": "0.7", "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
        axis.annotate(
            name,
            at,
            xytext=(4 if abs(up - lift) < height / 2 else 9, up),
            textcoords="offset points",
            fontsize=size,
            color=colour,
            va="center",
            arrowprops=line if abs(up - lift) >= height / 2 else None,
        )


def verdict_badge(verdict: str) -> str:
    """Return the HTML badge of a verdict: a symbol and a colour, so that neither alone carries the meaning."""
    symbol, colour = VERDICTS[verdict]
    return f'<span style="color:{colour};white-space:nowrap"><b>{symbol}</b> {verdict}</span>'
