"""The tables and the picture of docs/anomalies.md: how well the scores of a model find anomalies, beside baselines.

    python training/studies/anomalies.py --data digits
    python training/studies/anomalies.py --data ecg

digits: half of scikit-learn's digits, without one class, train a small model. The other half is scored, and the items
of the class are the anomalies. ecg: the first part of PyWavelets' electrocardiogram trains a small model of windows.
Windows of the rest are scored as they are, and with an artefact put into them.

The area under the ROC curve (ROC-AUC) of both scores, and for ecg the best Dice of their maps, stand beside those of
baselines on the same data. Both tables are written as .md and .json to runs/anomalies, and that of ecg with a picture.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from pywt.data import ecg
from scipy.ndimage import gaussian_filter1d, uniform_filter1d
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.evaluation.anomalies import item_metrics, map_metrics

METHODS = ("reconstruction", "denoising", "noise")
SEED = 0


def train(unet, x: torch.Tensor, steps: int, batch_size: int = 64, learning_rate: float = 2e-3):
    """Return a model and its schedule, trained on items (N, C, *spatial) in [-1, 1]; weights are averaged over steps.

    The learning rate falls to 0 by a cosine.
    """
    torch.manual_seed(SEED)
    scheduler = GaussianScheduler()
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0 = x[torch.randint(len(x), (batch_size,))]
        t, noise = torch.randint(scheduler.num_train_timesteps, (len(x0),)), torch.randn_like(x0)
        loss = (unet(scheduler.add_noise(x0, noise, t), t).sample - scheduler.target(x0, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        average.update_parameters(unet)
    return average.module.eval(), scheduler


def nearest(items: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return for each item (N, values) the nearest one of the training items (M, values)."""
    return known[torch.cdist(torch.tensor(items), torch.tensor(known)).argmin(dim=1).numpy()]


def principal(items: np.ndarray, known: np.ndarray, components: int = 20) -> np.ndarray:
    """Return items (N, values), reconstructed by the principal components of the training items (M, values)."""
    pca = PCA(components, random_state=SEED).fit(known)
    return pca.inverse_transform(pca.transform(items))


# ---------------------------------------------------------------------------------------------
# Digits


def digits_without(left_out: int, steps: int, folder: Path) -> dict[str, float]:
    """Return the ROC-AUC of each score for one class, by the name of the score; the model is kept in the folder."""
    digits = load_digits()
    x, classes = (digits.images / 16).astype(np.float32), digits.target
    known, x, anomalous = x[::2][classes[::2] != left_out], x[1::2], classes[1::2] == left_out
    file = folder / f"digits-without-{left_out}-{steps}"
    if not file.is_dir():
        torch.manual_seed(SEED)
        unet = UNet2D(8, in_channels=1, dim=16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8)
        DDPMPipeline(*train(unet, 2 * torch.tensor(known)[:, None] - 1, steps)).save_pretrained(file)
    pipe = DDPMPipeline.from_pretrained(file)
    pipe.set_progress_bar_config(disable=True)
    scores = {
        method: pipe.score(x[..., None], method, generator=torch.Generator().manual_seed(SEED), batch_size=512).scores
        for method in METHODS
    }
    flat, known = x.reshape(len(x), -1), known.reshape(len(known), -1)
    for name, normal in (("nearest", nearest(flat, known)), ("PCA", principal(flat, known))):
        scores[name] = np.square(flat - normal).mean(axis=1)
    return {name: item_metrics(values, anomalous)["roc_auc"] for name, values in scores.items()}


# ---------------------------------------------------------------------------------------------
# The electrocardiogram

LENGTH, SPLIT, BEAT = 256, 640, 848  # length of a window, end of the part for training, and the beat in the other part
GAINS = (0.8, 0.9, 1, 1.1, 1.2)  # amplitudes of the windows for training
DEVIATION = 15  # number of values of the moving standard deviation
SMOOTHING = 3.0  # deviation of the filter of the maps, in values
SHOWN = 60  # number of the window that is drawn
ARTEFACTS = ("dropped beat", "step", "burst of noise", "flat piece")


