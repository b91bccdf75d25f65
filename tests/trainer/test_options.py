"""Each option of training changes what its help says, and nothing else: a table from the option to what changes.

A run is compared with the run that differs from it in one option. An option that is not in the table fails the first
test, so that a new one cannot be forgotten.
"""

import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers import metrics
from PIL import Image

from ddpm_hf import TrainConfig, train

# Options of a run of a second; its learning rate is high, so that every difference shows in float32.
TINY = {
    "dim": 8, "dim_mults": [1, 2], "attn_heads": [2], "attn_dim_head": [4], "train_batch_size": 4, "num_cpu_threads": 1,
    "report_to": ["none"], "lr_scheduler": "constant", "learning_rate": 1e-2, "ddpm_num_steps": 50,
    "ddpm_num_inference_steps": 2, "num_samples": 2, "logging_steps": 1, "max_train_steps": 4, "checkpointing_steps": 2,
}  # fmt: skip
# Sources of data, of which `data` makes the files.
DIGITS, ECG = {"dataset_name": "digits"}, {"dataset_name": "ecg", "sequence_length": 32}
FOLDER, TABLE = {"train_data_dir": "pictures", "resolution": [8]}, {"dataset_name": "table", "resolution": [8]}
STREAM = {"train_data_dir": "table", "resolution": [8], "streaming": True}
IMAGES, SEQUENCES = {"train_data_file": "images.npy"}, {"train_data_file": "sequences.npz"}
ARRAY = {"train_data_file": "recording.npy", "sequence_length": 8, "stride": 2}
POINTS = {"train_data_file": "points.csv", "sequence_length": 8, "stride": 2}
# Values of other options that an option needs.
CLASSES, KNOWN = {**DIGITS, "class_labels": "label"}, {**SEQUENCES, "condition": "known"}
LONGER = {**DIGITS, "max_train_steps": 6}
MUON, LOGIT = {**DIGITS, "optimizer": "muon"}, {**DIGITS, "timestep_sampling": "logit_normal"}
LEARNED, FOURIER = {**DIGITS, "learned_variance": True}, {**DIGITS, "time_embedding": "learned_fourier"}
COSINE = {**DIGITS, "lr_scheduler": "cosine", "lr_warmup_steps": 1}
EVALUATED = {
    **DIGITS, "eval_steps": 2, "eval_num_samples": 6, "eval_num_real": 12, "feature_network": "pixels",
    "eval_cache_dir": "kept", "save_samples_steps": 2,
}  # fmt: skip
BOUND = {
    **EVALUATED, "eval_metrics": ["fid", "bits_per_dim"], "eval_likelihood_items": 4, "eval_likelihood_timesteps": 3
}  # fmt: skip
NETWORK = {**EVALUATED, "feature_network": "network.pt", "feature_resolution": 16}

