"""The training step: read `loop.py` first."""
