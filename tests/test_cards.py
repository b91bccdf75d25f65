"""The card is hidden from the tests that do not ask for it, and from the programs that they start."""

import os

import cards
import pytest
import torch


class Found:
    """Stand-ins for torch's functions on a machine with one card; they note what is called."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.calls.append("count") or 1)
        monkeypatch.setattr(torch.cuda, "init", lambda: self.calls.append("init"))
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")


@pytest.mark.parametrize("variable", [None, "3"])
def test_a_card_is_hidden_and_shown(variable, monkeypatch):
    """CUDA is initialized, and the number of devices asked for, before the variable says that there is none."""
    found = Found(monkeypatch)
    monkeypatch.setenv(cards.VARIABLE, variable or "")
    if variable is None:
        monkeypatch.delenv(cards.VARIABLE)
    card = cards.Card()
    assert card.is_there and found.calls == ["init", "count"]
    card.hide()
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0 and os.environ[cards.VARIABLE] == ""
    card.show()
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert os.environ.get(cards.VARIABLE) == variable
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_this_test_sees_no_card():
    assert not torch.cuda.is_available() and os.environ[cards.VARIABLE] == ""


def test_tolerances_of_devices():
    assert cards.tolerance(torch.device("cpu"), 1e-6) == {"rtol": 1e-6, "atol": 0}
    assert cards.tolerance(torch.device("cuda"), 1e-6, 1e-7) == {"rtol": 4e-6, "atol": 4e-7}
