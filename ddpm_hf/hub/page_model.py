"""The pipeline as the Gradio page uses it: limits, samplers, frames and pictures.

The Spaces that `ddpm_hf.hub.publish` writes carry a copy of this file and of `page_input.py`, which it imports.
"""

import contextlib
import inspect
import math

import diffusers
import gradio as gr
import numpy as np
import torch
from diffusers.utils import make_image_grid
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ddpm_hf.hub.page_input import (
    MODES,
    image_array,
    image_levels,
    number,
    refused,
    sequence_condition,
    told_on_the_page,
    whole,
)

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
MOST_AXES = 36  # of one plot; 128 would take seconds to draw
WIDTH = 768  # the approximate width in pixels of a picture on the page


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
        self.conditions = getattr(pipe.unet.config, "condition_channels", None) or 0
        self.is_paired = pipe.config.get("condition") == "paired"
        self.condition_shape = (self.conditions, *pipe.config["condition_size"]) if self.is_paired else None
        self.completes = self._takes("inpaint")
        self.varies = self._takes("__call__", "strength")
        self.scores = self.varies and self._takes("score")
        self.is_long = not self.is_image and self._takes("__call__", "length")
        self.shape = (pipe.unet.config.in_channels, *pipe._size())
        # two channels in units of their own are no grey and transparency
        self.paints = self.is_image and self.shape[0] in ((1, 3, 4) if self.has_units else MODES)
        self.most_samples = max(1, min(MOST_SAMPLES, MOST_VALUES // math.prod(self.shape)))
        self.most_points = max(2, min(MOST_POINTS, self.most_samples))
        pipe.set_progress_bar_config(disable=True)

    def _takes(self, function: str, *arguments: str) -> bool:
        """Return True if the pipeline has a function with these arguments, and it can be given the model's condition.

        Code that a folder carries may be older than this page, and lack some.
        """
        call = getattr(type(self.pipe), function, None)
        has = inspect.signature(call).parameters if call else {}
        if self.is_paired:
            arguments += ("condition",)
        is_known = self.is_paired or self.is_told or not self.conditions
        return call is not None and is_known and set(arguments) <= set(has)

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
        eta = number("eta", eta, 0, 1)
        try:
            self.pipe.scheduler = scheduler
            if sampler in STOCK:
                self.pipe.register_to_config(log_snr_spacing=False)
            elif sampler == FAST:
                self.pipe.use_fast_sampler(steps)
            takes_eta = "eta" in inspect.signature(self.pipe.scheduler.step).parameters
            if eta and not takes_eta:
                raise refused(f"eta is an option of DDIM, and {sampler} has none: set it to 0 (got {eta})")
            with told_on_the_page():
                yield {"num_inference_steps": steps, "output_type": "np", "return_dict": False,
                       **({"eta": eta} if takes_eta else {})}  # fmt: skip
        except ValueError as error:
            raise refused(str(error)) from error
        finally:
            self.pipe.scheduler = self.own
            self.pipe.register_to_config(**self.own_settings)

    def beside(self, count: int, chosen, scale, told, told_columns, length: int | None = None) -> dict:
        """Return the options of a call for what the model is given beside a sample: class, guidance and condition.

        Args:
            count: the number of samples.
            chosen: the number of a class, EVERY_CLASS or NO_CLASS.
            scale: the scale of classifier-free guidance.
            told: the condition of all samples, an image, or the path of a .csv or .npy file.
            told_columns: the names of the columns of a .csv file, as `last_rows` takes them.
            length: the length of a series, whose condition is longer in proportion; None: as trained.

        Raises:
            gr.Error: if there is no such class, the scale is out of range, or a condition is missing or does not fit
                the model.
        """
        return {**self._class_options(count, chosen, scale), **self._condition(told, told_columns, length)}

    def _class_options(self, count: int, chosen, scale) -> dict:
        if not self.classes:
            return {}
        scale = number("guidance scale", scale, 0, MOST_SCALE)
        if chosen == EVERY_CLASS:
            labels = [index % len(self.classes) for index in range(count)]
        elif chosen == NO_CLASS:
            labels = [None] * count
        else:
            labels = [whole("class", chosen, 0, len(self.classes) - 1)] * count
        return {"class_labels": labels, "guidance_scale": scale}

    def _condition(self, told, columns, length: int | None) -> dict:
        if not self.is_paired:
            return {}
        if told is None:
            raise refused("the model is given a condition beside each sample: upload it first")
        if self.is_image:
            return {"condition": self.image(told, self.condition_shape, "condition")[None]}
        channels, own = self.condition_shape
        own = own if length is None else own * length // self.shape[1]
        return {"condition": sequence_condition(told, columns, (channels, own))[None]}

    def asked(self, count, steps, seed, *given, passes: int = 1, **larger) -> tuple:
        """Return the number of samples, the steps, the options of `beside` and the generators of the samples.

        Args:
            count, steps, seed: the fields.
            given, larger: the further arguments of `beside`.
            passes: the number of times that the sampler passes each step.

        Raises:
            gr.Error: if a field is out of range, or all of it is too much work.
        """
        count, seed = whole("samples", count, 1, self.most_samples), whole("seed", seed, 0, LARGEST_SEED)
        steps = whole("steps", steps, 1, self.own.config.num_train_timesteps)
        beside = self.beside(count, *given, **larger)
        twice = beside.get("guidance_scale", 1) != 1
        if count * steps * passes * (1 + twice) > MOST_WORK:
            raise refused(
                f"samples x steps must be at most {MOST_WORK // passes // (1 + twice):,}"
                f"{' with guidance' if twice else ''}, got {count} x {steps}: ask for fewer of either"
            )
        return count, steps, beside, [generator_of(seed, i) for i in range(count)]

    # -- what the buttons do ---------------------------------------------------------------------

    def generate(self, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0, told=None, told_columns=""):
        """Draw samples, of the chosen class if the model has classes, and with the uploaded condition if it takes one.

        Returns:
            The picture of the samples, the frames of their trajectories, the slider of the frames set to the end, and
            the picture again for the frame that the slider shows.
        """
        count, steps, beside, generators = self.asked(count, steps, seed, chosen, scale, told, told_columns)
        latents = torch.cat(
            [torch.randn((1, *self.shape), generator=g, dtype=self.pipe.unet.dtype) for g in generators]
        )
        frames = Frames(self, latents)
        with self.sampler(sampler, steps, eta) as options:
            (samples,) = self.pipe(
                batch_size=count, generator=generators, latents=latents, callback_on_step_end=frames, **beside,
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

    def interpolate(
        self, seed, other, points, steps, sampler, chosen=EVERY_CLASS, scale=1.0, told=None, told_columns=""
    ):  # fmt: skip
        """Return the picture of samples of one class that start between the first noises of two seeds."""
        seeds = [whole(name, value, 0, LARGEST_SEED) for name, value in (("seed", seed), ("other seed", other))]
        points = whole("points", points, 2, self.most_points)
        ends = [torch.randn((1, *self.shape), generator=generator_of(s, 0))[0] for s in seeds]
        latents = between(*ends, points)
        # samplers that add noise add the same noise for every point
        generators = [torch.Generator().manual_seed(seeds[0]) for _ in range(points)]
        beside = self.beside(points, 0 if chosen == EVERY_CLASS else chosen, scale, told, told_columns)
        with self.sampler(sampler, steps, 0.0) as options:
            (samples,) = self.pipe(batch_size=points, latents=latents, generator=generators, **beside, **options)
        return self.picture(self.levels(samples), columns=points)

    def longer(self, length, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0, told=None, told_columns=""):
        """Return the picture of one series of a length; of all classes, it is of the first.

        Args:
            length: the length, at least that which the model was trained on.
            steps, sampler, seed, eta, chosen, scale, told, told_columns: the fields.
        """
        trained = self.shape[1]
        length = whole("length", length, trained, MOST_TIMES * trained)
        # windows of which neighbours share a half
        _, steps, beside, generators = self.asked(
            1, steps, seed, chosen, scale, told, told_columns, length=length, passes=-(-2 * length // trained)
        )
        with self.sampler(sampler, steps, eta) as options:
            (samples,) = self.pipe(length=length, generator=generators, **beside, **options)
        return plots(samples, 1, height=3)

    # -- pictures --------------------------------------------------------------------------------

    def levels(self, samples: np.ndarray) -> np.ndarray:
        """Return images (N, H, W, C) as levels from 0 to 1; sequences are returned as they are."""
        if not self.has_units:
            return samples
        scale, shift = np.asarray(self.pipe.config["data_scale"]), np.asarray(self.pipe.config["data_shift"])
        return (((samples - shift) / scale + 1) / 2).clip(0, 1)

    def units(self, levels: np.ndarray, name: str = "data") -> np.ndarray:
        """Return images (..., C) of levels from 0 to 1 in the units of the pipeline's data, or of its "condition"."""
        scale, shift = (self.pipe.config.get(f"{name}_{part}") for part in ("scale", "shift"))
        return levels if scale is None else (levels * 2 - 1) * np.asarray(scale) + np.asarray(shift)

    def image(self, given, shape: tuple[int, ...], name: str = "data") -> np.ndarray:
        """Return an uploaded image (H, W, C) in the units of the pipeline.

        Args:
            given: an image, or the path of a picture or of a .npy file, whose numbers have these units.
            shape: the shape (C, H, W) that pictures are cropped and resized to, and that arrays must have.
            name: "data", or "condition" for the units of conditions.
        """
        if isinstance(given, str) and given.lower().endswith(".npy"):
            return image_array(given, shape)
        return self.units(image_levels(given, shape), name)

    def picture(self, samples: np.ndarray, columns: int | None = None) -> Image.Image:
        """Return one picture of images (N, H, W, C) in [0, 1], or of sequences (N, C, length)."""
        columns = columns or math.ceil(math.sqrt(len(samples)))
        return grid(samples, columns) if self.is_image else plots(samples, min(columns, 4))


def drawn_figure(figure: Figure) -> Image.Image:
    """Return a matplotlib figure as an RGB image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def grid(images: np.ndarray, columns: int) -> Image.Image:
    """Return one picture of images (N, H, W, C) in [0, 1]."""
    if images.shape[3] not in (1, 3, 4):  # the channels lie side by side
        images = np.concatenate(np.split(images, images.shape[3], axis=3), axis=2)
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[1:3]
    zoom = max(1, WIDTH // (columns * width))
    cells = [Image.new("RGB", (width * zoom + 2, height * zoom + 2), "white") for _ in range(rows * columns)]
    for cell, image in zip(cells, (images * 255).round().astype(np.uint8)):
        tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        tile = tile.convert("RGBA" if image.shape[-1] == 4 else "RGB")
        tile = tile.resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
        cell.paste(tile, (1, 1), tile if tile.mode == "RGBA" else None)
    return make_image_grid(cells, rows, columns)


def plots(sequences: np.ndarray, columns: int, height: float = 1.5) -> Image.Image:
    """Return one picture with a plot of each sequence (N, C, length).

    The channels, which may have different units, have axes of their own if there are at most `MOST_AXES` of them.
    """
    rows = math.ceil(len(sequences) / columns)
    parts = [[channel] for channel in range(sequences.shape[1])]
    parts = parts if len(parts) * len(sequences) <= MOST_AXES else [range(len(parts))]
    figure = Figure(figsize=(12, height * rows * max(1, 0.7 * len(parts)) + 0.5), layout="constrained", dpi=80)
    axes = figure.subplots(rows * len(parts), columns, sharex=True, squeeze=False)
    for first, part in enumerate(parts):
        own = axes[first :: len(parts)].ravel()
        for i, axis in enumerate(own):
            if i:
                axis.sharey(own[0])
            axis.set_visible(i < len(sequences))
            axis.grid(alpha=0.25)
            for channel in part if i < len(sequences) else ():
                axis.plot(sequences[i, channel], linewidth=0.9, color=f"C{channel % 10}")
    return drawn_figure(figure)
