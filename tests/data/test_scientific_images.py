"""Images in units of their own: files, ranges, scalings, warnings and errors; and a run from TIFF files to samples."""

import json
import os

import numpy as np
import pytest
import tifffile
import torch
from diffusers import DiffusionPipeline
from helpers import SMALL
from PIL import Image

from ddpm_hf import DDPMPipeline, TrainConfig, train
from ddpm_hf.commands import evaluate
from ddpm_hf.data import open_data, scientific_images, sequences
from ddpm_hf.data.given import GivenUnits
from ddpm_hf.data.loading import hold_out, load_item
from ddpm_hf.data.ranges import measure
from ddpm_hf.data.scaling import EIGHT_BIT, Scaling
from ddpm_hf.data.scientific_images import (
    ScientificImages,
    array_shape,
    is_scientific,
    read_values,
    resized,
)
from ddpm_hf.data.sequences import write_scans

EPS = np.finfo(np.float32).eps


def numbers(*shape, low=0.0, high=1.0, seed=0):
    return np.random.default_rng(seed).uniform(low, high, shape)


def opened(**options):
    return open_data(TrainConfig(output_dir="none", **options))


def warnings(feed):
    return [note for note in feed.notes if note.startswith("warning")]


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """A folder of 12 float TIFF files with five bands of very different ranges, 10 x 12 pixels."""
    folder = tmp_path_factory.mktemp("bands")
    values = numbers(12, 5, 10, 12) * np.array([1, 10, 1000, 1e-3, 5])[:, None, None] + 3
    values = values.astype(np.float32)
    for i, image in enumerate(values):
        tifffile.imwrite(folder / f"{i:02}.tif", image, photometric="minisblack")
    return folder, values


# ---------------------------------------------------------------------------------------------
# Units


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (np.float32, {}),
        (np.float64, {"norm": "meanstd"}),
        (np.float64, {"value_range": (-5.0, 9.0)}),
        (np.int16, {"value_range": (-1024, 3071)}),
        (np.uint16, {}),
        (np.int32, {"norm": "minmax"}),
    ],
)
def test_units_are_undone(dtype, options):
    """x is rounded to float32 once: data = x * scale + shift is off by half an ulp of |x| <= limit, times the scale."""
    values = numbers(6, 5, 8, 9, low=-4, high=8)
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        values = numbers(6, 5, 8, 9, low=max(info.min, -1000), high=min(info.max, 3000))
        values[0, 0, 0, 0] = info.max if dtype is np.uint16 else 3000
    values = values.astype(dtype)
    data = ScientificImages(values, **options)
    scaling = data.scaling
    x = torch.stack([data[i] for i in range(6)])
    assert x.dtype == torch.float32 and x.shape == values.shape and x.abs().max() <= scaling.limit * (1 + EPS)
    back = scaling.to_data(x.double().flatten(2)).view(x.shape).numpy()
    bound = scaling.limit * EPS / 2 * np.array(scaling.scale)[:, None, None] + 1e-12
    assert (np.abs(back - values) <= bound).all()


