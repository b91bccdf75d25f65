"""The contenders of the benchmark: denoising-diffusion-pytorch, ddpm_hf and stock diffusers.

Each runs in a process of its own, as it comes to a user, so that its memory is its own.
"""

import contextlib
import gc
import itertools
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from diffusers import UNet2DModel
from diffusers.utils import logging
from measures import (
    device_work,
    exact_products,
    host_seconds,
    host_waits,
    reset_peak,
    resident,
    seconds_a_run,
)
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf import DDPMPipeline, GaussianScheduler, TrainConfig
from ddpm_hf.convert import from_denoising_diffusion_pytorch
from ddpm_hf.data.loading import Batch
from ddpm_hf.pipeline import GraphedModel
from ddpm_hf.pipeline.graphs import CudaBackend
from ddpm_hf.trainer import device as device_settings
from ddpm_hf.trainer.batches import Batches
from ddpm_hf.trainer.compiling import Plan, Runner
from ddpm_hf.trainer.loop import Trainer
from ddpm_hf.trainer.memory import keep_freed_memory

WIDTH = {"dim": 64, "dim_mults": (1, 2, 4, 8)}
FORMS = ("eager", "inductor", "graphs", "graphs + inductor")
TRAINING = ("step", "folder")  # tasks that train
# Runs before anything is measured: a step is captured as a graph in its fourth.
WARM_UP = 6


@dataclass(frozen=True)
class Task:
    """One thing that one side does.

    Attributes:
        side: "peer", "ours" or "stock".
        what: "call" (the model), "step" (one training step on a batch that is always the same), "folder" (one on the
            next batch of a folder of pictures, read as each side's trainer reads them) or "sample" (a batch, from noise
            to pixels).
        shape: the shape of a batch, (B, C, H, W) or (B, C, length).
        dtype: "float32" or "bfloat16": the type of the weights; in a training step that of autocast. "float16":
            autocast and a scaled loss, as the peer's option `amp` does.
        form: one of `FORMS`; graphs need a card. For the peer, "graphs + inductor" is
            torch.compile(mode="reduce-overhead") of its model, and there is no other form but "eager".
        weights: a file of the peer's weights, with which every side begins.
        pictures: the folder of a task "folder".
        steps: calls of the model in a sample.
        keep_memory: let the process keep freed memory. Otherwise memory is as it comes; our training step does what
            our trainer does, which keeps it, or with checkpointing gives it back (release_memory).
    """

    side: str
    what: str
    shape: tuple
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    form: str = "eager"
    checkpointing: bool = False
    weights: str | None = None
    pictures: str | None = None
    steps: int = 1
    keep_memory: bool = False

    @property
    def device_type(self) -> str:
        """The device without its number: "cuda" for "cuda:1"."""
        return torch.device(self.device).type


# -- the three sides


def peer_diffusion(task: Task):
    """Build denoising-diffusion-pytorch's diffusion and U-Net, as it comes."""
    from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D, Unet, Unet1D

    torch.manual_seed(0)
    if len(task.shape) == 4:
        model = Unet(channels=task.shape[1], **WIDTH)
        diffusion = GaussianDiffusion(model, image_size=task.shape[-1], sampling_timesteps=task.steps)
    else:
        model = Unet1D(channels=task.shape[1], **WIDTH)
        diffusion = GaussianDiffusion1D(model, seq_length=task.shape[-1])
    if task.weights:
        diffusion.load_state_dict(torch.load(task.weights, map_location="cpu", weights_only=True))
    return diffusion.to(task.device)


def our_model(task: Task):
    """Build our U-Net with the peer's weights, as the trainer has it."""
    state = torch.load(task.weights, map_location="cpu", weights_only=True)
    size = {"image_size" if len(task.shape) == 4 else "seq_length": task.shape[-1]}
    return from_denoising_diffusion_pytorch(state, **size).unet.train().to(task.device).channels_last()


