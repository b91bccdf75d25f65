"""Images of every form, sequences, bundled data, and the order of the training stream."""

import os
import struct
import subprocess
import tracemalloc
import warnings
import zlib

import numpy as np
import PIL
import pytest
import torch
from helpers import gradient
from PIL import Image

from ddpm_hf.config import TrainConfig
from ddpm_hf.data import open_data
from ddpm_hf.data.images import LONGEST, BadImageError, ImageDataset, decode, digits, image_folder, image_form
from ddpm_hf.data.loading import TrainingView, collate
from ddpm_hf.data.opening import build_dataset
from ddpm_hf.data.sequences import ecg

FORMS = {
    "a.PNG": lambda im: im,
    "b.jpg": lambda im: im,
    "c.webp": lambda im: im,
    "d.bmp": lambda im: im,
    "e.TIFF": lambda im: im.convert("CMYK"),
    "f.gif": lambda im: im.convert("P"),
    "g.png": lambda im: im.convert("L"),
    "h.png": lambda im: im.convert("RGBA"),
    "i.png": lambda im: im.convert("LA"),
    "j.png": lambda im: Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257),
    "k.tif": lambda im: Image.fromarray(np.asarray(im.convert("L")).astype(np.float32) / 255),
    "sub/l.jpeg": lambda im: im,
    "m.png": lambda im: im.convert("1"),
    "n.ppm": lambda im: im,
}


@pytest.fixture
def folder(tmp_path):
    for name, form in FORMS.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form(Image.fromarray(gradient())).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    return tmp_path / "photos"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_form_of_image_is_read(folder, channels):
    data = image_folder(str(folder), (6, 10), channels)
    assert len(data) == len(FORMS)
    grey = np.asarray(Image.fromarray(gradient()).convert("L")) / 127.5 - 1
    for source, x in zip(data.sources, data):
        assert x.shape == (channels, 6, 10) and x.dtype == torch.float32 and x.abs().max() <= 1
        if channels == 1 and not source.endswith(("m.png", "f.gif", "e.TIFF")):  # two levels; palettes; inks
            tolerance = 30 / 127.5 if source.endswith(("jpg", "jpeg", "webp")) else 1.01 / 127.5
            np.testing.assert_allclose(x[0], grey, atol=tolerance, err_msg=source)


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 65535], [32768, 256]], dtype=np.uint16)).save(tmp_path / "x.png")
    x = image_folder(str(tmp_path), (2, 2), 1)[0]
    np.testing.assert_array_equal(((x[0] + 1) * 127.5).round(), [[0, 255], [128, 1]])


