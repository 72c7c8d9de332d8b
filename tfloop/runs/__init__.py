"""Runs: one training on disk."""
