"""Floor 1: the UNet, the VAE, the text encoder, adapters, and a whole `Model` of them. `formats/` reads and writes them."""
