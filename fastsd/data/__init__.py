"""Floor 2: from the cache to batches. `sources/` finds images and captions, `building/` builds the cache from them.

rows, cache, tokens, text_embeddings, masks   define the file formats on the disk and read them
captions, order, validation_split, loader     select samples and prepare the batches of a step
"""
