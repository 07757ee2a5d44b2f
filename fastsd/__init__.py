"""fastsd: a lean training engine that retrains Stable Diffusion 1.5 on one GPU. Start reading at `fastsd/run/loop.py`."""

__version__ = "0.1.0"
