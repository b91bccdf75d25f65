"""TrainConfig: checks, YAML, the command line, differences between runs."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, load_program

from ddpm_hf import options as headings
from ddpm_hf.config import HEADINGS, TrainConfig, kinds, read_yaml
from ddpm_hf.rules import declared
from ddpm_hf.trainer.build import make_scheduler

train_script = load_program("train")


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "noise"}, {"ddpm_beta_schedule": "exp"}, {"norm": "layer"}, {"report_to": ["mlflo"]},
        {"learning_rate": 0.0},
        {"learning_rate": "fast"}, {"use_ema": 1}, {"image_channels": True}, {"output_dir": 5}, {"num_mem_kv": 1.5},
        {"train_batch_size": 0}, {"max_train_steps": 1.5}, {"resolution": [1, 2, 3]},
        {"on_bad_image": "ignore"}, {"mixed_precision": "fp8"}, {"lr_scheduler": "step"}, {"dropout": 1.0},
        {"image_channels": 0}, {"ema_max_decay": 1.1}, {"seed": -1}, {"full_attn": ["maybe"]}, {"min_snr_gamma": -1},
        {"optimizer": "sgd"}, {"loss_weighting": "sigma"},
        {"muon_learning_rate": 0}, {"timestep_sampling": "cosine"}, {"logit_std": 0.0},
        {"snr_shift": "automatic"}, {"snr_shift": "nan"}, {"snr_shift": True},
    ],
)  # fmt: skip
def test_bad_values_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError) as caught:
        TrainConfig(**options)
    assert name in str(caught.value) and str(value).strip("[]'") in str(caught.value)


def test_rules_between_options():
    with pytest.raises(ValueError, match="one source of data.*dataset_name and train_data_dir"):
        TrainConfig(dataset_name="digits", train_data_dir="x")
    with pytest.raises(ValueError, match="50 and 20"):
        TrainConfig(ddpm_num_steps=20)
    with pytest.raises(ValueError, match="min_snr_gamma must be 0 with loss_weighting 'uniform', got 5.0"):
        TrainConfig(loss_weighting="uniform", min_snr_gamma=5.0)
    with pytest.raises(ValueError, match="learning_rate must be above 1e-7 with lr_scheduler 'polynomial'.*got 1e-08"):
        TrainConfig(lr_scheduler="polynomial", learning_rate=1e-8)


@pytest.mark.parametrize(
    "options, rule",
    [
        ({"rescale_betas_zero_snr": True, "prediction_type": "pred_noise"}, "epsilon says nothing of x0"),
        ({"ddpm_beta_schedule": "linear", "ddpm_num_steps": 20, "ddpm_num_inference_steps": 5}, "at least 21 steps"),
        ({"rescale_betas_zero_snr": True, "ddpm_num_steps": 1, "ddpm_num_inference_steps": 1}, "every beta must lie"),
    ],
)
def test_schedules_are_checked_before_the_data_are_read(options, rule):
    with pytest.raises(ValueError, match=f"ddpm_beta_schedule.*{rule}"):
        TrainConfig(**options)


def test_the_weighting_follows_min_snr_where_it_is_not_given():
    found = [TrainConfig(**options).loss_weighting for options in ({}, {"min_snr_gamma": 5}, {"loss_weighting": "snr"})]
    assert found == ["uniform", "snr", "snr"]


def test_every_heading_is_joined_and_no_option_stands_under_two():
    declared_in = [value for value in vars(headings).values() if hasattr(value, "_argument_group_name")]
    assert set(declared_in) == set(HEADINGS)
    names = [f.name for heading in HEADINGS for f in dataclasses.fields(heading)]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(TrainConfig))  # the later of two would win


def test_every_option_has_help():
    assert all(f.metadata.get("help") for f in dataclasses.fields(TrainConfig))


def test_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: digits\nlearning_rate: 1e-3\ndim_mults: [1, 2]\nfull_attn: [true, false]\n")
    config = train_script.parse(["--config", str(file), "--dim_mults", "1", "3", "--no_center_crop"])
    assert (config.learning_rate, config.dim_mults, config.full_attn) == (1e-3, [1, 3], ["true", "false"])
    assert config.center_crop is False and config.dataset_name == "digits"
    other = train_script.parse(["--config", str(file), "--train_data_dir", "photos", "--full_attn", "false"])
    assert (
        other.dataset_name is None and other.train_data_dir == "photos" and other.model_options()["full_attn"] is False
    )


def test_without_data_the_demo_is_run():
    config = train_script.parse(["--max_train_steps", "3"])
    assert config.dataset_name == "digits" and config.max_train_steps == 3 and config.output_dir == "runs/digits"
    assert train_script.parse(["--train_data_dir=x"]).dim == 64


def test_yaml_errors(tmp_path):
    file = tmp_path / "run.yaml"
    wrongs = [("learning_rat: 1\n", "did you mean learning_rate"), ("- 1\n", "name: value"), ("a: [", "YAML")]
    for text, message in wrongs:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_yaml(str(file))
    with pytest.raises(ValueError, match="cannot be read"):
        read_yaml(str(tmp_path / "none.yaml"))


def test_presets_are_valid():
    for file in sorted((ROOT / "training" / "configs").glob("*.yaml")):
        assert TrainConfig(**read_yaml(str(file))).output_dir


def test_differences():
    """A resumed run may change options that do not alter the weights, and the length of a constant schedule."""
    earlier = yaml.safe_load(TrainConfig().to_yaml())
    assert TrainConfig().differences(earlier) == []
    assert TrainConfig(num_samples=4, checkpointing_steps=7).differences(earlier) == []
    assert TrainConfig(dim=32).differences(earlier) == ["dim: 64 -> 32"]
    assert "max_train_steps" in TrainConfig(max_train_steps=5).differences(earlier)[0]
    off = {**earlier, "min_snr_gamma": None}  # as in runs of earlier versions
    assert TrainConfig(min_snr_gamma=0).differences(off) == [] and TrainConfig(**off).min_snr_gamma == 0
    assert TrainConfig(min_snr_gamma=5.0).differences(off) == [
        "loss_weighting: uniform -> snr",
        "min_snr_gamma: 0.0 -> 5.0",
    ]
    before = {
        name: value for name, value in earlier.items() if name != "loss_weighting"
    }  # as in runs from before that option
    assert TrainConfig(loss_weighting="snr").differences(before) == []
    assert TrainConfig().differences(before) == ["loss_weighting: snr -> uniform"]
    for without_effect, with_effect in [
        ({"muon_learning_rate": 1e-3}, {"optimizer": "muon"}),
        ({"logit_std": 0.5}, {"timestep_sampling": "logit_normal"}),
    ]:
        with pytest.raises(ValueError, match="applies to runs with"):
            TrainConfig(**without_effect)
        assert TrainConfig().differences({**earlier, **without_effect}) == []  # a run of an earlier version
        assert len(TrainConfig(**without_effect, **with_effect).differences(earlier)) == 2
    plain = yaml.safe_load(TrainConfig(use_ema=False).to_yaml())
    assert TrainConfig(use_ema=False).differences({**plain, "ema_power": 0.6}) == []
    assert TrainConfig(ema_power=0.6).differences(plain) == ["use_ema: False -> True", "ema_power: 0.75 -> 0.6"]
    constant = yaml.safe_load(TrainConfig(lr_scheduler="constant").to_yaml())
    assert TrainConfig(lr_scheduler="constant", max_train_steps=5).differences(constant) == []


def test_an_option_that_is_newer_than_the_run_had_its_default():
    """A run of an earlier version names fewer options: one that is turned on now would change the rest of its steps."""
    earlier = yaml.safe_load(TrainConfig().to_yaml())
    del earlier["immiscible"], earlier["noise_offset"]
    assert TrainConfig().differences(earlier) == []
    changed = ["noise_offset: 0.0 -> 0.1", "immiscible: False -> True"]
    assert TrainConfig(immiscible=True, noise_offset=0.1).differences(earlier) == changed


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train_script.parse(["--output_dir=~/run"]).output_dir == str(tmp_path / "run")


def test_help_has_every_option_under_its_heading(capsys):
    """Each class of options is one heading of --help, in the order of the fields of TrainConfig."""
    with pytest.raises(SystemExit):
        train_script.parse(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{heading._argument_group_name}:\n") for heading in HEADINGS]
    assert places == sorted(places)
    by_heading = [f.name for heading in HEADINGS for f in dataclasses.fields(heading)]
    assert by_heading == [f.name for f in dataclasses.fields(TrainConfig)]
    options = [text.index(f"\n  --{name} ") for name in by_heading]
    assert options == sorted(options)


def test_numbers_without_a_rule():
    """All numbers have bounds, except those that the model's constructor checks and one that may be anything."""
    numbers = {name for name, (kind, _) in kinds().items() if kind in (int, float)}
    free = {f.name for f in dataclasses.fields(TrainConfig) if f.name in numbers and declared(f).rule is None}
    assert free == {"num_mem_kv", "fourier_dim", "logit_mean"}


