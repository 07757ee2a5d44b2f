"""Floor 3: one optimizer step - precision, arenas, optimizers, noise, objective, schedule, CUDA graph, memory."""
