"""The way from the user's data to batches; `open_data` is the door."""

from ddpm_hf.data.opening import open_data

__all__ = ["open_data"]