def stock_model(task: Task) -> UNet2DModel:
    """Build diffusers' own U-Net, with 7% more operations than ours at the same size (4% at 32 x 32)."""
    torch.manual_seed(0)
    model = UNet2DModel(
        task.shape[-1], task.shape[1], task.shape[1], block_out_channels=(64, 128, 192, 256),
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
    )  # fmt: skip
    return model.to(task.device)


# -- what they do


def autocast(task: Task) -> torch.autocast:
    """Return the autocast of the task, as a context or a decorator."""
    narrow = task.dtype != "float32"
    return torch.autocast(task.device_type, getattr(torch, task.dtype) if narrow else torch.bfloat16, enabled=narrow)


def compile_peer(diffusion, task: Task) -> None:
    """Compile the peer's model in place where the task says so."""
    if "inductor" in task.form:
        diffusion.model.compile(mode="reduce-overhead")


def build_call(task: Task) -> Callable[[], torch.Tensor]:
    """Build one call of the model without gradient; it returns the prediction."""
    x = torch.randn(task.shape, generator=torch.Generator().manual_seed(1)).to(task.device)
    t = torch.full((len(x),), 500, device=task.device)
    if task.side == "peer":
        diffusion = peer_diffusion(task)
        compile_peer(diffusion, task)
        return autocast(task)(lambda: diffusion.model(x, t).float())
    model = our_model(task) if task.side == "ours" else stock_model(task)
    dtype = getattr(torch, task.dtype)
    model = model.to(dtype)
    if task.side == "ours":
        model.time_embed.float()  # as from_pretrained(torch_dtype=...) keeps it
    if "inductor" in task.form:
        model.compile_repeated_blocks()
    if "graphs" not in task.form:
        return lambda: model(x.to(dtype), t).sample.float()
    graphed = GraphedModel().prepare(model, x.device)

    def call() -> torch.Tensor:
        return graphed(x.to(dtype), t).float()

    call.obstacle = lambda: graphed.reason
    return call


