"""Options of the run folder, and those that hold for a run as a whole."""

from dataclasses import dataclass

from ddpm_hf import scope
from ddpm_hf.rules import either, option, whole_number

COMPILERS = ("auto", "none", "inductor", "graphs")


@dataclass
class RunOptions:
    """The run folder, and what holds for the run as a whole."""

    _argument_group_name = "Run"

    output_dir: str = option(
        "runs/run", "Run folder. Running the same command again resumes the run in it.", changeable=True
    )
    seed: int = option(0, "Seed for initial weights, data order, noise and samples.", whole_number(0))
    resume_from_checkpoint: str = option(
        "latest", "Checkpoint to resume from: 'latest' takes the newest one and stops if it is damaged, 'latest-valid' "
        "takes the newest undamaged one.", either("latest", "latest-valid"), changeable=True
    )  # fmt: skip
    continue_from: str | None = option(
        None, "Folder of a run to continue in another output_dir. Its checkpoint gives weights, their average, "
        "optimizer, step count and place in the data; its config.yaml gives the options that you do not give. All "
        "options but those of the model may differ. max_train_steps is the total, and the schedule of the learning "
        "rate covers the remaining steps.", none="a new run",
    )  # fmt: skip
    continue_checkpoint: str = option(
        "newest", "Checkpoint to continue from: 'newest', 'best' (the one of the best evaluation), or the folder of a "
        "checkpoint, such as step-001000.", applies=scope.CONTINUED,
    )  # fmt: skip
    init_from: str | None = option(
        None, "Fine-tuning: begin with the weights of this pipeline, a folder, a repo on the Hub, or a model-*.pt file "
        "of denoising-diffusion-pytorch. The options of the model and of the noise schedule are taken from it; data, "
        "size and classes may differ. The size (resolution, sequence_length) is that of the pipeline if none is "
        "given.", none="new weights",
    )  # fmt: skip
    dry_run: bool = option(
        False, "Print the resolved options, the size of the model and the data found, read every item, list those that "
        "cannot be read, and stop.", changeable=True
    )  # fmt: skip
    num_cpu_threads: int | None = option(
        None, "Number of threads of each process when training on CPU.",
        whole_number(1, 1024),
        none="OMP_NUM_THREADS where it is set by the user, else the cores of this machine divided among its processes",
        changeable=True,
    )  # fmt: skip
    compile: str = option(
        "auto", "How training steps run. 'none': operation by operation; 'inductor': the model compiled by "
        "torch.compile; 'graphs': whole steps captured as CUDA graphs, with inductor inside if the run is long enough "
        "to make up for its compilation; 'auto': as 'graphs' on a card, as 'none' elsewhere.",
        either(*COMPILERS), changeable=True,
    )  # fmt: skip
    deterministic: bool = option(
        False, "Use only deterministic algorithms, so that also on a card a resumed run is bit for bit the run that "
        "was not stopped. This costs time."
    )  # fmt: skip
