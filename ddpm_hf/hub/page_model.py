"""The pipeline as the Gradio page uses it: limits, samplers, frames, pictures, and what visitors upload.

This file imports nothing of ddpm_hf, because the Spaces that `ddpm_hf.hub.publish` writes carry a copy of it.
"""

import contextlib
import inspect
import math

import diffusers
import gradio as gr
import numpy as np
import pandas as pd
import torch
from diffusers.utils import make_image_grid
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

OWN = "the pipeline's own (DDIM; DDPM at all steps)"
FAST = "fast (DPM-Solver++; 5 to 20 steps are enough)"
STOCK = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
         "DEISMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler")  # fmt: skip
EVERY_CLASS, NO_CLASS = "every class in turn", "no class"
MOST_SCALE = 10  # the largest scale of guidance
MOST_SAMPLES, MOST_POINTS = 64, 16
MOST_WORK = 16_000  # the product of samples and steps of one click; guidance doubles it, RePaint's passes multiply it
MOST_BYTES = 50_000_000  # the size of the frames that are kept for one visitor
MOST_VALUES = 2**23  # the number of values in all samples of one click, so fewer large samples are allowed
MOST_TIMES = 20  # the largest length of a series, in lengths that the model was trained on
LARGEST_SEED = 2**32 - 1
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of Pillow, by the number of channels
WIDTH = 768  # the approximate width in pixels of a picture on the page


def refused(message: str) -> gr.Error:
    """Return an error whose message the page shows; it leaves no traceback in the server's log."""
    return gr.Error(message, print_exception=False)


def whole(name: str, value, low: int, high: int) -> int:
    """Return the value of a field as a whole number.

    Raises:
        gr.Error: if it is not a whole number, or lies outside [low, high]; `name` stands in the message.
    """
    if value is None or isinstance(value, bool) or value != int(value) or not low <= value <= high:
        raise refused(f"{name} must be a whole number from {low} to {high}, got {value}")
    return int(value)


def generator_of(seed: int, index: int) -> torch.Generator:
    """Return the generator of sample `index`, which has its own so that it does not depend on the number of samples."""
    return torch.Generator().manual_seed(seed * MOST_SAMPLES + index)


