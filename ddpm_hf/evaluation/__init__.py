"""The way from pipelines to numbers."""
