"""A Gradio page to try a pipeline: samples, their way from noise, interpolation, and the visitor's own data.

Visitors complete, vary and score images and series that they upload. This file imports nothing of ddpm_hf, because the
Spaces that `ddpm_hf.hub.publish` writes carry a copy of it. For that reason it is longer than 600 lines.
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
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

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
MOST_VISITORS = 8  # the number of visitors whose frames are kept
MOST_WAITING = 32  # the number of clicks in the queue
LARGEST_REQUEST = 2**20  # bytes; the page's fields send hundreds
LARGEST_FILE = 2**23  # bytes of an uploaded image or table, on pages that complete
MOST_TIMES = 20  # the largest length of a series, in lengths that the model was trained on
PASSES = 5  # how often RePaint passes each place, for models that were not trained to complete
CLEAN_EVERY, CLEAN_AFTER = 600, 3600  # seconds after which pictures in gradio's cache, and frames, are removed
LARGEST_SEED = 2**32 - 1
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
        conditions = getattr(pipe.unet.config, "condition_channels", 0)  # of a paired condition, which the page has not
        # a picture that is uploaded has no other channels
        fits = not self.is_image or pipe.unet.config.in_channels in (1, 2, 3, 4)
        self.completes = hasattr(pipe, "inpaint") and (self.is_told or not conditions) and fits
        # code that a folder carries may be older than this page
        self.varies = "strength" in inspect.signature(type(pipe).__call__).parameters and fits and not conditions
        self.scores = self.varies and hasattr(pipe, "score")
        takes_length = "length" in inspect.signature(type(pipe).__call__).parameters
        self.is_long = not self.is_image and takes_length and not conditions
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

    def generate(self, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0):
        """Draw samples, of the chosen class if the model has classes.

        Returns:
            The picture of the samples, the frames of their trajectories, the slider of the frames set to the end, and
            the picture again for the frame that the slider shows.
        """
        count, steps, condition, generators = self.asked(count, steps, seed, chosen, scale)
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

    def interpolate(self, seed, other, points, steps, sampler, chosen=EVERY_CLASS, scale=1.0):
        """Return the picture of samples of one class that start between the first noises of two seeds."""
        seeds = [whole(name, value, 0, LARGEST_SEED) for name, value in (("seed", seed), ("other seed", other))]
        points = whole("points", points, 2, self.most_points)
        ends = [torch.randn((1, *self.shape), generator=generator_of(s, 0))[0] for s in seeds]
        latents = between(*ends, points)
        # samplers that add noise add the same noise for every point
        generators = [torch.Generator().manual_seed(seeds[0]) for _ in range(points)]
        condition = self._condition(points, 0 if chosen == EVERY_CLASS else chosen, scale)
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


class Uploads:
    """Reading of what visitors upload, in the form that the pipeline takes.

    Args:
        page: the page of the pipeline.
    """

    def __init__(self, page: Page):
        self.page = page

    def _image(self, image: Image.Image) -> np.ndarray:
        """Return an uploaded image, cut to the size of the model's, as levels from 0 to 1, (H, W, C).

        Raises:
            gr.Error: if an image cannot have the channels of the model's.
        """
        size, channels = self.page.shape[:0:-1], self.page.shape[0]  # (width, height)
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(channels)
        if mode is None:
            raise refused(f"the model's images have {channels} channels, and an uploaded image cannot have them")
        if channels in (1, 3):  # what is transparent becomes white
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        levels = np.asarray(ImageOps.fit(image.convert(mode), size), dtype=np.float32) / 255
        return levels.reshape(size[1], size[0], channels)

    def _history(self, file, columns, rows: int) -> np.ndarray:
        """Return the last rows of a table's columns, (C, rows), where missing values are NaN.

        Columns without names have the names 0, 1, 2, ...

        Raises:
            gr.Error: if the file is no table with these columns of numbers, or has fewer rows.
        """
        if not file:
            raise refused("there is no file yet: upload a CSV file first")
        channels = self.page.shape[0]
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


class Completing(Uploads):
    """Completing of the visitor's own data: the answers of one of the page's tabs."""

    def complete_image(self, drawn, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0):
        """Return the picture of the visitor's image without what was painted over, and of its completions.

        Args:
            drawn: the value of an image editor: its `background` and its `layers`, as PIL images.
            count, steps, sampler, seed, eta, chosen, scale: the fields.
        """
        if not drawn or drawn.get("background") is None:
            raise refused("there is no image yet: upload one first")
        size = self.page.shape[:0:-1]  # (width, height)
        known = self._image(drawn["background"])
        painted = np.zeros((size[1], size[0]), dtype=bool)
        for layer in drawn.get("layers") or ():
            alpha = layer.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > 0))
            painted |= np.asarray(ImageOps.fit(alpha, size, Image.Resampling.BOX)) > 0
        known = np.where(painted[..., None], np.nan, known)
        samples = self._complete(self.page.units(known), count, steps, sampler, seed, eta, chosen, scale)
        samples = self.page.levels(samples)
        shown = np.where(np.isnan(known), 0.5, known)
        return self.page.picture(np.concatenate([shown[None], samples]))

    def forecast(self, file, columns, points, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0):
        """Return the plot of the values that follow the end of columns of a table: median, 50% and 90% bands.

        Missing values among the last rows are filled too.

        Args:
            file: the path of a CSV file.
            columns: the names of the model's channels, separated by commas; empty: the first columns of numbers.
            points: the number of values after the end of the table.
            count, steps, sampler, seed, eta, chosen, scale: the fields.
        """
        points = whole("new values", points, 1, self.page.shape[1] - 1)
        history = self._history(file, columns, self.page.shape[1] - points)
        known = np.concatenate([history, np.full((self.page.shape[0], points), np.nan)], axis=1)
        samples = self._complete(known, count, steps, sampler, seed, eta, chosen, scale)
        return self._fan(known, samples)

    def _complete(self, known, count, steps, sampler, seed, eta, chosen, scale) -> np.ndarray:
        """Return completions (count, ...) of one item, which is NaN where it is unknown."""
        passes = 1 if self.page.is_told else PASSES
        count, steps, condition, generators = self.page.asked(count, steps, seed, chosen, scale, passes)
        if not np.isnan(known).any():
            raise refused("nothing is unknown yet: paint over the part to be made anew")
        jump = max(1, min(10, steps // 4))  # a chain of no more steps than a jump has would have no jumps
        with self.page.sampler(sampler, steps, eta) as options:
            (samples,) = self.page.pipe.inpaint(
                known[None], num_samples=count, generator=generators, jump_length=jump, jump_n_sample=passes,
                **condition, **options,
            )  # fmt: skip
        return samples

    def _fan(self, known: np.ndarray, samples: np.ndarray) -> Image.Image:
        """Return one picture of a sequence (C, length), NaN where unknown, and completions (N, C, length)."""
        figure = Figure(figsize=(12, 2.6 * len(known) + 0.5), layout="constrained", dpi=80)
        axes = figure.subplots(len(known), 1, sharex=True, squeeze=False).ravel()
        times = np.arange(known.shape[1])
        for channel, axis in enumerate(axes):
            quantiles = np.quantile(samples[:, channel], (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
            low_90, low_50, median, high_50, high_90 = quantiles
            axis.fill_between(times, low_90, high_90, color="tab:orange", alpha=0.25, linewidth=0, label="90% band")
            axis.fill_between(times, low_50, high_50, color="tab:orange", alpha=0.45, linewidth=0, label="50% band")
            axis.plot(times, median, color="tab:red", linewidth=1.2, label="median")
            axis.plot(times, known[channel], color="tab:blue", linewidth=1.4, label="known")
            axis.grid(alpha=0.25)
        axes[0].legend(loc="upper left", fontsize=8)
        return drawn_figure(figure)


class Varying(Uploads):
    """Variations and scores of the visitor's own data: the answers of one of the page's tabs."""

    def vary(self, given, columns, strength, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0):
        """Return the picture of the visitor's item and of variations of it (SDEdit).

        Args:
            given: an image, or the path of a CSV file with a series.
            columns: the names of the model's channels in the file, as in `Completing.forecast`.
            strength: the share of the way to noise that each variation begins at: 0 is the item, 1 ordinary sampling.
            count, steps, sampler, seed, eta, chosen, scale: the fields.
        """
        if strength is None or not 0 <= strength <= 1:
            raise refused(f"strength must lie in 0 to 1, got {strength}")
        count, steps, condition, generators = self.page.asked(count, steps, seed, chosen, scale)
        item = self._item(given, columns)
        with self.page.sampler(sampler, steps, eta) as options:
            (samples,) = self.page.pipe(
                **{"image" if self.page.is_image else "sequence": item[None]}, strength=float(strength),
                num_samples=count, generator=generators, **condition, **options,
            )  # fmt: skip
        return self.page.picture(self.page.levels(np.concatenate([item[None], samples])))

    def score(self, given, columns, seed):
        """Return the picture of the visitor's item with the map of its score, and its score in words.

        Args:
            given, columns: as in `vary`.
            seed: the field.
        """
        generators, item = [generator_of(whole("seed", seed, 0, LARGEST_SEED), 0)], self._item(given, columns)
        try:
            found = self.page.pipe.score(item[None], generator=generators)
        except ValueError as error:
            raise refused(str(error)) from error
        heat, text = np.asarray(found.maps)[0], f"Score: {float(np.asarray(found.scores)[0]):.4g}"
        return self._heat(self.page.levels(item[None])[0], heat), f"{text} (higher is stranger to the model)"

    def _item(self, given, columns) -> np.ndarray:
        """Return the uploaded item in the units of the pipeline, (H, W, C) or (C, length).

        Raises:
            gr.Error: if there is none, or it does not fit the model.
        """
        if given is None:
            raise refused("there is nothing yet: upload an image or a CSV file first")
        if self.page.is_image:
            return self.page.units(self._image(given))
        series = self._history(given, columns, self.page.shape[1])
        if not np.isfinite(series).all():
            raise refused(f"each of the last {self.page.shape[1]} rows must have a number in each column")
        return series

    def _heat(self, item: np.ndarray, heat: np.ndarray) -> Image.Image:
        """Return one picture of an item and of the map of its score, of the same shape."""
        if self.page.is_image:
            figure = Figure(figsize=(9, 4.5), layout="constrained", dpi=80)
            image, below = figure.subplots(1, 2)
            channels = item.shape[-1]
            shown = item if channels in (3, 4) else item[..., 0]
            image.imshow(shown, cmap="gray", vmin=0, vmax=1)
            figure.colorbar(below.imshow(heat.mean(axis=-1), cmap="inferno", vmin=0), ax=below, shrink=0.8)
            for axis in (image, below):
                axis.set_axis_off()
            return drawn_figure(figure)
        figure = Figure(figsize=(12, 2.6 * len(item) + 0.5), layout="constrained", dpi=80)
        ratios = {"height_ratios": [3, 1] * len(item)}
        axes = figure.subplots(2 * len(item), 1, sharex=True, squeeze=False, **ratios).ravel()
        for channel, values in enumerate(item):
            axes[2 * channel].plot(values, color="tab:blue", linewidth=1.2)
            axes[2 * channel].grid(alpha=0.25)
            axes[2 * channel + 1].fill_between(np.arange(len(values)), heat[channel], color="tab:red", linewidth=0)
        return drawn_figure(figure)


def build_page(pipe, title: str) -> gr.Blocks:
    """Return the page of a pipeline of ddpm_hf, which `serve` serves, under a title."""
    page = Page(pipe)
    total = page.own.config.num_train_timesteps
    with gr.Blocks(title=title, delete_cache=(CLEAN_EVERY, CLEAN_AFTER)) as blocks:
        gr.Markdown(f"# {title}\n{sum(p.numel() for p in pipe.unet.parameters()):,} parameters, {total:,} timesteps.")
        with gr.Row():
            most = page.most_samples
            count = gr.Number(min(9, most), label=f"Samples (1 to {most})", elem_id="count")
            steps = gr.Number(min(page.steps, total), label=f"Steps (1 to {total})", elem_id="steps")
            seed = gr.Number(0, label="Seed", elem_id="seed")
            eta = gr.Number(0, label="Eta: DDIM's noise (0 to 1)", elem_id="eta")
        sampler = gr.Dropdown([OWN, FAST, *STOCK], value=OWN, label="Sampler", elem_id="sampler")
        menu = [(name, name) for name in (EVERY_CLASS, NO_CLASS)]
        menu += [(name, number) for number, name in enumerate(page.classes)]
        shown = {"visible": bool(page.classes)}
        with gr.Row(**shown):
            chosen = gr.Dropdown(menu, value=EVERY_CLASS, label="Class", elem_id="class", **shown)
            label = "Guidance scale (1 is no guidance)"
            scale = gr.Slider(0, MOST_SCALE, 1, step=0.1, label=label, elem_id="scale", **shown)
        with gr.Tab("Samples"):
            button = gr.Button("Generate", variant="primary", elem_id="generate")
            samples = gr.Image(label="Samples", format="png", elem_id="samples")
        with gr.Tab("From noise to sample"):
            step = gr.Slider(0, 1, 1, step=1, label="Steps done", elem_id="step", interactive=False)
            frame = gr.Image(label="After these steps", format="png", elem_id="frame")
        with gr.Tab("Between two seeds"):
            with gr.Row():
                other = gr.Number(1, label="Other seed", elem_id="other")
                most = page.most_points
                points = gr.Number(min(8, most), label=f"Points (2 to {most})", elem_id="points")
            walk = gr.Button("Interpolate", variant="primary", elem_id="walk")
            first = f" {EVERY_CLASS.capitalize()}: here the first class." if page.classes else ""
            gr.Markdown(f"From the first sample of one seed to that of the other.{first}")
            line = gr.Image(show_label=False, format="png", elem_id="line")
        trajectory = gr.State(time_to_live=CLEAN_AFTER)
        fields = [count, steps, sampler, seed, eta, chosen, scale]
        if page.completes:
            _add_completing(page, fields)
        if page.varies:
            _add_varying(page, fields)
        if page.is_long:
            with gr.Tab("Longer series"):
                trained, most = page.shape[1], MOST_TIMES * page.shape[1]
                length = gr.Number(4 * trained, label=f"Length ({trained} to {most:,})", elem_id="length")
                longer = gr.Button("Generate a series", variant="primary", elem_id="longer")
                series = gr.Image(show_label=False, format="png", elem_id="series")
            longer.click(page.longer, [length, *fields[1:]], series)
        button.click(page.generate, fields, [samples, trajectory, step, frame])
        step.input(page.look_back, [trajectory, step], frame, trigger_mode="always_last", show_progress="hidden")
        walk.click(page.interpolate, [seed, other, points, steps, sampler, chosen, scale], line)
    blocks.takes_files = page.completes or page.varies
    return blocks.queue(default_concurrency_limit=1, max_size=MOST_WAITING)  # one pipeline, one sampler at a time


def _add_completing(page: Page, fields: list) -> None:
    """Add the tab in which visitors complete their own data to the page that is being built."""
    completing = Completing(page)
    with gr.Tab("Complete an image" if page.is_image else "Forecast"):
        if page.is_image:
            known = gr.ImageEditor(
                type="pil", image_mode="RGBA", sources=["upload"], transforms=(), label="Paint over what is unknown",
                brush=gr.Brush(colors=["#e0563b"], color_mode="fixed"), elem_id="known",
            )  # fmt: skip
            inputs, answer = [known], completing.complete_image
        else:
            length = page.shape[1]
            with gr.Row():
                known = gr.File(file_types=[".csv"], label="CSV file: rows are points in time", elem_id="known")
                with gr.Column():
                    text = "Columns of the channels, separated by commas (empty: the first columns of numbers)"
                    columns = gr.Textbox("", label=text, max_length=1000, elem_id="columns")
                    text = f"New values (1 to {length - 1})"
                    points = gr.Number(max(1, length // 4), label=text, elem_id="new")
            inputs, answer = [known, columns, points], completing.forecast
        button = gr.Button("Complete", variant="primary", elem_id="complete")
        completed = gr.Image(show_label=False, format="png", elem_id="completed")
        button.click(answer, inputs + fields, completed)


def _add_varying(page: Page, fields: list) -> None:
    """Add the tab in which visitors vary and score their own data to the page that is being built."""
    varying = Varying(page)
    with gr.Tab("Vary an image" if page.is_image else "Vary a series"):
        with gr.Row():
            if page.is_image:
                given = gr.Image(type="pil", image_mode="RGBA", sources=["upload"], label="Image", elem_id="given")
            else:
                text = f"CSV file, of which the last {page.shape[1]} rows are taken"
                given = gr.File(file_types=[".csv"], label=text, elem_id="given")
            with gr.Column():
                text = "Columns of the channels, separated by commas (empty: the first columns of numbers)"
                shown = {"visible": not page.is_image}
                columns = gr.Textbox("", label=text, max_length=1000, elem_id="given_columns", **shown)
                text = "Strength (0 is the item itself, 1 is a new sample)"
                strength = gr.Slider(0, 1, 0.4, step=0.05, label=text, elem_id="strength")
        vary = gr.Button("Vary", variant="primary", elem_id="vary")
        varied = gr.Image(show_label=False, format="png", elem_id="varied")
        vary.click(varying.vary, [given, columns, strength, *fields], varied)
        if page.scores:
            score = gr.Button("Score", elem_id="score")
            words = gr.Markdown("", elem_id="score_words")
            heat = gr.Image(label="Where it is strange to the model", format="png", elem_id="heat")
            score.click(varying.score, [given, columns, fields[3]], [heat, words])


class SmallRequests:
    """Middleware that refuses requests that are larger than what the page's fields send, and most uploaded files.

    Args:
        app: the application.
        takes_files: True for a page to which images or tables of at most `LARGEST_FILE` bytes may be uploaded.
    """

    def __init__(self, app, takes_files: bool = False):
        self.app, self.takes_files = app, takes_files

    async def __call__(self, scope, receive, send):
        uploads = (
            scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload")
        )
        most, received = LARGEST_FILE if uploads else LARGEST_REQUEST, 0

        async def receive_little():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= most else {"type": "http.disconnect"}

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if uploads and not self.takes_files:
            answer = PlainTextResponse("this page takes no files", status_code=403)
        elif not length.isdigit() or int(length) > most:
            answer = PlainTextResponse(f"a request may have at most {most:,} bytes", status_code=413)
        else:
            return await self.app(scope, receive_little, send)
        return await answer(scope, receive, send)


def serve(blocks: gr.Blocks, **options):
    """Serve the page with limits to what visitors send and to what is kept of it.

    Args:
        blocks: the page.
        options: further arguments of gradio's `launch`.
    """
    takes_files = getattr(blocks, "takes_files", False)
    largest = LARGEST_FILE if takes_files else LARGEST_REQUEST
    limits = {"max_file_size": largest, "state_session_capacity": MOST_VISITORS}
    middleware = [Middleware(SmallRequests, takes_files=takes_files)]
    return blocks.launch(**limits, app_kwargs={"middleware": middleware}, **options)
