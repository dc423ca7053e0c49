"""Drawings of README and docs: what the three branches see, time over length, and what models learn.

    python tests/benchmarks/draw.py branches                        # assets/branches.svg
    python tests/benchmarks/draw.py speed docs/speed.json           # assets/speed.png, from `gpu.py lengths --json`
    python tests/benchmarks/draw.py positions out/learn/long        # assets/positions.png, from `learn.py long`
    python tests/benchmarks/draw.py choice out/learn/long           # assets/choice.png, from the same runs
    python tests/benchmarks/draw.py recovery out/learn/convert      # assets/recovery.png, from `learn.py convert`

--out FILE writes elsewhere, in the format of its suffix. Both are drawn on a light card with round corners, so that
they are as readable on a dark page as on a white one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from runs import Log, read_logs

ROOT = Path(__file__).resolve().parents[2]
INK, MUTED, FAINT, CARD, EDGE = "#1f2328", "#59636e", "#e6e9ed", "#ffffff", "#d1d9e0"
LOCAL, COMPRESSED, SELECTED, DENSE = "#0969da", "#d9730d", "#1a7f37", "#6e7781"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": EDGE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "nsa",  # the same file from the same drawing
}


def card(width: float, height: float) -> Figure:
    """A figure whose background is a card with round corners."""
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    figure.add_artist(FancyBboxPatch((0.01, 0.01), width - 0.02, height - 0.02, transform=figure.dpi_scale_trans,
                                     boxstyle="round,pad=0,rounding_size=0.1", facecolor=CARD, edgecolor=EDGE,
                                     linewidth=0.8, zorder=-10))  # fmt: skip
    return figure


# Branches -------------------------------------------------------------------------------------------------------------

TOKENS, QUERY, BLOCK, WINDOW = 48, 43, 8, 10
WEIGHTS = [0.08, 0.41, 0.06, 0.33, 0.12]  # an example of the compressed attention's probabilities
CHOSEN = [1, 3, QUERY // BLOCK]  # the two highest, and the query's own block


def cells(axes: Axes, y: float, seen: set[int], colour: str) -> None:
    """A row of tokens, coloured where the query sees them; those after the query are outlined."""
    for t in range(TOKENS):
        future = t > QUERY
        face = colour if t in seen else "none" if future else FAINT
        axes.add_patch(Rectangle((t + 0.08, y), 0.84, 1.9, facecolor=face, edgecolor=EDGE if future else face,
                                 linewidth=0.6))  # fmt: skip


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=1.2,
                                   shrinkA=0, shrinkB=0, connectionstyle=style))  # fmt: skip


def name(axes: Axes, y: float, title: str, line: str, colour: str) -> None:
    axes.text(-1.5, y + 1.75, title, color=colour, weight="bold", fontsize=11.5, ha="right", va="center")
    axes.text(-1.5, y + 0.05, line, color=MUTED, fontsize=8.5, ha="right", va="center")


def branches() -> Figure:
    """Keys that one query sees in each branch, and the gates that join the branches."""
    figure = card(10, 3.75)
    axes = figure.add_axes((0.01, 0.02, 0.98, 0.96))
    axes.set(xlim=(-18, 68.5), ylim=(-1.7, 29.3), aspect="equal")
    axes.axis("off")
    top, local, compressed, selected = 24.2, 17.6, 10.2, 2.2

    name(axes, top, "tokens", "keys and values", INK)
    cells(axes, top, {QUERY}, INK)
    axes.text(QUERY + 0.5, top + 3.2, "query t", ha="center", va="center", weight="bold", fontsize=9.5)
    axes.text(0, top + 3.2, "first token", ha="left", va="center", color=MUTED, fontsize=8.5)
    axes.text(QUERY + 2.2, top - 1.2, "future", ha="left", va="center", color=MUTED, fontsize=8.5)

    name(axes, local, "local", "the last W tokens", LOCAL)
    cells(axes, local, set(range(QUERY - WINDOW + 1, QUERY + 1)), LOCAL)

    name(axes, compressed, "compressed", "one vector for each block", COMPRESSED)
    for block in range(TOKENS // BLOCK):
        at = block * BLOCK
        complete = at + BLOCK - 1 <= QUERY
        weight = WEIGHTS[block] if complete else 0.0
        box = dict(boxstyle="round,pad=0,rounding_size=0.5", linewidth=1.1, edgecolor=COMPRESSED if complete else EDGE)
        face = to_rgba(COMPRESSED, 0.08 + 1.4 * weight) if complete else "none"
        axes.add_patch(FancyBboxPatch((at + 0.4, compressed - 0.2), BLOCK - 0.8, 2.4, facecolor=face,
                                      linestyle="-" if complete else (0, (3, 2)), **box))  # fmt: skip
        label = f"{100 * weight:.0f} %" if complete else "incomplete"
        axes.text(at + BLOCK / 2, compressed + 0.95, label, color=INK if complete else MUTED, fontsize=8.5,
                  ha="center", va="center")  # fmt: skip

    name(axes, selected, "selective", "tokens of the S best blocks", SELECTED)
    cells(axes, selected, {t for block in CHOSEN for t in range(block * BLOCK, (block + 1) * BLOCK) if t <= QUERY},
          SELECTED)  # fmt: skip
    for block in CHOSEN[:-1]:
        middle = (block + 0.5) * BLOCK
        arrow(axes, (middle, compressed - 0.6), (middle, selected + 2.4), SELECTED)
    between = (compressed + selected) / 2 + 0.9
    axes.text(2.5 * BLOCK, between, "highest\nattention", color=SELECTED, fontsize=8.5, ha="center", va="center",
              linespacing=1.1)  # fmt: skip
    axes.text((CHOSEN[-1] + 0.5) * BLOCK - 2, selected - 1.3, "own block: always", color=SELECTED, fontsize=8.5,
              ha="center", va="center")  # fmt: skip

    join = (TOKENS + 13.4, compressed + 1.0)
    for y, colour, bend in ((local, LOCAL, -0.25), (compressed, COMPRESSED, 0.0), (selected, SELECTED, 0.25)):
        middle, side = y + 1.0, (y > compressed) - (y < compressed)
        arrow(axes, (TOKENS + 0.8, middle), (TOKENS + 3.4, middle), colour)
        axes.add_patch(FancyBboxPatch((TOKENS + 3.6, middle - 1.2), 5.4, 2.4, facecolor=CARD, edgecolor=colour,
                                      boxstyle="round,pad=0,rounding_size=1.2", linewidth=1.3))  # fmt: skip
        axes.text(TOKENS + 6.3, middle - 0.1, "× gate", color=colour, fontsize=9.5, ha="center", va="center")
        end = (join[0] - (0.4 if side else 1.4), join[1] + 1.3 * side)
        arrow(axes, (TOKENS + 9.2, middle), end, colour, bend)
    axes.add_patch(Circle(join, 1.35, facecolor=INK, edgecolor=INK))
    axes.text(join[0], join[1] - 0.1, "+", color=CARD, fontsize=13, weight="bold", ha="center", va="center")
    axes.text(join[0] + 2.0, join[1] - 0.1, "output", color=INK, weight="bold", fontsize=9.5, va="center")
    axes.text(TOKENS + 6.3, selected - 2.0, "from 0 to 1, learned,\none for each head", color=MUTED, fontsize=8.5,
              ha="center", va="center", linespacing=1.25)  # fmt: skip
    return figure


# Speed ----------------------------------------------------------------------------------------------------------------


def kilo(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def panel(axes: Axes, curve: dict) -> None:
    """ms over tokens of one shape, both axes logarithmic, with the ratio at the longest that both reach."""
    for key, label, colour in (("dense", "dense", DENSE), ("nsa", "NSA", LOCAL)):
        points = [(row["tokens"], row[key]) for row in curve["rows"] if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=2)
            axes.annotate(label, points[-1], (7, 0), textcoords="offset points", color=colour, weight="bold",
                          va="center")  # fmt: skip
    axes.set(xscale="log", yscale="log")
    tokens = [row["tokens"] for row in curve["rows"]]
    axes.set_xticks(tokens, [kilo(n) for n in tokens])
    axes.set_xlabel("tokens", loc="right", fontsize=8.5)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda ms, _: f"{ms:g} ms")
    axes.set_xlim(min(tokens) * 0.85, max(tokens) * 2.1)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    both = [row for row in curve["rows"] if "dense" in row and "nsa" in row]
    if both:
        last = both[-1]
        ratio = last["dense"] / last["nsa"]
        middle = (last["tokens"], (last["dense"] * last["nsa"]) ** 0.5)
        axes.plot([last["tokens"]] * 2, [last["nsa"], last["dense"]], color=MUTED, linewidth=1, linestyle=":")
        axes.annotate(f"{ratio:.1f}×", middle, (5, 0), textcoords="offset points", color=INK, va="center")
    axes.set_title(f"{curve['heads']} query heads, {curve['kv_heads']} key/value heads of {curve['dim_head']}",
                   loc="left", fontsize=10.5, weight="bold", pad=24)  # fmt: skip
    letters = {"block_size": "l", "stride": "d", "select_block_size": "l′", "topk_blocks": "S", "local_window": "W"}
    sizes = "   ".join(f"{letter} {curve['setting'][key]}" for key, letter in letters.items())
    axes.text(0, 1.035, sizes, transform=axes.transAxes, color=MUTED, fontsize=8.5, va="bottom")


def speed(results: dict) -> Figure:
    curves = results["curves"]
    figure = card(10, 3.5)
    for i, curve in enumerate(curves):
        width = 1 / len(curves)
        panel(figure.add_axes((i * width + 0.075, 0.22, width - 0.1, 0.58)), curve)
    card_, torch_, triton_ = (results[key] for key in ("card", "torch", "triton"))
    figure.text(0.02, 0.05, f"{results['measured']}; {card_}, torch {torch_}, triton {triton_}",
                color=MUTED, fontsize=8.5)  # fmt: skip
    return figure


# Learning -------------------------------------------------------------------------------------------------------------
NSA = "#c2410c"
OF_ATTENTION = {"dense": DENSE, "nsa": NSA, "window": LOCAL}
OF_CHOICE = {"best": INK, "chosen": NSA, "random": LOCAL, "forced": EDGE}


def best_runs(logs: list[Log]) -> dict[str, list[Log]]:
    """Logs by attention, of its best learning rate and of as many steps as NSA's."""
    from longtext import best_rate

    done = [log for log in logs if log.value("final")]
    steps = max(log.iterations for log in done if log.variant == "nsa")
    done = [log for log in done if log.iterations == steps]
    runs = {name: [log for log in done if log.variant == name] for name in OF_ATTENTION}
    return {name: [log for log in of if log.learning_rate == best_rate(of)] for name, of in runs.items() if of}


