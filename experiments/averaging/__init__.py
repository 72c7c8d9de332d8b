"""Averaged weights, with the BatchNorm statistics of the last weights and with their own."""
