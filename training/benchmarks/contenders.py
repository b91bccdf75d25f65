"""The contenders of the benchmark, each in a process of its own, so that memory is each one's own and as it comes:
denoising-diffusion-pytorch, ddpm_hf, and stock diffusers."""

import contextlib
import itertools
import multiprocessing
import os
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf import DDPMPipeline, GaussianScheduler, TrainConfig
from ddpm_hf.convert import from_denoising_diffusion_pytorch
from ddpm_hf.trainer.loop import Trainer
from ddpm_hf.trainer.memory import keep_freed_memory

WIDTH = {"dim": 64, "dim_mults": (1, 2, 4, 8)}


@dataclass(frozen=True)
class Task:
    """One thing that one side does.

    Args:
        side: "peer", "ours" or "stock".
        what: "call" (the model), "step" (of training) or "sample" (a batch, from noise to pixels).
        shape: of a batch, (B, C, H, W) or (B, C, length).
        dtype: "float32" or "bfloat16": of the weights, in a training step of autocast; "float16": the peer, by autocast
            and with a scaled loss, as its option `amp` does.
        weights: the peer's state, so that all have the same.
        steps: of sampling.
        keep_memory: freed memory stays with the process; else as it comes (our training step does what our trainer
            does: keeps it, or with checkpointing gives it back).
    """

    side: str
    what: str
    shape: tuple
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    compiled: bool = False  # by torch.compile: in a call the blocks, in a step the whole model
    checkpointing: bool = False
    weights: str | None = None
    steps: int = 1
    keep_memory: bool = False

    @property
    def device_type(self) -> str:
        """Without its number: "cuda" of "cuda:1"."""
        return torch.device(self.device).type


# -- the three sides


def peer_diffusion(task: Task):
    """denoising-diffusion-pytorch's diffusion and U-Net, as it comes."""
    from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D, Unet, Unet1D

    torch.manual_seed(0)
    if len(task.shape) == 4:
        model = Unet(channels=task.shape[1], **WIDTH)
        diffusion = GaussianDiffusion(model, image_size=task.shape[-1], sampling_timesteps=task.steps)
    else:
        model = Unet1D(channels=task.shape[1], **WIDTH)
        diffusion = GaussianDiffusion1D(model, seq_length=task.shape[-1])
    if task.weights:
        diffusion.load_state_dict(torch.load(task.weights, weights_only=True))
    return diffusion.to(task.device)


def our_model(task: Task):
    """Our U-Net with the peer's weights, as the trainer has it."""
    state = torch.load(task.weights, weights_only=True)
    size = {"image_size" if len(task.shape) == 4 else "seq_length": task.shape[-1]}
    return from_denoising_diffusion_pytorch(state, **size).unet.train().to(task.device).channels_last()


def stock_model(task: Task) -> UNet2DModel:
    """diffusers' own U-Net with 7% more operations than ours at the same size (4% at 32²)."""
    torch.manual_seed(0)
    model = UNet2DModel(
        task.shape[-1], task.shape[1], task.shape[1], block_out_channels=(64, 128, 192, 256),
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
    )  # fmt: skip
    return model.to(task.device)


# -- what they do


def autocast(task: Task) -> torch.autocast:
    """A context, or a decorator."""
    narrow = task.dtype != "float32"
    return torch.autocast(task.device_type, getattr(torch, task.dtype) if narrow else torch.bfloat16, enabled=narrow)


def build_call(task: Task) -> Callable[[], torch.Tensor]:
    """One call of the model without gradient, giving the prediction."""
    x = torch.randn(task.shape, generator=torch.Generator().manual_seed(1)).to(task.device)
    t = torch.full((len(x),), 500, device=task.device)
    if task.side == "peer":
        model = peer_diffusion(task).model
        return autocast(task)(lambda: model(x, t).float())
    model = our_model(task) if task.side == "ours" else stock_model(task)
    dtype = getattr(torch, task.dtype)
    model = model.to(dtype)
    if task.side == "ours":
        model.time_embed.float()  # as from_pretrained(torch_dtype=...) keeps it
    if task.compiled:
        model.compile_repeated_blocks()
    return lambda: model(x.to(dtype), t).sample.float()


