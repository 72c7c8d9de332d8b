"""A GAN with spectral norm in both nets, two optimizers in one step, and a distance to the real data."""
