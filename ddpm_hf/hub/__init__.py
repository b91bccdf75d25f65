"""The way from pipelines to the Hub: publishing, the model card, the page."""
