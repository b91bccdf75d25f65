"""The files of a saved pipeline: which are its own, and what a save takes along from the folder that it replaces."""

import pytest
from helpers import make

from ddpm_hf.hub.contents import carry_over, pipeline_files

MINE = ("LICENSE", "LICENSE.md", "notes.txt", "unet/notes.txt", "photo.png")
MEASURED = ("completion-gap.png", "bits-per-dim.png", "evaluation.json", "completion.json")


@pytest.mark.parametrize("edited", [False, True])
def test_a_save_takes_along_what_someone_has_put_there(edited, tmp_path):
    """Results of an evaluation of the earlier weights are left behind, unless an edited card shows them."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        make("images").save_pretrained(folder)
    for name in (*MINE, *MEASURED):
        (old / name).write_text("old")
    if edited:
        (old / "README.md").write_text("# Mine\n![a](completion-gap.png) ![b](<./bits-per-dim.png>)")
    carry_over(old, new)
    assert all((new / name).read_text() == "old" for name in MINE)
    found = [name for name in MEASURED if (new / name).exists()]
    assert found == (["completion-gap.png", "bits-per-dim.png"] if edited else [])
    assert ((new / "README.md").read_text() == (old / "README.md").read_text()) or not edited


@pytest.mark.parametrize(
    ("card", "published"),
    [("![](box.png)", {"box.png"}), ("![](x.png)", {"x.png"}), ("![](my%20own.png)", {"my own.png"}),
     ('<img src="./x.png">', {"x.png"}), ("# Nothing", set())],
)  # fmt: skip
def test_pictures_are_published_if_the_card_names_them(card, published, tmp_path):
    make("images").save_pretrained(tmp_path)
    for name in ("x.png", "box.png", "my own.png"):
        (tmp_path / name).touch()
    assert {name for name in pipeline_files(tmp_path, card)[0] if name.endswith(".png")} == published
