"""Training with classes: what the model is told, the pictures by class, and what does not fit together."""

import datasets
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from helpers import MODEL, STREAMED, config, weights
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, TrainConfig, UNet2D, train
from ddpm_hf.losses import diffusion_loss, drop_labels
from ddpm_hf.scheduler import GaussianScheduler
from ddpm_hf.trainer import looking
from ddpm_hf.trainer.looking import picture_classes
from ddpm_hf.trainer.loop import Trainer

SHORT = {"max_train_steps": 3, "num_samples": 25}


def items(labels, seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (len(labels), 1, 8, 8)).astype(np.float32)
    return [(torch.from_numpy(a), label) for a, label in zip(x, labels)]


def test_digits_by_class(tmp_path, capsys):
    """The counts are printed, the picture has a row of two for each digit, and the pipeline knows the names."""
    result = train(config(tmp_path, class_labels="label", **SHORT))
    assert "10 classes: 0 (178), 1 (182)" in capsys.readouterr().out
    (path,) = (tmp_path / "samples").glob("*.png")
    assert Image.open(path).size == (2 * 66, 10 * 66)
    pipe = DDPMPipeline.from_pretrained(result.pipeline_dir)
    assert pipe.unet.config.num_class_embeds == 10
    assert {int(number): name for number, name in pipe.config.id2label.items()} == dict(enumerate("0123456789"))
    assert len(pipe(class_labels=list(range(10))).images) == 10
    assert len(pipe(class_labels="7", guidance_scale=2.0).images) == 1


def test_the_classes_of_a_picture():
    """A row for each class, as long as they fit; the first classes once each where they do not."""
    assert picture_classes(7, 3) == [0, 0, 1, 1, 2, 2]
    assert picture_classes(3, 3) == [0, 1, 2] and picture_classes(2, 3) == [0, 1]
    assert picture_classes(4, 1) == [0, 0, 0, 0] and picture_classes(1, 1) == [0]


def test_plots_of_sequences_have_the_classes_as_titles(tmp_path, monkeypatch):
    """Generated and real sequences of a row have its class; a class without items has an empty panel."""
    levels = np.array([0, 0, 0, 2, 2, 2])
    waves = levels[:, None] + np.zeros(16) + np.linspace(0, 0.1, 16)
    np.savez(tmp_path / "waves.npz", waves=waves, kind=levels)
    seen = []
    monkeypatch.setattr(looking, "save_sequence_plot", lambda *arguments: seen.append(arguments))
    options = {"dataset_name": None, "train_data_file": str(tmp_path / "waves.npz"), "class_labels": "kind"}
    result = train(config(tmp_path / "run", train_batch_size=2, **options, **{**SHORT, "num_samples": 7}))
    ((generated, real, _, _, titles, _, names),) = seen
    assert names is None
    assert titles == ["0", "1", "2"] and generated.shape == real.shape == (3, 1, 16)
    assert real[0].max() < 0.2 and np.isnan(real[1]).all() and real[2].min() > 1.9
    assert np.load(tmp_path / "run" / "samples" / "step-000003.npy").shape == (6, 1, 16)
    pipe = DDPMPipeline1D.from_pretrained(result.pipeline_dir)
    assert pipe(class_labels=["2", None]).sequences.shape == (2, 1, 16)


def test_plots_of_sequences_have_the_columns_of_the_table_as_names(tmp_path, monkeypatch):
    rows = "".join(f"{20 + i % 5},{1000 + i % 7}\n" for i in range(60))
    (tmp_path / "weather.csv").write_text("temperature,pressure\n" + rows)
    seen = []
    monkeypatch.setattr(looking, "save_sequence_plot", lambda *arguments: seen.append(arguments[-1]))
    options = {"dataset_name": None, "train_data_file": str(tmp_path / "weather.csv"), "stride": 2}
    train(config(tmp_path / "run", sequence_length=16, **options, **{**SHORT, "max_train_steps": 1}))
    assert seen == [["temperature", "pressure"]]


