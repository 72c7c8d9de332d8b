"""tfloop: a training loop for TensorFlow and Keras."""
