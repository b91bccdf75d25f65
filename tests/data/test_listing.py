"""A folder is listed in one walk, in the order in which `pathlib` sorts paths."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_hf import TrainConfig
from ddpm_hf.data import open_data
from ddpm_hf.data.listing import list_folder

FILES = ("a.png", "a/z.png", "a-b/1.png", "a/b/2.PNG", "a/.hidden/3.png", "c.txt", "Z.jpg", ".d.png")


@pytest.fixture
def photos(tmp_path):
    for name in FILES:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "photos" / name, format="png")
    return tmp_path / "photos"


def test_files_come_in_the_order_of_pathlib(photos, monkeypatch):
    (photos / "a" / "to_nowhere.png").symlink_to("nowhere")
    (photos / "b_self").symlink_to("b_self")
    (photos / "to_folder").symlink_to("a")
    (photos / "to_file.png").symlink_to("a.png")
    os.mkfifo(photos / "pipe")
    found = list_folder(str(photos))
    expected = [path for path in photos.rglob("*") if not path.is_dir() and path.name not in (".d.png", "pipe")]
    assert found.files == [str(path) for path in sorted(expected)] and len(found.files) == 10
    assert found.broken == {str(photos / "a" / "to_nowhere.png"), str(photos / "b_self")}
    assert found.links == [str(photos / "to_folder")] and found.special == [str(photos / "pipe")]
    assert list_folder(str(photos / "none")).error.filename == str(photos / "none")
    monkeypatch.chdir(photos)
    assert list_folder("./").files == [str(path.relative_to(photos)) for path in sorted(expected)]
    monkeypatch.chdir(photos / "a")
    assert list_folder("../a/").files[:1] == [str(Path("../a/.hidden/3.png"))]


def test_training_lists_each_folder_once_and_looks_at_no_file(photos, monkeypatch):
    """Each file's kind comes with its name; 200,000 files took four walks and two looks at each file before."""
    listed, looked_at = [], []
    for name in ("stat", "lstat", "readlink"):
        real = getattr(os, name)

        def look(path, *args, real=real, **options):
            looked_at.append(str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(os, name, look)
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scan(path))
    feed = open_data(TrainConfig(train_data_dir=str(photos), resolution=[8]))
    assert len(feed.dataset) == 6
    folders = ["", "a", "a-b", "a/b", "a/.hidden"]
    assert sorted(listed) == sorted(str(photos / folder) for folder in folders)
    assert not {path for path in looked_at if path.endswith((".png", ".PNG", ".jpg"))}
