"""Time to quality: the distance to the data over seconds of training, denoising-diffusion-pytorch's trainer at its
defaults against ours with its recipe; and what each setting of the recipe does alone.

    python training/studies/recipe.py --output_dir studies/recipe            # all; resumes where it was stopped
    python training/studies/recipe.py --only ablation --data digits

Three contenders of one architecture on the same pictures, without mirroring, on one thread each:
  peer          its `Trainer` and `Unet` at their defaults (batch 16, constant rate 1e-4, v, sigmoid schedule)
  peer, tuned   the same with our batch, rate, warm-up, decay and number of steps
  ours          `ddpm_hf.train` with the recipe
The clock runs while they train only. Distances are of the averaged weights, all sampled by one pipeline.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import MODELS, Job, distance, finish, floor, log_ticks, pictures, run_jobs, sample, write_pictures

from ddpm_hf.arguments import SuggestingParser

SAMPLES = {"digits": 2_000, "crops": 800}
SAMPLING_STEPS = 10
MUON = {"optimizer": "muon", "muon_learning_rate": 9e-3}
# Ours: what won on both sets (docs/studies.md), and each set's own batch, number of steps and timesteps.
RECIPE = {
    **MUON,
    "learning_rate": 1.5e-3,
    "lr_warmup_steps": 25,
    "loss_weighting": "uniform",
    "immiscible": True,
    "ema_power": 0.6,
}
SIZES = {
    "digits": {"train_batch_size": 64, "max_train_steps": 220, "timestep_sampling": "logit_normal"},
    "crops": {"train_batch_size": 16, "max_train_steps": 175},
}
# The ablation's ground, from which one setting is changed at a time.
GROUND = {
    "optimizer": "adamw",
    "train_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 100,
    "loss_weighting": "snr",
}
GROUND_STEPS = {"digits": 1_000, "crops": 300}
PEER_STEPS = {"digits": 4_000, "crops": 1_000}
# One setting changed at a time; of Muon, one more.
ABLATION = {
    "as it is": {},
    "target epsilon": {"prediction_type": "epsilon"},
    "target x0": {"prediction_type": "sample"},
    "schedule linear": {"ddpm_beta_schedule": "linear"},
    "schedule cosine": {"ddpm_beta_schedule": "cosine"},
    "min-SNR 5": {"min_snr_gamma": 5.0},
    "weight 1": {"loss_weighting": "uniform"},
    "weight 1, immiscible noise": {"loss_weighting": "uniform", "immiscible": True},
    "immiscible noise": {"immiscible": True},
    "offset noise 0.05": {"noise_offset": 0.05},
    "EMA of 0.995 at once": {"ema_max_decay": 0.995, "ema_inv_gamma": 1e-6},
    "EMA power 0.9": {"ema_power": 0.9},
    "no EMA": {"use_ema": False},
    "rate 1e-4": {"learning_rate": 1e-4},
    "rate 3e-4": {"learning_rate": 3e-4},
    "rate 2e-3": {"learning_rate": 2e-3},
    "rate 4e-3": {"learning_rate": 4e-3},
    "constant rate": {"lr_scheduler": "constant_with_warmup"},
    "no warm-up": {"lr_warmup_steps": 0},
    "beta2 0.999": {"adam_beta2": 0.999},
    "batch 64, a quarter of the steps": {"train_batch_size": 64, "steps": 0.25},
    "bf16": {"mixed_precision": "bf16"},
    "Muon": MUON,
    "Muon, min-SNR 5": {**MUON, "min_snr_gamma": 5.0},
    "Muon, weight 1": {**MUON, "loss_weighting": "uniform"},
    "Muon at 3e-3, weight 1": {**MUON, "muon_learning_rate": 3e-3, "loss_weighting": "uniform"},
    "Muon at 3e-3, weight 1, immiscible noise": {
        **MUON, "muon_learning_rate": 3e-3, "loss_weighting": "uniform", "immiscible": True
    },
    "Muon at 1.5e-3, weight 1": {**MUON, "muon_learning_rate": 1.5e-3, "loss_weighting": "uniform"},
    "Muon, logit-normal timesteps": {**MUON, "timestep_sampling": "logit_normal"},
    "Muon, batch 64, a quarter of the steps": {**MUON, "train_batch_size": 64, "steps": 0.25, "lr_warmup_steps": 25},
}  # fmt: skip


class Clock:
    """Seconds of training, stopped while something else is done; a distance at each of some steps."""

    def __init__(self, at: list[int], measure):
        self.at, self.measure = set(at), measure
        self.seconds, self.curve = 0.0, []
        self.started = None

    def start(self) -> None:
        self.started = time.perf_counter()

    def after(self, step: int) -> None:
        if step in self.at:
            self.seconds += time.perf_counter() - self.started
            with torch.random.fork_rng():
                self.curve.append({"step": step, "seconds": self.seconds, "distance": self.measure()})
            self.start()


def ours(options: dict, folder: Path) -> list[dict]:
    from ddpm_hf import TrainConfig
    from ddpm_hf.trainer.loop import Trainer

    data = options["data"]
    config = TrainConfig(
        train_data_dir=str(write_pictures(data, folder)), resolution=pictures(data).shape[1],
        image_channels=pictures(data).shape[3], output_dir=str(folder / f"run-{time.time_ns()}"), seed=options["seed"],
        num_cpu_threads=1, report_to="none", save_samples_steps=0, num_samples=1, ddpm_num_inference_steps=1,
        checkpointing_steps=10**9, **{**listed(MODELS[data]), **options["config"]},
    )  # fmt: skip
    trainer = Trainer(config)

    def measure() -> float:
        with trainer.parts.average.weights() as model:
            return quality(trainer.parts.pipeline(model), options)

    clock = Clock(evaluated_at(config.max_train_steps, options["points"]), measure)
    after_step, train_step = trainer._after_step, trainer._train_step

    def timed_step(batches):
        if clock.started is None:
            clock.start()
        return train_step(batches)

    def timed_after(*arguments, **named):
        clock.after(trainer.progress.step)  # before the last save
        after_step(*arguments, **named)

    trainer._train_step, trainer._after_step = timed_step, timed_after
    trainer.run()
    return clock.curve


def listed(options: dict) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def peer(options: dict, folder: Path) -> list[dict]:
    """Its Trainer as it is, in pieces: between them the average is measured."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    data, tuned = options["data"], options["config"]
    torch.set_num_threads(1)
    torch.manual_seed(options["seed"])
    diffusion = GaussianDiffusion(
        Unet(channels=pictures(data).shape[3], **MODELS[data]), image_size=pictures(data).shape[1]
    )
    steps = tuned.get("max_train_steps", options.get("steps"))
    trainer = Trainer(
        diffusion, str(write_pictures(data, folder)), augment_horizontal_flip=False, calculate_fid=False,
        save_and_sample_every=10**9, results_folder=str(folder / f"peer-{time.time_ns()}"),
        train_batch_size=tuned.get("train_batch_size", 16), train_lr=tuned.get("learning_rate", 1e-4),
    )  # fmt: skip
    if tuned:
        warm = tuned["lr_warmup_steps"]
        rate = torch.optim.lr_scheduler.LambdaLR(
            trainer.opt.optimizer,
            lambda n: min((n + 1) / (warm + 1), 1) * 0.5 * (1 + math.cos(math.pi * max(0, n - warm) / (steps - warm))),
        )
        update = trainer.ema.update
        trainer.ema.update = lambda: (update(), rate.step())

    def measure() -> float:
        from ddpm_hf.convert import from_denoising_diffusion_pytorch

        state = {
            k.removeprefix("ema_model."): v for k, v in trainer.ema.state_dict().items() if k.startswith("ema_model.")
        }
        return quality(from_denoising_diffusion_pytorch(state, image_size=pictures(data).shape[1]), options)

    clock = Clock(evaluated_at(steps, options["points"]), measure)
    for step in sorted(clock.at):
        trainer.train_num_steps = step
        clock.start()
        trainer.train()
        clock.after(step)
    return clock.curve


