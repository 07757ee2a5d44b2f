"""Floor 2: sources, captions, the latent cache and the loader."""
