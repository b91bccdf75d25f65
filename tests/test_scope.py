"""Each option of training with each kind of data, model and setting: it applies, or an error names it."""

import dataclasses
import json
import wave

import numpy as np
import pytest
import torch
from conftest import load_program
from helpers import SMALL

from ddpm_hf import TrainConfig, UNet2D, train
from ddpm_hf.data import open_data
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.rules import declared, default_of
from ddpm_hf.scope import KINDS
from ddpm_hf.trainer.loop import Trainer

train_script = load_program("train")
FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
# Options that apply with any data, model and other options.
ALWAYS = {
    "output_dir", "num_cpu_threads", "seed", "resume_from_checkpoint", "dry_run", "dataloader_num_workers",
    "compile", "deterministic", "release_memory",
    "self_condition", "learned_variance", "gradient_checkpointing", "ddpm_num_steps", "ddpm_beta_schedule",
    "prediction_type",
    "loss_weighting", "min_snr_gamma", "noise_offset", "timestep_sampling", "rescale_betas_zero_snr",
    "snr_shift",
    "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "optimizer", "learning_rate", "lr_scheduler",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "mixed_precision", "use_ema",
    "logging_steps", "report_to", "save_samples_steps", "num_samples", "ddpm_num_inference_steps", "eval_batch_size",
    "holdout", "eval_steps", "checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "hub_license",
    "condition", "continue_from", "init_from",
    "dataset_name", "train_data_dir", "train_data_file",  # one source of data at most, which has its own check
}  # fmt: skip
# The other options: a value that is not the default, and the options that make this one apply.
VALUES = {
    "dataset_config_name": ("plain", {}), "dataset_split": ("test", {}), "image_column": ("image", {}),
    "sequence_columns": (["wave"], {}), "class_labels": ("label", {}), "condition_column": ("c", {}),
    "condition_dir": ("small", {}),
    "class_dropout_prob": (0.2, {"class_labels": "label"}), "mask_strategy": ("blocks", {"condition": "known"}),
    "channels_last": (True, {}), "image_norm": ("minmax", {}), "image_range": ([-2.0, 5.0], {}),
    "resolution": ([16], {}), "image_channels": (3, {}), "center_crop": (False, {}),
    "random_flip": (True, {}), "sequence_length": (8, {}), "stride": (2, {"sequence_length": 8}),
    "sequence_norm": ("meanstd", {}), "recording": (True, {}),
    "csv_decimal": (",", {}), "on_missing": ("drop", {}), "on_bad_image": ("skip", {}), "streaming": (True, {}),
    "shuffle_buffer": (10, {"streaming": True}), "cache_gb": (0.5, {}),
    "dim": (16, {}), "init_dim": (16, {}), "dim_mults": ([1, 2], {}), "norm": ("group", {}), "dropout": (0.1, {}),
    "norm_groups": (4, {"norm": "group"}), "attn_heads": ([2], {}), "attn_dim_head": ([8], {}),
    "full_attn": (["true"], {}), "mid_full_attn": (False, {}), "num_mem_kv": (2, {}),
    "time_embedding": ("learned_fourier", {}),
    "fourier_dim": (8, {"time_embedding": "learned_fourier"}), "theta": (100.0, {}),
    "logit_mean": (0.5, {"timestep_sampling": "logit_normal"}),
    "logit_std": (0.5, {"timestep_sampling": "logit_normal"}), "muon_learning_rate": (1e-2, {"optimizer": "muon"}),
    "lr_num_cycles": (3, {"lr_scheduler": "cosine_with_restarts"}), "lr_power": (2.0, {"lr_scheduler": "polynomial"}),
    "immiscible": (True, {}),
    "lr_warmup_steps": (7, {}), "ema_max_decay": (0.9, {}), "ema_inv_gamma": (2.0, {}), "ema_power": (0.6, {}),
    "ema_update_after_step": (3, {}), "ema_update_every": (2, {}),
    "eval_metrics": (["memorization"], {"eval_steps": 5}),
    "eval_num_samples": (20, {"eval_steps": 5}), "eval_num_real": (20, {"eval_steps": 5}),
    "eval_likelihood_items": (9, {"eval_steps": 5, "eval_metrics": ["bits_per_dim"]}),
    "eval_likelihood_timesteps": (9, {"eval_steps": 5, "eval_metrics": ["bits_per_dim"]}),
    "vlb_weight": (0.01, {"learned_variance": True}),
    "continue_checkpoint": ("best", {"continue_from": "runs/a"}),
    "metric_for_best": ("memorization", {"eval_steps": 5}), "feature_network": ("pixels", {"eval_steps": 5}),
    "feature_resolution": (64, {"eval_steps": 5, "feature_network": "net.pt"}),
    "eval_cache_dir": ("cache", {"eval_steps": 5}),
    "eval_num_neighbours": (4, {"eval_steps": 5, "eval_metrics": ["coverage"]}),
    **{name: (value, {"push_to_hub": True}) for name, value in {
        "hub_model_id": "a/b", "hub_every_save": True, "hub_upload_state": True, "hub_private_repo": False,
        "hub_revision": "next", "create_pr": True}.items()},
}  # fmt: skip
# Options that make another one have no effect.
AGAINST = {
    **{name: {"norm": "rms"} for name in ("norm_groups",)}, "fourier_dim": {"time_embedding": "sinusoidal"},
    "theta": {"time_embedding": "random_fourier"}, "lr_warmup_steps": {"lr_scheduler": "constant"},
    "lr_num_cycles": {"lr_scheduler": "cosine"}, "lr_power": {"lr_scheduler": "linear"},
    "immiscible": {"train_batch_size": 1},
    **{name: {"use_ema": False} for name in VALUES if name.startswith("ema_")},
    **{name: {"timestep_sampling": "uniform"} for name in ("logit_mean", "logit_std")},
    "muon_learning_rate": {"optimizer": "adamw"}, "shuffle_buffer": {"streaming": False},
    "class_dropout_prob": {"class_labels": None}, "mask_strategy": {"condition": None},
    **{name: {"eval_steps": 0} for name in VALUES if name.startswith("eval_") or name == "metric_for_best"},
    "vlb_weight": {"learned_variance": False}, "continue_checkpoint": {"continue_from": None},
    "feature_network": {"eval_steps": 5, "eval_metrics": ["memorization"]},
    "eval_num_neighbours": {"eval_steps": 5, "eval_metrics": ["memorization"]},
    "eval_cache_dir": {"eval_steps": 5, "eval_metrics": ["memorization"]},
    "feature_resolution": {"eval_steps": 5, "feature_network": "pixels"},
    **{name: {"push_to_hub": False} for name in VALUES if name.startswith("hub_") or name == "create_pr"},
}  # fmt: skip
IMAGE = {"resolution", "image_channels", "center_crop", "random_flip"}
SEQUENCE = {"sequence_length", "stride", "sequence_norm"}
FEATURES = {"feature_network", "feature_resolution", "eval_cache_dir"}
TABLE = {"dataset_config_name", "dataset_split"}
UNITS = {"image_norm", "image_range"}
DATA = IMAGE | SEQUENCE | FEATURES | TABLE | UNITS | {
    "channels_last",
    "image_column", "sequence_columns", "streaming", "shuffle_buffer", "cache_gb", "on_bad_image", "class_labels",
    "condition_column", "condition_dir", "class_dropout_prob", "recording", "csv_decimal", "on_missing",
}  # fmt: skip
# Those that apply to each kind of data.
HAS = {
    "digits": IMAGE | FEATURES | {"cache_gb", "on_bad_image"},
    "folder": IMAGE | FEATURES | {"cache_gb", "on_bad_image"},
    "data folder": IMAGE | FEATURES | UNITS | {"on_bad_image", "channels_last"},
    "image array": IMAGE | FEATURES | UNITS | {"on_bad_image", "channels_last"},
    "image table": IMAGE | FEATURES | TABLE | {"image_column", "cache_gb", "on_bad_image"},
    "image stream": IMAGE | TABLE | {"image_column", "on_bad_image", "streaming", "shuffle_buffer"},
    "ecg": SEQUENCE,
    "sequence table": SEQUENCE | TABLE | {"sequence_columns", "on_missing"},
    "sequence file": SEQUENCE | {"sequence_columns", "on_missing", "csv_decimal"},
    "array": SEQUENCE | {"on_missing", "channels_last", "recording"},
    "recordings": SEQUENCE | {"on_missing"},
    "given images": FEATURES | UNITS,
    "given ImageDataset": FEATURES | {"on_bad_image"},
    "given sequences": UNITS,
}
NEW_MODEL = {
    "dim", "init_dim", "dim_mults", "norm", "norm_groups", "dropout", "attn_heads", "attn_dim_head", "full_attn",
    "mid_full_attn", "num_mem_kv", "time_embedding", "fourier_dim", "theta",
}  # fmt: skip