def test_the_scalings_against_the_data():
    values = numbers(7, 3, 4, 5, low=-3, high=11)
    minmax, meanstd = ScientificImages(values).scaling, ScientificImages(values, norm="meanstd").scaling
    low, high = values.min(axis=(0, 2, 3)), values.max(axis=(0, 2, 3))
    np.testing.assert_allclose(minmax.shift, (low + high) / 2, rtol=1e-15)
    np.testing.assert_allclose(minmax.scale, (high - low) / 2, rtol=1e-15)
    np.testing.assert_allclose(meanstd.shift, values.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(meanstd.scale, values.std(axis=(0, 2, 3)), rtol=1e-13)
    bits = ScientificImages(values.astype(np.int16)).scaling
    assert bits.shift == (-0.5,) * 3 and bits.scale == (32767.5,) * 3


def test_8_bit_arrays_are_pictures():
    values = numbers(4, 5, 6, 6, high=256).astype(np.uint8)
    data = ScientificImages(values)
    assert data.scaling is EIGHT_BIT and data.scaling.to_json() == {} and data.channels == 5
    assert torch.equal(data[1], EIGHT_BIT.to_model(torch.from_numpy(values[1])))


# ---------------------------------------------------------------------------------------------
# Files


def test_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = numbers(6, 3, 8, 10)
    np.save("first.npy", values)
    np.save("last.npy", np.moveaxis(values, 1, -1))
    np.savez("both.npz", data=values, kind=np.array([0, 1] * 3))
    np.save("grey.npy", values[:, 0])
    first = opened(train_data_file="first.npy")
    assert first.kind == "image array" and first.shape == (3, 8, 10) and not warnings(first)
    assert first.files.paths == [str(tmp_path / "first.npy")]
    last = opened(train_data_file="last.npy", channels_last=True)
    assert torch.equal(first.dataset[2], last.dataset[2])
    assert "--channels_last" in warnings(opened(train_data_file="last.npy"))[0]
    both = opened(train_data_file="both.npz", class_labels="kind")
    assert both.class_counts == [3, 3] and torch.equal(first.dataset[2], both.dataset[2])
    assert opened(train_data_file="grey.npy").kind == "array"  # (N, channels, length)
    for option in ({"image_norm": "minmax"}, {"image_channels": 1}, {"resolution": [8, 10]}, {"image_range": [0, 1]}):
        grey = opened(train_data_file="grey.npy", **option)
        assert grey.kind == "image array" and grey.shape == (1, 8, 10)
    assert array_shape("nothing.npy") is None


def test_files_of_all_kinds(tmp_path):
    """Bands, samples and pages of TIFF files are channels; a compression that tifffile lacks is read by Pillow."""
    one, five = numbers(9, 7, high=4000), numbers(5, 9, 7, high=4000)
    for dtype in (np.uint16, np.int16, np.int32, np.float32, np.float64):
        for values in (one, five):
            tifffile.imwrite(tmp_path / "x.tif", values.astype(dtype), photometric="minisblack")
            found = read_values(str(tmp_path / "x.tif"), "x")
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, values.astype(dtype).reshape(-1, 9, 7))
    tifffile.imwrite(
        tmp_path / "x.tif", np.moveaxis(five, 0, -1), photometric="minisblack", planarconfig="contig",
        extrasamples=[0] * 4,
    )  # fmt: skip
    np.testing.assert_array_equal(read_values(str(tmp_path / "x.tif"), "x"), five)
    Image.fromarray(one.astype(np.float32)).save(tmp_path / "x.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_values(str(tmp_path / "x.tif"), "x")[0], one.astype(np.float32))
    for array, last in ((one, False), (five, False), (np.moveaxis(five, 0, -1), True)):
        np.save(tmp_path / "x.npy", array)
        expected = array[None] if array.ndim == 2 else five
        np.testing.assert_array_equal(read_values(str(tmp_path / "x.npy"), "x", last), expected)
    Image.fromarray(one.astype(np.uint16)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_values(str(tmp_path / "x.png"), "x")[0], one.astype(np.uint16))


def test_folders_are_told_apart(tmp_path, bands):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, values in files.items():
            if file.startswith("npy"):
                np.save(tmp_path / name / f"{file}.npy", values)
            elif values.dtype == np.uint8:
                Image.fromarray(values).save(tmp_path / name / f"{file}.png")
            else:
                tifffile.imwrite(tmp_path / name / f"{file}.tiff", values, photometric="minisblack")
        return {"train_data_dir": str(tmp_path / name)}

    grey, signed = np.arange(64, dtype=np.uint8).reshape(8, 8), np.arange(-500, 524, 16, np.int16).reshape(8, 8)
    pictures = folder("pictures", a=grey, b=grey, npy_c=grey)
    assert opened(**pictures).kind == "folder"
    own = opened(**pictures, image_norm="minmax")
    assert own.kind == "data folder" and own.shape == (1, 64, 64)
    assert (own.scaling.shift, own.scaling.scale) == ((31.5,), (31.5,))
    assert opened(**folder("hounsfield", a=signed, b=signed), resolution=[8]).kind == "data folder"
    assert opened(**folder("counts", a=(signed + 500).astype(np.uint16))).kind == "folder"  # as before
    arrays = opened(**folder("arrays", npy_a=numbers(2, 8, 8), npy_b=numbers(2, 9, 8, seed=1)), resolution=[8])
    assert arrays.kind == "data folder" and arrays.shape == (2, 8, 8) and arrays.items == 2
    assert opened(train_data_dir=str(bands[0])).kind == "data folder"


def test_resizing_keeps_the_range_and_the_middle():
    """An average over areas has the mean of the image where sizes divide, and no value leaves the image's range."""
    x = torch.rand(5, 24, 30, dtype=torch.float32)
    assert resized(x, (24, 30)) is x
    small = resized(x, (12, 15))
    assert small.shape == (5, 12, 15) and (small.mean((1, 2)) - x.mean((1, 2))).abs().max() < 0.02
    for size in ((12, 12), (50, 40), (7, 29)):
        y = resized(x, size)
        assert y.shape[1] >= size[0] and y.shape[2] >= size[1] and size[0] == y.shape[1] or size[1] == y.shape[2]
        assert y.min() >= x.min() - 1e-6 and y.max() <= x.max() + 1e-6
    assert resized(torch.rand(1, 2, 5000), (4, 4)).shape == (1, 4, 68)
    flat = ScientificImages(np.broadcast_to(np.arange(40.0), (3, 2, 40, 40)), (20, 20), random_flip=True)
    one, other = (
        flat.load(0),
        next(y for y in (flat.load(0, np.random.default_rng(i)) for i in range(9)) if y[0, 0, 0] > y[0, 0, -1]),
    )
    assert torch.equal(one.flip(2), other)


@pytest.mark.parametrize("order", "<>")
def test_byte_orders_and_pages(order, tmp_path):
    """Pages that were written one by one are channels as those of one array are; others, as overviews, are left out."""
    values = numbers(2, 6, 7).astype(np.float32)
    with tifffile.TiffWriter(tmp_path / "x.tif", byteorder=order) as file:
        for page in (*values, values[0, ::2, ::2], values[0].astype(np.float64)):
            file.write(page)
    np.testing.assert_array_equal(read_values(str(tmp_path / "x.tif"), "x"), values)
    assert is_scientific(str(tmp_path / "x.tif"))
    array = numbers(5, 1, 6, 7, high=60000).astype(order + "u2")
    data = ScientificImages(array)
    assert data.dtype == np.uint16 and data.scaling.scale == (32767.5,)
    np.testing.assert_allclose(data[2].numpy(), array[2] / 32767.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    "text, dtype, value",
    [
        ("-3.4028234663852886e+38", np.float32, np.finfo(np.float32).min),  # as GDAL writes it
        ("-9999.1", np.float32, np.float32(-9999.1)),
        ("255.0", np.uint8, 255),
        ("-32768", np.int16, -32768),
        ("-9999", np.uint16, None),  # no value of the image can be it
        ("none", np.int16, None),
    ],
)
def test_missing_values_are_those_that_the_file_declares(text, dtype, value, tmp_path):
    """The tag holds a text; zeros, which are in each image, are missing in none."""
    path, values = str(tmp_path / "x.tif"), np.arange(60).reshape(6, 10).astype(dtype)
    tags = [(42113, "s", 0, text, False)]
    tifffile.imwrite(path, values, extratags=tags)
    np.testing.assert_array_equal(read_values(path, "x")[0], values)
    values[2, 3:5] = value or 0
    tifffile.imwrite(path, values, extratags=tags)
    if value is None:
        read_values(path, "x")
    else:
        with pytest.raises(ValueError, match="2 values are .* which the file declares to be missing"):
            read_values(path, "x")


def test_palettes_are_colours(tmp_path):
    picture = Image.fromarray(numbers(9, 7, 3, high=256).astype(np.uint8)).quantize(16)
    picture.save(tmp_path / "x.tif")
    found = read_values(str(tmp_path / "x.tif"), "x")
    np.testing.assert_array_equal(found, np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0))