def evaluated_at(steps: int, points: int) -> list[int]:
    return [round(steps * (i + 1) / points) for i in range(points)]


def quality(pipe, options: dict) -> float:
    pipe.use_fast_sampler()
    return distance(sample(pipe, options["samples"], SAMPLING_STEPS), options["data"])


# -- all of it


def jobs_of(options) -> list[Job]:
    jobs = []

    def add(name: str, **job) -> None:
        job["samples"] = SAMPLES[job["data"]]
        jobs.append(Job(job, Path(options.output_dir) / f"{file_name(name)}.json"))

    for data in options.data:
        if "curves" in options.only:
            for seed in range(options.seeds):
                add(f"{data} peer {seed}", side="peer", data=data, seed=seed, config={}, steps=PEER_STEPS[data],
                    points=4)  # fmt: skip
                add(
                    f"{data} tuned {seed}",
                    side="peer",
                    data=data,
                    seed=seed,
                    config={**RECIPE, **SIZES[data]},
                    points=2,
                )
                add(
                    f"{data} ours {seed}", side="ours", data=data, seed=seed, config={**RECIPE, **SIZES[data]}, points=2
                )
        if "ablation" in options.only:
            for name, change in ABLATION.items():
                if options.setting and name not in options.setting:
                    continue
                config = {**GROUND, "max_train_steps": GROUND_STEPS[data], **change}
                config["max_train_steps"] = round(config["max_train_steps"] * config.pop("steps", 1))
                add(f"{data} ablation {name}", side="ours", data=data, seed=options.seed, config=config, points=1)
    return jobs


# -- what was found


