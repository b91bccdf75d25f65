"""Pictures of results: grids of images, generated sequences beside real ones, completions, losses and metrics."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image

SHOWN_CHANNELS = (1, 3, 4)  # numbers of channels that are one picture: grey, RGB, RGBA
MOST_AXES = 36  # rows of axes in a plot of sequences, at most


def picture_of(levels: np.ndarray) -> Image.Image:
    """Return an image (C, H, W) of levels from 0 to 1 as a picture of 8 bits.

    The channels lie side by side, in grey, with a white line between them, if there are other than 1, 3 or 4.
    """
    values = np.moveaxis((levels * 255).round().astype(np.uint8), 0, -1)
    if values.shape[2] in SHOWN_CHANNELS:
        return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    return Image.fromarray(side_by_side(np.moveaxis(values, -1, 0), 255))


def side_by_side(channels: np.ndarray, line: float) -> np.ndarray:
    """Lay the channels (C, H, W) of an image side by side, (H, C * (W + 1) - 1), with the value `line` between them."""
    with_lines = np.pad(channels, ((0, 0), (0, 0), (0, 1)), constant_values=line)
    return np.concatenate(list(with_lines), axis=1)[:, :-1]


def save_image_grid(images: list[Image.Image], path: Path, columns: int | None = None) -> None:
    """Save images as one PNG, in a grid that is as square as possible; small images are enlarged (bicubic).

    Args:
        images: PIL images of one size and mode.
        path: the file to write.
        columns: number of columns; None: as many as rows, or one more.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    zoom = max(1, math.ceil(64 / max(images[0].size)))
    width, height = images[0].width * zoom, images[0].height * zoom
    cells = []
    for image in images:
        # a border separates neighbours
        cell = Image.new(image.mode, (width + 2, height + 2), "white")
        cell.paste(image.resize((width, height), Image.Resampling.BICUBIC), (1, 1))
        cells.append(cell)
    cells += [Image.new(images[0].mode, cells[0].size, "white")] * (rows * columns - len(cells))
    grid = make_image_grid(
        [cell.convert("RGBA" if cell.mode in ("LA", "RGBA") else "RGB") for cell in cells], rows, columns
    )
    grid.save(path)


def channel_parts(channels: int) -> list[slice]:
    """Return the channels of each axis of a plot: one, because units may differ, or all if there are very many."""
    return [slice(c, c + 1) for c in range(channels)] if channels <= MOST_AXES else [slice(channels)]


def channel_name(names: Sequence[str] | None, channel: int) -> str:
    """Return the name of a channel, or "channel 0" and so on if it has none (`names` is None or too short)."""
    return names[channel] if names is not None and channel < len(names) else f"channel {channel}"


