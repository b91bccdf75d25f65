"""The place of a short chain's steps: the error of DPM-Solver++ by schedule, spacing and number of calls.

    python training/studies/spacing.py        # prints the table of docs/studies.md, in seconds

The model is the best possible one for Gaussian data, whose exact solution is known, so that the error is the sampler's
alone. Each direction of the data follows the sampler for itself; the error is the root mean square, over directions of
deviations 0.1 (fine detail) to 32 (the brightness that 32 x 32 x 3 pixels share), of the relative error of their
deviation in the samples.
"""

import math

import torch
from diffusers import DPMSolverMultistepScheduler

from ddpm_hf import GaussianScheduler
from ddpm_hf.pipeline import FAST, log_snr_timesteps
from ddpm_hf.scheduler import BETA_SCHEDULES

DEVIATIONS = (0.1, 0.3, 1.0, 3.0, 10.0, 32.0)
CALLS = (4, 6, 8, 10, 15, 20)


def even_timesteps(alphas_cumprod: torch.Tensor, steps: int) -> list[int]:
    """The stock spacing "trailing": evenly in t, from T-1."""
    total = len(alphas_cumprod)
    return [i * total // steps - 1 for i in range(steps, 0, -1)]


def error(own: GaussianScheduler, chain: list[int], deviations=DEVIATIONS) -> float:
    """The error of the fast sampler at the timesteps `chain`. Its steps are linear in x_T, so one x_T tells it."""
    fast = DPMSolverMultistepScheduler.from_config(own.config, **FAST)
    fast.set_timesteps(timesteps=chain)
    deviation = torch.tensor([deviations], dtype=torch.float64)
    x = torch.ones_like(deviation)
    for t in fast.timesteps:
        abar = float(own.alphas_cumprod[int(t)])
        epsilon = math.sqrt(1 - abar) / (deviation**2 * abar + 1 - abar) * x
        x0 = deviation**2 * math.sqrt(abar) / (deviation**2 * abar + 1 - abar) * x
        x = fast.step(math.sqrt(abar) * epsilon - math.sqrt(1 - abar) * x0, t, x).prev_sample
    abar = float(own.alphas_cumprod[-1])
    exact = deviation / (deviation**2 * abar + 1 - abar).sqrt()
    return (x / exact - 1).square().mean().sqrt().item()


def main() -> None:
    print("| schedule | steps |", " | ".join(map(str, CALLS)), "|")
    print("|---|---|" + "---|" * len(CALLS))
    for schedule in BETA_SCHEDULES:
        for zero_snr in (False, True):
            own = GaussianScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, clip_sample=False)
            for spacing, timesteps in (("fast", log_snr_timesteps), ("even in t", even_timesteps)):
                errors = [error(own, timesteps(own.alphas_cumprod, n)) for n in CALLS]
                name = schedule + ", zero SNR" * zero_snr
                print(f"| {name} | {spacing} |", " | ".join(f"{e:.3f}" for e in errors), "|")


if __name__ == "__main__":
    main()