def test_sixteen_bits_need_little_memory_beside_the_picture(tmp_path):
    """2,000 x 2,000 of 16 bits are 8 MB and their grey levels 4; in float64 they were 32, several times."""
    values = np.random.default_rng(0).integers(0, 65536, (2000, 2000)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png", compress_level=1)
    data = image_folder(str(tmp_path), (2000, 2000), 1)
    tracemalloc.start()
    array = data._decoded(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
    np.testing.assert_array_equal(array[..., 0], (values * (255 / 65535)).round())


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(gradient()).save(tmp_path / "x.png", exif=exif)
    x = image_folder(str(tmp_path), (10, 6))[0]
    np.testing.assert_allclose((x.movedim(0, -1) + 1) * 127.5, np.rot90(gradient(), -1), atol=0.01)


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "x.png")
    x = (image_folder(str(tmp_path), (2, 2))[0] + 1) * 127.5
    assert x[:, 0, 0].round().tolist() == [10, 20, 30] and (x[:, 1, 1] == 255).all()
    assert image_folder(str(tmp_path), (2, 2), 4)[0][3].tolist() == [[1, -1], [-1, -1]]


def test_transparency_of_tall_pictures(tmp_path):
    """Pictures are laid on white in bands: as in one piece."""
    rgba = np.random.default_rng(0).integers(0, 256, (150, 7, 4), dtype=np.uint8)
    image = Image.fromarray(rgba)
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.save(tmp_path / "x.png")
    for channels, mode in ((1, "L"), (3, "RGB")):
        array = image_folder(str(tmp_path), (150, 7), channels)._decoded(0)
        np.testing.assert_array_equal(array.squeeze(), np.asarray(white.convert(mode)))


def test_aspect_is_kept():
    """A square in a wide picture stays square: the shorter side is resized, the middle is kept."""
    array = np.zeros((40, 120), np.uint8)
    array[10:30, 50:70] = 255
    x = ImageDataset([array], (20, 20), 1)[0][0]
    inside = x > 0
    assert inside.any(0).sum() == inside.any(1).sum() == 10


def test_bad_pictures(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    data = image_folder(str(tmp_path), (6, 10))
    with pytest.raises(BadImageError, match="a.png"):
        data[0]
    stop = collate([TrainingView(data, 0)[0, 0]])
    assert "a.png" in stop.error and "--on_bad_image skip" in stop.error
    skip = collate([TrainingView(data, 0, "skip")[0, 0]])
    assert torch.equal(skip.x0[0], data[1]) and len(skip.skipped) == 1
    (tmp_path / "b.png").write_bytes(b"")
    assert "none of the images" in collate([TrainingView(data, 0, "skip")[0, 0]]).error


def test_a_line_of_pixels_needs_little_memory(tmp_path):
    """100,000 x 1 pixels cover 64 x 64 as 6,400,000 x 64: the middle is kept, and is that of the whole."""
    for size in ((100_000, 1), (1, 100_000)):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "x.png")
        x = image_folder(str(tmp_path), (64, 64))[0]
        assert x.shape == (3, 64, 64) and ((x[:, 5, 5] + 1) * 127.5).round().tolist() == [10, 20, 30]
        kept = decode(str(tmp_path / "x.png"), "RGB", (64, 64), "x")
        assert sorted(kept.size) == [64, LONGEST * 64]


@pytest.mark.parametrize("size", [(4000, 20), (20, 4000), (3001, 17), (900, 3)])
def test_the_middle_of_a_long_picture_is_that_of_the_whole(size):
    """Cropped before resizing, the pixels are those of resizing the whole and cropping then."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    array = np.stack((x % 251, (x // 7 + 3 * y) % 256, (x * y) % 253), -1).astype(np.uint8)
    data = ImageDataset([array], (12, 10))
    scale = max(10 / width, 12 / height)
    whole = Image.fromarray(array).resize(
        (max(10, round(width * scale)), max(12, round(height * scale))),
        Image.Resampling.HAMMING if scale < 1 else Image.Resampling.BICUBIC,
    )
    left, top = (whole.width - 10) // 2, (whole.height - 12) // 2
    expected = np.asarray(whole)[top : top + 12, left : left + 10]
    got = ((data[0] + 1) * 127.5).round().numpy().transpose(1, 2, 0)
    # the box's corners are rounded to float32 in Pillow: at most one grey level
    assert np.abs(got - expected).max() <= 1


def test_a_long_picture_is_cropped_at_random_within_its_middle():
    array = np.zeros((4, 4000), np.uint8)
    data = ImageDataset([array], (4, 4), 1, center_crop=False)
    assert data.load(0, np.random.default_rng(0)).shape == (1, 4, 4)
    assert data._decoded(0).shape == (4, LONGEST * 4, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_eight_bit_arrays_with_one_channel(dtype):
    array = np.arange(12, dtype=dtype).reshape(3, 4, 1)
    for source in (array, array[..., 0], array.tolist()):
        x = ImageDataset([source], (3, 4), 1)[0]
        assert ((x[0] + 1) * 127.5).round().tolist() == array[..., 0].tolist()


def test_a_picture_of_nan_is_a_bad_one(tmp_path):
    values = np.full((4, 4), np.nan, np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(BadImageError, match=r"x.tif: .*\[0, 1\].*nan"):
        image_folder(str(tmp_path), (4, 4))[0]


DAMAGED = ["avif", "qoi", "dds", "png", "jpeg", "webp", "gif", "tiff", "bmp", "tga", "jp2", "pcx", "sgi", "ico", "ppm"]


@pytest.mark.parametrize("kind", DAMAGED)
def test_whatever_a_decoder_raises_is_a_bad_image(kind, tmp_path):
    """Cut files and files with bytes changed either decode or are bad images of that name."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    path = tmp_path / f"x.{kind}"
    try:
        picture.save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow does not write {kind}")
    whole, bad = path.read_bytes(), 0
    for trial in range(40):
        damaged = bytearray(whole[: int(rng.integers(0, len(whole)))] if trial % 2 else whole)
        if trial % 2 == 0:
            for place in rng.integers(0, min(len(damaged), 200), 3):
                damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of what it can still read
                assert ImageDataset([str(path)], (8, 8))[0].shape == (3, 8, 8)
        except BadImageError as error:
            assert str(path) in str(error)
            bad += 1
    assert bad


def test_any_error_of_a_decoder_is_a_bad_image(tmp_path, monkeypatch):
    Image.fromarray(gradient()).save(tmp_path / "x.png")
    for error in (IndexError("x"), RuntimeError(), AssertionError(), EOFError("end"), KeyError(3)):
        monkeypatch.setattr(Image.Image, "convert", lambda *a, error=error, **k: (_ for _ in ()).throw(error))
        with pytest.raises(BadImageError, match="x.png"):
            image_folder(str(tmp_path), (6, 10), 1)[0]


def test_a_bad_picture_has_no_one_neighbour_for_stand_in():
    """Of 12 pictures 6 are bad, one after another: each good one is seen about as often as any other."""
    sources = [np.full((2, 2), i, np.uint8) if i < 6 else b"" for i in range(12)]
    view = TrainingView(ImageDataset(sources, (2, 2), 1), 0, "skip")
    seen = [int(((view[epoch, i].x.float()).mean()).item()) for epoch in range(200) for i in range(12)]
    counts = np.bincount(seen, minlength=6)
    # 2,400 draws of six: 400 each, of which 200 are fixed and the rest binomial(1200, 1/6), deviation 13
    assert counts[6:].sum() == 0 and np.abs(counts[:6] - 400).max() < 5 * 13
    assert torch.equal(view[3, 7].x, view[3, 7].x)  # it follows from the seed


def test_folder_errors(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"no images found.*1 files with endings .txt"):
        image_folder(str(tmp_path), (8, 8))
    with pytest.raises(ValueError, match="not a folder"):
        image_folder(str(tmp_path / "none"), (8, 8))


def psd(array):
    """A Photoshop file of one layer, as its format says."""
    height, width, _ = array.shape
    head = struct.pack(">4sH6xHIIHHIII", b"8BPS", 1, 3, height, width, 8, 3, 0, 0, 0)
    return head + struct.pack(">H", 0) + array.transpose(2, 0, 1).tobytes()


def png_of_16_bits(array):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = array.shape
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in array)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def frames(kind):
    """A file of three pictures of which ours is the first."""

    def write(image, path):
        white = Image.new("RGB", image.size, "white")
        image.save(path, kind, save_all=True, append_images=[white, white])

    return write