for kind in set(HAS) - {"ecg"}:
    HAS[kind] = HAS[kind] | {"class_labels", "class_dropout_prob"}


for kind in ("image table", "image stream", "image array", "sequence table", "sequence file", "array", "given images",
             "given sequences"):  # fmt: skip
    HAS[kind] = HAS[kind] | {"condition_column"}
for kind in ("folder", "data folder"):
    HAS[kind] = HAS[kind] | {"condition_dir"}


@pytest.fixture(autouse=True)
def nothing_to_inherit(monkeypatch):
    """A run that is continued has no options of its own."""
    monkeypatch.setattr("ddpm_hf.config.options_to_continue", lambda source, output_dir: {})


def test_every_option_is_in_the_matrix():
    assert set(FIELDS) == ALWAYS | set(VALUES) and not ALWAYS & set(VALUES)
    assert {name for name, f in FIELDS.items() if declared(f).scope} == set(VALUES)
    assert set(HAS) == set(KINDS)


def check(kind, model=None, **options):
    """Return True if a run with this kind of data refuses the options."""
    source = {"dataset_name": "somewhere"} if kind in ("image table", "image stream", "sequence table") else {}
    try:
        config = TrainConfig(**source, **options)
        config.check_scope(kind, model)
    except ValueError as error:
        assert "applies to" in str(error) or "streaming is for" in str(error), error
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_options_against_kinds_of_data(kind):
    """Each option is given at another value than its default, and at its default if that asks for something."""
    for name, (value, also) in VALUES.items():
        also = {**also, **({"streaming": True} if kind == "image stream" and name != "streaming" else {})}
        if kind != "image stream" and name == "shuffle_buffer":
            continue  # it needs streaming, which is refused itself
        refused = name in DATA and name not in HAS[kind]
        refused |= kind == "image stream" and "eval_steps" in also  # such a run is not evaluated
        config = {**also, name: value}
        assert check(kind, **config) == refused, (name, kind)
        default = default_of(FIELDS[name])
        if default is not None and default != declared(FIELDS[name]).off:
            config[name] = default
            assert check(kind, **config) == refused, (name, kind, default)


