"""Floor 2: image files and captions -> latents on the disk -> batches. In the order of the way:

source, sources, metadata, tars, imports    what the folders hold
buckets, decode                             from a file's bytes to pixels of a size
collect, build, pipeline, store             caching: what is new gets its place, is encoded, is written
rows, cache, tokens, states, masks          what lies on the disk then, and reading it
captions, order, loader                     what a step is given
upkeep                                      is it whole, what is there, what is there for nothing
"""
