"""Floor 1.5: models on the disk - what they look like in every tool's format, loading them, writing them.

single_file_layout, original_names, lora_names   what tensors are called
model_source, lora_files, model_summary          what a file or a folder holds
load, adapters, lora_weights                     from there to a `Model`
write, fold_vae                                  and back
"""