@pytest.mark.parametrize("name", VALUES)
def test_options_against_a_given_model(name):
    value, also = VALUES[name]
    model = torch.nn.Identity()  # a model without a configuration
    assert check(None, model=model, dataset_name="somewhere", **also, **{name: value}) == (name in NEW_MODEL)


@pytest.mark.parametrize("name", AGAINST)
def test_options_that_another_takes_out(name):
    """They are refused if they are given, at another value or at the default, and ignored if they are not."""
    value, also = VALUES[name]
    for given in (value, default_of(FIELDS[name])):
        if given is None or given == declared(FIELDS[name]).off:
            continue
        with pytest.raises(ValueError, match=f"^{name} applies to .*; got .* with .*: leave it out"):
            TrainConfig(**{**AGAINST[name], name: given})
    without = TrainConfig(**AGAINST[name])
    assert name not in without.applied()
    assert TrainConfig(**dataclasses.asdict(without)) == without  # a saved config.yaml names every option


def test_options_that_ask_for_nothing_are_let_be():
    asks_nothing = {"random_flip": False, "cache_gb": 0.0, "streaming": False, "hub_every_save": False}
    TrainConfig(dataset_name="ecg", lr_scheduler="constant", lr_warmup_steps=0, **asks_nothing).check_scope("ecg")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The options, and the dataset from Python if there is one, for each kind of data."""
    import datasets
    from PIL import Image

    folder = tmp_path_factory.mktemp("sources")
    pictures = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(4)]
    (folder / "photos").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / "photos" / f"{i}.png")
    datasets.Dataset.from_dict({"image": pictures, "wave": [[0.0, 1.0] * 8] * 4}).save_to_disk(str(folder / "table"))
    array = np.random.default_rng(0).normal(size=(4, 16))
    (folder / "bands").mkdir()
    for i, image in enumerate(np.random.default_rng(1).normal(size=(4, 5, 8, 8))):
        np.save(folder / "bands" / f"{i}.npy", image)
    np.save(folder / "images.npy", np.random.default_rng(2).normal(size=(4, 2, 8, 8)))
    np.save(folder / "waves.npy", array)
    np.savetxt(folder / "waves.csv", array, delimiter=",")
    table = {"train_data_dir": str(folder / "table")}
    (folder / "sound").mkdir()
    with wave.open(str(folder / "sound" / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(np.arange(16, dtype=np.int16).tobytes())
    tensors = list(torch.rand(4, 1, 8, 8))
    return {
        "digits": ({"dataset_name": "digits"}, None),
        "ecg": ({"dataset_name": "ecg"}, None),
        "folder": ({"train_data_dir": str(folder / "photos")}, None),
        "data folder": ({"train_data_dir": str(folder / "bands")}, None),
        "image array": ({"train_data_file": str(folder / "images.npy")}, None),
        "image table": (table, None),
        "image stream": ({**table, "streaming": True}, None),
        "sequence table": ({**table, "sequence_columns": ["wave"]}, None),
        "sequence file": ({"train_data_file": str(folder / "waves.csv")}, None),
        "array": ({"train_data_file": str(folder / "waves.npy")}, None),
        "recordings": ({"train_data_dir": str(folder / "sound")}, None),
        "given images": ({}, tensors),
        "given ImageDataset": ({}, ImageDataset([np.zeros((8, 8), np.uint8)] * 4, (8, 8), 1)),
        "given sequences": ({}, SequenceDataset(array)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_told_apart_and_checked(kind, sources):
    """With real data of each kind, `open_data` accepts or refuses options of images, of sequences and of tables."""
    options, dataset = sources[kind]
    assert open_data(TrainConfig(**options), dataset).kind == kind
    for more in ({"random_flip": True}, {"sequence_norm": "meanstd"}, {"image_column": "image"}):
        config = TrainConfig(**options, **more)
        if set(more) <= HAS[kind]:
            open_data(config, dataset)
        else:
            with pytest.raises(ValueError, match=f"{next(iter(more))} applies to .* with {KINDS[kind][:9]}"):
                open_data(config, dataset)


def test_splits_and_configurations_of_one_saved_table(sources):
    folder = sources["image table"][0]["train_data_dir"]
    for options, message in [
        ({"train_data_dir": folder, "dataset_split": "test"}, "dataset_split applies where"),
        ({"dataset_name": folder, "dataset_config_name": "big"}, "dataset_config_name does not apply to"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_data(TrainConfig(**options))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--dataset_name=ecg", "--random_flip"], "random_flip"),
        (["--dataset_name=ecg", "--center_crop", "true"], "center_crop"),  # its default, but typed
        (["--train_data_file=waves.npy", "--resolution", "16"], "resolution"),
        (["--train_data_file=waves.npy", "--image-column=image"], "image_column"),
        (["--dataset_name=digits", "--sequence_length=16", "--stride=2"], "sequence_length"),
        (["--dataset_name=digits", "--no_use_ema", "--ema_power=0.75"], "ema_power"),
        (["--feature_resolution=299"], "feature_resolution"),  # the demo measures with pixels
    ],
)
def test_the_program_refuses(arguments, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("waves.npy", np.zeros((4, 16)) + np.arange(16))
    assert train_script.main([*arguments, "--dry_run", "--dim=8", "--dim_mults", "1", "2"]) == 2
    assert f"error: {name} applies to" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_the_command_line_takes_out_of_a_file(tmp_path):
    """--eval_steps 0 turns off the demo's whole evaluation, and an option can undo a file's value."""
    config = train_script.parse(["--eval_steps=0"])
    assert (config.eval_steps, config.eval_num_samples, config.feature_network) == (0, 1000, "inception")
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: digits\nrandom_flip: true\nema_power: 0.6\ncenter_crop: false\n")
    config = train_script.parse(["--config", str(file), "--no_use_ema", "--dataset_name=ecg", "--random_flip=false",
                                 "--center_crop=true"])  # fmt: skip
    open_data(config)
    assert (config.ema_power, config.random_flip, config.center_crop) == (0.75, False, True)


def test_a_dataset_from_python(tmp_path):
    """Options for reading images are refused, and the card has none of them."""
    data = list(torch.rand(8, 1, 8, 8))
    with pytest.raises(ValueError, match=r"resolution applies to images.*got \[16\] with images given from Python"):
        train(TrainConfig(resolution=16, random_flip=True, image_channels=1, output_dir=str(tmp_path)), dataset=data)
    assert not list(tmp_path.iterdir())
    result = train(TrainConfig(output_dir=str(tmp_path / "run"), max_train_steps=1, **SMALL), dataset=data)
    said = set(json.loads((result.pipeline_dir / "training.json").read_text())["options"])
    effect = {name for name in FIELDS if name not in VALUES or (name not in DATA and name not in AGAINST)}
    without = DATA - UNITS - {"class_labels", "condition_column"} | {
        "lr_warmup_steps",
        "logit_std",
        "norm_groups",
        "eval_num_real",
    }
    assert effect <= said and not said & without
    assert "random_flip" not in (result.pipeline_dir / "README.md").read_text()


def test_options_of_a_given_model(tmp_path):
    """They may be given if they describe the model as it is, and the card leaves them out."""
    model = UNet2D(dim=16, dim_mults=(1, 2), sample_size=8, in_channels=1)
    shared = {"dataset_name": "digits", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="dim applies to the model that training builds.*got 64"):
        Trainer(TrainConfig(dim=64, **shared), model=model)
    with pytest.raises(ValueError, match="dropout applies to"):
        Trainer(TrainConfig(dropout=0.5, **shared), model=model)
    with pytest.raises(ValueError, match="self_condition must be the given model's, False, got True"):
        Trainer(TrainConfig(self_condition=True, **shared), model=model)
    trainer = Trainer(TrainConfig(dim=16, dim_mults=[1, 2], **shared), model=model)
    assert not NEW_MODEL & set(trainer.options)


def test_a_run_with_an_option_that_had_no_effect_is_resumed():
    """Earlier versions accepted and saved such options; a run that has them can be resumed without them."""
    earlier = {**dataclasses.asdict(TrainConfig()), "random_flip": True, "dim": 128}
    assert TrainConfig().differences(earlier, "given images", given_model=True) == []
    assert len(TrainConfig().differences(earlier, "digits")) == 2
