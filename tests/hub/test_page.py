"""The page to try a pipeline as a visitor meets it: in headless Chromium, as a Space, and its limits of requests."""

import http.client
import socket

import numpy as np
import pytest
from conftest import ROOT, run_program
from helpers import make, paired
from hub_server import serving
from PIL import Image
from visiting import Server, Visitor, needs_chromium, open_browser

from ddpm_hf.hub.page import build_page, serve
from ddpm_hf.hub.publish import write_space


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def browser():
    driver = open_browser()
    yield driver
    driver.quit()


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
        assert files.keys() == {"app.py", "page.py", "page_model.py", "page_input.py", "requirements.txt", "README.md"}
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