def collect(folder: Path, data: str, kind: str) -> dict[str, dict]:
    """Answers by what follows "<data> <kind>" in the files' names."""
    start = f"{data}-{kind}-"
    return {f.stem.removeprefix(start): json.loads(f.read_text()) for f in sorted(folder.glob(f"{start}*.json"))}


def report_curves(folder: Path, data: str) -> str:
    """Markdown: a row a seed; in what share of the peer's time ours had come as near as the peer did in the end."""
    lines = [
        "| seed | peer: distance, seconds | peer, tuned | ours | ours, share of the peer's time |",
        "|---|---|---|---|---|",
    ]
    sides = [collect(folder, data, kind) for kind in ("peer", "tuned", "ours")]
    for seed in sorted(set(sides[0]) & set(sides[2])):
        ends = [side[seed]["curve"][-1] if seed in side else None for side in sides]
        reached = [point for point in sides[2][seed]["curve"] if point["distance"] <= ends[0]["distance"]]
        share = f"1/{ends[0]['seconds'] / reached[0]['seconds']:.1f}" if reached else "not reached"
        cells = [f"{end['distance']:.3f}, {end['seconds']:.0f} s" if end else "" for end in ends]
        lines.append(f"| {seed} | " + " | ".join(cells) + f" | {share} |")
    return "\n".join(lines)


def report_ablation(folder: Path, datas: list[str]) -> str:
    """Markdown: a row a setting; distance, its ratio to the recipe's, and seconds a training."""
    found = {data: collect(folder, data, "ablation") for data in datas}
    found = {data: answers for data, answers in found.items() if answers}
    lines = ["| setting | " + " | ".join(f"{data}: distance (over the recipe's), seconds" for data in found) + " |"]
    lines.append("|---|" + "---|" * len(found))
    for name in ABLATION:
        cells = []
        for answers in found.values():
            answer, base = answers.get(file_name(name)), answers.get(file_name("as it is"))
            if answer is None or base is None:
                cells.append("")
                continue
            change = answer["distance"] / base["distance"]
            cells.append(f"{answer['distance']:.3f} ({change:.2f}), {answer['curve'][-1]['seconds']:.0f} s")
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(folder: Path, datas: list[str], file: Path) -> None:
    """Distance over seconds of training, a panel a set, a line a training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(datas), 4.4), layout="constrained")
    colours = {"peer": "tab:orange", "tuned": "tab:green", "ours": "tab:blue"}
    labels = {"peer": "denoising-diffusion-pytorch, its defaults", "tuned": "it with our batch, rate and schedule",
              "ours": "ddpm_hf"}  # fmt: skip
    for axis, data in zip(figure.subplots(1, len(datas), squeeze=False)[0], datas):
        for kind, colour in colours.items():
            for number, answer in enumerate(collect(folder, data, kind).values()):
                curve = answer["curve"]
                axis.plot([p["seconds"] for p in curve], [p["distance"] for p in curve], color=colour, marker="o",
                          markersize=3.5, linewidth=1.2, label=labels[kind] if number == 0 else None)  # fmt: skip
        axis.axhline(floor(data, SAMPLES[data]), color="grey", linestyle="--", label="real pictures")
        for scale in (axis.set_xscale, axis.set_yscale):
            scale("log")
        for each in (axis.xaxis, axis.yaxis):
            log_ticks(each)
        axis.set_title(f"{data}: {SAMPLES[data]:,} samples a point")
        axis.set_xlabel("seconds of training, one thread")
        axis.set_ylabel("Fréchet distance to the data")
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def file_name(name: str) -> str:
    return name.replace(" ", "-").replace("/", "_").replace(",", "")


def main(arguments: list) -> int:
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("curves", "ablation"), default=["curves", "ablation"])
    parser.add_argument("--data", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--setting", nargs="+", choices=tuple(ABLATION), help="of the ablation. Default: all")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each contender")
    parser.add_argument("--seed", type=int, default=0, help="of the ablation's trainings")
    parser.add_argument("--at_once", type=int, default=2, help="trainings side by side, of one thread each")
    parser.add_argument("--output_dir", default="studies/recipe")
    parser.add_argument("--job", help="(one training, as JSON)")
    parser.add_argument("--file", type=Path, help="(where its answer goes)")
    options = parser.parse_args(arguments)
    if options.job:
        job = json.loads(options.job)
        with tempfile.TemporaryDirectory() as folder:
            curve = {"ours": ours, "peer": peer}[job["side"]](job, Path(folder))
        finish(options.file, {**job, "curve": curve, "distance": curve[-1]["distance"]})
        return 0
    folder = Path(options.output_dir)
    run_jobs(__file__, jobs_of(options), options.at_once)
    if "curves" in options.only:
        for data in options.data:
            print(f"\n{data}: {SAMPLES[data]:,} samples; as many real pictures {floor(data, SAMPLES[data]):.3f}\n")
            print(report_curves(folder, data))
        draw(folder, options.data, folder / "recipe.png")
    if "ablation" in options.only:
        print(f"\n{report_ablation(folder, options.data)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
