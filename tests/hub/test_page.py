"""The page to try a pipeline: in headless Chromium, and its parts.

This file is longer than 600 lines because all of it tests one page, with one server and one set of pipelines.
"""

import base64
import http.client
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
import urllib.request
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import ROOT, run_program
from diffusers.configuration_utils import FrozenDict
from helpers import MODEL, make
from hub_server import serving
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.hub.page import PASSES, Completing, Varying, build_page, serve
from ddpm_hf.hub.page_model import (
    EVERY_CLASS,
    FAST,
    MOST_BYTES,
    MOST_SAMPLES,
    NO_CLASS,
    OWN,
    STOCK,
    Page,
    between,
    generator_of,
)
from ddpm_hf.hub.publish import write_space

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed (Debian: chromium chromium-driver)"
)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1400"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Server:
    """A program that serves on a port, until the block ends."""

    def __init__(self, arguments, port, cwd, **environment):
        self.address = f"http://127.0.0.1:{port}"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False",
               "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", **environment}  # fmt: skip
        self.log = open(cwd / "server.log", "w+")  # noqa: SIM115
        pipes = {"stdout": self.log, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=env, **pipes)

    def __enter__(self):
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.address, timeout=5)
                return self
            except OSError:
                time.sleep(0.2)
        self.__exit__()
        raise AssertionError(f"the server did not start:\n{self.text()}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)

    def text(self):
        self.log.seek(0)
        return self.log.read()


class Visitor:
    """What a person does on the page."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.find("#generate"))

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.1)
        raise AssertionError(f"waited {seconds} s in vain")

    def fill(self, field, value):
        (box,) = self.find(f"#{field} input[type=number]")
        box.send_keys("\ue009a\ue000", str(value))  # over all that is there

    def tab(self, number):
        self.find("button[role=tab]")[number].click()

    def source(self, picture):
        images = self.find(f"#{picture} img")
        return images[0].get_attribute("src") if images else None

    def picture(self, name):
        """The pixels of a shown picture."""
        source = self.wait(lambda: self.source(name))
        if source.startswith("data:"):
            content = base64.b64decode(source.split(",", 1)[1])
        else:
            content = urllib.request.urlopen(source).read()
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def press(self, button, picture):
        """Press, and give the new picture: each has an address of its own."""
        before = self.source(picture)
        self.find(f"#{button}")[0].click()
        self.wait(lambda: self.source(picture) not in (None, before))
        return self.picture(picture)


def visit_own_data(page, kind, tmp_path):
    """Vary and score an uploaded item, and draw a series that is longer than the model's."""
    page.tab(4)
    given = tmp_path / ("given.png" if kind == "images" else "given.csv")
    if kind == "images":
        Image.new("L", (16, 16), 90).save(given)
    else:
        np.savetxt(given, np.random.default_rng(0).normal(size=(16, 2)), delimiter=",")
    page.wait(lambda: page.find("#given input[type=file]"))[0].send_keys(str(given))
    page.wait(lambda: page.find("#given img") or "given" in page.find("#given")[0].text)
    assert page.press("vary", "varied").std() > 5
    heat = page.press("score", "heat")
    assert heat.shape[1] > 400 and heat.std() > 5
    page.wait(lambda: "higher is stranger" in page.find("#score_words")[0].text)
    if kind == "sequences":
        page.tab(5)
        page.wait(lambda: page.find("#length input[type=number]"))
        page.fill("length", 15)
        page.find("#longer")[0].click()
        page.wait(lambda: any("length must be a whole number from 16" in t.text for t in page.find(".toast-body")))
        page.fill("length", 80)
        first = page.press("longer", "series")
        page.fill("length", 160)
        assert first.std() > 5 and not np.array_equal(page.press("longer", "series"), first)


@needs_chromium
@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_a_visit(kind, browser, port, tmp_path):
    """Opens, generates, changes with the seed, repeats with the same one; a bad value shows a message, and the page
    lives on; the slider goes through the trajectory; interpolation gives its points; an uploaded item is completed,
    varied and scored, and a series is drawn that is longer than the model's."""
    make(kind).save_pretrained(tmp_path / "saved")
    demo = [ROOT / "training" / "demo.py", "--pipeline", tmp_path / "saved", "--port", port]
    with Server(demo, port, tmp_path) as server:
        page = Visitor(browser, server.address)
        page.fill("count", 4)
        first = page.press("generate", "samples")
        assert first.std() > 5
        page.fill("seed", 1)
        other = page.press("generate", "samples")
        assert not np.array_equal(first, other)

        page.fill("seed", -3)
        page.find("#generate")[0].click()
        page.wait(lambda: any("seed must be a whole number from 0" in t.text for t in page.find(".toast-body")))
        page.fill("seed", 0)
        page.fill("eta", 7)
        page.find("#generate")[0].click()
        page.wait(lambda: any("eta must lie in 0 to 1" in t.text for t in page.find(".toast-body")))
        page.fill("eta", 0)
        again = page.press("generate", "samples")
        assert np.array_equal(first, again)

        page.tab(1)
        assert np.array_equal(page.picture("frame"), first)  # the slider stands at the end
        before = page.source("frame")
        (slider,) = page.find("#step input[type=range]")
        slider.send_keys("\ue011")  # Home: x_T
        slider.send_keys("\ue014")  # and one step
        page.wait(lambda: page.source("frame") != before)
        assert not np.array_equal(page.picture("frame"), first)

        page.tab(2)
        page.fill("points", 3)
        assert page.press("walk", "line").shape[1] > 200

        page.tab(3)
        (drop,) = page.wait(lambda: page.find("#known"))
        if kind == "sequences":
            np.savetxt(tmp_path / "table.csv", np.random.default_rng(0).normal(size=(12, 2)), delimiter=",")
            page.wait(lambda: page.find("#known input[type=file]"))[0].send_keys(str(tmp_path / "table.csv"))
            page.wait(lambda: "table" in drop.text)
            assert page.press("complete", "completed").std() > 5

        visit_own_data(page, kind, tmp_path)
        assert "Traceback" not in server.text()


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_a_visit_with_a_condition(kind, browser, port, tmp_path):
    """Without a condition a message says what is missing; with one there are samples, which follow from it."""
    paired(kind).save_pretrained(tmp_path / "saved")
    given = [tmp_path / f"{name}.{'png' if kind == 'images' else 'csv'}" for name in "ab"]
    for number, file in enumerate(given):
        if kind == "images":
            Image.new("RGB", (30, 20), (90 + 150 * number, 90, 20)).save(file)
        else:
            np.savetxt(file, np.random.default_rng(number).normal(size=(12, 2)) + 5, delimiter=",")
    demo = [ROOT / "training" / "demo.py", "--pipeline", tmp_path / "saved", "--port", port]
    with Server(demo, port, tmp_path) as server:
        page, pictures = Visitor(browser, server.address), []
        page.find("#generate")[0].click()
        page.wait(lambda: any("upload it first" in t.text for t in page.find(".toast-body")))
        for file in given:
            page.wait(lambda: page.find("#condition input[type=file]"))[0].send_keys(str(file))
            shown = "#condition img" if kind == "images" else "#condition .file-preview"
            page.wait(lambda shown=shown: page.find(shown))
            pictures.append(page.press("generate", "samples"))
            page.find("#condition button[aria-label='Clear'], #condition button[aria-label='Remove Image']")[0].click()
        assert not np.array_equal(*pictures) and "Traceback" not in server.text()


@needs_chromium
def test_the_space_runs_without_the_package(browser, port, tmp_path):
    """What publish.py --space writes, run as a Space runs it: the pipeline from the Hub, ddpm_hf not installed."""
    make("images").save_pretrained(tmp_path / "saved")
    with serving() as hub:
        env = hub.environment("hf_alice", tmp_path / "home")
        done = run_program(
            ROOT / "training" / "publish.py", tmp_path / "saved", "--hub_model_id=digits", "--space=try-digits",
            cwd=tmp_path, **env,
        )  # fmt: skip
        assert done.returncode == 0 and "/spaces/alice/try-digits" in done.stdout, done.stderr
        files = hub.files("alice/try-digits", kind="spaces")
        assert files.keys() == {"app.py", "page.py", "page_model.py", "requirements.txt", "README.md"}
        assert b"sdk: gradio" in files["README.md"] and b"ddpm_hf" not in files["requirements.txt"]
        (tmp_path / "space").mkdir()
        for name, content in files.items():
            (tmp_path / "space" / name).write_bytes(content)
        without = "import sys, runpy; sys.modules['ddpm_hf'] = None; sys.path.insert(0, ''); "
        without += "runpy.run_path('app.py', run_name='__main__')"
        with Server(["-c", without], port, tmp_path / "space", **hub.environment(None, tmp_path / "other")) as server:
            assert Visitor(browser, server.address).press("generate", "samples").std() > 5


def test_a_space_of_someone_is_not_overwritten(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="new or empty folder"):
        write_space(tmp_path, "alice/digits", "digits")
    make("images").save_pretrained(tmp_path / "saved")
    with serving() as hub:
        env = hub.environment("hf_alice", tmp_path / "home")
        first = "import huggingface_hub as h; h.create_repo('alice/x', repo_type='space', space_sdk='gradio'); "
        first += "h.upload_file(path_or_fileobj=b'1', path_in_repo='game.py', repo_id='alice/x', repo_type='space')"
        assert run_program("-c", first, cwd=tmp_path, **env).returncode == 0
        done = run_program(
            ROOT / "training" / "publish.py", tmp_path / "saved", "--hub_model_id=digits", "--space=x", cwd=tmp_path,
            **env,
        )  # fmt: skip
        assert done.returncode == 2 and "another Space (game.py)" in done.stderr
        assert hub.files("alice/x", kind="spaces").keys() == {"game.py"}


@pytest.mark.parametrize("sampler", [OWN, FAST, *STOCK])
@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_every_sampler(kind, sampler):
    pipe = make(kind)
    own, page = pipe.scheduler, Page(pipe)
    with pytest.raises(gr.Error):
        page.generate(3, 4, FAST, 5, eta=0.5)  # a mistake leaves nothing behind
    picture, trajectory, slider, frame = page.generate(3, 4, sampler, 5, 0)
    again = page.generate(3, 4, sampler, 5, 0)
    assert np.array_equal(picture, again[0]) and np.array_equal(picture, frame)
    assert len(trajectory) == 3 and slider.maximum == trajectory.shape[1] - 1 and pipe.scheduler is own
    assert np.array_equal(page.look_back(trajectory, slider.maximum), picture)
    # the first sample does not depend on how many there are
    fewer = page.generate(1, 4, sampler, 5, 0)[1]
    # but for float32's rounding of the largest values on the way: Heun's first ones are thousands here
    rounding = 1.01 if kind == "images" else 1e-4 + 1e-5 * np.abs(trajectory[0]).max()
    assert np.allclose(fewer[0].astype(float), trajectory[0].astype(float), atol=rounding)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_frames_are_kept_as_far_as_memory_is_allowed(kind, monkeypatch):
    """All of them are the pipeline's own trajectory; fewer are spread evenly over it, from noise to samples."""
    pipe = make(kind)
    page = Page(pipe)
    _, all_frames, slider, _ = page.generate(3, 9, OWN, 5, 0)
    generators = [generator_of(5, i) for i in range(3)]
    _, expected = pipe(3, num_inference_steps=9, generator=generators, output_type="np", return_all_timesteps=True,
                       return_dict=False)  # fmt: skip
    expected = (expected * 255).round().astype(np.uint8) if kind == "images" else expected
    assert np.array_equal(all_frames, expected) and slider.label == "Steps done"
    monkeypatch.setattr("ddpm_hf.hub.page_model.MOST_BYTES", 4 * all_frames[:, 0].nbytes)
    picture, frames, slider, _ = page.generate(3, 9, OWN, 5, 0)
    assert np.array_equal(frames, expected[:, [0, 3, 6, 9]]) and slider.label == "Frame (4 kept of 9 steps)"
    assert np.array_equal(page.look_back(frames, slider.maximum), picture)


@pytest.mark.parametrize("completes", [False, True])
def test_files_and_large_requests_are_refused(completes, port):
    """A request that says that it is large, and one that is without saying so (status None: cut off). A page that does
    not complete takes no file, and one that does takes no large one."""
    pipe = make("images")
    if not completes:
        pipe.unet.register_to_config(condition_channels=2)  # a condition that the page does not know
    blocks = build_page(pipe, "x")
    assert blocks.delete_cache == (600, 3600)
    serve(blocks, server_port=port, prevent_thread_lock=True, quiet=True)
    large = b'{"data": ["' + b"x" * 2_000_000 + b'"]}'
    file = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n%s\r\n--b--\r\n'
    try:
        assert blocks.state_session_capacity == 8
        for path, body, kind, expected in (
            ("upload", file % b"x", "multipart/form-data; boundary=b", (200,) if completes else (403,)),
            (
                "upload",
                file % bytes(9_000_000),
                "multipart/form-data; boundary=b",
                (413, None) if completes else (403, None),
            ),
            ("queue/join", large, "application/json", (413,)),
            ("queue/join", iter([large]), "application/json", (400, 500, None)),
            ("queue/join", b"{}", "application/json", (422,)),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            try:
                connection.request("POST", f"/gradio_api/{path}", body, {"Content-Type": kind})
                status = connection.getresponse().status
            except (OSError, http.client.HTTPException):
                status = None
            connection.close()
            assert status in expected, (path, status)
    finally:
        blocks.close()


class Still(torch.nn.Module):
    """A model of no cost, for samples of any size."""

    def __init__(self, channels, size):
        super().__init__()
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.config = FrozenDict(in_channels=channels, sample_size=size)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return SimpleNamespace(sample=torch.zeros_like(x))


def test_memory_is_bounded():
    """64 samples of 64 x 64 pixels: frames of all 120 steps would have 95 MB in 8 bits, four times that in floats."""
    pipe = make("images")
    pipe.register_modules(unet=Still(3, 64))
    page = Page(pipe)
    tracemalloc.start()
    try:
        picture, frames, slider, _ = page.generate(64, 120, "DDIMScheduler", 0, 0)
        most = tracemalloc.get_traced_memory()[1]  # of arrays; tensors are not counted
    finally:
        tracemalloc.stop()
    assert frames.shape == (64, 63, 64, 64, 3) and slider.maximum == 62
    assert frames.nbytes <= MOST_BYTES and most < 2 * MOST_BYTES + 20e6
    file = io.BytesIO()
    picture.save(file, "png")
    assert file.tell() < 3e6


def test_of_large_samples_fewer_are_allowed():
    pipe = make("images")
    pipe.register_modules(unet=Still(3, 512))
    page = Page(pipe)
    assert (page.most_samples, page.most_points) == (10, 10)
    with pytest.raises(gr.Error, match="samples must be a whole number from 1 to 10, got 11"):
        page.generate(11, 2, OWN, 0, 0)
    assert page.generate(1, 2, "DDIMScheduler", 0, 0)[0].size == (514, 514)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 0}, "samples must be a whole number from 1 to 64, got 0"),
        ({"count": 2.5}, "got 2.5"),
        ({"count": None}, "got None"),
        ({"steps": 1001}, "steps must be a whole number from 1 to 1000"),
        ({"count": 64, "steps": 1000}, "samples x steps must be at most 16,000, got 64 x 1000"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be"),
        ({"eta": 2}, "eta must lie in 0 to 1, got 2"),
        ({"eta": 0.5, "sampler": "UniPCMultistepScheduler"}, "eta is an option of DDIM"),
        ({"sampler": "Other"}, "sampler must be one of the list, got Other"),
    ],
)
def test_bad_values(change, says):
    fields = {"count": 1, "steps": 2, "sampler": OWN, "seed": 0, "eta": 0, **change}
    with pytest.raises(gr.Error, match=says):
        Page(make("images")).generate(**fields)
    with pytest.raises(gr.Error, match="generate samples first"):
        Page(make("images")).look_back(None, 0)