@pytest.mark.parametrize("folder", [False, True])
def test_the_range_is_kept_beside_the_run(folder, tmp_path, monkeypatch):
    """The second start reads no image before it is needed; a file that has changed, or is read otherwise, is read."""
    passes = []
    monkeypatch.setattr(scientific_images, "measure", lambda *a: passes.append(1) or measure(*a))
    monkeypatch.setattr(sequences, "KEPT_FROM", 0)
    values = numbers(8, 2, 6, 6, low=-5).astype(np.float32)
    (tmp_path / "data").mkdir()
    for i, image in enumerate(values if folder else values[None]):
        np.save(tmp_path / "data" / f"{i}.npy", image)
    files = sorted(map(str, (tmp_path / "data").iterdir()))
    source = {"train_data_dir": str(tmp_path / "data")} if folder else {"train_data_file": files[0]}
    options = {"output_dir": str(tmp_path), "resolution": [6], "image_norm": "meanstd", **source}
    first = open_data(TrainConfig(**options))
    write_scans(first.units, tmp_path)
    second = open_data(TrainConfig(**options))
    assert len(passes) == 1 and second.scaling == first.scaling and second.notes == first.notes
    assert torch.equal(first.dataset[3], second.dataset[3]) and second.units.dtype == np.float32
    open_data(TrainConfig(**{**options, "on_bad_image": "skip"}))
    os.utime(files[-1], ns=(0, 0))
    open_data(TrainConfig(**options))
    assert len(passes) == 3


