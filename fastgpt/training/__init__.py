"""Training: recipes, the trainer, optimizer, processes, memory and logs."""
