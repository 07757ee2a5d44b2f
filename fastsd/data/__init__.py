"""Floor 2: from the cache to batches. `sources/` finds images and captions, `building/` makes the cache of them.

rows, cache, tokens, text_embeddings, masks   what lies on the disk, and reading it
captions, order, validation_split, loader     what a step is given
"""
