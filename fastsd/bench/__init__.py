"""Floor 4: what `fastsd bench` measures: the real step, its memory, optimizers, loader and cache, beside their baselines."""
