"""The way from batches to weights; `train` in loop.py is the door."""
