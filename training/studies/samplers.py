"""Which sampler comes as near to the data as DDIM at 250 of 1000 steps, with the fewest calls of the model.

    python training/studies/samplers.py --output_dir studies/samplers        # all; resumes where it was stopped

Trains a model of each set of pictures (`common.py`), then measures samplers at numbers of calls, for seeds of x_T: the
Fréchet distance of their samples. Writes samplers.json, samplers.png and a table.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from common import MODELS, Job, distance, finish, floor, log_ticks, pictures, run_jobs, sample, write_pictures
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ddpm_hf import DDPMPipeline, GaussianScheduler
from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.trainer.memory import keep_freed_memory

COMMON = {"learning_rate": 1e-3, "lr_warmup_steps": 100, "min_snr_gamma": 5.0}
TRAINING = {
    "digits": {"max_train_steps": 3_000, "train_batch_size": 64, **COMMON},
    "crops": {"max_train_steps": 3_500, "train_batch_size": 16, **COMMON},
}
COUNTS = {"digits": 5_000, "crops": 5_000}  # samples of a measurement
DPM = {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}
DEIS = {"timestep_spacing": "trailing", "solver_order": 2, "lower_order_final": False}
# name -> class, options over the model's own schedule, which is kept
SAMPLERS = {
    "DDIM": (GaussianScheduler, {"sampler": "ddim"}),
    "DDIM, linspace": (GaussianScheduler, {"sampler": "ddim", "timestep_spacing": "linspace"}),
    "DDIM, leading": (GaussianScheduler, {"sampler": "ddim", "timestep_spacing": "leading"}),
    "DDIM, no clipping": (GaussianScheduler, {"sampler": "ddim", "clip_sample": False}),
    "DDPM": (GaussianScheduler, {"sampler": "ddpm"}),
    "fast": (DPMSolverMultistepScheduler, {**DPM, "log_snr_spacing": True}),
    "fast, no clipping": (DPMSolverMultistepScheduler, {**DPM, "log_snr_spacing": True, "thresholding": False}),
    "fast, order 3": (DPMSolverMultistepScheduler, {**DPM, "log_snr_spacing": True, "solver_order": 3}),
    "fast, Heun": (DPMSolverMultistepScheduler, {**DPM, "log_snr_spacing": True, "solver_type": "heun"}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {**DPM}),
    "DPM++ 2M, no clipping": (DPMSolverMultistepScheduler, {**DPM, "thresholding": False}),
    "DPM++ 2M, linspace": (DPMSolverMultistepScheduler, {**DPM, "timestep_spacing": "linspace"}),
    "DPM++ 2M, leading": (DPMSolverMultistepScheduler, {**DPM, "timestep_spacing": "leading"}),
    "DPM++ 2M, last step short": (DPMSolverMultistepScheduler, {**DPM, "final_sigmas_type": "sigma_min"}),
    "DPM++ 2M, Heun": (DPMSolverMultistepScheduler, {**DPM, "solver_type": "heun"}),
    "DPM++ 2M, stochastic": (DPMSolverMultistepScheduler, {**DPM, "algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 3M": (DPMSolverMultistepScheduler, {**DPM, "solver_order": 3}),
    "UniPC 2": (UniPCMultistepScheduler, {**DPM, "solver_order": 2}),
    "UniPC 3": (UniPCMultistepScheduler, {**DPM, "solver_order": 3}),
    "DEIS 2": (DEISMultistepScheduler, {**DEIS, "lower_order_final": True}),
    "DEIS 2, all second order": (DEISMultistepScheduler, {**DEIS}),
    "DEIS 2, no clipping": (DEISMultistepScheduler, {**DEIS, "thresholding": False}),
    "DEIS 2, leading": (DEISMultistepScheduler, {**DEIS, "timestep_spacing": "leading"}),
    "DEIS 3, all third order": (DEISMultistepScheduler, {**DEIS, "solver_order": 3}),
}

# Hours on two cores; what was run of it is in docs/studies.md.
PLAN = [f"{'|'.join(SAMPLERS)}:5,10:0", "fast:5,8,10,12,15,20:0,1,2", "DDIM:5,10,20,50,100,250,1000:0,1,2"]


def build(pipe: DDPMPipeline, name: str) -> DDPMPipeline:
    kind, options = SAMPLERS[name]
    options = dict(options)
    spacing = options.pop("log_snr_spacing", False)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    pipe.register_to_config(log_snr_spacing=spacing)
    return pipe


def train_model(options: dict, folder: Path) -> dict:
    from ddpm_hf import TrainConfig, train

    data = options["data"]
    result = train(
        TrainConfig(
            train_data_dir=str(write_pictures(data, folder)),
            resolution=pictures(data).shape[1],
            image_channels=pictures(data).shape[3],
            output_dir=str(folder / f"model-{data}"),
            report_to="none",
            num_cpu_threads=1,
            num_samples=64,
            logging_steps=100,
            save_samples_steps=0,
            **{name: list(v) if isinstance(v, tuple) else v for name, v in MODELS[data].items()},
            **TRAINING[data],
        )  # fmt: skip
    )
    return {"pipeline": str(result.pipeline_dir)}


def measure(options: dict) -> dict:
    keep_freed_memory()
    pipe = build(DDPMPipeline.from_pretrained(options["pipeline"]), options["sampler"])
    images = sample(pipe, options["count"], options["steps"], options["seed"])
    return {"distance": distance(images, options["data"])}


# -- what was found


def collect(folder: Path, counts: dict[str, int]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """data -> sampler -> steps -> distances, one a seed; of that many samples, because the distance depends on it."""
    found: dict = {}
    for file in sorted(folder.glob("*.json")):
        answer = json.loads(file.read_text())
        if "sampler" in answer and answer["count"] == counts[answer["data"]]:
            by_steps = found.setdefault(answer["data"], {}).setdefault(answer["sampler"], {})
            by_steps.setdefault(answer["steps"], []).append(answer["distance"])
    return found


def table(samplers: dict[str, dict[int, list[float]]]) -> str:
    """Return a Markdown table with a row for each sampler and a column for each number of calls.

    A cell is the mean over the seeds; where there are several, another row has half the range of their distances.
    """
    steps = sorted({n for by_steps in samplers.values() for n in by_steps})
    lines = ["| sampler | " + " | ".join(map(str, steps)) + " |", "|---|" + "---|" * len(steps)]
    for name in [name for name in SAMPLERS if name in samplers]:
        found = [samplers[name].get(n, []) for n in steps]
        means = [f"{statistics.mean(values):.3f}" if values else "" for values in found]
        ranges = [f"{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else "" for values in found]
        lines.append(f"| {name} | " + " | ".join(means) + " |")
        if any(ranges):
            lines.append(f"| {name}, half the range of the seeds | " + " | ".join(ranges) + " |")
    return "\n".join(lines)


def draw(found: dict, counts: dict[str, int], file: Path) -> None:
    """Distance over model calls, a panel a set, the samplers that were tried at two numbers of calls or more."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(found), 4.6), layout="constrained")
    for axis, (data, samplers) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        ticks = set()
        axis.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
        for name in [name for name in SAMPLERS if len(samplers.get(name, {})) >= 2]:
            steps = sorted(samplers[name])
            ticks |= set(steps)
            values = [statistics.mean(samplers[name][n]) for n in steps]
            axis.plot(steps, values, marker="o", markersize=4, linewidth=1.2, label=name)
        if 250 in samplers.get("DDIM", {}):
            axis.axhline(statistics.mean(samplers["DDIM"][250]), color="black", linestyle=":", label="DDIM, 250 calls")
        axis.axhline(floor(data, counts[data]), color="grey", linestyle="--", label="real pictures")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(sorted(ticks), map(str, sorted(ticks)))
        axis.minorticks_off()
        log_ticks(axis.yaxis)
        axis.set_title(f"{data}: {counts[data]:,} samples a point")
        axis.set_xlabel("model calls a sample")
        axis.set_ylabel("Fréchet distance to the data")
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(file, dpi=100)


