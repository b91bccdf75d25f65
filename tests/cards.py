"""The graphics card of the machine in tests: hidden from all of them but those that ask for it.

Most tests are about the CPU (equal bits, freed memory, threads), and the code under test takes a card where it sees
one. A test asks for the card with the marker `card`, or with the fixture `device`, which runs it on each device.
"""

import os

import torch

# `DDPM_HF_TEST_DEVICE=cpu pytest tests/test_cuda.py` tries those tests on CPU, as far as they need no card.
DEVICE = os.environ.get("DDPM_HF_TEST_DEVICE", "cuda")
VARIABLE = "CUDA_VISIBLE_DEVICES"


class Card:
    """Hides the graphics card from this process and from the programs that it starts, and shows it again.

    CUDA is initialized before, because a process keeps the devices that it saw then: the variable alone would hide the
    card from this process for good.
    """

    def __init__(self):
        self.is_there = torch.cuda.is_available()
        if self.is_there:
            # cuBLAS reads it when it starts, for the tests of deterministic training
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.cuda.init()
            torch.cuda.device_count()  # keeps the number from here on
        self.variable = os.environ.get(VARIABLE)
        self.functions = torch.cuda.is_available, torch.cuda.device_count

    def hide(self) -> None:
        os.environ[VARIABLE] = ""
        torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0

    def show(self) -> None:
        if self.variable is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = self.variable
        torch.cuda.is_available, torch.cuda.device_count = self.functions


CARD = Card()
DEVICES = ["cpu", "cuda"] if CARD.is_there else ["cpu"]
CARD.hide()


def tolerance(device: torch.device, rtol: float, atol: float = 0.0) -> dict[str, float]:
    """Return the tolerances of `torch.testing.assert_close` on a device, from those on the CPU.

    They are four times as large on a card. Its functions (exp, log, sine, division of float32) are off by up to 4 units
    in the last place instead of 1 (CUDA C++ Programming Guide, "Mathematical Functions"), and its sums have another
    order. The fixture `device` has switched TF32 off, which would cost 13 bits.
    """
    factor = 1.0 if device.type == "cpu" else 4.0
    return {"rtol": factor * rtol, "atol": factor * atol}
