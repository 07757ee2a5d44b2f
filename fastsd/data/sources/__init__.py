"""Floor 2: discovery of images, captions, masks and other trainers' latents in folders, tars and metadata files."""