# ---------------------------------------------------------------------------------------------
# Warnings and errors


def test_what_would_be_silent_is_told(tmp_path):
    """Different types in one folder, arrays with their channels last, a constant, and values declared to be missing."""
    for i, image in enumerate((numbers(6, 6).astype(np.float32), numbers(6, 6, high=60000).astype(np.uint16))):
        tifffile.imwrite(tmp_path / f"{i}.tif", image)
    assert "different types, float32 and uint16" in warnings(opened(train_data_dir=str(tmp_path)))[0]
    (tmp_path / "last").mkdir()
    np.save(tmp_path / "last" / "x.npy", numbers(32, 32, 3))
    last = {"train_data_dir": str(tmp_path / "last"), "resolution": [8]}
    assert "taken for 32 channels" in warnings(opened(**last))[0]
    assert opened(**last, channels_last=True).shape == (3, 8, 8) and not warnings(opened(**last, channels_last=True))
    (constant,) = [note for note in ScientificImages(np.full((2, 1, 4, 4), -3, np.int16)).notes if "flat" in note]
    assert "--image_range" not in constant
    image = np.where(numbers(6, 6) < 0.1, -9999, numbers(6, 6, seed=1)).astype(np.float32)
    tifffile.imwrite(tmp_path / "1.tif", image, extratags=[(42113, "s", 0, "-9999", True)])
    count = (image == -9999).sum()
    with pytest.raises(ValueError, match=rf"1\.tif: {count} values are -9999, which the file declares to be missing"):
        opened(train_data_dir=str(tmp_path))
    assert opened(train_data_dir=str(tmp_path), on_bad_image="skip").scaling.shift[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.filterwarnings("error")
def test_mapped_8_bit_arrays_are_read_without_a_warning(tmp_path):
    np.save(tmp_path / "x.npy", numbers(4, 3, 6, 6, high=256).astype(np.uint8))
    assert opened(train_data_file=str(tmp_path / "x.npy")).dataset[0].shape == (3, 6, 6)


def test_12_bits_in_16(tmp_path):
    values = numbers(6, 8, 8, high=4095).astype(np.uint16)
    for i, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    folder = {"train_data_dir": str(tmp_path), "resolution": [8]}
    found = warnings(opened(**folder, image_channels=1))
    assert len(found) == 1 and "--image_range 0 4095" in found[0] and f"{values.max()}" in found[0]
    assert "--image_range 0 4095" in warnings(opened(**folder, image_norm="bits"))[0]
    feed = opened(**folder, image_range=[0, 4095])
    assert not warnings(feed) and feed.dataset[0].std() > 0.4  # uniform in [-1, 1]: 0.577
    np.save(tmp_path / "ct.npy", numbers(4, 1, 8, 8, low=-1000, high=3000).astype(np.int16))
    assert "--image_range -9" in warnings(opened(train_data_file=str(tmp_path / "ct.npy")))[0]


def test_values_outside_a_range_are_clipped_and_counted(tmp_path):
    values = np.full((4, 1, 5, 5), 10.0)
    values[0, 0, 0, 0], values[1, 0, 1, 1] = -50, 99
    np.save(tmp_path / "x.npy", values)
    feed = opened(train_data_file=str(tmp_path / "x.npy"), image_range=[0, 20])
    assert "2.00% of the values" in warnings(feed)[0] and "-50 to 99" in warnings(feed)[0]
    assert feed.dataset[0].min() == -1 and feed.dataset[1].max() == 1 and feed.dataset[2].abs().max() == 0


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda v: v.__setitem__((3, 1, 2, 4), np.nan), {}, "row 3 of .*x.npy: .*channel 1 has nan in row 2, column 4"),
        (lambda v: v.__setitem__((2, 0, 0, 0), np.inf), {}, "row 2 of .*x.npy: .*channel 0 has inf"),
        (lambda v: v.__setitem__((slice(None), 1), 7), {}, "channel 1 of .*x.npy has the value 7 everywhere"),
        (None, {"image_norm": "bits"}, "image_norm bits is for whole numbers, and .*x.npy has float64"),
        (None, {"image_range": [50, 60]}, "image_range must hold values of .*x.npy, which lie in .*; got 50 to 60"),
        (None, {"image_channels": 3}, "image_channels must be the number of channels of .*x.npy, 2, .*got 3"),
        (None, {"sequence_norm": "meanstd"}, "sequence_norm applies to .* with an array of images"),
    ],
)
def test_bad_arrays(change, options, message, tmp_path):
    values = numbers(5, 2, 6, 6)
    if change:
        change(values)
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(ValueError, match=message):
        opened(train_data_file=str(tmp_path / "x.npy"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_range": [1, 1]}, "image_range must be two finite numbers, the lower first"),
        ({"image_range": [0, float("nan")]}, "image_range must be one or more finite numbers"),
        ({"image_range": [0, 1], "image_norm": "minmax"}, "image_norm and image_range exclude each other"),
        ({"image_norm": "log"}, "image_norm must be one of bits, minmax, meanstd"),
        ({"dataset_name": "digits", "image_norm": "minmax"}, "image_norm applies to .* with the bundled digits"),
        ({"dataset_name": "digits", "image_channels": 5}, "image_channels must be 1, 3 or 4 for digits, got 5"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        opened(**options)


def test_bad_files_are_named_or_skipped(tmp_path):
    for i in range(5):
        np.save(tmp_path / f"{i}.npy", numbers(3, 6, 6, seed=i))
    folder = {"train_data_dir": str(tmp_path), "resolution": [6]}
    np.save(tmp_path / "5.npy", np.full((3, 6, 6), np.nan))
    with pytest.raises(ValueError, match=r"5\.npy: all values must be finite; .*--on_bad_image skip"):
        opened(**folder)
    assert opened(**folder, on_bad_image="skip").items == 6
    np.save(tmp_path / "5.npy", np.zeros((2, 6, 6)))
    with pytest.raises(ValueError, match=r"same channels: .*5\.npy has 2, .*0\.npy has 3"):
        opened(**folder)
    (tmp_path / "5.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"cannot read the image .*5\.npy"):
        opened(**folder)
    # with a scaling the data is not looked at, but for its channels
    bad_first = {"sources": [str(tmp_path / f"{i}.npy") for i in (5, 0)], "resolution": (6, 6)}
    bad_first["scaling"] = Scaling((0.0,) * 3, (2.0,) * 3)
    assert ScientificImages(**bad_first, skip_bad=True).channels == 3
    with pytest.raises(ValueError, match=r"cannot read the image .*5\.npy"):
        ScientificImages(**bad_first)
    bad_first["sources"].pop()
    with pytest.raises(ValueError, match="none of the images of the array can be read"):
        ScientificImages(**bad_first, skip_bad=True)


def test_bad_rows_of_an_array_are_named_or_skipped(tmp_path, monkeypatch):
    """The range is that of the other rows, and training leaves the bad ones out as it leaves out files."""
    monkeypatch.setattr(scientific_images, "PART", 100)
    array = numbers(6, 2, 5, 5)
    array[2, 1, 0, 3] = np.nan
    array[3:5, 0] = 9  # a part without a good row, and part of another one
    array[3:5, 1, 2, 2] = np.inf
    np.save(tmp_path / "x.npy", array)
    file = {"train_data_file": str(tmp_path / "x.npy")}
    with pytest.raises(ValueError, match=r"row 2 of .* channel 1 has nan in row 0, column 3.*--on_bad_image skip"):
        opened(**file)
    feed = opened(**file, on_bad_image="skip")
    good = array[[0, 1, 5]]
    np.testing.assert_allclose(feed.scaling.shift, (good.max((0, 2, 3)) + good.min((0, 2, 3))) / 2)
    batch = next(iter(feed.loader(0, 0, 1, {}, False)))
    assert batch.x0.abs().max() <= 1 + EPS and batch.skipped
    tensor = torch.from_numpy(good)
    assert torch.equal(ScientificImages(tensor)[1], ScientificImages(good)[1])


# ---------------------------------------------------------------------------------------------
# Datasets from Python


def given(dataset, data_range=None, **options):
    from ddpm_hf.trainer.loop import _with_range

    return open_data(_with_range(TrainConfig(output_dir="none", **options), dataset, data_range), dataset)


def test_data_in_0_to_1_is_told():
    found = warnings(given(list(torch.rand(8, 3, 4, 4))))
    assert len(found) == 1 and "data_range=(0, 1)" in found[0] and "8 items" in found[0]
    assert not warnings(given([torch.rand(3, 4, 4) * 2 - 1 for _ in range(8)]))
    feed = given(list(torch.rand(8, 3, 4, 4)), (0, 1))
    assert not warnings(feed) and feed.scaling.to_json() == {"data_shift": [0.5] * 3, "data_scale": [0.5] * 3}


def test_latents_of_any_range():
    values = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)).double() * 5 + 2 for i in range(6)]
    items = [{"x0": value, "label": i % 2} for i, value in enumerate(values)]
    feed = given(items, image_norm="meanstd", class_labels="label")
    whole = torch.stack(values)
    np.testing.assert_allclose(feed.scaling.shift, whole.mean((0, 2, 3)).numpy(), rtol=1e-12)
    x = load_item(feed.dataset, 3)
    expected = (values[3] - whole.mean((0, 2, 3))[:, None, None]) / whole.std((0, 2, 3), correction=0)[:, None, None]
    assert (x - expected).abs().max() < 1e-6 and feed.class_counts == [3, 3]
    assert feed.scaling.limit == pytest.approx(float(max(load_item(feed.dataset, i).abs().max() for i in range(6))))


@pytest.mark.parametrize(
    "item",
    [
        numbers(1, 4, 5).astype(">f4"), numbers(1, 4, 5)[:, ::-1], numbers(1, 4, 5).astype(np.float16),
        torch.from_numpy(numbers(1, 4, 5)).bfloat16(), numbers(1, 4, 5, high=9).astype(">i2"),
    ],
    ids=["big-endian", "reversed", "half", "bfloat16", "big-endian whole numbers"],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_items_of_any_form(item):
    wide = item.double() if isinstance(item, torch.Tensor) else torch.from_numpy(item.astype(np.float64, order="C"))
    feed = given([item, item], (-20_000_000, 20_000_000))
    torch.testing.assert_close(load_item(feed.dataset, 0), (wide / 2e7).float())
    assert GivenUnits([item, item], "minmax")[1].abs().max() == pytest.approx(1, abs=1e-6)
    if isinstance(item, np.ndarray) and item.dtype.kind == "f":  # in the model's units already
        torch.testing.assert_close(load_item([item], 0), wide.float())


def test_bits_of_8_bit_items_are_those_of_pictures():
    items = [numbers(6, 8, 3, high=256, seed=i).astype(np.uint8) for i in range(3)]
    data = GivenUnits(items, "bits")
    assert data.scaling is EIGHT_BIT and data.channels == 3
    assert torch.equal(data[2], EIGHT_BIT.to_model(torch.from_numpy(items[2]).movedim(-1, 0)))


def test_8_bit_items_are_images():
    tensor = torch.randint(0, 256, (3, 6, 8), dtype=torch.uint8)
    expected = EIGHT_BIT.to_model(tensor)
    for item in (tensor, tensor.movedim(0, -1), tensor.numpy(), tensor.movedim(0, -1).numpy()):
        feed = given([item] * 4)
        assert feed.kind == "given images" and torch.equal(load_item(feed.dataset, 0), expected)
    assert given([tensor[0].numpy()] * 4).shape == (1, 6, 8)
    assert (load_item(given([tensor.numpy()] * 4, (0, 255)).dataset, 1) - expected).abs().max() <= EPS
    square = np.zeros((3, 3, 3), np.uint8)
    square[..., 0] = 255  # an array is (H, W, C), a tensor (C, H, W)
    assert load_item(given([square] * 4).dataset, 0)[0].min() == 1
    assert load_item(given([torch.from_numpy(square)] * 4).dataset, 0)[0, :, 1:].max() == -1


@pytest.mark.parametrize(
    ("dataset", "data_range", "options", "message"),
    [
        (None, (0, 1), {}, "data_range is the range of a dataset given from Python"),
        ([torch.rand(1, 4, 4)] * 4, (1, 0), {}, "data_range: image_range must be two finite numbers"),
        ([torch.rand(1, 4, 4)] * 4, (0, 1), {"image_norm": "minmax"}, "in place of the options"),
        ([torch.rand(1, 4, 4) * 9] * 4, (0, 1), {}, "item 0 of the data: its values must lie in the range .*0 to 1"),
        ([torch.rand(1, 4, 4) * 9] * 4, None, {}, r"items must lie in \[-1, 1\]; .*data_range=\(low, high\)"),
        ([torch.zeros(1, 4, 4, dtype=torch.int32)] * 4, None, {}, "with data_range or image_norm"),
        ([torch.full((1, 4, 4), torch.nan)] * 4, (0, 1), {}, "item 0 of the data must be finite"),
        (ScientificImages(numbers(4, 1, 4, 4)), (0, 1), {}, "image_range is for tensors and arrays given from Python"),
    ],
)
def test_bad_data_from_python(dataset, data_range, options, message):
    with pytest.raises(ValueError, match=message):
        given(dataset, data_range, **options)


# ---------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def run(bands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = {**SMALL, "train_batch_size": 4, "max_train_steps": 2, "resolution": [8], "holdout": 4}
    evaluation = {"eval_steps": 2, "eval_metrics": ["memorization", "held_out_loss"], "eval_num_samples": 4}
    train(TrainConfig(train_data_dir=str(bands[0]), output_dir=str(folder), **options, **evaluation))
    return folder


def test_a_run_of_five_bands(run, bands):
    """Two steps on float TIFF files, saved and loaded in both ways; samples are in the units of each band."""
    values = bands[1].astype(np.float64)
    low, high = values.min(axis=(0, 2, 3)), values.max(axis=(0, 2, 3))
    saved = json.loads((run / "pipeline" / "model_index.json").read_text())
    np.testing.assert_allclose(saved["data_shift"], (high + low) / 2, rtol=1e-15)
    images = []
    for cls, more in ((DDPMPipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})):
        pipe = cls.from_pretrained(run / "pipeline", **more)
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(2, generator=torch.Generator().manual_seed(1), output_type="np").images)
    np.testing.assert_array_equal(*images)
    assert images[0].shape == (2, 8, 8, 5)
    # x0 is clipped to [-1, 1] in each step, and so are the samples
    assert (images[0] >= low - 1e-3 * (high - low)).all() and (images[0] <= high + 1e-3 * (high - low)).all()
    with pytest.raises(ValueError, match="output_type 'pil' needs 1, 2, 3 or 4 channels, the model has 5"):
        pipe()
    picture = Image.open(run / "samples" / "step-000002.png")
    assert picture.mode == "RGB" and picture.width > 4 * picture.height  # the bands side by side
    samples = np.load(run / "samples" / "step-000002.npy")
    assert samples.shape == (4, 5, 8, 8) and samples[:, 2].mean() > 100 > samples[:, 0].mean()


