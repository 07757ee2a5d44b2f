"""Floor 3: one optimizer step with its precision, arenas, optimizers, noise, objective, schedule, CUDA graph and memory."""
