"""From pipelines to numbers."""
