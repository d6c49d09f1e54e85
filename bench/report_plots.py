"""The plots of `report.py`, as SVG."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from beside import at_our_kl, OURS
from report_arms import arms_of
from report_parts import mean, NoResult, Results
from report_quality import curve_of, quality_of, SIZES
from report_trained import BIPO, LORA, PTUNING, tried_of


def draw_all(results: Results, folder: Path) -> None:
    """All of them; one whose result is missing is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (draw_quality, draw_arms, draw_curves):
        with suppress(NoResult):
            draw(results, folder)


def pyplot() -> Any:
    """matplotlib.pyplot, set to write the same SVG every time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "edge-align", "font.size": 9}
    from matplotlib import pyplot as plt

    return plt


def draw_quality(results: Results, folder: Path) -> None:
    """quality.svg: win rates with intervals, and the random directions' range behind them."""
    rows = [row for size in SIZES for row in quality_of(results, size)[1]]
    nulls = {
        row["user"]: row for row in results.newest("nulls", where=lambda r: "directions" in r)["directions"]["users"]
    }
    users = list(dict.fromkeys(row["user"] for row in rows))
    sizes = sorted({row["pairs"] for row in rows})
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for at, who in enumerate(users):
        if who in nulls:
            axes.fill_between(
                [at - 0.38, at + 0.38], min(nulls[who]["null"]), nulls[who]["null_p95"], color="0.88", lw=0
            )
    for i, size in enumerate(sizes):
        own = {row["user"]: row for row in rows if row["pairs"] == size}
        x = [at + 0.18 * (2 * i - len(sizes) + 1) for at in range(len(users))]
        y = [own[who]["win_rate"] for who in users]
        error = [
            [own[who]["win_rate"] - own[who]["win_ci"][0] for who in users],
            [own[who]["win_ci"][1] - own[who]["win_rate"] for who in users],
        ]
        axes.errorbar(
            x,
            y,
            error,
            fmt="os"[i % 2],
            ms=5,
            capsize=2,
            color=("tab:orange", "tab:blue")[i % 2],
            label=f"{size} pairs",
        )
    axes.axhline(0.5, color="0.4", lw=0.8, ls=":")
    axes.set(ylim=(0, 1), ylabel="win rate against the base", xticks=range(len(users)))
    axes.set_xticklabels([who.replace("_", "\n") for who in users])
    axes.legend(loc="lower right", frameon=False, title="grey: random directions, to the 95th percentile")
    figure.savefig(folder / "quality.svg", metadata={"Date": None})
    plt.close(figure)


def draw_arms(results: Results, folder: Path) -> None:
    """arms.svg: of every way that was measured, win rate over NLL, each person and the mean."""
    _, found = arms_of(results, SIZES[0])
    arms = {name: rows for name, rows in found.items() if name != OURS}
    for method in (LORA, PTUNING, BIPO):
        with suppress(NoResult):
            tried = [row for row in tried_of(results, method)["rows"] if row["pairs"] == SIZES[0]]
            arms |= {name: [row for row in tried if row["arm"] == name] for name in (method, at_our_kl(method))}
    arms = {name: rows for name, rows in arms.items() if rows}
    arms[OURS] = quality_of(results, SIZES[0])[1]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for i, (name, rows) in enumerate(arms.items()):
        color = "tab:blue" if name == OURS else f"C{i + 1}"
        x, y = ([row[key] for row in rows] for key in ("nll_ratio", "win_rate"))
        axes.scatter(x, y, s=9, color=color, alpha=0.4, lw=0)
        axes.scatter([mean(x)], [mean(y)], s=60, color=color, label=name, zorder=3)
    axes.axhline(0.5, color="0.4", lw=0.8, ls=":")
    axes.axvline(1.0, color="0.4", lw=0.8, ls=":")
    axes.set(ylim=(0, 1.02), xlabel="NLL under the base, times the base's own", ylabel="win rate against the base")
    axes.legend(loc="lower right", frameon=False, fontsize=8, title=f"{SIZES[0]} pairs; small: each person")
    figure.savefig(folder / "arms.svg", metadata={"Date": None})
    plt.close(figure)


def draw_curves(results: Results, folder: Path) -> None:
    """curves.svg: win rate by number of pairs, each person and the mean."""
    _, sizes, found = curve_of(results)
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for i, (who, rates) in enumerate(found.items()):
        axes.plot(sizes, rates, color=f"C{i}", lw=1, marker="o", ms=3, alpha=0.6, label=who.replace("_", " "))
    axes.plot(sizes, [mean(rates) for rates in zip(*found.values(), strict=True)], color="k", lw=2.5, label="mean")
    axes.axhline(0.5, color="0.4", lw=0.8, ls=":")
    axes.set(xscale="log", xticks=sizes, ylim=(0.4, 1.02), xlabel="pairs", ylabel="win rate against the base")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend(loc="lower right", frameon=False, fontsize=8, ncols=3)
    figure.savefig(folder / "curves.svg", metadata={"Date": None})
    plt.close(figure)
