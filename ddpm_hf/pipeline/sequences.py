"""`DDPMPipeline1D`: sequences, in the units of the data."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddpm_hf.pipeline.continuing import ContinuingPipeline
from ddpm_hf.pipeline.guidance import class_names, number_of_classes
from ddpm_hf.pipeline.interpolating import InterpolatingPipeline
from ddpm_hf.pipeline.outputs import SequenceOutput
from ddpm_hf.pipeline.pairs import condition_settings, sequence_tensor
from ddpm_hf.pipeline.rules import ClassLabels, Generators, check_parts
from ddpm_hf.pipeline.scoring import ScoringPipeline
from ddpm_hf.pipeline.units import checked_units, from_units, to_units


class DDPMPipeline1D(InterpolatingPipeline, ContinuingPipeline, ScoringPipeline):
    """Unconditional generation of sequences, in the units of the data that the model was trained on.

    Args:
        unet: a `UNet1D`. It is given weights in the memory layout of its activations, for speed.
        scheduler: a `GaussianScheduler`, or a stock scheduler.
        num_inference_steps: number of steps of calls that give none; None: every training step.
        data_shift, data_scale: one number per channel: data = x * scale + shift for the model's x in [-1, 1]; None:
            the data is x. A channel with the scale 0 is the constant `shift`, and its x is 0.
        log_snr_spacing, steps_before_fast: settings of `use_fast_sampler`, which sets them.
        id2label: names of the classes, by their numbers, of a model with classes; None: they have no names.
        condition: "known" for a model that is also given the known values and where they are; "paired" for one that is
            given a condition beside each sample; None for other models.
        condition_size: length of a paired condition, the model's size or that divided by one whole number;
            None: the model's size.
        condition_shift, condition_scale: one number per channel of a paired condition, as data_shift and data_scale.
        score_quantiles: what `calibrate_score` has kept.

    Raises:
        ValueError: the model is one of images, the scheduler cannot sample from it, or a value is outside its range.
    """

    model_cpu_offload_seq = "unet"
    _output_types = ("np", "pt", "latent")
    _size_names = "length"

    def __init__(
        self,
        unet,
        scheduler,
        num_inference_steps: int | None = None,
        data_shift: Sequence[float] | None = None,
        data_scale: Sequence[float] | None = None,
        log_snr_spacing: bool = False,
        steps_before_fast: int | None = None,
        id2label: dict | None = None,  # JSON has texts for keys, of which diffusers would warn on loading
        condition: str | None = None,
        condition_size: Sequence[int] | None = None,
        condition_shift: Sequence[float] | None = None,
        condition_scale: Sequence[float] | None = None,
        score_quantiles: dict | None = None,
    ):
        super().__init__()
        check_parts(self, unet, num_inference_steps, 1, "DDPMPipeline")
        conditioned = condition_settings(unet, condition, condition_size, condition_shift, condition_scale)
        names = class_names(id2label, number_of_classes(unet))
        units = checked_units(unet.config.in_channels, data_shift, data_scale)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            log_snr_spacing=log_snr_spacing,
            steps_before_fast=steps_before_fast,
            **units,
            # other pipelines are saved as they always were
            **({} if names is None else {"id2label": names}),
            **conditioned,
            **({} if score_quantiles is None else {"score_quantiles": score_quantiles}),
        )

    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        eta: float | None = None,
        output_type: str = "np",
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
        sequence=None,
        strength: float | None = None,
        num_samples: int = 1,
        length: int | None = None,
        method: str | None = None,
        overlap: int | None = None,
        condition=None,
    ) -> SequenceOutput | tuple:
        """Sample sequences.

        The arguments are those of a call of `DDPMPipeline`, but `latents` is `(B, C, length)`, `output_type` is
        "np" or "pt", or "latent" for x_0 in the model's units, the items to start from are called `sequence`,
        `(B, C, length)` in the units of the data, and `condition` is an array or tensor `(B, C', length')` in
        its own units.

        Args:
            length: length of the sequences; None: as trained. Longer ones are sampled by `method`.
            method: "single": one call of the model for the whole length in each step; "joint": windows of the trained
                length that are denoised together, whose predictions are averaged where they overlap (MultiDiffusion,
                Bar-Tal et al., arXiv:2302.08113); "sequential": windows of which each goes on from the one before, as
                in `stream`. None: "single" up to twice the trained length, "joint" beyond.
            overlap: number of values that neighbouring windows share; None: half of the trained length.

        Returns:
            A `SequenceOutput`, or with return_dict=False a tuple.

        Raises:
            ValueError: a value is outside its range, or a shape is wrong.
            FloatingPointError: the samples have NaN or infinity; the message has the timestep and the likely cause.
        """
        return self._vary_or_generate(
            "sequence", sequence, strength, num_samples, batch_size, num_inference_steps, generator, latents, eta,
            output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs, return_all_timesteps,
            timesteps, class_labels, condition, guidance_scale, guidance_rescale, guidance_interval, guide,
            size=None if length is None else (length,), method=method, overlap=overlap,
        )  # fmt: skip

    def _size(self) -> tuple:
        if self.unet.config.sample_size is None:
            raise ValueError(
                "the model's configuration has no sample_size: give latents, or set it when building the model"
            )
        return (self.unet.config.sample_size,)

    def _encode(self, sequences, name: str) -> Tensor:
        """Convert arrays or tensors (B, C, length) from the units of the data to those of the model."""
        x = sequence_tensor(sequences, name, self._channels())
        if len(x) == 0 or not torch.isfinite(x).all():
            raise ValueError(f"{name} must be finite, (B, {self._channels()}, length); got the shape {tuple(x.shape)}")
        return from_units(self, x).to(self._execution_device, self.unet.dtype)

    def _decode(self, x: Tensor, output_type: str):
        """Convert (B, C, length) from the model's units to the data's; float64 where float32 has too few digits."""
        if output_type == "latent":
            return x
        return self._in_form(to_units(self, x), output_type)

    def _tensor(self, sequences, name: str) -> Tensor:
        """Convert arrays or tensors (B, C, length) to a tensor on the CPU, in the units of the data.

        Lists and whole numbers become float64.
        """
        dtype = None if hasattr(sequences, "dtype") else torch.float64
        x = sequence_tensor(sequences, name, self._channels(), dtype)
        return x if x.is_floating_point() else x.double()

    def _in_form(self, sequences: Tensor, output_type: str):
        """Convert (B, C, length) to the form of `output_type`, tensors on the device of the pipeline."""
        return sequences.to(self._execution_device) if output_type == "pt" else sequences.cpu().numpy()

    def _output(self, samples, trajectory, return_dict: bool):
        if not return_dict:
            return (samples,) if trajectory is None else (samples, trajectory)
        return SequenceOutput(sequences=samples, trajectory=trajectory)