def conditional():
    """A pipeline of images with three classes, two of which look alike to a menu."""
    unet = UNet2D(sample_size=8, in_channels=1, num_class_embeds=3, **MODEL)
    names = {0: "owl", 1: EVERY_CLASS, 2: "7"}
    return DDPMPipeline(unet, GaussianScheduler(), num_inference_steps=3, id2label=names)


def test_classes_and_guidance():
    """What the page draws is what the pipeline draws for these classes and this scale."""
    pipe = conditional()
    page = Page(pipe)
    for chosen, scale, labels in ((EVERY_CLASS, 1, [0, 1, 2, 0]), (2, 2.5, [2] * 4), (NO_CLASS, 1, [None] * 4)):
        _, frames, _, _ = page.generate(4, 3, OWN, 5, 0, chosen, scale)
        generators = [generator_of(5, i) for i in range(4)]
        (expected,) = pipe(4, generator=generators, output_type="np", return_dict=False, class_labels=labels,
                           guidance_scale=scale)  # fmt: skip
        assert np.array_equal(frames[:, -1], (expected * 255).round().astype(np.uint8))
    walks = [page.interpolate(0, 1, 3, 3, OWN, chosen, 2.0) for chosen in (EVERY_CLASS, 0, 2)]
    assert np.array_equal(walks[0], walks[1]) and not np.array_equal(walks[0], walks[2])
    for chosen, scale, message in (
        (3, 1, "class must be a whole number from 0 to 2, got 3"),
        (0, -0.1, "guidance scale must lie in 0 to 10, got -0.1"),
        (0, None, "got None"),
    ):
        with pytest.raises(gr.Error, match=message):
            page.generate(4, 3, OWN, 5, 0, chosen, scale)
    with pytest.raises(gr.Error, match="at most 8,000 with guidance, got 64 x 126"):
        page.generate(64, 126, OWN, 5, 0, 0, 2.0)


