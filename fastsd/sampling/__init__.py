"""Floor 4: images from a model, and grids of them."""
