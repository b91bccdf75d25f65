"""Scores of items against labels and masks: ROC-AUC, average precision and the best Dice, by scikit-learn.

Labels say which items are anomalous, masks which parts of them. Percentiles place a score among those of other items.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_hf.data.images import ImageDataset, find_images
from ddpm_hf.data.sequence_files import LABEL_ENDINGS, read_label_file

KINDS = {False: "normal", True: "anomalous"}

# ---------------------------------------------------------------------------------------------
# Items


def item_names(dataset: Any, folder: str | Path) -> tuple[list[str], list]:
    """Return names of the columns that say what an item is, and their values, one row for each item.

    They are `item`, the file below `folder` or else the item's number; for windows of sequences also `sequence`, the
    file or the number of the sequence, and `start`, the window's first point in it.
    """
    root = Path(folder) if Path(folder).is_dir() else Path(folder).parent

    def below(name: int | str | Path) -> int | str:
        if isinstance(name, int):
            return name
        return str(Path(name).relative_to(root) if Path(name).is_relative_to(root) else name)

    sources = getattr(dataset, "sources", None)
    if isinstance(sources, (list, tuple)) and all(isinstance(each, (str, Path)) for each in sources):
        return ["item"], [[below(each)] for each in sources]
    if not hasattr(dataset, "origin"):
        return ["item"], [[number] for number in range(len(dataset))]
    places = [(below(name), start) for name, start in map(dataset.origin, range(len(dataset)))]
    if any(start for _, start in places):
        return ["item", "sequence", "start"], [[number, *place] for number, place in enumerate(places)]
    return ["item"], [[name] for name, _ in places]  # some of the sequences may have been left out


def percentiles(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the share of the reference's scores, in per cent, that do not exceed each score; NaN stays NaN.

    Args:
        scores: (N,).
        reference: the scores (M,) of other items, in any order.
    """
    found = 100 * np.searchsorted(np.sort(reference), scores, side="right") / len(reference)
    return np.where(np.isnan(scores), np.nan, found)


# ---------------------------------------------------------------------------------------------
# Labels and masks


def is_label_file(labels: str) -> bool:
    """Return True if labels are named by a file of their own, and not by a column of the data."""
    return Path(labels).suffix.lower() in LABEL_ENDINGS


def read_anomalies(labels: str, dataset: Any, normal: Sequence[str] | None) -> np.ndarray:
    """Return bools (N,) that are True for anomalous items.

    Args:
        labels: a file with one class for each item, or for each sequence that windows are cut from; or the column that
            the classes of the dataset were read from.
        dataset: the items.
        normal: the names of the classes that are normal; None: the classes are 0, normal, and 1, anomalous.

    Raises:
        ValueError: there are no labels, they do not fit the items or `normal`, or all items are of one kind.
    """
    rows = getattr(dataset, "sequences", len(dataset))
    if is_label_file(labels):
        found = read_label_file(labels, rows, len(dataset))
        if len(found) not in (len(dataset), rows):
            raise ValueError(
                f"--labels {labels} must have one label for each of the {len(dataset):,} items"
                + (f", or of the {rows:,} sequences" if rows != len(dataset) else "") + f", got {len(found):,}"
            )  # fmt: skip
    else:
        found = getattr(dataset, "labels", None)
        if found is None:
            raise ValueError(f"--labels must be a column of the data or a file of labels, got {labels!r}")
    names = found.names
    if normal is None:
        if set(names) - {"0", "1"}:
            raise ValueError(
                f"--labels must be 0 (normal) and 1 (anomalous), or --normal names the normal ones of the classes "
                f"{', '.join(names[:20])}"
            )
        normal = ["0"]
    unknown = [each for each in normal if each not in names]
    if unknown:
        raise ValueError(f"--normal must be of the classes {', '.join(names[:20])}; got {', '.join(unknown)}")
    anomalous = ~np.isin(found.numbers, [names.index(each) for each in normal])
    if hasattr(dataset, "per_item") and len(anomalous) == rows:
        anomalous = dataset.per_item(anomalous)
    if anomalous.all() or not anomalous.any():
        raise ValueError(f"--labels {labels} must have normal and anomalous items; all are {KINDS[anomalous.any()]}")
    return anomalous


def read_masks(masks: str, dataset: Any, shape: tuple[int, ...], names: Sequence[Sequence]) -> np.ndarray:
    """Return bools, True where an item is anomalous: (N, *spatial), or (N, C, *spatial) where channels have their own.

    Args:
        masks: a folder of pictures, or a .npy or .npz file of an array. A picture has the name of its item, with any
            ending, and `_mask` may follow; it is resized and cropped as the item was, and is True where it is brighter
            than half of its brightest value. An item without a picture is normal. An array has the shape of the items,
            with or without channels; for windows it may have that of the sequences that they are cut from.
        dataset: the items.
        shape: the shape of an item, (C, *spatial).
        names: the names of the items, as `item_names` returns them.

    Raises:
        ValueError: nothing is found, the masks do not fit the items, or nothing or everything is anomalous.
    """
    spatial = tuple(shape[1:])
    found = _pictures(masks, shape, names) if Path(masks).is_dir() else _array(masks, dataset, shape)
    if found.all() or not found.any():
        raise ValueError(f"--masks {masks} must have normal and anomalous places; all are {KINDS[found.any()]}")
    assert found.shape[-len(spatial) :] == spatial and len(found) == len(dataset)
    return found


