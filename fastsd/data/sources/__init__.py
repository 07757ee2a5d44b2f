"""Floor 2: what folders, tars and metadata files hold - images, their captions, masks and latents of other trainers."""