def test_the_menu_of_classes():
    """It is shown for a model with classes; a class may have the name of another entry."""
    for pipe, visible in ((conditional(), True), (make("images"), False)):
        page = build_page(pipe, "x")
        assert not page.analytics_enabled
        parts = page.blocks.values()
        (menu,) = [part for part in parts if getattr(part, "elem_id", None) == "class"]
        assert menu.visible is visible
        if visible:
            assert menu.choices[2:] == [("owl", 0), (EVERY_CLASS, 1), ("7", 2)]


# -- paired conditions ---------------------------------------------------------------------------


def paired(kind, own_units=False):
    """A pipeline that is given a condition: 3 x 4 x 4 for images, or 2 x 8 in units of its own for sequences."""
    torch.manual_seed(0)
    if kind == "images":
        unet = UNet2D(sample_size=8, in_channels=1, condition_channels=3, **MODEL)
        units = {"condition_shift": [1, 2, 3], "condition_scale": [2, 2, 2]} if own_units else {}
        return DDPMPipeline(unet, GaussianScheduler(), 3, condition="paired", condition_size=[4, 4], **units)
    unet = UNet1D(sample_size=16, in_channels=1, condition_channels=2, **MODEL)
    return DDPMPipeline1D(
        unet, GaussianScheduler(), 3, condition="paired", condition_size=[8], condition_shift=[5, 0],
        condition_scale=[2, 1],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["images", "own units", "csv", "npy"])
