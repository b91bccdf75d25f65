"""`DDPMPipeline`: images."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm_hf.pipeline.guidance import class_names, number_of_classes
from ddpm_hf.pipeline.interpolating import InterpolatingPipeline
from ddpm_hf.pipeline.outputs import IMAGE_MODES, ImageOutput
from ddpm_hf.pipeline.pairs import condition_settings, image_tensor
from ddpm_hf.pipeline.rules import ClassLabels, Generators, check_parts
from ddpm_hf.pipeline.scoring import ScoringPipeline
from ddpm_hf.pipeline.units import checked_levels, checked_units, from_units, to_units


class DDPMPipeline(InterpolatingPipeline, ScoringPipeline):
    """Unconditional generation of images.

    Args:
        unet: a `UNet2D`, or a stock `UNet2DModel`. A `UNet2D` is given channels-last weights, for speed.
        scheduler: a `GaussianScheduler`, or a stock scheduler.
        num_inference_steps: number of steps of calls that give none; None: every training step.
        log_snr_spacing, steps_before_fast: settings of `use_fast_sampler`, which sets them.
        id2label: names of the classes, by their numbers, of a model with classes; None: they have no names.
        condition: "known" for a model that is also given the known values and where they are; "paired" for one that is
            given a condition beside each sample; None for other models.
        data_shift, data_scale: one number per channel, for images in units of their own: data = x * scale + shift for
            the model's x in [-1, 1]. "np" and "pt" are in these units then, and "pil" shows x. None: the images are
            pictures, levels from 0 to 1.
        condition_size: height and width of a paired condition, the model's size or that divided by one whole number;
            None: the model's size.
        condition_shift, condition_scale: one number per channel of a paired condition, as data_shift and data_scale.
        score_quantiles: what `calibrate_score` has kept.
        data_levels: one number per channel, for images in units of their own that are whole numbers: how many whole
            numbers the range of data_scale has. method="denoising" of `score` computes the probability of a level
            then. None: they have a density. Pictures have 256 levels, and none here.

    Raises:
        ValueError: the model is one of sequences, the scheduler cannot sample from it, or a value is outside its range.
    """

    model_cpu_offload_seq = "unet"
    _output_types = ("pil", "np", "pt", "latent")
    _size_names = "height and width"

    def __init__(
        self,
        unet,
        scheduler,
        num_inference_steps: int | None = None,
        log_snr_spacing: bool = False,
        steps_before_fast: int | None = None,
        id2label: dict | None = None,  # JSON has texts for keys, of which diffusers would warn on loading
        condition: str | None = None,
        data_shift: Sequence[float] | None = None,
        data_scale: Sequence[float] | None = None,
        condition_size: Sequence[int] | None = None,
        condition_shift: Sequence[float] | None = None,
        condition_scale: Sequence[float] | None = None,
        score_quantiles: dict | None = None,
        data_levels: Sequence[int] | None = None,
    ):
        super().__init__()
        check_parts(self, unet, num_inference_steps, 2, "DDPMPipeline1D")
        conditioned = condition_settings(unet, condition, condition_size, condition_shift, condition_scale)
        names = class_names(id2label, number_of_classes(unet))
        units = checked_units(unet.config.in_channels, data_shift, data_scale)
        levels = checked_levels(unet.config.in_channels, data_levels, data_scale)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            log_snr_spacing=log_snr_spacing,
            steps_before_fast=steps_before_fast,
            # other pipelines are saved as they always were
            **({} if names is None else {"id2label": names}),
            **conditioned,
            **({} if score_quantiles is None else {"score_quantiles": score_quantiles}),
            **({} if units["data_scale"] is None else units),
            **({} if levels is None else {"data_levels": levels}),
        )

    # This function is longer than 60 lines because it documents every option of a call.
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_all_timesteps: bool = False,
        timesteps: Sequence[int] | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide=None,
        image=None,
        strength: float | None = None,
        num_samples: int = 1,
        height: int | None = None,
        width: int | None = None,
        method: str | None = None,
        overlap: int | None = None,
        condition=None,
    ) -> ImageOutput | tuple:
        """Sample images.

        Args:
            batch_size: number of images.
            num_inference_steps: number of steps, 1 to T; None: the pipeline's default.
            generator: generator of all noise: one, or one per sample (a sample then does not depend on the others).
            latents: x_T, standard normal, `(B, C, H, W)`; None: it is drawn.
            eta: share of DDIM's noise, 0 to 1; None: the scheduler's own.
            output_type: "pil" (8-bit grey, RGB or RGBA by channels), "np" or "pt" (floats in [0, 1], or in
                the units of the data for a pipeline with data_scale), or "latent" (x_0 as the model has it, a tensor
                `(B, C, H, W)` of the model's type, neither scaled nor clamped).
            return_dict: return an `ImageOutput` if true, else the tuple `(images,)`, with the trajectory if asked for.
            callback_on_step_end: a function that is called as (pipeline, step index, timestep, {"latents": x}) after
                each step, and may return new latents in such a dictionary.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback is given; only "latents".
            return_all_timesteps: return the trajectory from x_T to x_0 too.
            timesteps: explicit timesteps instead of a number of steps, for schedulers that take them.
            class_labels: number or name of the class, or None for no class, of a model with classes: one for all
                samples, or a list with one per sample. batch_size may then be left out.
            guidance_scale: weight of classifier-free guidance, or with a guide of autoguidance, at least 0: 1 is none,
                more follows the class, or leaves what the guide does wrong, more closely; 0 ignores the class, or is
                the guide alone. Other values than 1 take a second prediction in each step.
            guidance_rescale: share, in [0, 1], to which the deviation of a guided prediction is put back to that of the
                prediction for the class (Lin et al., arXiv:2305.08891, section 3.4).
            guidance_interval: lowest and highest noise level that is guided, as shares of the training timesteps, from
                0 (data) to 1 (noise) (Kynkäänniemi et al., arXiv:2404.07724).
            guide: a worse model of the same data, for autoguidance (Karras et al., arXiv:2406.02507): an earlier
                checkpoint, or a smaller model that was trained for a shorter time. It is a model or a pipeline with the
                channels, size, schedule and prediction type of this one; with classes it is given the same labels.
            image: images to start from instead of noise (SDEdit, Meng et al., arXiv:2108.01073): PIL images, an array
                `(B, H, W, C)` or a tensor `(B, C, H, W)`, in the units of the samples. batch_size is then left out;
                generators and classes may be one per image.
            strength: share of the chain that is run on noised images, from 0 (they come back as they are) to 1 (noise
                alone: ordinary sampling); None: 0.5. It needs `image`.
            num_samples: number of variations of each image, those of the first one first.
            height, width: size of the images; None: as trained. Larger ones are sampled by `method`.
            method: "single": one call of the model for the whole image in each step; "joint": windows of the trained
                size that are denoised together, whose predictions are averaged where they overlap (MultiDiffusion,
                Bar-Tal et al., arXiv:2302.08113). None: "single" up to twice the trained size, "joint" beyond.
            overlap: number of pixels that neighbouring windows share; None: half of the trained size.
            condition: what the samples belong to, for a model with paired conditions: PIL images, an array
                (B, H, W, C') or a tensor (B, C', H, W) in [0, 1], or in the units of condition_scale, of the size
                condition_size, and larger in proportion for larger images; one for all samples, one per sample, or one
                per item of `image`. batch_size may then be left out.

        Raises:
            ValueError: a value is outside its range, a shape is wrong, the guide is a model of other data, a condition
                is missing or does not fit, the scheduler cannot start from images, or PIL has no mode for the number
                of channels.
            FloatingPointError: the samples have NaN or infinity; the message has the timestep and the likely cause.
        """
        return self._vary_or_generate(
            "image", image, strength, num_samples, batch_size, num_inference_steps, generator, latents, eta,
            output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs, return_all_timesteps,
            timesteps, class_labels, condition, guidance_scale, guidance_rescale, guidance_interval, guide,
            size=self._size_of(height, width), method=method, overlap=overlap,
        )  # fmt: skip

    def _size_of(self, height: int | None, width: int | None) -> tuple | None:
        """Return the size that a call asks for; None: as trained."""
        if height is None and width is None:
            return None
        if None in (height, width):
            trained = self._size()
            height, width = (own if n is None else n for n, own in zip((height, width), trained))
        return height, width

    def _size(self) -> tuple:
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError(
                "the model's configuration has no sample_size: give latents, or set it when building the model"
            )
        return (size, size) if isinstance(size, int) else tuple(size)

    def _tensor(self, images, name: str) -> Tensor:
        """Convert PIL images, arrays (B, H, W, C) or tensors (B, C, H, W) to (B, C, H, W), in their own units."""
        images, is_pil = image_tensor(images, name, self._channels())
        if is_pil and self._has_units():
            images = to_units(self, images * 2 - 1)
        return images.double() if self._has_units() and not images.is_floating_point() else images

    def _encode(self, images, name: str) -> Tensor:
        """Convert PIL images, arrays (B, H, W, C) or tensors (B, C, H, W), in [0, 1] or in the units of the data, to
        (B, C, H, W) in the model's units."""
        images = self._tensor(images, name)
        if self._has_units():
            if len(images) == 0 or not images.isfinite().all():
                raise ValueError(f"{name} must hold finite images, got the shape {tuple(images.shape)}")
            return from_units(self, images).to(self._execution_device, self.unet.dtype)
        if len(images) == 0 or not (images.min() >= 0 and images.max() <= 1):  # NaN too
            if len(images) == 0:
                raise ValueError(f"{name} must hold at least one image")
            raise ValueError(f"{name} must lie in [0, 1]; got {images.min():.4g} to {images.max():.4g}")
        return images.to(self._execution_device, self.unet.dtype) * 2 - 1

    def _decode(self, x: Tensor, output_type: str):
        """Convert (B, C, H, W) in the model's units to images in the form of `output_type`."""
        if output_type == "latent":
            return x
        if self._has_units():
            return self._in_form(to_units(self, x), output_type)
        return self._in_form((x.float() / 2 + 0.5).clamp(0, 1), output_type)

    def _in_form(self, images: Tensor, output_type: str):
        """Convert (B, C, H, W), in [0, 1] or in the units of the data, to the form of `output_type`.

        Tensors are given back on the device of the pipeline.
        """
        if output_type == "pt":
            return images.to(self._execution_device)
        if output_type == "pil" and self._has_units():
            images = (from_units(self, images) / 2 + 0.5).clamp(0, 1)
        array = images.movedim(1, -1).cpu().numpy()
        if output_type == "np":
            return array
        eight_bit = (array * 255).round().astype(np.uint8)
        mode = IMAGE_MODES[array.shape[-1]]
        return [Image.fromarray(image[..., 0] if mode == "L" else image) for image in eight_bit]

    def _has_units(self) -> bool:
        """Return True if the images have units of their own."""
        return self.config.get("data_scale") is not None

    def _output(self, samples, trajectory, return_dict: bool):
        if not return_dict:
            return (samples,) if trajectory is None else (samples, trajectory)
        return ImageOutput(images=samples, trajectory=trajectory)
