"""The figures and pictures of docs/long.md: long electrocardiograms by each method, their seams and their rhythm.

    python training/train.py --config training/configs/ecg.yaml
    python training/train.py --config training/configs/ecg.yaml --sequence_length 512 --dim 16 --train_batch_size 16 \\
        --max_train_steps 600 --output_dir runs/ecg-512
    python training/studies/long.py --wider runs/ecg-512/pipeline
    python training/studies/long.py --extend

The folder runs/long gets table.md, long.png, rhythm.png and the series; with --extend the table of continuations. A
seam is where a window begins or ends. "Beside each other" are samples of the trained length without any overlap. The
wider model has windows of more than one beat.
"""

import argparse
import re
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from pywt.data import ecg
from scipy.signal import find_peaks, welch

from ddpm_hf import DDPMPipeline1D
from ddpm_hf.pipeline import windows

WINDOWS, SERIES, STEPS = 20, 4, 50
PROMINENCE = 120  # of a peak that is a beat; those of the recording have 276 to 347, its other waves up to 63
LAGS = 200


def starts(length: int, window: int, overlap: int) -> list[int]:
    """Return the seams: where windows begin and end, inside of the series."""
    begin = windows.window_starts(length, window, overlap)
    return sorted({*begin, *(place + window for place in begin)} - {0, length})


def autocorrelation(x: np.ndarray) -> np.ndarray:
    x = x - x.mean()
    return np.array([(x[:, : x.shape[1] - lag] * x[:, lag:]).mean() for lag in range(1, LAGS)]) / (x * x).mean()


