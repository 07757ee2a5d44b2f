"""Floor 2: from the cache to batches. `sources/` finds images and captions, `building/` builds the cache from them.

rows, cache, tokens, text_embeddings, masks   the file formats on the disk, and their readers
captions, order, validation_split, loader     selection and preparation of the batches of a step
"""