ODD = {  # name: (how it is written, largest difference in grey levels)
    "colour16.png": (lambda image, path: path.write_bytes(png_of_16_bits(np.asarray(image))), 0),
    "a.psd": (lambda image, path: path.write_bytes(psd(np.asarray(image))), 0),
    "animated.gif": (frames("GIF"), 30), "animated.webp": (frames("WEBP"), 30), "animated.png": (frames("PNG"), 0),
    "pages.tiff": (frames("TIFF"), 0), "stereo.mpo": (frames("MPO"), 30), "stereo.jpg": (frames("MPO"), 30),
    "inks.jpg": (lambda image, path: image.convert("CMYK").save(path), 30),
    "a.jp2": (lambda image, path: image.save(path), 1), "a.ico": (lambda image, path: image.save(path), 0),
}  # fmt: skip
if tuple(map(int, PIL.__version__.split(".")[:2])) < (11, 3):  # it reads MPO, but what it writes is broken
    del ODD["stereo.mpo"], ODD["stereo.jpg"]


def test_odd_forms_are_read_or_named(tmp_path):
    """Of several pictures in a file the first is taken."""
    image = Image.fromarray(np.repeat(np.repeat(gradient(2, 4), 8, 0), 4, 1))
    for name, (write, tolerance) in ODD.items():
        write(image, tmp_path / name)
        x = image_folder(str(tmp_path), (16, 16))[0]
        got = ((x + 1) * 127.5).round().numpy().transpose(1, 2, 0)
        assert np.abs(got - np.asarray(image).astype(float)).max() <= tolerance, name
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["a.eps", "a.ps", "a.png"])
def test_no_program_is_started_for_a_picture(name, tmp_path, monkeypatch):
    """Pillow has Ghostscript run EPS, whatever the file is called."""
    Image.fromarray(gradient()).save(tmp_path / name, "EPS")

    def start(*args, **options):
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    with pytest.raises(BadImageError, match=f"{name}: EPS is not read"):
        image_folder(str(tmp_path), (6, 10))[0]


