"""Normalising a weight before it is used against a constraint after the update."""