@pytest.mark.parametrize("given, kept", [(0, 0.0), ("0.0", 0.0), (-1.5, -1.5), ("-1.50", -1.5), ("auto", "auto")])
def test_the_shift_is_a_number_or_auto(given, kept, tmp_path):
    config = TrainConfig(snr_shift=given)
    assert config.snr_shift == kept == train_script.parse(["--snr_shift", str(given)]).snr_shift
    assert type(config.snr_shift) is type(kept) and yaml.safe_load(config.to_yaml())["snr_shift"] == kept
    assert not config.differences({**yaml.safe_load(config.to_yaml()), "snr_shift": str(kept)})  # as 0.5.0 wrote it
    # runs from before the option had none
    earlier = {"loss_weighting": "uniform"}
    assert config.differences(earlier) == ([] if kept == 0 else [f"snr_shift: 0.0 -> {kept}"])


@pytest.mark.parametrize(
    "size, shift", [((128, 128), -2 * math.log(2)), ((100, 75), math.log(4096 / 7500)), ((32, 32), 0), ((8, 64), 0),
                    ((5000,), math.log(256 / 5000)), ((256,), 0), ((187,), 0)],
)  # fmt: skip
def test_the_shift_follows_the_size(size, shift):
    feed = SimpleNamespace(shape=(3, *size), scaling=SimpleNamespace(limit=1.0))
    plain, auto, own = (make_scheduler(TrainConfig(snr_shift=s), feed) for s in (0, "auto", 0.7))
    for scheduler, added in ((auto, shift), (own, 0.7)):
        assert scheduler.config.snr_shift == pytest.approx(added)
        torch.testing.assert_close(
            scheduler.snr(torch.arange(1000)).log(), plain.snr(torch.arange(1000)).log() + added, rtol=0, atol=1e-4
        )


def test_a_shift_that_no_schedule_has_is_refused():
    with pytest.raises(ValueError, match="ddpm_beta_schedule 'sigmoid'.*snr_shift=1000.0"):
        TrainConfig(snr_shift=1000)