def parse_plan(plan: str) -> tuple[list[str], list[int], list[int]]:
    """ "DDIM|UniPC 2:5,10,20:0,1,2" -> samplers, steps, seeds."""
    names, steps, seeds = plan.split(":")
    return names.split("|"), [int(n) for n in steps.split(",")], [int(n) for n in seeds.split(",")]


def main(arguments: list) -> int:
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--plan", nargs="+", default=PLAN, help="samplers:steps:seeds, e.g. 'DDIM|UniPC 2:5,10:0,1,2'")
    parser.add_argument("--samples", type=int, help=f"of a measurement. Default: {COUNTS}")
    parser.add_argument("--at_once", type=int, default=2, help="measurements side by side, of one thread each")
    parser.add_argument("--output_dir", default="studies/samplers")
    parser.add_argument("--job", help="(one measurement, as JSON)")
    parser.add_argument("--file", type=Path, help="(where its answer goes)")
    options = parser.parse_args(arguments)
    folder = Path(options.output_dir)
    if options.job:
        job = json.loads(options.job)
        finish(options.file, {**job, **(measure(job) if "sampler" in job else train_model(job, options.file.parent))})
        return 0
    models = {data: Job({"data": data}, folder / f"model-{data}.json") for data in options.data}
    run_jobs(__file__, list(models.values()), options.at_once)
    counts = {data: options.samples or count for data, count in COUNTS.items()}
    jobs = []
    for plan in options.plan:
        names, steps, seeds = parse_plan(plan)
        for seed in seeds:
            for name in names:
                for n in steps:
                    for data in options.data:
                        key = f"{data} {name} {n} {seed} {counts[data]}".replace(" ", "-").replace(",", "")
                        job = {"data": data, "sampler": name, "steps": n, "seed": seed, "count": counts[data],
                               "pipeline": models[data].result()["pipeline"]}  # fmt: skip
                        jobs.append(Job(job, folder / f"{key}.json"))
    run_jobs(__file__, jobs, options.at_once)
    found = collect(folder, counts)
    (folder / "samplers.json").write_text(json.dumps({"distances": found, "samples": counts}, indent=1))
    for data, samplers in found.items():
        print(f"\n{data}: {counts[data]:,} samples; as many real pictures {floor(data, counts[data]):.3f}\n")
        print(table(samplers))
    draw(found, counts, folder / "samplers.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
