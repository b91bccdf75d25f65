"""Metrics of scores and maps against known anomalies, labels and masks."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from ddpm_hf.data.images import image_folder
from ddpm_hf.data.recordings import Recording, RecordingDataset, rows_as_recordings
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation.anomalies import (
    item_metrics,
    item_names,
    map_metrics,
    percentiles,
    read_anomalies,
    read_masks,
)


def test_metrics_are_those_of_scikit_learn_and_of_a_search():
    """The best Dice is the largest F1 over all cuts at a value of the maps; an item that was not scored is left out."""
    draw = np.random.default_rng(0)
    masks = draw.random((5, 6)) < 0.3
    maps = (masks[:, None] + draw.normal(size=(5, 2, 6))).round(1)
    maps[4] = np.nan
    values, truth = maps[:4].mean(axis=1).ravel(), masks[:4].ravel()
    found = map_metrics(maps, masks)
    assert found["map_roc_auc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
    assert found["map_average_precision"] == pytest.approx(average_precision_score(truth, values), abs=1e-12)
    dice = {cut: f1_score(truth, values >= cut) for cut in values}
    assert found["best_dice"] == pytest.approx(max(dice.values()), abs=1e-12)
    assert dice[found["best_dice_threshold"]] == pytest.approx(found["best_dice"], abs=1e-12)
    scores, labels = np.array([1.0, 3.0, 2.0, np.nan, 4.0]), np.array([False, True, False, True, False])
    assert item_metrics(scores, labels) == {"roc_auc": pytest.approx(2 / 3), "average_precision": pytest.approx(1 / 2)}


def test_percentiles_count_the_scores_below():
    found = percentiles(np.array([0.5, 1.0, 2.5, 9.0, np.nan]), np.array([3.0, 1.0, 2.0, 4.0]))
    assert np.array_equal(found, [0, 25, 50, 100, np.nan], equal_nan=True)


@pytest.fixture
def windows():
    """Three sequences of two windows of 4 points."""
    return SequenceDataset(np.arange(24.0).reshape(3, 8), length=4, stride=4, name="x")


def test_labels_and_masks_follow_windows(windows, tmp_path):
    """Labels and masks of the sequences are given to their windows; those of the windows are taken as they are."""
    (tmp_path / "rows.txt").write_text("0\n1\n0\n")
    (tmp_path / "items.txt").write_text("0\n0\n1\n0\n0\n0\n")
    (tmp_path / "named.csv").write_text("label\n0\n0\n1\n0\n0\n0\n")
    assert read_anomalies(str(tmp_path / "rows.txt"), windows, None).tolist() == [0, 0, 1, 1, 0, 0]
    assert read_anomalies(str(tmp_path / "named.csv"), windows, None).tolist() == [0, 0, 1, 0, 0, 0]
    assert read_anomalies(str(tmp_path / "items.txt"), windows, None).tolist() == [0, 0, 1, 0, 0, 0]
    names, rows = item_names(windows, "x.npy")
    assert names == ["item", "sequence", "start"] and rows[:3] == [[0, 0, 0], [1, 0, 4], [2, 1, 0]]
    mask = np.zeros((3, 8), np.uint8)
    mask[1, 5] = 1
    np.save(tmp_path / "m.npy", mask)
    found = read_masks(str(tmp_path / "m.npy"), windows, (1, 4), rows)
    assert found.dtype == bool and np.argwhere(found).tolist() == [[3, 1]]
    np.save(tmp_path / "m.npy", mask[:, :7])
    with pytest.raises(ValueError, match=r"one of the shapes \(6, 1, 4\), \(6, 4\), .*; got \(3, 7\)"):
        read_masks(str(tmp_path / "m.npy"), windows, (1, 4), rows)
    np.savez(tmp_path / "several.npz", a=mask, b=mask)
    with pytest.raises(ValueError, match="several.npz cannot be read: .*data"):
        read_masks(str(tmp_path / "several.npz"), windows, (1, 4), rows)
    wrong = {"0\n0\n0\n": "all are normal", "0\n1\n1\n0\n": "one label for each", "a\na\nb\n": "0 \\(normal"}
    for text, message in wrong.items():
        (tmp_path / "wrong.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_anomalies(str(tmp_path / "wrong.txt"), windows, None)
    with pytest.raises(ValueError, match="--normal must be of the classes a, b; got c"):
        read_anomalies(str(tmp_path / "wrong.txt"), windows, ["c"])


def test_labels_and_places_of_windows_where_some_are_left_out(tmp_path):
    """Labels of the sequences, or of the windows that are left; a sequence of which no window is left has one too."""
    array = np.arange(36.0).reshape(3, 1, 12)
    array[0, 0, 5] = array[1] = np.nan
    windows = RecordingDataset(rows_as_recordings(array, "x"), "x", length=4, stride=4, drop=True)
    names, rows = item_names(windows, "x.npy")
    assert names == ["item", "sequence", "start"]
    assert rows == [[0, 0, 0], [1, 0, 8], [2, 2, 0], [3, 2, 4], [4, 2, 8]]
    for text, expected in (("0\n1\n1\n", [0, 0, 1, 1, 1]), ("0\n1\n0\n0\n1\n", [0, 1, 0, 0, 1])):
        (tmp_path / "labels.txt").write_text(text)
        assert read_anomalies(str(tmp_path / "labels.txt"), windows, None).tolist() == expected
    (tmp_path / "labels.txt").write_text("0\n1\n" * 4 + "0\n")
    with pytest.raises(ValueError, match="each of the 5 items, or of the 3 sequences, got 9"):
        read_anomalies(str(tmp_path / "labels.txt"), windows, None)


def test_windows_of_recordings_have_their_files(tmp_path):
    read = [Recording(f"{tmp_path}/a/{n}.wav", 1, 8, 10.0, lambda a, b: np.arange(a, b)[None] * 1.0) for n in range(3)]
    whole, windows = (RecordingDataset(read, "x", length=length, stride=length) for length in (8, 4))
    assert item_names(whole, tmp_path) == (["item"], [["a/0.wav"], ["a/1.wav"], ["a/2.wav"]])
    assert item_names(windows, tmp_path)[1][:3] == [[0, "a/0.wav", 0], [1, "a/0.wav", 4], [2, "a/1.wav", 0]]
    (tmp_path / "labels.txt").write_text("1\n0\n0\n")
    assert read_anomalies(str(tmp_path / "labels.txt"), windows, None).tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_masks_of_images_are_cut_as_the_images(kind, tmp_path):
    """A mask is found by the name of its image, of any size; an image without one is normal."""
    for name, size in (("a", (16, 8)), ("b", (8, 8))):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("L", size, 90).save(tmp_path / "data" / f"{name}.png")
    (tmp_path / "masks").mkdir()
    mask = np.zeros((8, 16), np.uint8)
    mask[:, 8:] = 1  # the right half of a wide image; its middle is kept
    Image.fromarray(mask.astype(kind)).save(tmp_path / "masks" / "a_mask.png")
    data = image_folder(str(tmp_path / "data"), (8, 8), 1, False)
    names, rows = item_names(data, tmp_path / "data")
    assert names == ["item"] and rows == [["a.png"], ["b.png"]]
    found = read_masks(str(tmp_path / "masks"), data, (1, 8, 8), rows)
    assert found[0, :, 4:].all() and not found[0, :, :4].any() and not found[1].any()
    with pytest.raises(ValueError, match="such as x or x_mask; it has a, b"):
        read_masks(str(tmp_path / "data"), data, (1, 8, 8), [["x"], ["y"]])