def test_samples_of_an_uploaded_condition(kind, tmp_path):
    """What the page draws is what the pipeline draws for this condition, brought to its size if it is an image."""
    pipe = paired("images" if kind in ("images", "own units") else "sequences", kind == "own units")
    page, columns = Page(pipe), ""
    if page.is_image:
        given = Image.new("RGBA", (40, 60), (51, 102, 204, 255))
        levels = np.array([0.2, 0.4, 0.8])
        condition = np.ones((1, 4, 4, 3)) * (levels if kind == "images" else (levels * 2 - 1) * 2 + [1, 2, 3])
    else:
        rows = np.random.default_rng(0).normal(size=(20, 3)) + 5
        condition, given, columns = rows[-8:, [2, 0]].T[None], str(tmp_path / f"x.{kind}"), "c,a"
        if kind == "csv":
            np.savetxt(given, rows, delimiter=",", header="a,b,c", comments="")
        else:
            np.save(given, condition[0])
    _, frames, _, picture = page.generate(3, 3, OWN, 5, 0, EVERY_CLASS, 1.0, given, columns)
    options = {"generator": [generator_of(5, i) for i in range(3)], "output_type": "np", "return_dict": False}
    (expected,) = pipe(3, condition=condition.astype(np.float32), **options)
    expected = (expected * 255).round().astype(np.uint8) if page.is_image else expected
    np.testing.assert_allclose(frames[:, -1].astype(float), expected, rtol=0, atol=1 if page.is_image else 1e-4)
    assert page.interpolate(0, 1, 3, 3, OWN, EVERY_CLASS, 1.0, given, columns).size[0] > 200
    with pytest.raises(gr.Error, match="upload it first"):
        page.generate(3, 3, OWN, 5, 0)
    if kind == "npy":
        for wrong, says in (
            (condition[0, :1], r"of the shape \(2, 8\), got float64 of the shape \(1, 8\)"),
            (condition[0] * np.nan, "finite"),
        ):
            np.save(given, wrong)
            with pytest.raises(gr.Error, match=says):
                page.generate(3, 3, OWN, 5, 0, EVERY_CLASS, 1.0, given)


