"""The results of the benchmark as a table of text and as a picture."""

from pathlib import Path


def table(rows: list[dict]) -> str:
    """Return rows as aligned columns, one for each key; a cell is empty where a row has no value."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells)


def markdown(rows: list[dict]) -> str:
    """Return rows as `table` does, in the form of Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths))} |" for line in cells)


def cell(value) -> str:
    """Return a value as it stands in a table: three digits, or all digits before the point."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def draw(rows: list[dict], file: Path, label: str) -> None:
    """Draw the ratios of rows as bars into a PNG file.

    Args:
        rows: those with "what" and "ratio" are drawn, from top to bottom.
        file: the file.
        label: the name of the axis.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("ratio") is not None and "what" in row][::-1]
    figure = Figure(figsize=(8, 0.34 * len(rows) + 1), layout="constrained")
    axis = figure.subplots()
    colours = ["tab:orange" if row.get("emphasis", "bfloat16" in row["what"]) else "tab:blue" for row in rows]
    bars = axis.barh([row["what"] for row in rows], [row["ratio"] for row in rows], color=colours)
    axis.bar_label(bars, [f"{row['ratio']:.2f}" for row in rows], padding=3)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(right=2.5 * max(1, *(row["ratio"] for row in rows)))  # room for the labels
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if tick < 2 * max(row["ratio"] for row in rows)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(label, fontsize=9)
    figure.savefig(file, dpi=100)