# For each option: the options of the one run, the value that the other run has, and what then differs.
LEARNT, LINES = {"losses", "weights", "average", "pictures"}, {"losses", "rates", "epochs", "steps", "evaluation"}
CHANGES = {
    "dataset_name": (DIGITS, "ecg", LEARNT | {"data", "epochs", "files", "lines", "model", "pipeline"}),
    "dataset_split": ({**TABLE, "dataset_split": "train"}, "test", LEARNT | {"data", "epochs", "lines"}),
    "train_data_dir": (FOLDER, "brighter", LEARNT | {"data"}),
    "train_data_file": (IMAGES, "images_last.npy", LEARNT | {"data", "lines", "model", "pipeline"}),
    "channels_last": ({"train_data_file": "images_last.npy"}, True, LEARNT | {"data"}),
    "image_column": (TABLE, "other", LEARNT | {"data"}),
    "sequence_columns": (POINTS, ["b"], LEARNT | {"data", "lines", "model", "pipeline"}),
    "class_labels": (DIGITS, "label", LEARNT | {"data", "lines", "model", "pipeline"}),
    "condition_column": (SEQUENCES, "c", LEARNT | {"lines", "model", "pipeline"}),
    "condition_dir": (FOLDER, "brighter", LEARNT | {"lines", "model", "pipeline"}),
    "holdout": (DIGITS, 50, LEARNT | {"data", "epochs", "lines"}),
    "resolution": (DIGITS, [12], LEARNT | {"data", "lines", "model"}),
    "image_channels": (DIGITS, 3, LEARNT | {"data", "lines", "model"}),
    "image_norm": (IMAGES, "meanstd", LEARNT | {"data", "lines", "pipeline", "schedule"}),
    "image_range": (IMAGES, [0.0, 2000.0], LEARNT | {"data", "lines", "pipeline"}),
    "center_crop": (FOLDER, False, LEARNT),
    "random_flip": (DIGITS, True, LEARNT),
    "on_bad_image": (FOLDER, "skip", set()),
    "recording": (ARRAY, True, LEARNT | {"data", "epochs", "lines", "model", "pipeline"}),
    "csv_decimal": (POINTS, ",", {"lines"}),
    "on_missing": ({"train_data_file": "gaps.npy", "condition": "known"}, "interpolate", LEARNT | {"data", "lines"}),
    "sequence_length": (ECG, 48, LEARNT | {"data", "epochs", "lines", "model"}),
    "stride": (ECG, 5, LEARNT | {"data", "epochs", "lines"}),
    "sequence_norm": (SEQUENCES, "meanstd", LEARNT | {"data", "pipeline", "schedule"}),
    "dataloader_num_workers": (FOLDER, 1, set()),
    "streaming": ({"train_data_dir": "table", "resolution": [8]}, True, LEARNT | {"data"}),
    "shuffle_buffer": (STREAM, 4, LEARNT),
    "cache_gb": (FOLDER, 0.0, set()),
    "seed": (DIGITS, 1, LEARNT),
    "resume_from_checkpoint": (DIGITS, "latest-valid", set()),
    # The weights are those of the run that did all steps; the lines of its metrics begin later.
    "continue_from": (LONGER, "earlier", LINES | {"files", "lines"}),
    "continue_checkpoint": ({**LONGER, "continue_from": "earlier"}, "step-000002", LINES | {"lines"}),
    "init_from": (DIGITS, "earlier/pipeline", LEARNT | {"files", "lines"}),
    "dry_run": (
        DIGITS, True, LEARNT | LINES | {"data", "files", "lines", "model", "pipeline", "schedule"}
    ),
    "num_cpu_threads": (DIGITS, None, set()),
    "compile": (DIGITS, "none", set()),
    "deterministic": (DIGITS, True, set()),
    "dim": (DIGITS, 12, LEARNT | {"lines", "model"}),
    "init_dim": (DIGITS, 12, LEARNT | {"lines", "model"}),
    "dim_mults": (DIGITS, [1, 3], LEARNT | {"lines", "model"}),
    "self_condition": (DIGITS, True, LEARNT | {"lines", "model"}),
    "learned_variance": (DIGITS, True, LEARNT | {"lines", "model", "schedule"}),
    "norm": (DIGITS, "group", LEARNT | {"lines", "model"}),
    "norm_groups": ({**DIGITS, "norm": "group"}, 4, LEARNT | {"model"}),
    "dropout": (DIGITS, 0.5, LEARNT | {"model"}),
    "attn_heads": (DIGITS, [1], LEARNT | {"lines", "model"}),
    "attn_dim_head": (DIGITS, [8], LEARNT | {"lines", "model"}),
    "full_attn": (DIGITS, ["true"], LEARNT | {"lines", "model"}),
    "mid_full_attn": (DIGITS, False, LEARNT | {"lines", "model"}),
    "num_mem_kv": (DIGITS, 2, LEARNT | {"lines", "model"}),
    "time_embedding": (DIGITS, "learned_fourier", LEARNT | {"lines", "model"}),
    "fourier_dim": (FOURIER, 8, LEARNT | {"lines", "model"}),
    "theta": (DIGITS, 100.0, LEARNT | {"model"}),
    "ddpm_num_steps": (DIGITS, 40, LEARNT | {"schedule"}),
    "ddpm_beta_schedule": (DIGITS, "cosine", LEARNT | {"schedule"}),
    "prediction_type": (DIGITS, "sample", LEARNT | {"schedule"}),
    "loss_weighting": (DIGITS, "snr", LEARNT),
    "min_snr_gamma": ({**DIGITS, "loss_weighting": "snr"}, 0.5, LEARNT),
    "vlb_weight": (LEARNED, 0.1, LEARNT),
    "noise_offset": (DIGITS, 0.1, LEARNT),
    "timestep_sampling": (DIGITS, "logit_normal", LEARNT),
    "logit_mean": (LOGIT, 1.0, LEARNT),
    "logit_std": (LOGIT, 0.5, LEARNT),
    "class_dropout_prob": (CLASSES, 0.9, LEARNT),
    "condition": (SEQUENCES, "known", LEARNT | {"lines", "model", "pipeline"}),
    "mask_strategy": (KNOWN, "forecast", LEARNT),
    "immiscible": (DIGITS, True, LEARNT),
    "rescale_betas_zero_snr": (DIGITS, True, LEARNT | {"schedule"}),
    "snr_shift": (DIGITS, -1.0, LEARNT | {"schedule"}),
    "max_train_steps": (DIGITS, 6, LEARNT | {"epochs", "evaluation", "files", "rates", "steps"}),
    "train_batch_size": (DIGITS, 6, LEARNT | {"epochs"}),
    "gradient_accumulation_steps": (DIGITS, 2, LEARNT | {"epochs"}),
    "optimizer": (DIGITS, "muon", LEARNT),
    "learning_rate": (DIGITS, 5e-3, LEARNT | {"rates"}),
    "muon_learning_rate": (MUON, 9e-3, LEARNT),
    "lr_scheduler": (COSINE, "linear", LEARNT | {"rates"}),
    "lr_num_cycles": ({**COSINE, "lr_scheduler": "cosine_with_restarts"}, 2, LEARNT | {"rates"}),
    "lr_power": ({**COSINE, "lr_scheduler": "polynomial"}, 2.0, LEARNT | {"rates"}),
    "lr_warmup_steps": (COSINE, 2, LEARNT | {"rates"}),
    "adam_beta1": (DIGITS, 0.5, LEARNT),
    "adam_beta2": (DIGITS, 0.5, LEARNT),
    "adam_weight_decay": (DIGITS, 0.1, LEARNT),
    "adam_epsilon": (DIGITS, 1e-2, LEARNT),
    "max_grad_norm": (DIGITS, 1e-3, LEARNT),
    "mixed_precision": (DIGITS, "bf16", LEARNT),
    "gradient_checkpointing": (DIGITS, True, set()),
    "release_memory": (DIGITS, True, set()),
    "use_ema": (DIGITS, False, {"average", "files", "pictures"}),
    "ema_max_decay": (DIGITS, 0.1, {"average", "pictures"}),
    "ema_inv_gamma": (DIGITS, 3.0, {"average", "pictures"}),
    "ema_power": (DIGITS, 0.3, {"average", "pictures"}),
    "ema_update_after_step": (DIGITS, 2, {"average", "pictures"}),
    "ema_update_every": (DIGITS, 2, {"average", "pictures"}),
    "logging_steps": (DIGITS, 2, LINES),
    "report_to": (DIGITS, ["tensorboard"], {"files"}),
    "save_samples_steps": (DIGITS, 2, {"files", "pictures"}),
    "num_samples": (DIGITS, 3, {"pictures"}),
    "ddpm_num_inference_steps": (DIGITS, 3, {"pictures", "pipeline"}),
    "eval_batch_size": (DIGITS, 1, set()),
    "checkpointing_steps": (DIGITS, 1, {"files"}),
    "checkpoints_total_limit": (DIGITS, 1, {"files"}),
    "eval_steps": ({**SEQUENCES, "num_samples": 2}, 2, {"best", "evaluation", "files", "lines", "steps"}),
    "eval_metrics": (EVALUATED, ["kid"], {"best", "evaluation", "lines"}),
    "eval_num_samples": (EVALUATED, 8, {"evaluation", "lines"}),
    "eval_num_real": (EVALUATED, 16, {"evaluation", "lines"}),
    "eval_likelihood_items": (BOUND, 5, {"evaluation", "lines"}),
    "eval_likelihood_timesteps": (BOUND, 4, {"evaluation", "lines"}),
    "feature_network": (EVALUATED, "network.pt", {"evaluation", "lines"}),
    "feature_resolution": (NETWORK, 12, {"evaluation", "lines"}),
    "eval_num_neighbours": ({**EVALUATED, "eval_metrics": ["fid", "coverage"]}, 1, {"evaluation", "lines"}),
    "eval_cache_dir": (EVALUATED, "run/kept", {"files"}),
    "metric_for_best": (EVALUATED, "kid", {"best"}),
    "hub_license": (DIGITS, "mit", {"licence"}),
}  # fmt: skip
# A configuration of a table on the Hub, the folder itself, and the Hub's options, for which tests/hub has a Hub.
ELSEWHERE = {
    "dataset_config_name", "output_dir", "push_to_hub", "hub_model_id", "hub_every_save", "hub_upload_state",
    "hub_private_repo", "hub_revision", "create_pr",
}  # fmt: skip