def intervals(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Return beats per 1,000 values, and the distances of neighbouring beats, of series (N, length)."""
    beats = [find_peaks(row, prominence=PROMINENCE)[0] for row in x]
    return 1000 * sum(map(len, beats)) / x.size, np.concatenate([np.diff(each) for each in beats])


def measure(x: np.ndarray, real: np.ndarray, seams: list[int]) -> list[str]:
    """Return the cells of a row of the table for series (N, length)."""
    jumps = abs(np.diff(x, axis=1))
    at = np.zeros(jumps.shape[1], bool)
    at[[place - 1 for place in seams]] = True
    spectra = [10 * np.log10(welch(each, nperseg=256)[1].mean(0)) for each in (x, real)]
    rate, distances = intervals(x)
    cells = [f"{x.std():.1f}"]
    for part in (jumps[:, at], jumps[:, ~at]):
        cells.append("" if not part.size else f"{np.median(part):.1f}, {np.quantile(part, 0.95):.0f}, {part.max():.0f}")
    cells.append(f"{np.sqrt(np.mean((spectra[0] - spectra[1])[1:] ** 2)):.1f}")
    cells.append(f"{np.sqrt(np.mean((autocorrelation(x) - autocorrelation(real)) ** 2)):.3f}")
    cells.append(f"{rate:.2f}")
    cells.append(
        ", ".join(f"{value:.0f}" for value in np.quantile(distances, (0.1, 0.5, 0.9))) if len(distances) else ""
    )
    return cells


def equal_weights(size, window, overlap) -> windows.Windows:
    """Return windows whose values all have the same weight."""
    covered = cover(size, window, overlap)
    weights, total = torch.ones_like(covered.weights), torch.zeros_like(covered.total)
    for place in covered.places:
        total[place] += weights
    return windows.Windows(covered.places, weights, total)


cover = windows.cover


def draw(pipe, name: str, length: int) -> tuple[np.ndarray, list[int]]:
    """Return series (N, length) by the method of a row, and their seams."""
    window = pipe.unet.config.sample_size
    shared = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    kind, *numbers = name.split(", ")
    number = int(re.search(r"[0-9]+", name)[0]) if numbers else 0
    if kind == "beside each other":
        x = pipe(SERIES * WINDOWS, **shared).sequences.reshape(SERIES, -1)
        return x, list(range(window, length, window))
    if kind == "one call":
        return pipe(SERIES * WINDOWS // number, length=number * window, method="single", **shared).sequences[:, 0], []
    method = "sequential" if kind == "sequential" else "joint"
    weights = equal_weights if kind == "joint with equal weights" else cover
    with mock.patch.object(windows, "cover", weights):
        x = pipe(SERIES, length=length, method=method, overlap=number, **shared).sequences[:, 0]
    ends = starts(length, window, number)
    return x, ends if method == "joint" else [window + i * (window - number) for i in range(len(ends)) if
                                              window + i * (window - number) < length]  # fmt: skip


def picture(real, series: dict, seams: dict, file: Path) -> None:
    """Draw the data, and the beginning of one series of each method with marks at the seams."""
    figure = Figure(figsize=(9, 1.5 * (len(series) + 1)), layout="constrained")
    axes = figure.subplots(len(series) + 1, 1, sharex=True, sharey=True)
    for ax, (name, x) in zip(axes, {"data": real, **series}.items()):
        ax.plot(x[0][:3000], color="black" if name == "data" else "C0", linewidth=0.7)
        for place in seams.get(name, []):
            if place < 3000:
                ax.axvline(place, color="C3", alpha=0.3, linewidth=0.7)
        ax.set_title(name, fontsize=9)
        ax.tick_params(labelsize=7)
    figure.savefig(file, dpi=100)


def rhythm(real, series: dict, seams: dict, file: Path) -> None:
    """Draw the distances of neighbouring beats, the spectra, and the share of jumps above a size, of each series."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    beats, spectrum, jumps = figure.subplots(1, 3)
    for place in intervals(real)[1]:
        beats.axvline(place, color="black", linewidth=1)
    for number, (name, x) in enumerate({"data": real, **series}.items()):
        color = "black" if name == "data" else f"C{number - 1}"
        if name != "data":
            values = intervals(x)[1]
            beats.hist(values, range(0, 1001, 50), weights=np.full(len(values), 1 / len(values)), color=color,
                       histtype="step")  # fmt: skip
        frequency, power = welch(x, nperseg=256)
        spectrum.semilogy(frequency[1:], power.mean(0)[1:], color=color, linewidth=0.8, label=name)
        sizes = abs(np.diff(x, axis=1))
        at = np.isin(np.arange(sizes.shape[1]) + 1, seams.get(name, []))
        for part, style in ((sizes[:, ~at], "-"), (sizes[:, at], ":")):
            if part.size:
                jumps.loglog(np.sort(part, axis=None)[::-1], np.arange(1, part.size + 1) / part.size, style,
                             color=color, linewidth=1)  # fmt: skip
    beats.set(xlabel="distance of neighbouring beats, values", ylabel="share")
    spectrum.set(xlabel="frequency, per value", ylabel="power")
    jumps.set(xlabel="jump (dotted: at seams)", ylabel="share of jumps as large", xlim=(0.5, 400), ylim=(1e-3, 1.1))
    figure.legend(*spectrum.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    for ax in (beats, spectrum, jumps):
        ax.tick_params(labelsize=7)
    figure.savefig(file, dpi=80)


ROWS = ("beside each other", "one call, 1 times", "one call, 2 times", "one call, 4 times", "one call, 20 times",
        "joint with equal weights, overlap 128", "joint, overlap 64", "joint, overlap 128",
        "sequential, overlap 128")  # fmt: skip
SHOWN = ("beside each other", "joint with equal weights, overlap 128", "joint, overlap 128", "sequential, overlap 128")
RHYTHM = ("beside each other", "joint, overlap 128")


def load(folder: str) -> DDPMPipeline1D:
    pipe = DDPMPipeline1D.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def continuations(pipe, real: np.ndarray, folder: Path, items: int = 4) -> None:
    """Write a table of continuations, by both methods, of four pieces of the recording that are a window long.

    Each continuation is four windows long. "Seam" is the first new value after the recording; the other seams are as
    for series. The mean square of a jump is divided by that of the recording, which the largest jumps dominate.
    """
    window = pipe.unet.config.sample_size
    length, shared = 5 * window, window // 2
    begins = np.linspace(0, real.shape[1] - window, items).astype(int)
    known = np.stack([real[:, place : place + window] for place in begins])
    lines = ["| method | calls of the model | seam | other seams | other jumps | deviation | spectrum, dB | "
             "autocorrelation | beats |", "|" + "---|" * 9]  # fmt: skip
    for method in ("sequential", "joint"):
        rows, calls = [], []
        hook = pipe.unet.register_forward_pre_hook(lambda model, args, calls=calls: calls.append(len(args[0])))
        x = pipe.extend(
            known, length, num_inference_steps=STEPS, method=method, generator=torch.Generator().manual_seed(0)
        ).sequences[:, 0]
        hook.remove()
        begin = window - shared
        ends = [begin + place for place in starts(length - begin, window, shared)]
        seams = [place for place in ends if place > window]
        if method == "sequential":
            seams = list(range(window + shared, length, shared))
        jumps = abs(np.diff(x, axis=1))
        at = np.array([place - 1 for place in seams])
        rest = np.setdiff1d(np.arange(window, length - 1), at)
        for part in (jumps[:, window - 1], jumps[:, at], jumps[:, rest]):
            rows.append(f"{np.median(part):.1f}, {np.quantile(part, 0.95):.0f}, {part.max():.0f}")
        cells = measure(x[:, window:], real, [])
        rows += [cells[0], *cells[3:6]]
        np.save(folder / f"extend-{method}.npy", x)
        lines.append(f"| {method} | {sum(calls) / items:,.0f} | " + " | ".join(rows) + " |")
        print(lines[-1], flush=True)
        (folder / "extend.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="runs/ecg/pipeline", help="Pipeline of the electrocardiogram.")
    parser.add_argument("--wider", help="Pipeline of longer windows, by the default method, for the rhythm.")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, help="Rows of the table.")
    parser.add_argument("--output_dir", default="runs/long", help="Folder for the table, the pictures and the series.")
    parser.add_argument("--extend", action="store_true", help="Measure continuations instead.")
    options = parser.parse_args()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load(options.pipeline)
    real = np.asarray(ecg(), np.float64)[None]
    if options.extend:
        return continuations(pipe, real, folder)
    length = WINDOWS * pipe.unet.config.sample_size
    head = "| series | deviation | jumps at seams | other jumps | spectrum, dB | autocorrelation | beats | intervals |"
    lines = [head,
             "|" + "---|" * 8, "| data | " + " | ".join(measure(real, real, [])) + " |"]  # fmt: skip
    series, seams = {}, {}
    rows = [(name, name, pipe) for name in options.rows]
    if options.wider:
        wider = load(options.wider)
        size = wider.unet.config.sample_size
        rows.append((f"windows of {size}", f"joint, overlap {size // 2}", wider))
    for name, method, pipe in rows:
        x, places = draw(pipe, method, length)
        np.save(folder / f"{name.replace(', ', '-').replace(' ', '_')}.npy", x)
        lines.append(f"| {name} | " + " | ".join(measure(x, real, places)) + " |")
        print(lines[-1], flush=True)
        (folder / "table.md").write_text("\n".join(lines) + "\n")
        series[name], seams[name] = x, places
    picture(real, {name: x for name, x in series.items() if name in SHOWN}, seams, folder / "long.png")
    chosen = {name: x for name, x in series.items() if name in RHYTHM or name not in ROWS}
    rhythm(real, chosen, seams, folder / "rhythm.png")


if __name__ == "__main__":
    main()
