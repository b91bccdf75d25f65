"""The values of options that are chosen from a list, where options and what they choose between can both import them.

Nothing is imported here: the command line lists the values without loading torch or diffusers. `unet.py` and
`scheduler.py` ship inside saved pipelines and have their own lists, and diffusers and accelerate have theirs; a test
compares them with these.
"""

# of ddpm_hf.unet
NORMS = ("rms", "group")
TIME_EMBEDDINGS = ("sinusoidal", "learned_fourier", "random_fourier")
# of ddpm_hf.scheduler
BETA_SCHEDULES = ("linear", "cosine", "sigmoid")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
PREDICTION_ALIASES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
# of diffusers (without piecewise_constant, which needs rules that have no option here) and of accelerate
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")

LOSS_WEIGHTINGS = ("snr", "uniform")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")
MASK_STRATEGIES = ("random", "blocks", "forecast", "mixed")
# of samples in files, and of the model's calls that make them
IMAGE_FORMATS = ("png", "webp", "npz", "npy", "parquet")
SEQUENCE_FORMATS = ("npy", "csv", "parquet")
SAMPLING_PRECISIONS = ("no", "fp16", "bf16")
