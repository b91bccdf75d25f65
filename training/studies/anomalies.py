"""Anomalies: does a model that was trained without one class of digits find the items of that class?

    python training/studies/anomalies.py --classes 0 1 8 --steps 500

Half of scikit-learn's digits, without the class, train a small model. The other half is scored: the items of the class
are the anomalies. The area under the ROC curve (ROC-AUC) of both scores is printed beside those of two baselines on the
same data: the distance to the nearest training item, and the error of a reconstruction by principal components (PCA).
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from ddpm_hf import DDPMPipeline, GaussianScheduler, UNet2D


def train(x: torch.Tensor, steps: int, seed: int) -> DDPMPipeline:
    """Return a pipeline that was trained on images (N, 1, 8, 8) in [0, 1]; its weights are averaged over the steps."""
    torch.manual_seed(seed)
    unet = UNet2D(8, in_channels=1, dim=16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8)
    scheduler = GaussianScheduler()
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(steps):
        x0 = 2 * x[torch.randint(len(x), (64,))] - 1
        t, noise = torch.randint(scheduler.num_train_timesteps, (len(x0),)), torch.randn_like(x0)
        prediction = unet(scheduler.add_noise(x0, noise, t), t).sample
        loss = (prediction - scheduler.target(x0, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(unet)
    pipe = DDPMPipeline(average.module.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def areas(left_out: int, steps: int, seed: int = 0) -> dict[str, float]:
    """Return the ROC-AUC of each score for one class, by the name of the score."""
    digits = load_digits()
    x, classes = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], digits.target
    train_items = x[::2][classes[::2] != left_out]
    x, is_anomaly = x[1::2], classes[1::2] == left_out
    pipe = train(train_items, steps, seed)
    flat, known = x.flatten(1).numpy(), train_items.flatten(1).numpy()
    pca = PCA(20).fit(known)
    scores = {
        method: pipe.score(x, method, generator=torch.Generator().manual_seed(seed), batch_size=512).scores
        for method in ("reconstruction", "denoising")
    }
    scores["nearest"] = torch.cdist(x.flatten(1), train_items.flatten(1)).amin(dim=1).numpy()
    scores["PCA"] = np.square(flat - pca.inverse_transform(pca.transform(flat))).sum(axis=1)
    return {name: roc_auc_score(is_anomaly, values) for name, values in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)), help="Classes that are left out.")
    parser.add_argument("--steps", type=int, default=500, help="Training steps of each model.")
    arguments = parser.parse_args()
    for left_out in arguments.classes:
        found = areas(left_out, arguments.steps)
        print(left_out, *(f"{name} {area:.3f}" for name, area in found.items()), flush=True)


if __name__ == "__main__":
    main()
