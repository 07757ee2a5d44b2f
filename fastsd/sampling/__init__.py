"""Floor 4: image generation and sample grids."""
