"""What tests share: small models, the closed-form denoiser of Gaussian data, and runs of programs."""

import contextlib
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# One thread each, for two processes of tests side by side: several threads of one wait for each other by spinning, and
# take many times as long where cores are busy. Before torch is imported, and for the programs that tests run.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from cards import CARD, DEVICES  # noqa: E402
from diffusers.utils import logging  # noqa: E402

ROOT = Path(__file__).parents[1]
# No test begins after so many seconds, and the report of those before is printed. A signal would not do that: a run of
# training that is tested takes it as a request to save.
END = time.monotonic() + float(os.environ.get("DDPM_HF_TEST_SECONDS", "inf"))


def pytest_runtest_teardown(item):
    if time.monotonic() > END:
        item.session.shouldstop = "the time of DDPM_HF_TEST_SECONDS is over"


@pytest.fixture(autouse=True)
def fixed_seed_and_threads():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device of this machine; on a card, products and convolutions of float32 are exact, not in TF32."""
    device = torch.device(request.param)
    if device.type == "cpu":
        yield device
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    CARD.show()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield device
    CARD.hide()
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def card_where_asked_for(request):
    """Show the graphics card to tests with the marker `card`; all others run as on a machine without one."""
    if CARD.is_there and request.node.get_closest_marker("card"):
        CARD.show()
        yield
        torch.cuda.synchronize()
        CARD.hide()
    else:
        yield


@pytest.fixture(autouse=True)
def own_accelerator():
    """Accelerate keeps one state a process; runs of different precision need one each."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def diffusers_log(caplog):
    """What diffusers' loggers say, which they keep from the root logger."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


@pytest.fixture
def double():
    """Float64 as the default type during a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def exact_abar(scheduler):
    """(T,) alphas_cumprod in float64, from the configuration; the scheduler publishes them as float32."""
    betas = torch.tensor(scheduler.config["trained_betas"], dtype=torch.float64)
    return torch.cumprod(1 - betas, 0)


def optimal_prediction(scheduler, x_t, t, mean, std):
    """The best prediction at x_t where x0 ~ N(mean, std^2), as epsilon, x0 or v: all are linear in x_t."""
    abar = exact_abar(scheduler)[t].item()
    total = std**2 * abar + 1 - abar  # variance of x_t
    residual = x_t - abar**0.5 * mean
    x0 = mean + std**2 * abar**0.5 / total * residual
    epsilon = (1 - abar) ** 0.5 / total * residual
    kind = scheduler.config.prediction_type
    return {"sample": x0, "epsilon": epsilon, "v_prediction": abar**0.5 * epsilon - (1 - abar) ** 0.5 * x0}[kind]


def load_program(name):
    """A program as a module: ddpm_hf/commands/<name>.py, or training/<name>.py, whose folder's other files can then be
    imported, as when it is run."""
    if (ROOT / "ddpm_hf" / "commands" / f"{name}.py").is_file():
        return importlib.import_module(f"ddpm_hf.commands.{name}")
    file = ROOT / "training" / f"{name}.py"
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"{file.stem}_script", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their types there
    spec.loader.exec_module(module)
    return module


def run_program(*arguments, cwd, **environment):
    """A Python program in a fresh process, with this repository's package."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a launcher's workers too
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


class Process:
    """What the evaluation needs of accelerate's `Accelerator`, for processes that are threads of a test.

    Gathering is as strict as gloo's: tensors of other types or shapes are an error.
    """

    device, print = torch.device("cpu"), staticmethod(lambda *_: None)

    def __init__(self, index: int, table: list, barrier: threading.Barrier):
        self.process_index, self.num_processes, self.table, self.barrier = index, len(table), table, barrier
        self.is_main_process = self.is_local_main_process = index == 0

    def _exchange(self, mine):
        self.table[self.process_index] = mine
        self.barrier.wait()
        everyone = list(self.table)
        self.barrier.wait()
        return everyone

    def gather(self, tensor):
        everyone = self._exchange(tensor)
        assert len({(x.dtype, x.shape) for x in everyone}) == 1, "gathered tensors differ in type or shape"
        return torch.cat(everyone)

    def gather_for_metrics(self, objects, use_gather_object):
        return [each for part in self._exchange(objects) for each in part]

    def wait_for_everyone(self):
        self._exchange(None)

    @contextlib.contextmanager
    def local_main_process_first(self):
        yield


def simulated(processes: int, work) -> list:
    """The results of work(accelerator) in so many processes, simulated by threads."""
    table, barrier = [None] * processes, threading.Barrier(processes, timeout=60)

    def start(index):
        try:
            return work(Process(index, table, barrier))
        except BaseException:
            barrier.abort()  # the others would wait for ever
            raise

    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(start, index) for index in range(processes)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]
