"""The page with a visitor's own data: completing, varying and scoring, and the reading of what is uploaded."""

import gradio as gr
import numpy as np
import pytest
import torch
from helpers import MODEL, make, paired
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.hub.page import PASSES, Completing, Varying, build_page
from ddpm_hf.hub.page_input import image_array, image_levels
from ddpm_hf.hub.page_model import EVERY_CLASS, FAST, MOST_SAMPLES, NO_CLASS, OWN, STOCK, Page, generator_of


def drawn(image, *boxes):
    """The value of an image editor: each box (left, top, right, bottom) is painted on a layer of its own."""
    layers = []
    for box in boxes:
        layers.append(Image.new("RGBA", image.size))
        layers[-1].paste((224, 86, 59, 255), box)
    return {"background": image.convert("RGBA"), "layers": layers, "composite": None}


def asked_of(pipe, monkeypatch):
    """What `inpaint` is asked, with completions that are 0.25 where the data is unknown."""
    calls = []

    def inpaint(known, num_samples, **options):
        calls.append({"known": known, "num_samples": num_samples, **options})
        rows = np.repeat(known, num_samples, axis=0)
        return (np.where(np.isnan(rows), 0.25, rows),)

    monkeypatch.setattr(pipe, "inpaint", inpaint)
    return calls


def test_an_image_is_completed(monkeypatch):
    """Only what was painted over is unknown, at the model's size; what is transparent is white; the picture shows the
    image with its hole, and the completions."""
    pipe = make("images")
    calls = asked_of(pipe, monkeypatch)
    image = Image.new("RGBA", (40, 40), (51, 51, 51, 255))
    image.paste((0, 0, 0, 0), (0, 0, 40, 10))
    value = drawn(image, (10, 20, 20, 30), (30, 30, 31, 31))
    picture = Completing(Page(pipe)).complete_image(value, 3, 2, OWN, 7, 0)
    (call,) = calls
    expected = np.full((8, 8), 0.2)
    expected[:2] = 1
    expected[4:6, 2:4] = expected[6, 6] = np.nan
    np.testing.assert_allclose(call["known"], expected[None, ..., None], atol=0.1)  # resizing is bicubic
    assert call["num_samples"] == 3 and call["jump_n_sample"] == PASSES and call["num_inference_steps"] == 2
    assert [g.initial_seed() for g in call["generator"]] == [7 * MOST_SAMPLES + i for i in range(3)]
    assert picture.size[0] == picture.size[1]  # the hole and three completions


def test_a_table_is_continued(tmp_path, monkeypatch):
    """The last rows of the columns in the order asked for, then as many unknown values as asked for; missing values are
    unknown too."""
    pipe = make("sequences")  # two channels of 16 values
    calls = asked_of(pipe, monkeypatch)
    rows = np.arange(40.0).reshape(20, 2)
    lines = [f"{a:g},x{i},{b:g}" for i, (a, b) in enumerate(rows)]
    lines[-2] = "36,x,"
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["# made up", "up, name, down", *lines]))
    completing = Completing(Page(pipe))
    expected = np.concatenate([rows[-12:].T, np.full((2, 4), np.nan)], axis=1)
    expected[1, 10] = np.nan
    for columns, order in (("", [0, 1]), ("down, up", [1, 0])):
        completing.forecast(str(table), columns, 4, 2, 2, OWN, 0, 0)
        assert np.array_equal(calls[-1]["known"][0], expected[order], equal_nan=True)
    bare = tmp_path / "bare.csv"
    np.savetxt(bare, rows, delimiter=",")
    completing.forecast(str(bare), "1,0", 4, 2, 2, OWN, 0, 0)
    assert np.array_equal(calls[-1]["known"][0, :, :12], rows[-12:, ::-1].T)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"file": None}, "upload a CSV file first"),
        ({"columns": "up,left"}, "no column left; its columns are up, down"),
        ({"columns": "up"}, "as many columns of numbers as the model has channels, 2, got 1"),
        ({"points": 16}, "new values must be a whole number from 1 to 15, got 16"),
        ({"points": 5}, "at least 11 rows, got 10"),
        ({"steps": 700, "count": 5}, "samples x steps must be at most 3,200, got 5 x 700"),
        ({"sampler": STOCK[0]}, "completed by RePaint, which needs the pipeline's own"),
        ({"sampler": FAST}, "choose it as the sampler"),
    ],
)
def test_tables_that_cannot_be_continued(fields, says, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["up,down", *["1,2"] * 10]))
    given = {
        "file": str(table),
        "columns": "",
        "points": 8,
        "count": 1,
        "steps": 2,
        "sampler": OWN,
        "seed": 0,
        "eta": 0,
    }
    with pytest.raises(gr.Error, match=says):
        Completing(Page(make("sequences"))).forecast(*{**given, **fields}.values())