def save_sequence_plot(
    generated: np.ndarray, real: np.ndarray, path: Path, rows: int = 6, titles: Sequence[str] | None = None,
    conditions: np.ndarray | None = None, names: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Save a plot with generated sequences in the left column and real ones in the right, as PNG.

    Each channel has axes of its own, with one scale for all sequences, if there are at most `MOST_AXES` channels.

    Args:
        generated, real: `(N, C, length)`. NaN is not drawn.
        path: the file to write.
        rows: number of sequences of each kind, at most; there are fewer where `MOST_AXES` would be exceeded.
        titles: a title for each sequence; None: only the columns have titles.
        conditions: `(N, C', length')`, what each generated sequence was given, for a column of their own before the
            others and on a scale of their own; None: there is no such column.
        names: the names of the channels; None: they are numbered.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    columns = {} if conditions is None else {"condition": conditions}
    columns |= {"generated": generated, "real": real}
    parts = channel_parts(max(sequences.shape[1] for sequences in columns.values()))
    depth = len(parts)
    rows = min(rows, len(generated), len(real), max(1, MOST_AXES // depth))
    figure = Figure(figsize=(11, (1.35 if depth == 1 else 0.95 * depth) * rows + 0.6), layout="constrained")
    one_scale = conditions is None and depth == 1
    axes = figure.subplots(rows * depth, len(columns), sharex=True, sharey=one_scale, squeeze=False)
    for column, (kind, sequences) in enumerate(columns.items()):
        places = np.arange(sequences.shape[-1]) * (real.shape[-1] / sequences.shape[-1])
        own = len(channel_parts(sequences.shape[1]))  # a condition may have another number of channels
        for part, channels in enumerate(parts):
            first = axes[part, 0 if kind == "condition" else len(columns) - 2]
            for row, axis in enumerate(axes[part::depth, column]):
                if not one_scale and axis is not first:
                    axis.sharey(first)
                axis.set_visible(depth == 1 or part < own)
                if own < depth and part == own - 1 and row == rows - 1:
                    axis.tick_params(labelbottom=True)
                for channel in sequences[row, channels]:
                    axis.plot(places, channel, linewidth=0.9, color=f"C{part % 10}" if depth > 1 else None)
                axis.grid(alpha=0.25)
                if depth > 1 and own > 1 and kind != "real":
                    name = channel_name(names if kind == "generated" else None, part)
                    axis.set_ylabel(name, fontsize="x-small", parse_math=False)
    for column, kind in enumerate(columns):
        axes[0, column].set_title(kind)
        for row, title in enumerate((titles or ())[:rows]):
            # a title has the name of a class, in which $ is no formula
            axes[row * depth, column].set_title(f"{kind}: {title}", fontsize="small", parse_math=False)
    figure.align_ylabels()
    figure.savefig(path, dpi=100)


def save_loss_plot(records: list[dict], path: Path) -> None:
    """Save a plot of the training loss over optimizer steps, on a logarithmic scale, as PNG.

    Args:
        records: dictionaries with `step` and `loss`.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([record["step"] for record in records], [record["loss"] for record in records], linewidth=1.1)
    axis.set_yscale("log")
    for plain in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        plain(lambda value, _: f"{value:g}")
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("training loss")
    axis.grid(alpha=0.25, which="both")
    figure.savefig(path, dpi=100)


def save_steps_plot(records: list[dict], title: str, path: Path) -> None:
    """Save a plot of metrics over the number of sampling steps, one panel for each metric, as PNG.

    Several scales of guidance have a line each; if all records have one number of steps, panels are over the scales.

    Args:
        records: dictionaries with `metric`, `value`, `num_inference_steps` and, for guided samples, `guidance_scale`.
        title: title of the whole figure.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(record["metric"] for record in records))
    over_steps = len({record["num_inference_steps"] for record in records}) > 1
    scales = sorted({record.get("guidance_scale", 1.0) for record in records})
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names):
        own = [record for record in records if record["metric"] == name]
        for scale in scales if over_steps else [None]:
            points = [
                (record["num_inference_steps"] if over_steps else record["guidance_scale"], record["value"])
                for record in own
                if scale is None or record.get("guidance_scale", 1.0) == scale
            ]
            axis.plot(*zip(*sorted(points)), marker="o", label=None if scale is None else f"guidance {scale:g}")
        if over_steps:
            ticks = sorted({record["num_inference_steps"] for record in own})
            axis.set_xscale("log")
            axis.set_xticks(ticks, [str(n) for n in ticks])
            axis.minorticks_off()
        axis.set_title(name)
        axis.set_xlabel("sampling steps" if over_steps else "guidance scale")
        axis.grid(alpha=0.25)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    if over_steps and len(scales) > 1:
        axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)  # it has the name of a folder
    figure.savefig(path, dpi=100)