def put_in(artefact: str, window: np.ndarray, beat: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a window (length,) with an artefact put in, in the units of the recording, and bools that say where.

    Args:
        artefact: one of `ARTEFACTS`.
        window: it is not changed.
        beat: place of the window's beat.
        rng: what draws the place of the artefact, and its values.
    """
    window, size = window.copy(), 48
    place = int(rng.integers(0, len(window) - size + 1))
    if artefact == "dropped beat":
        place, size = beat - 16, 32
        window[place : place + size] = np.linspace(window[place - 1], window[place + size], size)
    elif artefact == "step":
        window[place : place + size] += rng.choice((-1, 1)) * 40
    elif artefact == "burst of noise":
        window[place : place + size] += 10 * rng.standard_normal(size)
    else:
        window[place : place + size] = window[place]
    mask = np.zeros(len(window), bool)
    mask[place : place + size] = True
    return window, mask


def windows() -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return windows for training and held-out ones, (N, length) each, and the place of the beat in each of the latter.

    The part that is held out begins where the one for training ends. Its beat is lower than the two of the other part,
    so those for training are there with other amplitudes, too.
    """
    recording = np.asarray(ecg(), np.float64)
    known = np.stack([recording[start : start + LENGTH] for start in range(0, SPLIT - LENGTH + 1)])
    starts = range(SPLIT, len(recording) - LENGTH + 1, 2)
    known = np.concatenate([gain * known for gain in GAINS])
    return known, np.stack([recording[start : start + LENGTH] for start in starts]), [BEAT - start for start in starts]


def moving_deviation(items: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the values around each one."""
    mean = uniform_filter1d(items, DEVIATION, axis=1)
    return np.sqrt(np.maximum(uniform_filter1d(items * items, DEVIATION, axis=1) - mean * mean, 0))


def show(shown: dict[str, tuple], file: Path) -> None:
    """Draw a window of each artefact with its mask, and below it its maps."""
    names = ("", *METHODS, "PCA", "moving deviation")
    figure = Figure(figsize=(10, 1.2 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(shown), sharex=True)
    for column, (artefact, (item, mask, maps)) in enumerate(shown.items()):
        place = np.flatnonzero(mask)
        axes[0, column].set_title(artefact, fontsize=9)
        for ax, name in zip(axes[:, column], names):
            ax.axvspan(place[0], place[-1], color="C3", alpha=0.2, linewidth=0)
            ax.plot(maps[name] if name else item, color="C0" if name else "black", linewidth=0.8)
            ax.tick_params(labelsize=7)
            if name:
                ax.set_yticks([])
            if not column:
                ax.set_ylabel(name or "item", fontsize=8)
    figure.savefig(file, dpi=80)


def model_of_windows(known: np.ndarray, steps: int, folder: Path) -> DDPMPipeline1D:
    """Return a pipeline that was trained on windows (N, length) in their own units; it is kept in the folder."""
    file = folder / f"ecg-{steps}"
    if not file.is_dir():
        scale, shift = np.ptp(known) / 2, (known.max() + known.min()) / 2
        torch.manual_seed(SEED)
        unet = UNet1D(known.shape[1], in_channels=1, dim=16, dim_mults=(1, 2, 4), attn_heads=2, attn_dim_head=16)
        x = torch.tensor((known - shift) / scale, dtype=torch.float32)[:, None]
        trained = DDPMPipeline1D(*train(unet, x, steps, 32, 1e-3), data_shift=[shift], data_scale=[scale])
        trained.save_pretrained(file)
    pipe = DDPMPipeline1D.from_pretrained(file)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def maps_of(items: np.ndarray, known: np.ndarray, pipe: DDPMPipeline1D) -> dict[str, np.ndarray]:
    """Return the maps (N, length) of each score; the score of an item is the mean of its map."""
    maps = {}
    for method in METHODS:
        generator = torch.Generator().manual_seed(SEED)
        maps[method] = pipe.score(items[:, None], method, generator=generator, smoothing=SMOOTHING).maps[:, 0]
    for name, normal in (("nearest", nearest(items, known)), ("PCA", principal(items, known))):
        maps[name] = gaussian_filter1d(np.square(items - normal), SMOOTHING, axis=1, mode="nearest")
    maps["moving deviation"] = moving_deviation(items)
    return maps


def artefacts(steps: int, folder: Path) -> dict[str, dict]:
    """Return ROC-AUC and best Dice of each score for each artefact, and draw one window of each into the folder."""
    known, held_out, beats = windows()
    pipe = model_of_windows(known, steps, folder)
    normal = maps_of(held_out, known, pipe)
    rng = np.random.default_rng(SEED)
    table, shown = {}, {}
    for artefact in ARTEFACTS:
        changed = [put_in(artefact, window, beat, rng) for window, beat in zip(held_out, beats)]
        items, masks = (np.stack(each) for each in zip(*changed))
        maps = maps_of(items, known, pipe)
        shown[artefact] = items[SHOWN], masks[SHOWN], {name: values[SHOWN] for name, values in maps.items()}
        anomalous = np.arange(2 * len(items)) >= len(items)
        places = np.concatenate([np.zeros_like(masks), masks])[:, None]
        table[artefact] = {}
        for name, found in maps.items():
            both = np.concatenate([normal[name], found])
            table[artefact][name] = {
                "ROC-AUC": item_metrics(both.mean(axis=1), anomalous)["roc_auc"],
                "Dice": map_metrics(both[:, None], places)["best_dice"],
            }
        print(artefact, table[artefact], flush=True)
    show(shown, folder / "anomalies.png")
    return table


# ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "ecg"), required=True, help="Which table.")
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)), help="Digits that are left out.")
    parser.add_argument("--steps", type=int, help="Training steps of each model. Default: 400 for digits, 700 for ecg.")
    parser.add_argument("--output_dir", default="runs/anomalies", help="Folder for the table and the picture.")
    options = parser.parse_args()
    folder, begin = Path(options.output_dir), time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    if options.data == "digits":
        rows = {}
        for left_out in options.classes:
            rows[str(left_out)] = digits_without(left_out, options.steps or 400, folder)
            print(left_out, rows[str(left_out)], flush=True)
        names = list(rows[str(left_out)])
        rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in names}
        cells = {row: [f"{value:.3f}" for value in found.values()] for row, found in rows.items()}
    else:
        rows = artefacts(options.steps or 700, folder)
        cells = {
            f"{row}, {measure}": [f"{found[measure]:.2f}" for found in each.values()]
            for measure in ("ROC-AUC", "Dice") for row, each in rows.items()
        }  # fmt: skip
        names = list(rows[ARTEFACTS[0]])
    lines = ["| " + " | ".join(["", *names]) + " |", "|" + "---|" * (len(names) + 1)]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]
    (folder / f"{options.data}.md").write_text("\n".join(lines) + "\n")
    (folder / f"{options.data}.json").write_text(json.dumps({"cpu_seconds": time.process_time() - begin, "rows": rows}))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
