"""Floor 2.5: building the cache. The modules, in the order of processing:

buckets, decode                                 decode image files to pixels of a bucket's size
collect, build, pipeline, claims, store         find new images, assign their rows, encode and write them
machines, beats, results                        divide this work among machines without shared locks
mask_cells, tokenize_captions, embed_captions   compute mask cells, token ids and text embeddings
upkeep                                          verify the cache, measure its latents, delete unused files
"""