def test_files_and_drawings_that_are_none(tmp_path):
    page = Completing(Page(make("images")))
    for value, says in ((None, "upload one first"), (drawn(Image.new("L", (8, 8))), "paint over the part")):
        with pytest.raises(gr.Error, match=says):
            page.complete_image(value, 1, 2, OWN, 0, 0)
    bad = tmp_path / "bad.csv"
    for content, says in (
        (b"\xff\xfe\x00", "cannot be read as CSV"),
        (b"", "cannot be read"),
        (b"a,b\nx,y\n", "got 0"),
    ):
        bad.write_bytes(content)
        with pytest.raises(gr.Error, match=says):
            Completing(Page(make("sequences"))).forecast(str(bad), "", 8, 1, 2, OWN, 0, 0)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_completing_by_the_pipeline_itself(kind, tmp_path):
    """The same seed gives the same picture; another one another."""
    page = Completing(Page(make(kind)))
    if kind == "images":
        value = drawn(Image.new("L", (16, 16), 90), (4, 4, 12, 12))
        pictures = [np.asarray(page.complete_image(value, 2, 2, OWN, seed, 0)) for seed in (0, 0, 1)]
    else:
        np.savetxt(tmp_path / "x.csv", np.random.default_rng(0).normal(size=(12, 2)), delimiter=",")
        table = str(tmp_path / "x.csv")
        pictures = [np.asarray(page.forecast(table, "", 4, 2, 2, OWN, seed, 0)) for seed in (0, 0, 1)]
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_the_tab_is_there_where_the_pipeline_can_complete():
    told = make("images")
    told.unet.register_to_config(condition_channels=2)
    told.register_to_config(condition="known")
    other = make("images")
    other.unet.register_to_config(condition_channels=2)  # a condition that the page does not know
    for pipe, there, condition in (
        (make("images"), True, False), (make("sequences"), True, False), (told, True, False), (other, False, False),
        (paired("images"), True, True), (paired("sequences"), True, True),
    ):  # fmt: skip
        blocks = build_page(pipe, "x")
        found = {getattr(part, "elem_id", None) for part in blocks.blocks.values()}
        assert all((name in found) is there for name in ("known", "vary", "score"))
        assert ("length" in found) is (there and pipe._size() == (16,))
        assert ("condition" in found) is condition and blocks.takes_files is there


class Older(DDPMPipeline):
    """A pipeline of an older package, which a folder may carry: its `inpaint` takes no condition."""

    def inpaint(self, known):
        raise NotImplementedError


def test_older_code_has_the_tabs_that_it_can_serve():
    new = paired("images")
    old = Older(new.unet, new.scheduler, 3, condition="paired", condition_size=[4, 4])
    found = {getattr(part, "elem_id", None) for part in build_page(old, "x").blocks.values()}
    assert "known" not in found and {"vary", "score"} <= found


