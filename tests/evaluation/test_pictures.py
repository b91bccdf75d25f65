"""FID and KID: clean-fid's values, statistics that are kept, pictures that cannot be read."""

import errno
import io
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import frechet_by_eigenvalues, make
from measuring import Known, as_samples, evaluator, grey, images, measure
from PIL import Image

from ddpm_hf import GaussianScheduler
from ddpm_hf.data.images import ImageDataset, digits
from ddpm_hf.data.tables import ImageColumn
from ddpm_hf.evaluation.features import FeatureNetwork


def test_fid_and_kid_are_clean_fids(tmp_path):
    """Of 8-bit samples and un-augmented real pictures, each once."""
    arrays = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)
    real, fake = arrays[:90], arrays[90:] // 2
    data = ImageDataset(list(real), (8, 8), 3, center_crop=False, random_flip=True)
    options = {"cache_dir": str(tmp_path), "metrics": ["fid", "kid"]}
    # off the 8-bit grid by less than half a level: rounded as pictures are
    values = measure(data, (3, 8, 8), fake / 255 + 0.4 / 255, **options)
    network = FeatureNetwork("pixels")
    a, b = (network(x).double().numpy() for x in (real, fake))
    expected = frechet_by_eigenvalues(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    # fewer samples than dimensions: rounding leaves up to sqrt(eps) of the largest root in each of the 192
    assert values["fid"] == pytest.approx(expected, rel=192 * np.finfo(float).eps ** 0.5)
    x, y = a / np.sqrt(192), b / np.sqrt(192)
    kernel = [(u @ v.T + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))]
    off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    full = sum(off) - 2 * kernel[2].mean()
    # subsets of all 60 samples and 60 of 90 real ones estimate the whole without bias
    assert values["kid"] == pytest.approx(full, rel=0.05)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert measure(data, (3, 8, 8), fake / 255 + 0.4 / 255, **options) == values and file.stat().st_mtime_ns == written
    file.write_bytes(b"damaged")
    assert measure(data, (3, 8, 8), fake / 255 + 0.4 / 255, **options) == values


@pytest.mark.parametrize("kind", ["arrays", "bytes", "files", "table", "pictures"])
def test_the_cache_knows_every_picture(kind, tmp_path):
    """One pixel of one picture among 40 is another key, also in files of equal size and time; so are another number of
    items and another treatment of bad ones. The same contents have the same key, wherever they are."""

    def encoded(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "bmp")
        return file.getvalue()

    def sources(arrays, folder):
        if kind == "files":
            folder.mkdir()
            for i, array in enumerate(arrays):
                (folder / f"{i}.bmp").write_bytes(encoded(array))
                os.utime(folder / f"{i}.bmp", (0, 0))
            return [str(folder / f"{i}.bmp") for i in range(len(arrays))]
        if kind == "table":
            rows = {"image": [{"bytes": encoded(array), "path": None} for array in arrays]}
            features = datasets.Features({"image": datasets.Image()})
            return ImageColumn(datasets.Dataset.from_dict(rows, features=features), "image")
        form = {"arrays": lambda x: x, "bytes": encoded, "pictures": Image.fromarray}[kind]
        return [form(array) for array in arrays]

    def key(arrays, folder, **options):
        return evaluator(images(sources(arrays, tmp_path / folder)), (1, 8, 8), **options).pictures.cache_file().name

    arrays = grey(40)
    changed = arrays.copy()
    changed[17, 3, 3] ^= 1
    keys = [key(arrays, "a"), key(changed, "b"), key(arrays[:39], "c"), key(arrays, "d", num_real=39)]
    keys.append(key(arrays, "e", on_bad_image="skip"))
    assert len(set(keys)) == 5 and key(arrays, "f") == keys[0]


def test_the_cache_is_not_for_what_cannot_be_told(tmp_path):
    """Data sets of the user, classes that change ours, and what arrays do not hold have no file."""

    class Own(ImageDataset):
        pass

    assert evaluator(list(digits()), (1, 8, 8)).pictures.cache_file() is None
    assert evaluator(Own(list(grey(8)), (8, 8), 1), (1, 8, 8)).pictures.cache_file() is None


def test_other_pictures_in_memory_have_other_statistics(tmp_path):
    """All but 16 evenly spaced ones of 200 replaced by black: a distance of their own, not the cached one."""
    options = {"cache_dir": str(tmp_path), "metrics": ["fid"]}
    first, samples = grey(200), as_samples(grey(100, seed=1))
    second = np.zeros_like(first)
    kept = np.linspace(0, 199, 16).astype(int)
    second[kept] = first[kept]
    cached = [measure(images(list(x)), (1, 8, 8), samples, **options)["fid"] for x in (first, second)]
    alone = measure(images(list(second)), (1, 8, 8), samples, metrics=["fid"], cache_dir=str(tmp_path / "other"))["fid"]
    assert cached[1] == alone > 2 * cached[0]


@pytest.mark.parametrize("reason", ["no folder", "full disk"])
def test_a_cache_that_cannot_be_written_stops_nothing(reason, tmp_path, monkeypatch, capsys):
    """The value is the same, a warning names the folder and the option, and no half file is left."""
    samples = as_samples(grey(20, seed=1))
    expected = measure(images(list(grey(30))), (1, 8, 8), samples, metrics=["fid"], cache_dir=str(tmp_path / "good"))
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / "cache" if reason == "no folder" else tmp_path / "full"
    if reason == "full disk":

        def full(file, **_):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
    found = measure(images(list(grey(30))), (1, 8, 8), samples, metrics=["fid"], cache_dir=str(folder))
    assert found == expected
    said = capsys.readouterr().out
    assert f"cannot be kept in {folder}" in said and "eval_cache_dir" in said
    assert (tmp_path / "file").read_text() == "mine" and (reason == "no folder" or not list(folder.iterdir()))


def test_bad_pictures_count_nowhere(tmp_path, capsys):
    """Twelve files, six damaged: every metric is that of the six good ones, from the cache too, and their number is
    told. Were the next good one taken for a bad one, one picture would stand seven times."""
    good, options = grey(6), {"cache_dir": str(tmp_path), "on_bad_image": "skip", "metrics": ["fid", "memorization"]}
    places = (0, 1, 2, 3, 4, 8)
    sources = iter(good)
    mixed = [b"damaged" if i in places else next(sources) for i in range(12)]
    samples = as_samples(grey(20, seed=1))
    expected = measure(images(list(good)), (1, 8, 8), samples, **options)
    for metrics_ in (["fid", "memorization"], ["fid", "memorization"], ["fid"]):  # the third needs the cache alone
        e = evaluator(images(mixed), (1, 8, 8), num_samples=20, **{**options, "metrics": metrics_})
        e.prepare()
        values = e(Known(samples, (1, 8, 8)), 5)
        assert values == {name: value for name, value in expected.items() if name[:3] in ("fid", metrics_[-1][:3])}
        records = e.records(values, make("images"), 5)
        assert {(r["num_real"], r["num_left_out"]) for r in records} == {(6, 6)}
        assert "left out 6 of 12 real images" in capsys.readouterr().out
    held = evaluator(images(list(good)), (1, 8, 8), images(mixed), metrics=["held_out_loss"], on_bad_image="skip")
    held(Known([], (1, 8, 8)), 5, GaussianScheduler())
    assert held.held_out.count == 6
    with pytest.raises(ValueError, match="at least 4 real items that can be read, the data has 3"):
        measure(images([*good[:3], *[b"damaged"] * 5]), (1, 8, 8), samples, **options)
