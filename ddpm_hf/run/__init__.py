"""The files of a run: checkpoints, metrics, and the record of how it was made."""