@pytest.mark.parametrize("name", [b"a\nb.png", b"a\xff.png", b"\x1b[2Ja.png"])
def test_messages_are_one_line_of_any_output(name, tmp_path):
    with open(os.fsencode(tmp_path) + b"/" + name, "wb"):
        pass
    with pytest.raises(BadImageError) as caught:
        image_folder(str(tmp_path), (6, 10))[0]
    assert str(caught.value).isprintable() and "png" in str(caught.value)


def test_a_bad_row_of_a_table_has_the_same_message_every_time():
    """The list of pictures that were left out names each once."""
    rows = [{"bytes": b"no", "path": None}, {"bytes": b"", "path": None}, None, b""]
    data = ImageDataset(rows, (8, 8))
    reasons = ["no image that Pillow knows"] + ["there is no content"] * 3
    for number, reason in enumerate(reasons):
        messages, kept = set(), []
        for _ in range(3):
            kept.append(bytearray(1000))  # so that addresses differ
            with pytest.raises(BadImageError, match=f"number {number}: .*{reason}") as caught:
                data[number]
            messages.add(str(caught.value))
        assert len(messages) == 1 and "0x" not in messages.pop()


def test_what_else_is_in_a_folder(tmp_path, monkeypatch):
    """Links that lead nowhere are bad pictures; other files, and folders that are linked, are said to be left."""
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (photos / "x.png", elsewhere):
        folder.mkdir(parents=True)
        Image.fromarray(gradient()).save(folder / "y.png")
    for name, target in {"a.png": "nowhere", "b.png": "b.png", "c.png": elsewhere / "y.png", "sub": elsewhere,
                         "self": "."}.items():  # fmt: skip
        (photos / name).symlink_to(target)
    for name in ("phone.heic", "film.mp4", ".hidden.png"):
        (photos / name).touch()
    os.mkfifo(photos / "pipe.jpg")
    data = image_folder(str(photos), (6, 10))
    assert [os.path.relpath(source, photos) for source in data.sources] == ["a.png", "b.png", "c.png", "x.png/y.png"]
    for index in (0, 1):
        with pytest.raises(BadImageError, match="photos/[ab].png"):
            data[index]
    files, links = data.notes
    assert "3 files with endings .heic, .jpg, .mp4" in files
    assert "2 links to folders, which are not followed" in links
    assert open_data(TrainConfig(train_data_dir=str(photos), on_bad_image="skip")).notes == data.notes

    scan = os.scandir

    def closed(path):
        if str(path).endswith("x.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match="cannot read the folder .*x.png: Permission denied"):
        image_folder(str(photos), (6, 10))


def test_bundled_data():
    d = digits()
    assert len(d) == 1797 and d[0].shape == (1, 8, 8) and d[0].min() == -1 and len(d[5].unique()) <= 17
    assert digits((16, 16), 3)[0].shape == (3, 16, 16)
    e = ecg(128, 4)
    assert len(e) == (1024 - 128) // 4 + 1 and e[0].shape == (1, 128)
    assert min(x.min() for x in e) == -1 and max(x.max() for x in e) == 1


def test_build_dataset(folder, tmp_path):
    assert build_dataset(TrainConfig(train_data_dir=str(folder), resolution=[8, 16]))[0].shape == (3, 8, 16)
    np.save(tmp_path / "w.npy", np.random.default_rng(0).normal(size=(5, 2, 32)))
    cut = build_dataset(TrainConfig(train_data_file=str(tmp_path / "w.npy"), sequence_length=16))
    assert cut[0].shape == (2, 16)
    with pytest.raises(ValueError, match="at most the data's length 32, got 64"):
        build_dataset(TrainConfig(train_data_file=str(tmp_path / "w.npy"), sequence_length=64))
    with pytest.raises(ValueError, match="no data"):
        build_dataset(TrainConfig())


def test_the_form_of_an_array_is_that_of_its_image():
    """As the columns of tables hold them: lists, with one channel or none."""
    for shape, channels in (((4, 6), 1), ((4, 6, 1), 1), ((4, 6, 3), 3), ((4, 6, 4), 4)):
        values = np.full(shape, 7, np.int64)
        for source in (values, values.tolist()):
            assert image_form(source, "x") == ((4, 6), channels) and decode(source, "L", (4, 6), "x").size == (6, 4)
    for wrong in (np.full((4, 6), 256), np.full((4, 6), 0.5)):
        with pytest.raises(BadImageError, match="cannot read the image x: an array must hold 8-bit values"):
            image_form(wrong, "x")