# -- completing ----------------------------------------------------------------------------------


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
        ({"points": 5}, "at least 11 rows before the new values, got 10"),
        ({"steps": 700, "count": 5}, "samples x steps must be at most 3,200, got 5 x 700"),
        ({"sampler": STOCK[0]}, "GaussianScheduler"),
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
        Completing(Page(make("sequences"))).forecast(**{**given, **fields})


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
    for pipe, there in ((make("images"), True), (make("sequences"), True), (paired("images"), False), (told, True)):
        blocks = build_page(pipe, "x")
        found = {getattr(part, "elem_id", None) for part in blocks.blocks.values()}
        assert ("known" in found) is there and ("condition" in found) is not there and blocks.takes_files


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


def test_between_two_noises():
    """The ends are the ends; every point has the norm of its place on the circle; halves are as far from either end."""
    a, b = (torch.randn(2, 40, generator=generator_of(s, 0), dtype=torch.float64) for s in (1, 2))
    b *= a.norm() / b.norm()
    line = between(a, b, 5)
    assert torch.allclose(line[0], a, atol=1e-12) and torch.allclose(line[-1], b, atol=1e-12)
    assert torch.allclose(line.flatten(1).norm(dim=1), a.norm().expand(5), rtol=1e-12)
    angles = [torch.nn.functional.cosine_similarity(x.flatten(), line[2].flatten(), dim=0) for x in (a, b)]
    assert torch.allclose(*angles, rtol=1e-12)