def build_step(task: Task) -> Callable[[], Iterable[torch.Tensor]]:
    """Build one training step: loss, gradient, clipping, optimizer, and the average of the weights as each side has it.

    It returns the loss and the gradient's norm, as tensors on the device. With `pictures` it reads its batch too.
    """
    x = (torch.rand(task.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(task.device)
    if task.side == "peer":
        images = (x + 1) / 2
        batches = itertools.repeat(images) if task.pictures is None else _peer_batches(task)
        return _peer_step(peer_diffusion(task), batches, task)
    return _our_step(our_model(task) if task.side == "ours" else stock_model(task), x, task)


def _peer_batches(task: Task) -> Iterator[torch.Tensor]:
    """Yield the batches of pictures as the peer's `Trainer` reads them, without end."""
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset

    data = Dataset(task.pictures, task.shape[-1], augment_horizontal_flip=True)
    loader = DataLoader(data, task.shape[0], shuffle=True, pin_memory=True, num_workers=multiprocessing.cpu_count())
    while True:
        for images in loader:
            yield images.to(task.device)


def _peer_step(diffusion, batches: Iterator[torch.Tensor], task: Task) -> Callable[[], Iterable[torch.Tensor]]:
    """Return a training step as the peer's `Trainer.train` makes it."""
    from ema_pytorch import EMA

    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10)
    compile_peer(diffusion, task)
    scaler = torch.amp.GradScaler(task.device_type, enabled=task.dtype == "float16")
    forward = autocast(task)(lambda: diffusion(next(batches)))

    def step() -> tuple:
        loss = forward()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update()
        return loss.detach(), norm

    return step


def _our_step(model, x: torch.Tensor, task: Task) -> Callable[[], Iterable[torch.Tensor]]:
    """Return a step of our trainer, on x or on the pictures; a stock model is trained by the same loop."""
    data = {} if task.pictures is None else {"train_data_dir": task.pictures, "resolution": [task.shape[-1]]}
    config = TrainConfig(
        output_dir="nothing is written", report_to="none", train_batch_size=len(x), num_cpu_threads=task.threads,
        mixed_precision="bf16" if task.dtype == "bfloat16" else "no", gradient_checkpointing=task.checkpointing,
        release_memory=task.checkpointing,
        learning_rate=1e-4, lr_scheduler="constant", compile="inductor" if task.form == "inductor" else "none",
        random_flip=task.pictures is not None, **data,
    )  # fmt: skip
    settings = contextlib.ExitStack()  # they end with the step
    settings.enter_context(device_settings.settings(config))
    launched = {"ACCELERATE_USE_CPU": str(task.device_type == "cpu"), "ACCELERATE_DYNAMO_BACKEND": "no"}
    AcceleratorState._reset_state(reset_partial_state=True)  # of another task of this process
    with patch_environment(**launched):
        trainer = Trainer(config, dataset=None if data else list(x.cpu()), model=model)
        trainer._start()
    trainer._prepare()
    if "graphs" in task.form:
        # the trainer itself would compile after some replays, in a run that is long enough
        plan = Plan(graphs=True, inductor="now" if "inductor" in task.form else "never")
        trainer.runner = Runner(trainer.training_step, plan, graphs_of(task))
    trainer.batches = Batches(trainer.parts) if data else Repeated(x)

    def step() -> torch.Tensor:
        values = trainer._train_step(trainer.batches)
        trainer.progress.step += 1
        return values

    step.settings = settings
    step.obstacle = lambda: None if trainer.runner.graphs is None or trainer.runner.graphs.replaying else "not captured"
    return step


def graphs_of(task: Task) -> CudaBackend:
    """Return what captures the steps of a task."""
    return CudaBackend(torch.device(task.device))


class Repeated:
    """The trainer's batches, always the same."""

    def __init__(self, x: torch.Tensor):
        self.batch = Batch(x, skipped=[])

    def __next__(self) -> Batch:
        return self.batch

    def launched(self) -> None:
        """The trainer says that a step has been launched; nothing is to be done."""


def build_sample(task: Task) -> Callable[[], object]:
    """Build a batch of images, from noise to pixels: the peer's DDIM at `steps`, our pipeline by its fast sampler."""
    if task.side == "peer":
        diffusion = peer_diffusion(task)
        return autocast(task)(lambda: diffusion.sample(batch_size=task.shape[0]))
    model = our_model(task).to(getattr(torch, task.dtype))
    model.time_embed.float()
    pipe = DDPMPipeline(model.eval(), GaussianScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.use_fast_sampler()
    if "graphs" in task.form:
        pipe.use_cuda_graphs()

    def sample():
        return pipe(batch_size=task.shape[0], num_inference_steps=task.steps, output_type="pt")

    sample.obstacle = lambda: pipe._graphs.reason if pipe._graphs else None
    return sample


BUILD = {"call": build_call, "step": build_step, "folder": build_step, "sample": build_sample}


# -- processes


class Contender:
    """A process that builds tasks and measures them when it is asked.

    Args:
        task: the first task, which is built at once; None: `build` is called later.

    Raises:
        RuntimeError: from every method, if the process failed; the message has its traceback.
        TimeoutError: from `answer`, if the process took too long; it is ended.
    """

    def __init__(self, task: Task | None = None):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))  # no daemon: those may have no loaders
        self.process.start()
        theirs.close()
        if task is not None:
            self.ask("build", task)

    def tell(self, question: str, *arguments) -> None:
        """Ask for a method of `Served`, without waiting for its result."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: `answer` says why
            self.pipe.send((question, arguments))

    def answer(self, until: float | None = None):
        """Wait for a result, at most until this time of `time.monotonic`, and return it."""
        if until is not None and not self.pipe.poll(max(0.0, until - time.monotonic())):
            self.process.terminate()
            raise TimeoutError("the time was over")
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"a contender ended with {self.process.exitcode} (killed for memory?)") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def ask(self, question: str, *arguments, until: float | None = None):
        """Ask for a method of `Served` and return its result."""
        self.tell(question, *arguments)
        return self.answer(until)

    def seconds(self, runs: int = 1) -> float:
        """Return the seconds of a run when so many are queued."""
        return self.ask("seconds", runs)

    def peak(self) -> int:
        """Return the peak of memory since the task was built, in bytes above what the libraries take: weights,
        gradients, optimizer and activations."""
        return self.ask("peak")

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


class Served:
    """The work of a contender's process: it holds one task at a time."""

    def build(self, task: Task, warm_up: int = 1) -> list | None:
        """Build a task in place of the one before, and run it a few times.

        Args:
            task: the task.
            warm_up: runs before the first measurement, one at least; optimizers make their state in the first step.

        Returns:
            For a call, the first prediction, as an array; for a training step, [loss, norm of the gradient] of each
            run; None for a sample.

        Raises:
            RuntimeError: graphs were asked for, and are not used.
        """
        self.drop()
        torch.set_num_threads(task.threads)
        if task.keep_memory and task.device == "cpu" and not (task.side == "ours" and task.what in TRAINING):
            keep_freed_memory()
        self.task, self.before = task, resident("VmRSS")
        torch.manual_seed(0)
        run = BUILD[task.what](task)
        self.run = run if task.what in TRAINING else torch.no_grad()(run)
        reset_peak(task.device)
        if task.what == "sample":  # nothing is made at first use that would take long, but graphs
            warm_up = int(task.device_type == "cuda")
        results = [self.run() for _ in range(warm_up)]
        obstacle = getattr(run, "obstacle", lambda: None)()
        if task.device_type == "cuda" and "graphs" in task.form and obstacle is not None:
            raise RuntimeError(f"no graph is replayed: {obstacle}")
        if task.what == "call":
            return results[0].cpu().numpy()
        return [[float(value) for value in result] for result in results] if task.what in TRAINING else None

    def drop(self) -> None:
        """Forget the task and free its memory."""
        self.run = self.task = None
        gc.collect()
        if "torch._dynamo" in sys.modules:
            sys.modules["torch._dynamo"].reset()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def seconds(self, runs: int = 1) -> float:
        """Return the seconds of a run when so many are queued."""
        return seconds_a_run(self.run, self.task.device, runs)

    def host(self) -> float:
        """Return the seconds until a run returns that finds the device idle."""
        return host_seconds(self.run, self.task.device)

    def device_work(self, runs: int) -> tuple[float, float] | None:
        """Return the seconds of device work of a run, and the number of kernels; None on CPU."""
        return device_work(self.run, self.task.device, runs)

    def peak(self) -> int:
        """Return the peak of memory since the task was built, in bytes."""
        if self.task.device_type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident("VmHWM") - self.before