def test_that_run_is_evaluated_in_its_units(run, bands, tmp_path, capsys):
    arguments = ["--pipeline", run / "pipeline", "--data", bands[0], "--metrics", "memorization", "held_out_loss",
                 "--num_samples", "4", "--batch_size", "4", "--output_dir", tmp_path]  # fmt: skip
    assert evaluate.main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    now = {r["metric"]: r["value"] for r in json.loads((tmp_path / "evaluation.json").read_text())}
    then = {r["metric"]: r["value"] for r in json.loads((run / "pipeline" / "evaluation.json").read_text())}
    assert now["held_out_loss"] == pytest.approx(then["held_out_loss"], rel=1e-5)


def test_given_data_of_a_run_is_completed_in_its_units(tmp_path):
    dataset = [torch.rand(2, 8, 8) * 30 - 10 for _ in range(8)]
    options = {**SMALL, "train_batch_size": 4, "max_train_steps": 1, "condition": "known"}
    train(TrainConfig(output_dir=str(tmp_path), **options), dataset, data_range=(-10, 20))
    pipe = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    known = dataset[0][None].clone()
    known[..., 4:] = torch.nan
    done = pipe.inpaint(known, output_type="pt").images
    assert torch.equal(done[..., :4], known[..., :4]) and done.isfinite().all() and done.std() > 1
    (picture,) = pipe.inpaint(known, output_type="pil").images
    levels = (known[0, :, :, :4].double() + 10) / 30 * 255
    assert (torch.from_numpy(np.array(picture)).movedim(-1, 0)[..., :4] - levels).abs().max() <= 0.5 + 1e-3
    again = pipe.inpaint([picture], mask=known.isnan(), output_type="pil").images[0]
    np.testing.assert_array_equal(np.array(again)[:, :4], np.array(picture)[:, :4])
    end = pipe.interpolate(dataset[0][None], dataset[1][None], strength=0.01, weights=0.0, output_type="pt").images
    assert (end - dataset[0]).abs().mean() < 8  # close to the first end, in units


def test_held_out_images_are_parts(bands):
    rest, held = hold_out(opened(train_data_dir=str(bands[0])).dataset, 3, 0)
    assert len(rest) == 9 and load_item(held, 0).shape == (5, 64, 64)


def test_dry_run_tells_what_was_found(bands, capsys, tmp_path):
    train(TrainConfig(train_data_dir=str(bands[0]), dry_run=True, output_dir=str(tmp_path / "x"), **SMALL))
    text = capsys.readouterr().out
    for part in ("float32, 5 channels", "ranges of the channels: 0: 3", "scaling: image_norm minmax"):
        assert part in text
    assert not (tmp_path / "x").exists()