def build_step(task: Task) -> Callable[[], None]:
    """One training step: loss, gradient, clipping, optimizer, and the average of the weights as each side has it."""
    x = (torch.rand(task.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(task.device)
    if task.side == "peer":
        return _peer_step(peer_diffusion(task), (x + 1) / 2, task)
    return _our_step(our_model(task) if task.side == "ours" else stock_model(task), x, task)


def _peer_step(diffusion, images: torch.Tensor, task: Task) -> Callable[[], None]:
    """Return a training step as the peer's `Trainer.train` makes it, without its data."""
    from ema_pytorch import EMA

    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10)
    scaler = torch.amp.GradScaler(task.device_type, enabled=task.dtype == "float16")
    forward = autocast(task)(lambda: diffusion(images))

    def step() -> None:
        scaler.scale(forward()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update()

    return step


def _our_step(model, x: torch.Tensor, task: Task) -> Callable[[], None]:
    """A step of our trainer, without its data; a stock model by the same loop."""
    config = TrainConfig(
        output_dir="nothing is written", report_to="none", train_batch_size=len(x), num_cpu_threads=task.threads,
        mixed_precision="bf16" if task.dtype == "bfloat16" else "no", gradient_checkpointing=task.checkpointing,
        learning_rate=1e-4, lr_scheduler="constant",
    )  # fmt: skip
    # as by `accelerate launch`: --cpu, --dynamo_backend inductor
    launched = {"ACCELERATE_USE_CPU": str(task.device == "cpu"), "ACCELERATE_DYNAMO_BACKEND": "no"}
    if task.compiled:
        launched["ACCELERATE_DYNAMO_BACKEND"] = "inductor"
    AcceleratorState._reset_state(reset_partial_state=True)  # of another task of this process
    with patch_environment(**launched):
        trainer = Trainer(config, dataset=list(x.cpu()), model=model)
        trainer._start()
    trainer._prepare()
    batches = itertools.repeat(x)

    def step() -> None:
        trainer._train_step(batches)
        trainer.progress.step += 1

    return step


def build_sample(task: Task) -> Callable[[], None]:
    """A batch of images, from noise to pixels: the peer's DDIM at `steps`, our pipeline with its fast sampler."""
    if task.side == "peer":
        diffusion = peer_diffusion(task)
        return autocast(task)(lambda: diffusion.sample(batch_size=task.shape[0]))
    model = our_model(task).to(getattr(torch, task.dtype))
    model.time_embed.float()
    pipe = DDPMPipeline(model.eval(), GaussianScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.use_fast_sampler()
    return lambda: pipe(batch_size=task.shape[0], num_inference_steps=task.steps, output_type="pt")


BUILD = {"call": build_call, "step": build_step, "sample": build_sample}


# -- processes


def alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each contender returns, called in turn so that the machine's moods fall on all."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Contender:
    """A task in a process of its own, which waits until it is asked.

    Raises:
        RuntimeError: the process failed; its traceback is in the message.
    """

    def __init__(self, task: Task):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, task), daemon=True)
        self.process.start()
        theirs.close()
        self._ask(None)  # built

    def _ask(self, question: str | None):
        if question:
            self.pipe.send(question)
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"a contender ended with {self.process.exitcode} (killed for memory?)") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def seconds(self) -> float:
        """Return the seconds of one run."""
        return self._ask("seconds")

    def peak(self) -> int:
        """Bytes above what the libraries take, at most, since it was built: weights, gradients, optimizer and all."""
        return self._ask("peak")

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


def _serve(pipe, task: Task) -> None:
    try:
        torch.set_num_threads(task.threads)
        if task.keep_memory and task.device == "cpu" and not (task.side == "ours" and task.what == "step"):
            keep_freed_memory()
        before = _resident("VmRSS")
        run = BUILD[task.what](task)
        if task.what != "step":
            run = torch.no_grad()(run)
        _reset_peak(task.device)
        if task.what != "sample":
            run()  # optimizers make their state in the first step
        answers = {
            "seconds": lambda: timed(run, task.device),
            "peak": lambda: torch.cuda.max_memory_allocated() if task.device != "cpu" else _resident("VmHWM") - before,
        }
        pipe.send(True)
        while True:
            pipe.send(answers[pipe.recv()]())
    except EOFError:  # the other side is done
        return
    except Exception:
        pipe.send(traceback.format_exc())


def _resident(field: str) -> int:
    """Bytes of this process by /proc/self/status: VmRSS (now) or VmHWM (the peak); without /proc the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))


def _reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 as such: CUDA's convolutions have TF32's ten bits otherwise, fewer than outputs are compared by."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def outputs(tasks: list[Task]) -> list[torch.Tensor]:
    """Return the outputs of the calls, in this process."""
    with torch.no_grad(), exact_products():
        return [build_call(task)() for task in tasks]


WAITS = {
    "cpu": ("aten::_local_scalar_dense",),
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}


def host_waits(task: Task) -> int:
    """How often the host waits for the device in one run, by the profiler; on CPU: reads of a number from a tensor."""
    from torch.profiler import ProfilerActivity, profile

    run = BUILD[task.what](task)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if task.device_type == "cuda" else [])]
    run()
    with profile(activities=activities) as found:
        run()
    return sum(event.name in WAITS[task.device_type] for event in found.events())


def save_weights(task: Task, folder: Path) -> Task:
    """The task with a file of the weights that every side begins with."""
    file = folder / f"{'x'.join(map(str, task.shape[1:]))}.pt"
    if not file.exists():
        torch.save(peer_diffusion(task).state_dict(), file)
    return replace(task, weights=str(file))


def operations(build: Callable[..., torch.nn.Module], shape: tuple) -> float:
    """Floating-point operations of one call of a model at its defaults; a training step has three times as many."""
    with torch.device("meta"):
        model = build(sample_size=shape[-1])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))
    return float(counter.get_total_flops())
