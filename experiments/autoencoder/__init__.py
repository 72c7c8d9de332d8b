"""The autoencoder of the post: a loss on tensors, and `fit(x, None)`."""
