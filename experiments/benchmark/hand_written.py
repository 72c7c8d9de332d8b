"""What one would write by hand: a step for each batch, and loops over steps inside the program."""

import functools

import numpy as np
import tensorflow as tf

CHUNK = 64  # steps in one call, where a loop does not take a whole epoch


def step_of(model, workload):
    """`step(*batch) -> loss`, in plain TensorFlow."""
    compiled = workload.compiled()
    if compiled["loss"] is None:  # a GAN has its own
        return lambda *batch: model.train_step(batch)["d_loss"]
    optimizer, loss = compiled["optimizer"], compiled["loss"]
    optimizer.build(model.trainable_variables)
    variables = model.trainable_variables

    def step(x, y):
        with tf.GradientTape() as tape:
            total = tf.add_n([loss(y, model(x, training=True)), *model.losses])
        optimizer.apply(tape.gradient(total, [v.value for v in variables]), variables)
        return total

    return step


def per_batch(model, workload, data):
    """A compiled function called for every batch from Python."""
    step = tf.function(step_of(model, workload))

    def epoch():
        if workload.stream is not None:
            batches = workload.stream(data, workload.batch_size)
            for _, batch in zip(range(workload.steps(data)), batches, strict=False):
                loss = step(*batch)
        else:
            for rows in order(workload, data):
                loss = step(*(part[rows] for part in data))
        return float(loss)

    return epoch


def order(workload, data):
    rows = np.random.permutation(len(data[0])).astype("int32")
    return rows[: workload.steps(data) * workload.batch_size].reshape(-1, workload.batch_size)


def gathered(model, workload, data, jit_step=False, jit_loop=False):
    """One call an epoch: the arrays are constants of a program that loops over steps."""
    step = tf.function(step_of(model, workload), jit_compile=True) if jit_step else step_of(model, workload)
    arrays = [tf.constant(part) for part in data]

    @tf.function(jit_compile=jit_loop)
    def run(rows):
        def body(i, _):
            return i + 1, step(*(tf.gather(a, rows[i]) for a in arrays))

        return tf.while_loop(lambda i, _: i < rows.shape[0], body, (0, 0.0))[1]

    return lambda: float(run(tf.constant(order(workload, data))))


def unrolled(model, workload, data, steps=4):
    """Several steps one after the other in one compiled program, without a loop."""
    step = step_of(model, workload)
    arrays = [tf.constant(part) for part in data]

    @tf.function(jit_compile=True)
    def run(rows):
        return [step(*(tf.gather(a, rows[i]) for a in arrays)) for i in range(steps)]

    def epoch():
        for rows in order(workload, data).reshape(-1, steps, workload.batch_size):
            losses = run(tf.constant(rows))
        return float(losses[-1])

    return epoch


def over_blocks(step):
    """A compiled loop over a block of stacked batches."""

    @tf.function(jit_compile=True)
    def run(*block):
        def body(i, _):
            return i + 1, step(*(a[i] for a in block))

        return tf.while_loop(lambda i, _: i < block[0].shape[0], body, (0, 0.0))[1]

    return run


def streamed(model, workload, data):
    """The iterator of a tf.data pipeline, read in the loop."""
    step = step_of(model, workload)

    @tf.function
    def run(iterator, count):
        return tf.while_loop(lambda i, _: i < count, lambda i, _: (i + 1, step(*next(iterator))), (0, 0.0))[1]

    def epoch():
        iterator = iter(workload.stream(data, workload.batch_size))
        return float(run(iterator, tf.constant(workload.steps(data))))

    return epoch


def stacked_dataset(model, workload, data):
    """Chunks of a tf.data pipeline, stacked by tf.data, handed to a compiled loop."""
    run = over_blocks(step_of(model, workload))
    chunk = chunk_of(workload, data)

    def epoch():
        blocks = workload.stream(data, workload.batch_size).batch(chunk, drop_remainder=True).prefetch(1)
        for block in blocks.take(workload.steps(data) // chunk):
            loss = run(*block)
        return float(loss)

    return epoch


def stacked_batches(model, workload, data):
    """Batches made by Python, stacked by NumPy, handed to a compiled loop."""
    run = over_blocks(step_of(model, workload))
    chunk = chunk_of(workload, data)

    def epoch():
        batches = workload.stream(data, workload.batch_size)
        for _ in range(workload.steps(data) // chunk):
            block = [np.stack(leaves) for leaves in zip(*(next(batches) for _ in range(chunk)), strict=True)]
            loss = run(*block)
        return float(loss)

    return epoch


def chunk_of(workload, data):
    """The largest number of steps up to CHUNK that divides an epoch."""
    return max(n for n in range(1, CHUNK + 1) if workload.steps(data) % n == 0)


LOOPS = {
    "graph": gathered,
    "jit": functools.partial(gathered, jit_step=True),
    "scan": functools.partial(gathered, jit_loop=True),
    "unrolled": unrolled,
    "streamed": streamed,
    "stacked_dataset": stacked_dataset,
    "stacked_batches": stacked_batches,
}