def plain_axes(axes: Axes, x: str, y: str) -> Axes:
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def positions(logs: list[Log]) -> Figure:
    """Loss by position, a line the mean and a band the range over seeds; and how much less it is than the window's."""
    runs, figure = best_runs(logs), card(10, 3.6)
    panels = [figure.add_axes((left, 0.17, 0.4, 0.7)) for left in (0.075, 0.575)]
    plain_axes(panels[0], "position of the byte", "loss, nats")
    plain_axes(panels[1], "position of the byte", "loss below that of the window, nats")
    means = {}
    for name, of_name in runs.items():
        curves = [log.value("final")["by_position"] for log in of_name]
        width = of_name[0].context / len(curves[0])
        x = [(number + 0.5) * width for number in range(len(curves[0]))]
        means[name] = [statistics.mean(bin_) for bin_ in zip(*curves, strict=True)]
        ranges = ([edge(bin_) for bin_ in zip(*curves, strict=True)] for edge in (min, max))
        panels[0].fill_between(x, *ranges, color=OF_ATTENTION[name], alpha=0.2, linewidth=0)
        panels[0].plot(x, means[name], color=OF_ATTENTION[name], label=name, linewidth=1.5)
    for name, mean in means.items():
        if name != "window" and "window" in means:
            less = [of_window - each for of_window, each in zip(means["window"], mean, strict=True)]
            panels[1].plot(x, less, color=OF_ATTENTION[name], linewidth=1.5)
    panels[1].axhline(0, color=LOCAL, linewidth=1.5)
    panels[0].legend(frameon=False, ncols=3, loc="upper right")
    return figure