def test_seeds_share_no_noise():
    last, first = (torch.randn(4, generator=generator_of(*which)) for which in ((0, MOST_SAMPLES - 1), (1, 0)))
    assert not torch.equal(last, first)


def test_a_series_of_a_length(monkeypatch):
    """The length goes to the pipeline; a length, or more work than a click may ask for, is refused."""
    page = Page(make("sequences"))
    drawn_series = []
    monkeypatch.setattr(page, "_plots", lambda samples, *_, **__: drawn_series.append(samples))
    for seed in (0, 0, 1):
        page.longer(40, 2, OWN, seed, 0)
    assert drawn_series[0].shape == (1, 2, 40)
    assert np.array_equal(*drawn_series[:2]) and not np.array_equal(drawn_series[0], drawn_series[2])
    for length, steps, says in ((15, 2, "from 16 to 320, got 15"), (321, 2, "got 321"), (320, 999, "at most 400")):
        with pytest.raises(gr.Error, match=says):
            page.longer(length, steps, OWN, 0, 0)
    found = {getattr(part, "elem_id", None) for part in build_page(make("images"), "x").blocks.values()}
    assert "length" not in found


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
    for wrong, says in (((None, "", 0.5), "upload an image"), ((given[0], "", 1.5), "strength must lie in 0 to 1")):
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
