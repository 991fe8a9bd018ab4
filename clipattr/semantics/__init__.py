"""What a latent means: labels, alignment, clarity."""