def _pictures(folder: str, shape: tuple[int, ...], names: Sequence[Sequence]) -> np.ndarray:
    if len(shape) != 3:
        raise ValueError(f"--masks of sequences must be a .npy or .npz file, got the folder {folder}")
    paths = {str(Path(path).relative_to(folder).with_suffix("")): path for path in find_images(folder)[0]}
    wanted = [str(Path(str(each[0])).with_suffix("")) for each in names]
    chosen = [next((paths[n] for n in (each, f"{each}_mask") if n in paths), None) for each in wanted]
    if not any(chosen):
        raise ValueError(
            f"--masks {folder} must hold pictures with the names of the items, such as {wanted[0]} or "
            f"{wanted[0]}_mask; it has {', '.join(list(paths)[:5])}"
        )
    images = ImageDataset([_mask_source(path) for path in chosen if path], shape[1:], channels=1)
    found, numbers = np.zeros((len(names), *shape[1:]), bool), [n for n, path in enumerate(chosen) if path]
    for place, number in enumerate(numbers):
        mask = images.load_8bit(place)[0].numpy()
        found[number] = mask > mask.max() / 2
    return found


def _mask_source(path: str) -> str | np.ndarray:
    """Return the path of a mask, or its 8-bit levels if it has 16 bits, of which 0 and 1 would both become black."""
    with contextlib.suppress(Exception), Image.open(path) as file:  # one that cannot be read is named later
        if file.mode[0] in "IF":
            values = np.asarray(file)
            return np.where(values > values.max() / 2, np.uint8(255), np.uint8(0))
    return path


def _array(path: str, dataset: Any, shape: tuple[int, ...]) -> np.ndarray:
    if Path(path).suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"--masks must be a folder of pictures, or a .npy or .npz file, got {path}")
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            name = found.files[0] if len(found.files) == 1 else "data"
            found = found[name]  # raises where there are several arrays, none of which is named "data"
    except Exception as error:  # NumPy raises many kinds
        raise ValueError(f"--masks {path} cannot be read: {error}") from error
    array = found != 0
    fitting = [(len(dataset), *shape), (len(dataset), *shape[1:])]
    if array.shape in fitting:
        return array
    if hasattr(dataset, "place") and hasattr(dataset, "array"):
        rows, length = dataset.array.shape[0], dataset.array.shape[-1]
        array = array[None] if array.ndim == 1 and rows == 1 else array
        fitting += [(rows, shape[0], length), (rows, length)]
        if array.shape in fitting:
            places = [dataset.place(number) for number in range(len(dataset))]
            starts = [(row, window * dataset.stride) for row, window in places]
            return np.stack([array[row, ..., start : start + shape[-1]] for row, start in starts])
    raise ValueError(
        f"--masks {path} must have one of the shapes {', '.join(map(str, dict.fromkeys(fitting)))}; got {array.shape}"
    )


# ---------------------------------------------------------------------------------------------
# Metrics


def item_metrics(scores: np.ndarray, anomalous: np.ndarray) -> dict[str, float]:
    """Return ROC-AUC and average precision of the scores (N,) of items; those that are NaN are left out."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    known = np.isfinite(scores)
    truth = anomalous[known]
    if truth.all() or not truth.any():
        raise ValueError("metrics need normal and anomalous items among those that were scored")
    return {
        "roc_auc": float(roc_auc_score(truth, scores[known])),
        "average_precision": float(average_precision_score(truth, scores[known])),
    }


def map_metrics(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Return ROC-AUC and average precision of the values of maps, and the best Dice with its threshold.

    The Dice coefficient of all maps that are cut at one threshold, 2 |A and B| / (|A| + |B|), is the harmonic mean of
    precision and recall there; the best one is that of the threshold that suits these masks.

    Args:
        maps: (N, C, *spatial); items whose map is NaN are left out.
        masks: bools (N, C, *spatial), or (N, *spatial), which are compared with the mean of the channels.
    """
    from sklearn.metrics import precision_recall_curve

    known = np.isfinite(maps).reshape(len(maps), -1).all(axis=1)
    maps, masks = maps[known], masks[known]
    values = maps if masks.ndim == maps.ndim else maps.mean(axis=1)
    values, truth = values.ravel(), masks.ravel()
    found = item_metrics(values, truth)
    precision, recall, thresholds = precision_recall_curve(truth, values)
    dice = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    best = int(dice[:-1].argmax())
    return {
        "map_roc_auc": found["roc_auc"], "map_average_precision": found["average_precision"],
        "best_dice": float(dice[best]), "best_dice_threshold": float(thresholds[best]),
    }  # fmt: skip