def choice(logs: list[Log]) -> Figure:
    """Share of dense attention that 16 blocks hold, and mean gates, by layer: the mean over seeds."""
    layers, figure = [log.value("final")["layers"] for log in best_runs(logs)["nsa"]], card(10, 3.6)
    panels = [figure.add_axes((left, 0.17, 0.4, 0.7)) for left in (0.075, 0.575)]
    numbers = [int(number) + 1 for number in layers[0]]
    plain_axes(panels[0], "layer", "share of dense attention in blocks")
    plain_axes(panels[1], "layer", "mean gate")
    for name, colour in OF_CHOICE.items():
        shares = [statistics.mean(each[str(number - 1)][name] for each in layers) for number in numbers]
        panels[0].plot(numbers, shares, "o-", color=colour, label=name, markersize=4)
    for branch, (name, colour) in enumerate({"local": LOCAL, "compressed": COMPRESSED, "selective": SELECTED}.items()):
        gates = [statistics.mean(each[str(number - 1)]["gates"][branch] for each in layers) for number in numbers]
        panels[1].plot(numbers, gates, "o-", color=colour, label=name, markersize=4)
    for axes in panels:
        axes.set(ylim=(0, 1), xticks=numbers)
        axes.legend(frameon=False, fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(-0.03, 1), columnspacing=1.2)
    return figure


