"""Floor 1.5: models on the disk, in every tool's format.

single_file_layout, original_names, lora_names   the names of tensors
model_source, pickles, lora_files, model_summary the contents of files and folders
load, adapters, lora_weights                     loading these contents into a `Model`
write, fold_vae, lora_convert, merge             writing models for other tools
"""
