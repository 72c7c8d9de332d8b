"""A variational autoencoder: two named losses that add up, one with a weight that is a schedule."""