def test_every_option_of_training_is_in_the_table():
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    assert names == set(CHANGES) | ELSEWHERE and not set(CHANGES) & ELSEWHERE


class Network(torch.nn.Module):
    """Features of images: every 37th value."""

    def forward(self, x):
        return x.flatten(1)[:, ::37]


def make_data(folder):
    """Write the data that the runs are trained on."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 200, (12, 12, 9, 3), dtype=np.uint8)
    for name, brighter in (("pictures", 0), ("brighter", 50)):
        (folder / name).mkdir()
        for number, picture in enumerate(pictures):
            Image.fromarray(picture + np.uint8(brighter)).save(folder / name / f"{number:02d}.png")
    import datasets

    images = [Image.fromarray(picture) for picture in pictures]
    both = datasets.Features({"image": datasets.Image(), "other": datasets.Image()})
    for split, some in (("train", images), ("test", images[4:])):
        rows = datasets.Dataset.from_dict({"image": some, "other": some[::-1]}, features=both)
        rows.to_parquet(folder / "table" / f"{split}-0.parquet")
    np.save(folder / "images.npy", rng.integers(0, 4096, (12, 2, 8, 8)).astype(np.uint16))
    np.save(folder / "images_last.npy", rng.integers(0, 4096, (12, 8, 8, 8)).astype(np.uint16))
    waves = np.sin(rng.random((12, 2, 1)) * np.arange(16) + rng.random((12, 2, 1))).astype(np.float32)
    np.savez(folder / "sequences.npz", data=waves, c=waves[:, :1] ** 2)
    np.save(folder / "recording.npy", np.concatenate(list(waves), axis=1))
    waves[3, 0, 4], waves[7, 1, :3] = np.nan, np.nan
    np.save(folder / "gaps.npy", waves)
    lines = [f"{a:.3f};{b:.3f}".replace(".", ",") for a, b in np.cumsum(rng.normal(size=(40, 2)), axis=0)]
    (folder / "points.csv").write_text("\n".join(["a;b", *lines]))
    torch.jit.script(Network()).save(str(folder / "network.pt"))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left(folder, printed):
    """Everything that a run leaves, by the words of the table, without the options themselves and times."""
    told = re.sub(r"^.*?(?=model: UNet)", "", printed, flags=re.DOTALL)  # the options come before it
    found = {"lines": re.sub(r"training:.*|.*item/s\]|\d+(\.\d+)? (s|min)\b", "", told).split()}
    if not (folder / "pipeline").is_dir():
        return {**found, "files": []}
    lines, pipeline = metrics(folder), folder / "pipeline"
    for name, keys in (("losses", ("loss", "grad_norm")), ("rates", ("lr",)), ("epochs", ("epoch",))):
        found[name] = [line[key] for line in lines for key in keys if key in line]
    found["steps"] = [line["step"] for line in lines]
    found["evaluation"] = [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines]
    newest = max((folder / "checkpoints").iterdir())
    found["weights"] = digest(newest / "model.safetensors")
    found["average"] = digest(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    for name, file in (("model", "unet/config.json"), ("schedule", "scheduler/scheduler_config.json"),
                       ("pipeline", "model_index.json")):  # fmt: skip
        found[name] = (pipeline / file).read_text()
    found["pictures"] = [digest(path) for path in sorted((folder / "samples").iterdir())]
    found["data"] = json.loads((pipeline / "training.json").read_text())["data"]
    found["licence"] = yaml.safe_load((pipeline / "README.md").read_text().split("---")[1]).get("license")
    files = (path for path in folder.rglob("*") if path.is_file())
    found["files"] = sorted({re.sub(r"events\..*", "events", str(path.relative_to(folder))) for path in files})
    best = json.loads((newest / "progress.json").read_text())["best"]
    found["best"] = best and best["metric"]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains with options, once, and gives what the run leaves; names of files are those of `make_data`."""
    folder, known = tmp_path_factory.mktemp("runs"), {}
    make_data(folder)

    def run(options, capsys, name="run"):
        key = name, json.dumps(options, sort_keys=True)
        if key not in known:
            AcceleratorState._reset_state(reset_partial_state=True)
            capsys.readouterr()
            train(TrainConfig(output_dir=name, **{**TINY, **options}))
            known[key] = left(folder / name, capsys.readouterr().out)
            if name == "run":
                shutil.rmtree(name, ignore_errors=True)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changes_what_it_says(name, trained, capsys):
    options, value, changed = CHANGES[name]
    if {"continue_from", "continue_checkpoint", "init_from"} & {name, *options}:
        trained(DIGITS, capsys, "earlier")
    one, other = trained(options, capsys), trained({**options, name: value}, capsys)
    assert {part for part in one | other if one.get(part) != other.get(part)} == changed
