"""Floor 4: `fastsd bench`, which measures the real step, its memory, optimizers, loader and cache against baselines."""