def recovery(logs: list[Log]) -> Figure:
    """Validation loss over the tokens that a converted model has seen."""
    figure = card(10, 4)
    axes = plain_axes(figure.add_axes((0.075, 0.15, 0.62, 0.75)), "tokens, millions", "validation loss, nats")
    palette = (NSA, COMPRESSED, SELECTED, LOCAL, "#8250df", "#bf3989", "#0d7680")
    colours = iter(palette)
    for log in sorted(logs, key=lambda log: -log.evaluations[-1]["val"]):
        x = [each["iteration"] * log.batch_size * log.context / 1e6 for each in log.evaluations]
        y = [each["val"] for each in log.evaluations]
        colour = DENSE if log.variant == "dense" else next(colours)
        axes.plot(x, y, color=colour, label=log.name.replace("-", " "), linewidth=3 if log.variant == "dense" else 1.3)
    lowest = min(log.evaluations[-1]["val"] for log in logs)
    axes.set_ylim(top=min(axes.get_ylim()[1], lowest + 0.3))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


# Main -----------------------------------------------------------------------------------------------------------------
OF_RUNS = {"positions": positions, "choice": choice, "recovery": recovery}


def draw(what: str, results: Path | None) -> Figure:
    if results is None:
        return branches()
    if what == "speed":
        return speed(json.loads(results.read_text(encoding="utf-8")))
    return OF_RUNS[what](read_logs(results))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("branches", "speed", *OF_RUNS))
    parser.add_argument("results", nargs="?", type=Path, help="file of `gpu.py lengths --json`, or folder of runs")
    parser.add_argument("--out", type=Path, help="picture; not given: the one in assets/")
    args = parser.parse_args(arguments)
    if (args.what == "branches") != (args.results is None):
        parser.error(f"{args.what} {'has no' if args.what == 'branches' else 'needs'} results")
    with matplotlib.rc_context(STYLE):
        figure = draw(args.what, args.results)
        out = args.out or ROOT / "assets" / ("branches.svg" if args.what == "branches" else f"{args.what}.png")
        dated = {"metadata": {"Date": None}} if out.suffix == ".svg" else {}
        figure.savefig(out, dpi=200, **dated)
    print(out)


if __name__ == "__main__":
    main()
