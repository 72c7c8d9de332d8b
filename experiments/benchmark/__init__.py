"""tfloop against Keras' `fit`, a hand-written step and hand-written loops, in one process."""
