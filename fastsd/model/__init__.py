"""Floor 1: the UNet, the VAE, the text encoder, LoRA adapters, and `Model`, which holds them. `formats/` reads and writes."""
