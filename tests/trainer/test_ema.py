"""The average of the weights: its definition in training, and weights that are spread over processes."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import run_program
from helpers import SMALL, OnDevice, config, metrics, weights
from safetensors.torch import load_file

from ddpm_hf import TrainConfig, UNet1D, train
from ddpm_hf.trainer.ema import WeightAverage


def test_the_average_follows_its_definition(tmp_path, monkeypatch):
    """e_n = d_n e_{n-1} + (1 - d_n) w_n with d_n = 1 - (1 + n - 1)^-power, from the weights of each step."""
    history = []
    update = WeightAverage.update

    def spy(self, share):
        history.append([p.detach().double().clone() for p in self.model.parameters()])
        update(self, share)

    monkeypatch.setattr(WeightAverage, "update", spy)
    train(config(tmp_path, max_train_steps=4, learning_rate=0.01))
    expected = history[0]
    for n, now in enumerate(history[1:], start=2):
        decay = min(1 - (1 + (n - 1)) ** -0.75, 0.9999)
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, now)]
    saved = load_file(tmp_path / "checkpoints" / "step-000004" / "ema.safetensors")
    for i, e in enumerate(expected):
        torch.testing.assert_close(saved[f"{i:05d}"].double(), e, rtol=1e-5, atol=1e-7)


def test_when_and_how_much_the_average_takes_in():
    """1 - d_n by the definition above, with every option; None where the step is not one of every so many."""
    model = torch.nn.Linear(2, 2)
    options = {"ema_max_decay": 0.9, "ema_inv_gamma": 2.0, "ema_power": 0.5, "ema_update_after_step": 3}
    average = WeightAverage(model, Accelerator(cpu=True), TrainConfig(ema_update_every=2, **options))
    average.start(model)
    for step in range(300):
        k = max(0, step + 1 - 3 - 1)
        expected = 1 - min(1 - (1 + k / 2.0) ** -0.5, 0.9) if step % 2 == 0 else None
        assert average.share(step) == (expected if expected is None else pytest.approx(expected, rel=1e-14))
    without = WeightAverage(model, Accelerator(cpu=True), TrainConfig(use_ema=False))
    without.start(model)
    assert without.share(0) is None


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 1.0])
def test_a_share_in_a_tensor_is_the_number(share):
    """average + share * (weights - average), both ways, in float64; the averages stay in their memory."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 4, 3, dtype=torch.float64)
    for given in (share, torch.tensor(share, dtype=torch.float64)):
        average = WeightAverage(model, Accelerator(cpu=True), TrainConfig())
        average.start(model)
        before = [p.clone() for p in average.ema.shadow_params]
        places = [p.data_ptr() for p in average.ema.shadow_params]
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        average.update(given)
        assert [p.data_ptr() for p in average.ema.shadow_params] == places
        for p, b, w in zip(average.ema.shadow_params, before, model.parameters()):
            torch.testing.assert_close(p, b + share * (w.detach() - b), rtol=1e-14, atol=1e-15)


def test_an_update_stays_on_its_device():
    """On the meta device, where a read by the host raises, no tensor of the host takes part."""
    model = torch.nn.Conv2d(3, 4, 3, device="meta")
    average = WeightAverage(model, Accelerator(cpu=True), TrainConfig())
    average.start(model)
    share = torch.zeros((), device="meta")
    with OnDevice("meta") as seen:
        average.update(share)
    assert seen.operations == 3


@pytest.mark.parametrize("use_ema", [True, False])
def test_weights_are_exchanged_in_place(use_ema):
    model = torch.nn.Conv2d(3, 4, 3)
    average = WeightAverage(model, Accelerator(cpu=True), TrainConfig(use_ema=use_ema))
    average.start(model)
    with torch.no_grad():
        model.weight += 1
    kept, places = [p.detach().clone() for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
    with average.weights() as whole:
        assert [p.data_ptr() for p in whole.parameters()] == places
        torch.testing.assert_close(whole.weight + use_ema, kept[0])
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept))


@pytest.mark.parametrize(
    ("use_ema", "compiler"), [(True, "no"), (False, "no"), pytest.param(True, "eager", marks=pytest.mark.slow)]
)
def test_what_is_measured_is_the_saved_model(use_ema, compiler):
    """Under bf16, compiled too, the averaged model computes in float32, as the pipeline that is saved does, not under
    autocast, whose rounding is some 2^-8; training goes on under autocast."""
    model = UNet1D(sample_size=8, in_channels=1, dim=8, dim_mults=[1], attn_heads=1, attn_dim_head=4)
    plain = copy.deepcopy(model).eval()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", dynamo_backend=compiler)
    average = WeightAverage(model, accelerator, TrainConfig(use_ema=use_ema))
    prepared = accelerator.prepare(model)
    average.start(prepared)
    x, t = torch.randn(4, 1, 8), torch.tensor([0, 300, 600, 999])
    with torch.no_grad():
        expected, before = plain(x, t).sample, prepared.eval()(x, t).sample
        with average.weights() as whole:
            found = whole(x, t).sample
        after = prepared.eval()(x, t).sample
    assert torch.equal(found, expected) and torch.equal(after, before)
    assert (before - expected).abs().max() > 1e-4 * expected.abs().max()


# accelerate starts FSDP on accelerators only: this tells it that the CPU processes are such.
SHARDED = """
import json, sys
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
from ddpm_hf import TrainConfig, train
train(TrainConfig(**json.loads(sys.argv[1])))
"""


def sharded(folder, version=2, **options):
    (folder / "sharded.py").write_text(SHARDED)
    fsdp = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(version), "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true" if version == 2 else "FULL_SHARD",
    }  # fmt: skip
    return run_program(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "sharded.py",
        json.dumps({**SMALL, "dataset_name": "digits", "output_dir": "sharded", "num_cpu_threads": 1, **options}),
        cwd=folder, ACCELERATE_USE_CPU="1", **fsdp,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over processes is tested on Linux")
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6's FSDP2 has no CPU")
def test_weights_spread_over_processes(tmp_path):
    """FSDP on two processes, stopped after step 4 and resumed to 6, with three samples for two processes: the losses,
    the average and the samples of one process with the whole model."""
    options = {"learning_rate": 1e-2, "optimizer": "muon", "num_samples": 3, "eval_steps": 3, "eval_num_samples": 5,
               "feature_network": "pixels", "eval_cache_dir": "cache"}  # fmt: skip
    for steps in (4, 6):
        done = sharded(tmp_path, train_batch_size=4, max_train_steps=steps, **options)
        assert done.returncode == 0, done.stderr
    assert "resuming sharded after step 4" in done.stdout
    assert list((tmp_path / "sharded" / "checkpoints" / "step-000006").glob("pytorch_model_fsdp_0/*.distcp"))
    options["eval_cache_dir"] = str(tmp_path / "cache")
    train(config(tmp_path / "whole", max_train_steps=6, **options))
    losses = [[r["loss"] for r in metrics(tmp_path / run) if "loss" in r] for run in ("sharded", "whole")]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-4)
    ours, expected = weights(tmp_path / "sharded"), weights(tmp_path / "whole")
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        # Adam's first steps are of full size whatever the gradient: rounding in small gradients is enlarged
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_shards_that_cannot_be_averaged(tmp_path):
    done = sharded(tmp_path, version=1, max_train_steps=2)
    assert done.returncode != 0 and "FSDP must be of version 2" in done.stderr