def test_a_model_that_was_trained_to_complete_has_every_tab(tmp_path):
    """Without a known part it samples as usual, so its page also varies, scores and draws longer series."""
    torch.manual_seed(0)
    pipe = DDPMPipeline1D(
        UNet1D(16, in_channels=1, condition_channels=2, **MODEL), GaussianScheduler(), 3, condition="known"
    )
    found = {getattr(part, "elem_id", None) for part in build_page(pipe, "x").blocks.values()}
    assert {"known", "vary", "score", "longer"} <= found
    page, table = Page(pipe), str(tmp_path / "x.csv")
    np.savetxt(table, np.random.default_rng(0).normal(size=(20, 1)), delimiter=",")
    assert page.longer(40, 2, OWN, 0, 0).size[0] > 200
    assert Varying(page).vary(table, "", 0.5, 2, 4, OWN, 0, 0).size[0] > 200
    assert Varying(page).score(table, "", 0)[1].startswith("Score: ")


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_an_item_is_varied(kind, tmp_path):
    """Strength 0 shows the item again, strength 1 does not depend on it; the same seed gives the same picture."""
    varying = Varying(Page(make(kind)))
    if kind == "images":
        given = [Image.new("RGBA", (16, 16), (level, level, level, 255)) for level in (90, 200)]
    else:
        given = [str(tmp_path / f"{name}.csv") for name in "ab"]
        for number, path in enumerate(given):
            np.savetxt(path, np.random.default_rng(number).normal(size=(20, 2)), delimiter=",")

    def halves(item, strength, seed=0):
        picture = np.asarray(varying.vary(item, "", strength, 1, 2, OWN, seed, 0)).astype(int)
        return picture, (picture[:, : picture.shape[1] // 2], picture[:, -(picture.shape[1] // 2) :])

    if kind == "images":
        first, second = halves(given[0], 0)[1]
        assert np.array_equal(first, second)
        assert np.array_equal(halves(given[0], 1)[1][1], halves(given[1], 1)[1][1])
    pictures = [halves(given[0], 0.5, seed)[0] for seed in (3, 3, 4)]
    assert np.array_equal(*pictures[:2]) and not np.array_equal(pictures[0], pictures[2])
    for wrong, says in (
        ((None, "", 0.5), "there is nothing yet"),
        ((given[0], "", 1.5), "strength must lie in 0 to 1"),
    ):
        with pytest.raises(gr.Error, match=says):
            varying.vary(*wrong, 1, 2, OWN, 0, 0)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_an_item_is_scored(kind, tmp_path):
    """The picture is that of the pipeline's map; a series with a missing value is refused."""
    pipe = make(kind)
    page = Page(pipe)
    if kind == "images":
        given = Image.new("RGBA", (16, 16), (90, 90, 90, 255))
    else:
        given = str(tmp_path / "x.csv")
        np.savetxt(given, np.random.default_rng(0).normal(size=(16, 2)), delimiter=",")
    pictures, words = zip(*(Varying(page).score(given, "", seed) for seed in (0, 0)))
    assert np.array_equal(*map(np.asarray, pictures)) and words[0].startswith("Score: ") and words[0] == words[1]
    if kind == "sequences":
        (tmp_path / "gap.csv").write_text("\n".join(["1,2"] * 15 + ["1,"]))
        with pytest.raises(gr.Error, match="each of the last 16 rows must have a number"):
            Varying(page).score(str(tmp_path / "gap.csv"), "", 0)


def test_an_item_is_scored_given_the_chosen_class(monkeypatch):
    """Each class has a score of its own, that of the pipeline; "every class" and "no class" score without one."""
    torch.manual_seed(0)
    unet = UNet2D(sample_size=8, in_channels=1, num_class_embeds=2, **MODEL)
    pipe = DDPMPipeline(unet, GaussianScheduler(), 3, id2label={0: "owl", 1: "cat"})
    varying, given = Varying(Page(pipe)), Image.new("L", (8, 8), 90)
    words = {chosen: varying.score(given, "", 0, chosen)[1] for chosen in (EVERY_CLASS, NO_CLASS, 0, 1)}
    for chosen, label, name in (
        (NO_CLASS, None, "without a class"),
        (0, 0, "given the class owl"),
        (1, 1, "given the class cat"),
    ):
        found = pipe.score(np.full((1, 8, 8, 1), 90 / 255), generator=[generator_of(0, 0)], class_labels=label)
        assert words[chosen] == f"Score {name}: {found.scores[0]:.4g} (higher is stranger to the model)"
    assert words[EVERY_CLASS] == words[NO_CLASS] and len(set(words.values())) == 3
    with pytest.raises(gr.Error, match="class must be a whole number from 0 to 1, got 2"):
        varying.score(given, "", 0, 2)
    pipe.calibrate_score(found)
    assert "percentile" in varying.score(given, "", 0, 1)[1]


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_own_data_beside_a_condition(kind, tmp_path):
    """What is completed, varied and scored follows from the uploaded condition, which must be there."""
    pipe = paired(kind)
    page = Page(pipe)
    if kind == "images":
        conditions = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        item, value = Image.new("L", (8, 8), 90), drawn(Image.new("L", (8, 8), 90), (2, 2, 6, 6))
        complete, given = Completing(page).complete_image, (value,)
    else:
        item, *conditions = (str(tmp_path / f"{name}.csv") for name in "xab")
        for number, file in enumerate((item, *conditions)):
            np.savetxt(file, np.random.default_rng(number).normal(size=(16, 2 if number else 1)), delimiter=",")
        complete, given = Completing(page).forecast, (item, "", 4)
    fields = (1, 2, OWN, 0, 0, EVERY_CLASS, 1.0)
    answers = {
        "complete": lambda *told: np.asarray(complete(*given, *fields, *told)),
        "vary": lambda *told: np.asarray(Varying(page).vary(item, "", 0.8, *fields, *told)),
        "score": lambda *told: Varying(page).score(item, "", 0, EVERY_CLASS, *told)[1],
    }
    for answer in answers.values():
        first, again, other = (answer(condition) for condition in (*conditions[:1] * 2, conditions[1]))
        assert np.array_equal(first, again) and not np.array_equal(first, other)
        with pytest.raises(gr.Error, match="condition beside each sample: upload it first"):
            answer(None)


def test_arrays_in_units_of_their_own(tmp_path):
    """A .npy file is taken as it is, channels first or last; NaN is completed, and the known values stay."""
    torch.manual_seed(0)
    unet = UNet2D(sample_size=8, in_channels=5, **MODEL)
    pipe = DDPMPipeline(unet, GaussianScheduler(), 3, data_shift=[100] * 5, data_scale=[50] * 5)
    page, array, path = Page(pipe), np.random.default_rng(0).uniform(50, 150, size=(5, 8, 8)), str(tmp_path / "x.npy")
    last = np.moveaxis(array, 0, -1)
    for form in (array, last):
        np.save(path, form)
        assert np.array_equal(page.image(path, page.shape), last)
    assert np.array_equal(Varying(page)._item(path, ""), last)
    assert Varying(page).vary(path, "", 0, 1, 2, OWN, 0, 0).size[0] > 200
    assert Varying(page).score(path, "", 0)[1].startswith("Score: ")
    array[:, 2:4] = np.nan
    np.save(path, array)
    assert Completing(page).complete_array(path, 1, 2, OWN, 0, 0).size[0] > 200
    with pytest.raises(gr.Error, match="got NaN"):
        Varying(page).vary(path, "", 0, 1, 2, OWN, 0, 0)
    for wrong, says in ((array[:4], r"got the shape \(4, 8, 8\)"), (array * np.inf, "with infinity")):
        np.save(path, wrong)
        with pytest.raises(gr.Error, match=says):
            page.image(path, page.shape)
    np.save(path, np.array(["x"]))
    with pytest.raises(gr.Error, match="real numbers, got <U1"):
        page.image(path, page.shape)
    with pytest.raises(gr.Error, match="5 channels, and a picture cannot"):
        page.image(Image.new("L", (8, 8)), page.shape)
    np.save(path, array[0])
    assert image_array(path, (1, 8, 8)).shape == (8, 8, 1)


def test_pictures_of_16_bits_keep_their_levels():
    """Pillow's conversion would make every level above 255 white."""
    deep = Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16))
    expected = np.arange(64).reshape(8, 8, 1) * 1000 / 65535
    for image in (deep, Image.fromarray(expected[..., 0].astype(np.float32))):
        for channels in (1, 2, 3, 4):
            levels = image_levels(image, (channels, 8, 8))
            assert levels.shape == (8, 8, channels)
            assert np.allclose(levels[..., : channels - (channels % 2 == 0)], expected, atol=1e-6)
            assert channels % 2 or (levels[..., -1] == 1).all()
    with pytest.raises(gr.Error, match="must lie in 0 to 1, got 0 to 63000"):
        image_levels(Image.fromarray(np.asarray(deep, dtype=np.float32)), (1, 8, 8))


def test_files_that_are_no_pictures(tmp_path):
    """They get a message in place of a traceback: a text, and a picture that is cut off."""
    field = next(p for p in build_page(make("images"), "x").blocks.values() if getattr(p, "elem_id", None) == "given")
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no picture")
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    for file in (text, cut):
        with pytest.raises(gr.Error, match="cannot be read as an image"):
            field.preprocess(field.data_model(path=str(file), orig_name=file.name))
        with pytest.raises(gr.Error, match="cannot be read as an image"):
            image_levels(str(file), (1, 8, 8))


def test_warnings_of_the_pipeline_are_shown(tmp_path, monkeypatch):
    """Values far outside of those of training are most likely in other units; the visitor is told so."""
    shown = []
    monkeypatch.setattr("ddpm_hf.hub.page_input.gr.Warning", shown.append)
    np.savetxt(tmp_path / "x.csv", np.full((16, 2), 1e6), delimiter=",")
    varying = Varying(Page(make("sequences")))
    varying.vary(str(tmp_path / "x.csv"), "", 0.5, 1, 2, OWN, 0, 0)
    assert len(shown) == 2 and all("far outside" in text for text in shown)
    varying.score(str(tmp_path / "x.csv"), "", 0)
    assert len(shown) == 4