def _serve(pipe) -> None:
    logging.set_verbosity_error()  # a pipeline warns of the cast that `build_call` undoes for one module
    served = Served()
    try:
        while True:
            question, arguments = pipe.recv()
            pipe.send(getattr(served, question)(*arguments))
    except EOFError:  # the other side is done
        return
    except Exception:
        pipe.send(traceback.format_exc())


def outputs(tasks: list[Task]) -> list[torch.Tensor]:
    """Return the outputs of the calls, in this process."""
    with torch.no_grad(), exact_products():
        return [build_call(task)() for task in tasks]


def waits_of(task: Task) -> int:
    """Return how often the host waits for the device in one run of a task, in this process."""
    return host_waits(BUILD[task.what](task), task.device)


def save_weights(task: Task, folder: Path) -> Task:
    """Return the task with a file of the weights that every side begins with."""
    file = folder / f"{'x'.join(map(str, task.shape[1:]))}.pt"
    if not file.exists():
        torch.save(peer_diffusion(replace(task, device="cpu")).state_dict(), file)
    return replace(task, weights=str(file))


def operations(build: Callable[..., torch.nn.Module], shape: tuple) -> float:
    """Return the floating-point operations of one call of a model at its defaults; a training step has three times as
    many."""
    with torch.device("meta"):
        model = build(sample_size=shape[-1])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))
    return float(counter.get_total_flops())
