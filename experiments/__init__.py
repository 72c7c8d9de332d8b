"""Experiments: one folder a training binary, all of one shape. `python -m experiments.classifier`."""
