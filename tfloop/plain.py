"""Plain variables: those of the loop itself, which no distribution strategy copies to its devices."""

import concurrent.futures

import tensorflow as tf


def plain_variable(value, **arguments):
    """A non-trainable `tf.Variable` outside every strategy's scope. A scope is a thread's: another thread has none."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread, tf.init_scope():
        return thread.submit(tf.Variable, value, trainable=False, **arguments).result()