def test_labels_matter_unless_all_are_dropped(tmp_path):
    """Two runs with other labels differ, and with class_dropout_prob 1 they are the same to the bit: only "no class"
    is trained, and the embeddings of the classes stay as they were made."""
    first = [0, 1, 2] * 8
    runs = {"a": (first, 0.0), "b": (first[::-1], 0.0), "c": (first, 1.0), "d": (first[::-1], 1.0)}
    for name, (labels, dropout) in runs.items():
        options = {"dataset_name": None, "class_labels": "y", "class_dropout_prob": dropout, **SHORT, "use_ema": False}
        train(config(tmp_path / name, **options), dataset=items(labels))
    a, b, c, d = (weights(tmp_path / name) for name in "abcd")
    assert any(not torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(c[name], d[name]) for name in c)
    start = Trainer(config(tmp_path / "e", **options), dataset=items(first)).model.state_dict()
    moved = (c["class_embedding.weight"] != start["class_embedding.weight"]).any(1)
    assert moved.tolist() == [False, False, False, True]


def test_without_any_class_the_model_is_the_unconditional_one():
    """Where all labels are dropped and the embedding of "no class" is zero, loss and gradients are those of the model
    without classes, to the bit."""
    found = []
    for classes in (None, 3):
        torch.manual_seed(0)
        model = UNet2D(8, in_channels=1, num_class_embeds=classes, **MODEL)
        numbers, labels = torch.arange(4), None
        if classes:
            torch.nn.init.zeros_(model.class_embedding.weight)
            labels = drop_labels(torch.tensor([0, 1, 2, 0]), numbers, 1.0, classes)
        x0, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        loss = diffusion_loss(model, GaussianScheduler(), x0, 100 * numbers, noise, class_labels=labels).loss
        loss.mean().backward()
        found.append((loss, [p.grad for name, p in model.named_parameters() if name != "class_embedding.weight"]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_streamed_classes(tmp_path):
    """A shard with another class for each image: each batch's labels are those of its images."""
    names = [f"kind {i}" for i in range(11)]
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=names)})
    rows = {"image": STREAMED, "kind": [i % 11 for i in range(22)]}
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "table" / "x.parquet"))
    seen = []
    options = {"train_data_dir": str(tmp_path / "table"), "streaming": True, "resolution": [8], "image_channels": 1}
    trainer = Trainer(config(tmp_path / "run", dataset_name=None, class_labels="kind", **options, **SHORT))
    step = trainer._train_step

    def look(batches):
        seen.append(next(batches))
        return step(iter(seen[-1:]))

    trainer._train_step = look
    result = trainer.run()
    assert len(seen) == 3
    for batch in seen:
        pictures = (batch.items.flatten(1).min(1).values.int() // 10) % 11
        assert torch.equal(pictures.long(), batch.labels)
    assert DDPMPipeline.from_pretrained(result.pipeline_dir)(class_labels="kind 3").images


def refused(message, tmp_path, model=None, dataset=None, **options):
    with pytest.raises(ValueError, match=message):
        Trainer(config(tmp_path, **options), dataset=dataset, model=model)


def test_what_does_not_fit(tmp_path):
    def model(classes):
        return UNet2D(8, in_channels=1, num_class_embeds=classes, **MODEL)

    refused("num_class_embeds of the model must be .*, 10, got 9", tmp_path, model(9), class_labels="label")
    refused("num_class_embeds of the model must be .*, 10, got None", tmp_path, model(None), class_labels="label")
    refused(
        r"class_labels must be given for a model with classes \(num_class_embeds 10\), got None", tmp_path, model(10)
    )
    Trainer(config(tmp_path, class_labels="label"), model=model(10))
    with pytest.raises(ValueError, match="class_dropout_prob applies to runs with class_labels; got 0.2 with"):
        TrainConfig(class_dropout_prob=0.2)
    with pytest.raises(ValueError, match=r"class_dropout_prob must be in \[0, 1\], got 1.5"):
        TrainConfig(class_labels="label", class_dropout_prob=1.5)
    stock = UNet2DModel(
        8, 1, 1, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=10,
    )  # fmt: skip
    told = {"dataset_name": "digits", "class_labels": "label", "output_dir": str(tmp_path / "stock")}
    with pytest.raises(ValueError, match='class_dropout_prob must be 0 with a UNet2DModel.*"no class"; got 0.1'):
        Trainer(TrainConfig(**told), model=stock)
    Trainer(TrainConfig(class_dropout_prob=0.0, **told), model=stock)

    class Named(list):
        classes = ["a", "b", "a"]

    options = {"dataset_name": None, "class_labels": "y", "dataset": Named(items([0, 1, 2, 2]))}
    refused("each class must have a name of its own, got several named a", tmp_path, **options)