def save_bound_plot(terms: Sequence, values: Mapping[str, float], path: Path) -> None:
    """Save a plot of the variational bound's terms over the timesteps, on a logarithmic scale, as PNG.

    The decoder's term (t = 0) and the prior's are in the title: the decoder's may be negative for a density.

    Args:
        terms: records with `low`, `high` and `value`, the term in bits per dimension and timestep for low <= t < high;
            the first is the decoder's.
        values: the numbers of the title, by name: `bits_per_dim`, `bits_per_dim_decoder`, `bits_per_dim_prior`.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    steps = [term for term in terms[1:] if term.value > 0]  # of a perfect model a term may be 0
    places = [(term.low + term.high - 1) / 2 for term in steps]
    axis.plot(places, [term.value for term in steps], linewidth=1.1, marker="." if len(steps) < 200 else None)
    axis.set_yscale("log")
    axis.set_xlabel("timestep t")
    axis.set_ylabel("bits per dimension and timestep")
    axis.grid(alpha=0.25, which="both")
    total, decoder, prior = (values[f"bits_per_dim{part}"] for part in ("", "_decoder", "_prior"))
    axis.set_title(
        f"{total:.4g} bits per dimension: {decoder:.4g} at t = 0, {total - decoder - prior:.4g} at t >= 1, prior "
        f"{prior:.2g}",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)


def save_fan_plot(items: Sequence, path: Path, names: Sequence[str] | None = None) -> None:
    """Save a plot of completed sequences as PNG: truth, known part, median, 50% and 90% bands of the completions.

    A panel shows one channel of one sequence; of many channels the first three are drawn.

    Args:
        items: records with `truth` (C, length), `hidden` (length,), True where it was hidden, and `completions`
            (M, C, length); missing values are NaN.
        path: the file to write.
        names: the names of the channels; None: they are numbered.
    """
    from matplotlib.figure import Figure

    channels = min(3, len(items[0].truth))
    panels = [(item, channel) for item in items for channel in range(channels)]
    columns = min(len(panels), 2) if channels == 1 else channels
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(11, 1.9 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axis, (item, channel) in zip(axes.ravel(), panels):
        times = np.arange(len(item.hidden))
        only_known = np.where(item.hidden, np.nan, item.truth[channel])
        low_90, low_50, median, high_50, high_90 = (
            np.where(item.hidden, quantile, np.nan)
            for quantile in np.quantile(
                item.completions[:, channel], (0.05, 0.25, 0.5, 0.75, 0.95), axis=0, method="weibull"
            )
        )
        axis.fill_between(times, low_90, high_90, color="tab:orange", alpha=0.25, linewidth=0, label="90% band")
        axis.fill_between(times, low_50, high_50, color="tab:orange", alpha=0.45, linewidth=0, label="50% band")
        axis.plot(times, median, color="tab:red", linewidth=1.2, label="median")
        axis.plot(times, item.truth[channel], "k--", linewidth=0.9, label="truth")
        axis.plot(times, only_known, color="tab:blue", linewidth=1.4, label="known")  # over the truth
        axis.grid(alpha=0.25)
    if channels > 1:
        for channel, axis in enumerate(axes[0]):
            axis.set_title(channel_name(names, channel), parse_math=False)
    for axis in axes.ravel()[len(panels) :]:
        axis.set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=100)


def save_completed_images(items: Sequence, path: Path) -> None:
    """Save a picture of completed images as PNG: in each row the known part, two completions and the true image.

    Args:
        items: records with `truth` (C, H, W), levels from 0 to 1, `hidden` (H, W), True where it was hidden, and
            `completions` (M, C, H, W) with M of at least 2.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    titles = ("known", "completion", "completion", "truth")
    channels, height, width = items[0].truth.shape
    shown = channels if channels not in SHOWN_CHANNELS else 1
    width = shown * (width + 1) - 1
    figure = Figure(figsize=(6.4, 1.6 * height / width * len(items) + 0.4), layout="constrained")
    axes = figure.subplots(len(items), len(titles), squeeze=False)
    for row, item in zip(axes, items):
        known, *others = (_as_rgb(image) for image in (item.truth, *item.completions[:2], item.truth))
        hidden = side_by_side(np.stack([item.hidden] * shown), False)
        known[hidden] = (0.85, 0.35, 0.25)  # a colour that grey images do not have
        for axis, image in zip(row, (known, *others)):
            axis.imshow(image, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def _as_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image (C, H, W) with levels from 0 to 1 as RGB (H, W, 3), without a channel of opacity.

    The channels lie side by side if there are other than 1, 3 or 4.
    """
    if len(image) not in SHOWN_CHANNELS:
        image = side_by_side(image, 1)[None]
    colours = image[:3] if len(image) >= 3 else image[[0, 0, 0]]
    return np.moveaxis(colours, 0, -1).clip(0, 1)


def save_heat_map(
    item: np.ndarray, heat: np.ndarray, limits: tuple[float, float], path: Path, names: Sequence[str] | None = None
) -> None:
    """Save a picture of an item with the map of its score as PNG.

    An image lies in grey under the mean of its channels' maps. Each channel of a sequence is drawn over its map as
    colours, with the map as a curve below it.

    Args:
        item: (C, H, W), levels from 0 to 1, or a sequence (C, length).
        heat: the map, of the same shape.
        limits: the values that have the weakest and the strongest colour.
        path: the file to write.
        names: the names of a sequence's channels; None: they are numbered.
    """
    from matplotlib.figure import Figure

    low, high = limits
    if item.ndim == 3:
        levels = _as_rgb(item)
        strength = heat.mean(axis=0) if len(item) in SHOWN_CHANNELS else side_by_side(heat, 0)
        figure = Figure(figsize=(6.4, 3.2 * levels.shape[0] / levels.shape[1] + 0.4), layout="constrained")
        axes = figure.subplots(1, 2)
        axes[0].imshow(levels, interpolation="nearest")
        axes[1].imshow(levels.mean(axis=2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        shown = axes[1].imshow(
            strength, cmap="inferno", vmin=low, vmax=high, alpha=((strength - low) / (high - low)).clip(0.15, 0.9),
            interpolation="nearest",
        )  # fmt: skip
        for axis in axes:
            axis.set_axis_off()
        figure.colorbar(shown, ax=axes[1], shrink=0.8)
    else:
        count, length = item.shape
        figure = Figure(figsize=(9, 2.0 * count + 0.4), layout="constrained")
        axes = figure.subplots(2 * count, 1, sharex=True, squeeze=False, height_ratios=[3, 1] * count)[:, 0]
        for channel in range(count):
            series, below = axes[2 * channel : 2 * channel + 2]
            series.plot(item[channel], linewidth=0.9, color="black")
            if count > 1:
                series.set_ylabel(channel_name(names, channel), fontsize="small", parse_math=False)
            strip = (-0.5, length - 0.5, *series.get_ylim())
            shown = series.imshow(heat[channel][None], cmap="Reds", vmin=low, vmax=high, aspect="auto", extent=strip)
            below.fill_between(range(length), low, heat[channel], color="tab:red", linewidth=0.5)
            below.set_ylim(low, high)
        figure.colorbar(shown, ax=list(axes), shrink=0.8)
    figure.savefig(path, dpi=100, format="png")
