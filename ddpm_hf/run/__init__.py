"""What a run leaves on disk: checkpoints, metrics, and the record of how it was made."""
