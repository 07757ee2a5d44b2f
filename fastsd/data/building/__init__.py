"""Floor 2.5: making the cache. In the order of the way:

buckets, decode                                 from a file's bytes to pixels of a size
collect, build, pipeline, store                 what is new gets its place, is encoded, is written
mask_cells, tokenize_captions, embed_captions   what is made of masks and captions
upkeep                                          is it whole, what is there, what is there for nothing
"""
