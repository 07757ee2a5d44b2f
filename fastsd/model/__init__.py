"""Floor 1: the UNet, the VAE, the text encoder, and the formats their weights come and go in."""