def between(a: torch.Tensor, b: torch.Tensor, points: int) -> torch.Tensor:
    """Return noises on the great circle from a to b, evenly spaced; all have the norm that noise has.

    Args:
        a, b: the ends, (C, *spatial).
        points: the number of noises, with both ends.

    Returns:
        A tensor (points, C, *spatial).
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.arccos(cosine)
    weights = torch.linspace(0, 1, points, dtype=a.dtype).view(-1, *(1,) * a.ndim)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)


class Frames:
    """A callback of the pipeline's steps that keeps frames of the samples on their way from noise.

    It keeps as many frames, evenly spaced, as `MOST_BYTES` hold, and at least two.

    Args:
        page: the page.
        latents: the noise (N, C, *spatial) that the samples start from.

    Attributes:
        kept: the frames, arrays (N, ...), of 8 bits for images.
        total: the number of steps that the sampler takes.
    """

    def __init__(self, page, latents: torch.Tensor):
        self.page, self.latents, self.kept, self.total = page, latents, [], 0

    def __call__(self, pipe, step: int, timestep, tensors: dict) -> dict:
        if step == 0:
            self.total = len(pipe.scheduler.timesteps)
            self._keep(self.latents * pipe.scheduler.init_noise_sigma)
            most = max(2, MOST_BYTES // self.kept[0].nbytes)
            self.chosen = set(np.linspace(0, self.total, min(most, self.total + 1)).round().astype(int).tolist())
        if step + 1 in self.chosen:
            self._keep(tensors["latents"])
        return {}

    def _keep(self, x: torch.Tensor) -> None:
        frame = self.page.levels(self.page.pipe._decode(x, "np"))
        self.kept.append((frame * 255).round().astype(np.uint8) if self.page.is_image else frame)


class Page:
    """The pipeline as the page uses it: each public method answers a button or a slider."""

    def __init__(self, pipe):
        self.pipe, self.own = pipe, pipe.scheduler
        # use_fast_sampler sets these; code that a folder carries may be older than this page and lack some
        settings = ("num_inference_steps", "log_snr_spacing", "steps_before_fast")
        self.own_settings = {name: pipe.config[name] for name in settings if name in pipe.config}
        self.is_image = len(pipe._size()) == 2
        # images in units of their own
        self.has_units = self.is_image and pipe.config.get("data_scale") is not None
        self.steps = pipe.config.num_inference_steps or len(self.own)
        self.classes = self._class_names()
        self.is_told = pipe.config.get("condition") == "known"  # it was trained to complete
        conditions = getattr(pipe.unet.config, "condition_channels", 0)
        self.is_paired = pipe.config.get("condition") == "paired"  # then every tab but those of samples is left out
        self.condition_shape = (conditions, *pipe.config["condition_size"]) if self.is_paired else None
        # a picture that is uploaded has no other channels
        fits = not self.is_image or pipe.unet.config.in_channels in (1, 2, 3, 4)
        alone = self.is_told or not conditions  # the model needs nothing beside the item
        self.completes = hasattr(pipe, "inpaint") and alone and fits
        # code that a folder carries may be older than this page
        self.varies = "strength" in inspect.signature(type(pipe).__call__).parameters and fits and alone
        self.scores = self.varies and hasattr(pipe, "score")
        takes_length = "length" in inspect.signature(type(pipe).__call__).parameters
        self.is_long = not self.is_image and takes_length and alone
        self.shape = (pipe.unet.config.in_channels, *pipe._size())
        self.most_samples = max(1, min(MOST_SAMPLES, MOST_VALUES // math.prod(self.shape)))
        self.most_points = max(2, min(MOST_POINTS, self.most_samples))
        pipe.set_progress_bar_config(disable=True)

    def _class_names(self) -> list[str]:
        """Return the names of the model's classes by their numbers; none for a model without classes."""
        number = getattr(self.pipe.unet.config, "num_class_embeds", None) or 0
        names = {int(key): str(name) for key, name in (self.pipe.config.get("id2label") or {}).items()}
        return [names.get(key, f"class {key}") for key in range(number)]

    # -- from fields to arrays -------------------------------------------------------------------

    @contextlib.contextmanager
    def sampler(self, sampler: str, steps, eta):
        """Give the pipeline a sampler until the block ends; the block gets the options of a call.

        Raises:
            gr.Error: if the sampler or the call cannot take a value.
        """
        scheduler = self.own
        if sampler in STOCK:
            scheduler = getattr(diffusers, sampler).from_config(self.own.config)
        elif sampler not in (OWN, FAST):
            raise refused(f"sampler must be one of the list, got {sampler}")
        steps = whole("steps", steps, 1, self.own.config.num_train_timesteps)
        if eta is None or not 0 <= eta <= 1:
            raise refused(f"eta must lie in 0 to 1, got {eta}")
        try:
            self.pipe.scheduler = scheduler
            if sampler in STOCK:
                self.pipe.register_to_config(log_snr_spacing=False)
            elif sampler == FAST:
                self.pipe.use_fast_sampler(steps)
            takes_eta = "eta" in inspect.signature(self.pipe.scheduler.step).parameters
            if eta and not takes_eta:
                raise refused(f"eta is an option of DDIM, and {sampler} has none: set it to 0 (got {eta})")
            yield {"num_inference_steps": steps, "output_type": "np", "return_dict": False,
                   **({"eta": float(eta)} if takes_eta else {})}  # fmt: skip
        except ValueError as error:
            raise refused(str(error)) from error
        finally:
            self.pipe.scheduler = self.own
            self.pipe.register_to_config(**self.own_settings)

    def _condition(self, count: int, chosen, scale) -> dict:
        """Return the options of a call for the chosen class and the scale of guidance.

        Args:
            count: the number of samples.
            chosen: the number of a class, EVERY_CLASS or NO_CLASS.
            scale: the scale of classifier-free guidance.

        Raises:
            gr.Error: if there is no such class, or the scale is out of range.
        """
        if not self.classes:
            return {}
        if scale is None or not 0 <= scale <= MOST_SCALE:
            raise refused(f"guidance scale must lie in 0 to {MOST_SCALE}, got {scale}")
        if chosen == EVERY_CLASS:
            labels = [index % len(self.classes) for index in range(count)]
        elif chosen == NO_CLASS:
            labels = [None] * count
        else:
            labels = [whole("class", chosen, 0, len(self.classes) - 1)] * count
        return {"class_labels": labels, "guidance_scale": float(scale)}

    def _told(self, given, columns) -> dict:
        """Return the options of a call for an uploaded condition, one for all samples; none for other models.

        Args:
            given: an image, or the path of a .csv or .npy file.
            columns: the names of the columns of a .csv file, as `last_rows` takes them.

        Raises:
            gr.Error: if there is no condition, or it does not fit the model.
        """
        if not self.is_paired:
            return {}
        if given is None:
            raise refused("the model is given a condition beside each sample: upload it first")
        if self.is_image:
            levels, scale = image_levels(given, self.condition_shape), self.pipe.config.get("condition_scale")
            shift = self.pipe.config.get("condition_shift")
            units = levels if scale is None else (levels * 2 - 1) * np.asarray(scale) + np.asarray(shift)
            return {"condition": units[None]}
        return {"condition": sequence_condition(given, columns, self.condition_shape)[None]}

    def asked(self, count, steps, seed, chosen, scale, passes: int = 1) -> tuple:
        """Return the number of samples, the steps, the options of the class and the generators of the samples.

        Args:
            count, steps, seed, chosen, scale: the fields.
            passes: the number of times that the sampler passes each step.

        Raises:
            gr.Error: if a field is out of range, or all of it is too much work.
        """
        count, seed = whole("samples", count, 1, self.most_samples), whole("seed", seed, 0, LARGEST_SEED)
        steps = whole("steps", steps, 1, self.own.config.num_train_timesteps)
        condition = self._condition(count, chosen, scale)
        twice = condition.get("guidance_scale", 1) != 1
        if count * steps * passes * (1 + twice) > MOST_WORK:
            raise refused(
                f"samples x steps must be at most {MOST_WORK // passes // (1 + twice):,}"
                f"{' with guidance' if twice else ''}, got {count} x {steps}: ask for fewer of either"
            )
        return count, steps, condition, [generator_of(seed, i) for i in range(count)]

    # -- what the buttons do ---------------------------------------------------------------------

    def generate(self, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0, given=None, columns=""):
        """Draw samples, of the chosen class if the model has classes, and with the uploaded condition if it takes one.

        Returns:
            The picture of the samples, the frames of their trajectories, the slider of the frames set to the end, and
            the picture again for the frame that the slider shows.
        """
        count, steps, condition, generators = self.asked(count, steps, seed, chosen, scale)
        condition |= self._told(given, columns)
        latents = torch.cat(
            [torch.randn((1, *self.shape), generator=g, dtype=self.pipe.unet.dtype) for g in generators]
        )
        frames = Frames(self, latents)
        with self.sampler(sampler, steps, eta) as options:
            (samples,) = self.pipe(
                batch_size=count, generator=generators, latents=latents, callback_on_step_end=frames, **condition,
                **options,
            )  # fmt: skip
        last = len(frames.kept) - 1
        label = "Steps done" if last == frames.total else f"Frame ({last + 1} kept of {frames.total} steps)"
        picture = self.picture(self.levels(samples))
        slider = gr.Slider(0, last, last, step=1, label=label, interactive=True)
        return picture, np.stack(frames.kept, axis=1), slider, picture

    def look_back(self, trajectory, step):
        """Return the picture of the samples in the kept frame number `step`."""
        if trajectory is None:
            raise refused("there is no trajectory yet: generate samples first")
        step = whole("step", step, 0, trajectory.shape[1] - 1)
        samples = trajectory[:, step]
        return self.picture(samples / 255.0 if samples.dtype == np.uint8 else samples)

    def interpolate(self, seed, other, points, steps, sampler, chosen=EVERY_CLASS, scale=1.0, given=None, columns=""):
        """Return the picture of samples of one class that start between the first noises of two seeds."""
        seeds = [whole(name, value, 0, LARGEST_SEED) for name, value in (("seed", seed), ("other seed", other))]
        points = whole("points", points, 2, self.most_points)
        ends = [torch.randn((1, *self.shape), generator=generator_of(s, 0))[0] for s in seeds]
        latents = between(*ends, points)
        # samplers that add noise add the same noise for every point
        generators = [torch.Generator().manual_seed(seeds[0]) for _ in range(points)]
        condition = self._condition(points, 0 if chosen == EVERY_CLASS else chosen, scale)
        condition |= self._told(given, columns)
        with self.sampler(sampler, steps, 0.0) as options:
            (samples,) = self.pipe(batch_size=points, latents=latents, generator=generators, **condition, **options)
        return self.picture(self.levels(samples), columns=points)

    def longer(self, length, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0):
        """Return the picture of one series of a length; of all classes, it is of the first.

        Args:
            length: the length, at least that which the model was trained on.
            steps, sampler, seed, eta, chosen, scale: the fields.
        """
        trained = self.shape[1]
        length = whole("length", length, trained, MOST_TIMES * trained)
        # windows of which neighbours share a half
        _, steps, condition, generators = self.asked(1, steps, seed, chosen, scale, passes=-(-2 * length // trained))
        with self.sampler(sampler, steps, eta) as options:
            (samples,) = self.pipe(length=length, generator=generators, **condition, **options)
        return self._plots(samples, 1, height=2.5 * self.shape[0])

    # -- pictures --------------------------------------------------------------------------------

    def levels(self, samples: np.ndarray) -> np.ndarray:
        """Return images (N, H, W, C) as levels from 0 to 1; sequences are returned as they are."""
        if not self.has_units:
            return samples
        scale, shift = np.asarray(self.pipe.config["data_scale"]), np.asarray(self.pipe.config["data_shift"])
        return (((samples - shift) / scale + 1) / 2).clip(0, 1)

    def units(self, levels: np.ndarray) -> np.ndarray:
        """Return images (..., C) of levels from 0 to 1 in the units of the pipeline."""
        if not self.has_units:
            return levels
        scale, shift = np.asarray(self.pipe.config["data_scale"]), np.asarray(self.pipe.config["data_shift"])
        return (levels * 2 - 1) * scale + shift

    def picture(self, samples: np.ndarray, columns: int | None = None) -> Image.Image:
        """Return one picture of images (N, H, W, C) in [0, 1], or of sequences (N, C, length)."""
        columns = columns or math.ceil(math.sqrt(len(samples)))
        return self._grid(samples, columns) if self.is_image else self._plots(samples, min(columns, 4))

    def _grid(self, images: np.ndarray, columns: int) -> Image.Image:
        if images.shape[3] not in (1, 2, 3, 4):  # the channels lie side by side
            images = np.concatenate(np.split(images, images.shape[3], axis=3), axis=2)
        rows = math.ceil(len(images) / columns)
        height, width = images.shape[1:3]
        zoom = max(1, WIDTH // (columns * width))
        cells = [Image.new("RGB", (width * zoom + 2, height * zoom + 2), "white") for _ in range(rows * columns)]
        for cell, image in zip(cells, (images * 255).round().astype(np.uint8)):
            tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            tile = tile.convert("RGBA" if image.shape[-1] in (2, 4) else "RGB")
            tile = tile.resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
            cell.paste(tile, (1, 1), tile if tile.mode == "RGBA" else None)
        return make_image_grid(cells, rows, columns)

    def _plots(self, sequences: np.ndarray, columns: int, height: float = 1.5) -> Image.Image:
        rows = math.ceil(len(sequences) / columns)
        figure = Figure(figsize=(12, height * rows + 0.5), layout="constrained", dpi=80)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for i, axis in enumerate(axes):
            axis.set_visible(i < len(sequences))
            axis.grid(alpha=0.25)
            for channel in sequences[i] if i < len(sequences) else ():
                axis.plot(channel, linewidth=0.9)
        return drawn_figure(figure)


def drawn_figure(figure: Figure) -> Image.Image:
    """Return a matplotlib figure as an RGB image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def image_levels(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """Return an uploaded image, cut to the size of a shape (C, H, W), as levels from 0 to 1, (H, W, C).

    Raises:
        gr.Error: if an image cannot have these channels.
    """
    size, channels = shape[:0:-1], shape[0]  # (width, height)
    mode = MODES.get(channels)
    if mode is None:
        raise refused(f"the model's images have {channels} channels, and an uploaded image cannot have them")
    if channels in (1, 3):  # what is transparent becomes white
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    levels = np.asarray(ImageOps.fit(image.convert(mode), size), dtype=np.float32) / 255
    return levels.reshape(size[1], size[0], channels)


def last_rows(file, columns, shape: tuple[int, int]) -> np.ndarray:
    """Return the last rows of a table's columns in a shape (C, rows), where missing values are NaN.

    Columns without names have the names 0, 1, 2, ...

    Args:
        file: the path of a CSV file.
        columns: the names of the columns, separated by commas; empty: the first columns of numbers.
        shape: the number of columns, and the number of rows.

    Raises:
        gr.Error: if the file is no table with these columns of numbers, or has fewer rows.
    """
    channels, rows = shape
    if not file:
        raise refused("there is no file yet: upload a CSV file first")
    try:
        table = pd.read_csv(file, header=None, dtype=str, comment="#", skipinitialspace=True)
    except (ValueError, OSError) as error:  # pandas' own errors, and those of the encoding, are ValueErrors
        raise refused(f"the file cannot be read as CSV: {error}") from error
    numbers = table.apply(pd.to_numeric, errors="coerce")
    has_names = numbers.iloc[0].isna().all()  # the first line may name the columns
    labels = [str(name).strip() for name in (table.iloc[0] if has_names else table.columns)]
    numbers = numbers[int(has_names) :].to_numpy(dtype=np.float64).T
    names = [name.strip() for name in (columns or "").split(",") if name.strip()]
    names = names or [name for name, row in zip(labels, numbers) if np.isfinite(row).any()][:channels]
    missing = [name for name in names if name not in labels]
    if missing:
        raise refused(f"the file has no column {', '.join(missing)}; its columns are {', '.join(labels[:20])}")
    if len(names) != channels:
        raise refused(f"the file must give as many columns of numbers as the model has channels, {channels}, got "
                      f"{len(names)}")  # fmt: skip
    values = numbers[[labels.index(name) for name in names]]
    if values.shape[1] < rows:
        raise refused(f"the columns must have at least {rows} rows before the new values, got {values.shape[1]}")
    history = values[:, -rows:]
    if not np.isfinite(history).any(axis=1).all():
        raise refused(f"each of the columns {', '.join(names)} must have a number among its last {rows} rows")
    return np.where(np.isfinite(history), history, np.nan)


def sequence_condition(file, columns, shape: tuple[int, int]) -> np.ndarray:
    """Return the sequence of an uploaded file, which must have a shape (C, length).

    Args:
        file: the path of a .csv file, whose last rows are taken, or of a .npy file.
        columns: the names of the columns of a .csv file, as `last_rows` takes them.

    Raises:
        gr.Error: if the file cannot be read, or has another shape or numbers that are not finite.
    """
    if not str(file).lower().endswith(".npy"):
        series = last_rows(file, columns, shape)
    else:
        try:
            series = np.atleast_2d(np.load(file, allow_pickle=False))
        except Exception as error:  # NumPy raises many kinds
            raise refused(f"the file cannot be read as .npy: {error}") from error
    if series.shape != shape or series.dtype.kind not in "iuf" or not np.isfinite(series).all():
        raise refused(
            f"the condition must be finite numbers of the shape {shape}, got {series.dtype} of the "
            f"shape {series.shape}{' with NaN or infinity' if series.shape == shape else ''}"
        )
    return series
