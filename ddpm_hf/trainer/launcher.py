"""The launcher that started this process, and the check that what runs is what accelerate's configuration asks for."""

import os
from pathlib import Path

import psutil
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType

from ddpm_hf.data.checking import usable_cores

# Set by accelerate's launcher and by torch's, which accelerate uses for several processes.
ACCELERATE, TORCH = "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"
PROGRAMS = {"accelerate", "accelerate-launch", "torchrun"}
MODULES = ("accelerate.commands.", "torch.distributed.run", "torch.distributed.launch")
KINDS = {
    "ACCELERATE_USE_FSDP": ("FSDP", DistributedType.FSDP),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", DistributedType.DEEPSPEED),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", None),  # which needs models of its own
}
# The parent when the process began. A program that imports for long sets it to what it saw first.
first_parent = os.getppid()


def name() -> list[str]:
    """Return the program that started this process, as the beginning of a command line."""
    if ACCELERATE not in os.environ:
        return ["torchrun"] if TORCH in os.environ else ["python"]
    processes = os.environ.get("WORLD_SIZE", "1")
    return ["accelerate", "launch", *(["--num_processes", processes] if processes != "1" else [])]


def command_after(command: list[str]) -> list[str] | None:
    """Return the arguments of a launcher's command line, or None if the command line is another program's."""
    for place, part in enumerate(command[:4]):  # before it: the interpreter, its options, -m
        if Path(part).name in PROGRAMS or part.startswith(MODULES):
            return command[place + 1 :]
    return None


def _parent_command() -> list[str]:
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:  # it has ended, or is another user's
        return []


def parent_launcher() -> int | None:
    """Return the process number of the launcher that started this process, or None if no launcher did.

    The environment alone does not tell, because programs that a launched program starts inherit it.
    """
    if ACCELERATE not in os.environ and TORCH not in os.environ:
        return None
    if os.getppid() != first_parent:  # it has ended since
        return first_parent
    return None if command_after(_parent_command()) is None else first_parent


def threads(processes: int) -> int:
    """Return the number of threads for each of the processes of a run on CPU, where its options do not say it.

    It is OMP_NUM_THREADS if the user has set it; otherwise the processes share the cores. Both launchers set that
    variable to 1 where the user has not.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    launched = ACCELERATE in os.environ or TORCH in os.environ
    if asked.isdecimal() and int(asked) > (1 if launched else 0):
        return int(asked)
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", processes)))


def start_warning() -> str | None:
    """Return a warning about the way in which this process was started, or None."""
    if parent_launcher() == 1 and TORCH not in os.environ:
        return (
            "accelerate launch is this container's first process, which Linux does not end by SIGTERM: the run "
            "will not hear of its stop. Start one process with python, several with torchrun or accelerate launch "
            "--multi_gpu"
        )
    return None


def asked_processes() -> int:
    """Return the number of processes that accelerate's command line or configuration file asks for; 1 if unknown."""
    arguments = command_after(_parent_command())
    if ACCELERATE not in os.environ or not arguments:
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        options = launch_command_parser().parse_args(arguments[1:] if arguments[0] == "launch" else arguments)
        file = options.config_file or default_config_file
        if options.num_processes is None and Path(file).is_file() and not options.cpu:
            options.num_processes = load_config_from_file(file).num_processes
    except (Exception, SystemExit):  # of another version of accelerate: its own launcher has taken it
        return 1
    return options.num_processes or 1


def start(**options) -> Accelerator:
    """Return accelerate's `Accelerator` with these options, checked by `check_started`.

    Raises:
        ValueError: as `check_started`, or if accelerate's configuration asks for a package that is not installed.
    """
    if is_initialized() and options.get("mixed_precision") not in (None, AcceleratorState().mixed_precision):
        AcceleratorState._reset_state()  # an earlier run of this process had another precision
    try:
        accelerator = Accelerator(**options)
    except ImportError as error:
        asked = [kind for name, (kind, _) in KINDS.items() if os.environ.get(name, "").lower() == "true"]
        named = f" for {asked[0]}" if asked else ""
        raise ValueError(
            f"accelerate is configured{named}, which cannot train here: {str(error).rstrip('.')}; or write "
            "distributed_type: MULTI_GPU (or 'NO' with num_processes: 1) in accelerate's configuration file"
        ) from error
    check_started(accelerator)
    return accelerator


def check_started(accelerator) -> None:
    """Check that what runs is what accelerate's configuration asks for.

    Raises:
        ValueError: if FSDP, DeepSpeed or Megatron-LM was asked for and does not run, if fewer processes run than were
            asked for, or if the device does not have the precision that was asked for.
    """
    device, found = accelerator.device.type, accelerator.num_processes
    for variable, (kind, distributed_type) in KINDS.items():
        if os.environ.get(variable, "").lower() == "true" and accelerator.distributed_type != distributed_type:
            reason = f"accelerate runs it on accelerators only and here trains on {device}" if distributed_type else (
                "it trains models of its own only"
            )  # fmt: skip
            raise ValueError(
                f"accelerate is configured for {kind}, which cannot train here: {reason}; write distributed_type: "
                "MULTI_GPU (or 'NO' with num_processes: 1) in accelerate's configuration file"
            )
    started, asked = int(os.environ.get("WORLD_SIZE", 1)), asked_processes()
    if started > found:
        raise ValueError(
            f"{started} processes were started, but accelerate sees {found} (on a machine without accelerators): set "
            "ACCELERATE_USE_CPU=1 to train on CPU with several"
        )
    if asked > found:
        raise ValueError(
            f"accelerate's launcher was asked for {asked} processes and has started {found}: on CPU (MULTI_CPU, --cpu) "
            f"it starts several through MPI only. ACCELERATE_USE_CPU=1 torchrun --nproc_per_node {asked} starts "
            f"{asked}; num_processes: 1 in accelerate's configuration file, or --num_processes 1, asks for one"
        )
    if accelerator.mixed_precision == "fp8":
        raise ValueError("mixed_precision must be 'no', 'bf16' or 'fp16'; accelerate is configured for 'fp8'")
    if accelerator.mixed_precision == "fp16" and device == "cpu":
        raise ValueError(
            "mixed_precision must be 'bf16' or 'no' on CPU, where accelerate trains fp16 in float32; got 'fp16' (from "
            "the options, or from accelerate's configuration)"
        )
