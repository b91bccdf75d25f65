"""The page in a real browser: a server of the page, and a visitor in headless Chromium."""

import base64
import io
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed (Debian: chromium chromium-driver)"
)


def open_browser():
    """Return a driver of headless Chromium, which the caller quits."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1400"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


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
