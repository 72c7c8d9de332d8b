"""Replicas: one step on several devices, each on its part of the batch (`tf.distribute`).

On every replica a loss is written, computed and shown as on one device: the mean over the examples that the replica
has. What goes into an optimizer is weighted by the replica's share of the batch and summed over the replicas first,
so that an update is that of the whole batch, clipping acts on the gradient of the whole batch, and parts need not be
of one size. Keras and TensorFlow have another rule (a loss is divided by the number of replicas, and whoever forgets
it makes updates that are too large): what follows that rule, as `tf.nn.compute_average_loss`, is brought to this one.

Non-trainable weights that a step writes, such as BatchNormalization's statistics, become their mean over the
replicas; random numbers differ between them; rows are put together as those of one batch.
"""

import contextlib
import functools
import threading

import keras
import tensorflow as tf

from tfloop import _keras, terms
from tfloop.accumulation import scaled
from tfloop.row import over_rows
from tfloop.step import current_step

SUPPORTED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
)
_local = threading.local()


def strategy_of(model):
    """The strategy in whose scope a model was made, or `None`."""
    strategy = model.distribute_strategy
    with strategy.scope():
        return strategy if tf.distribute.has_strategy() else None


def check(model):
    """Raises `ValueError` where a model cannot be trained on the replicas that were asked for."""
    if keras.distribution.distribution() is not None:
        raise ValueError(
            "keras.distribution does nothing with the TensorFlow backend: weights and data would stay on one device. "
            "Call keras.distribution.set_distribution(None), and make the model in the scope of a "
            "tf.distribute.MirroredStrategy."
        )
    strategy = strategy_of(model)
    if strategy is None:
        return
    name = type(strategy).__name__
    if not isinstance(strategy, SUPPORTED):
        supported = ", ".join(s.__name__ for s in SUPPORTED)
        raise ValueError(
            f"{name} is not supported: its replicas update variables at times of their own. Use {supported}."
        )
    check_variables(model)


def check_variables(model):
    """Raises `ValueError` for what was made outside the scope of the model's strategy."""
    strategy = strategy_of(model)
    if not isinstance(strategy, SUPPORTED[:2]):
        return
    name = type(strategy).__name__
    outside = [v.path for v in model.variables if not isinstance(v.value, tf.distribute.DistributedValues)]
    if outside:
        raise ValueError(
            f"{outside[0]!r} was made outside the scope of the {name}. Make the model within `with strategy.scope():`."
        )
    optimizer = model.optimizer
    if optimizer is not None and _keras.optimizer_strategy(optimizer) is not strategy:
        raise ValueError(
            f"The optimizer {optimizer.name!r} was made outside the scope of the {name}. Make it, and call `compile`, "
            "within `with strategy.scope():`."
        )


class Team:
    """The processes that train one model together: each makes the same chunks of steps, and the chief writes.

    Args:
        strategy: a `tf.distribute.Strategy` or `None`. All but `MultiWorkerMirroredStrategy` are one process.
    """

    def __init__(self, strategy=None):
        self.size, self.chief = 1, True
        self._strategy = strategy
        resolver = getattr(strategy, "cluster_resolver", None)
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and resolver is not None:
            cluster = resolver.cluster_spec().as_dict()
            self.size = sum(len(cluster.get(kind, ())) for kind in ("chief", "worker")) or 1
            first = "chief" if "chief" in cluster else "worker"
            self.chief = self.size == 1 or (resolver.task_type == first and resolver.task_id == 0)

    def told(self, *numbers):
        """What the chief says: its whole numbers, on every process. All of them must ask at the same point."""
        return self.sums(*(numbers if self.chief else [0] * len(numbers)))

    def sums(self, *numbers):
        """Whole numbers (below 2**24) added up over the processes. All of them must ask at the same point."""
        if self.size == 1:
            return numbers
        return tuple(int(n) for n in self._total(tf.constant(numbers, tf.float32)).numpy())

    @functools.cached_property
    def _total(self):
        def on_a_replica(numbers):
            context = tf.distribute.get_replica_context()
            replicas_here = context.num_replicas_in_sync // self.size
            speaks = tf.get_static_value(context.replica_id_in_sync_group) % replicas_here == 0
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(numbers) if speaks else 0 * numbers)

        def total(numbers):
            found = self._strategy.run(on_a_replica, (numbers,))
            return self._strategy.experimental_local_results(found)[0]

        return tf.function(total, autograph=False, input_signature=[tf.TensorSpec([None], tf.float32)])


@functools.lru_cache(maxsize=8)
def team_of(strategy):
    """The `Team` of a strategy, or of none."""
    return Team(strategy)


def current_team():
    """The `Team` of the strategy whose scope this is."""
    return team_of(tf.distribute.get_strategy() if tf.distribute.has_strategy() else None)


def copies(variable):
    """The variables on the devices of this process that a variable stands for; itself, where there is no strategy.

    A process reads them alone. The sum of a metric's variable over several processes only all of them can read.
    """
    value = _keras.tensor_of(variable)
    return list(value.values) if isinstance(value, tf.distribute.DistributedValues) else [value]


class Replica:
    """One of `count` replicas in a step; the only one, where there is no strategy."""

    def __init__(self, index=0, count=1, context=None):
        self.index, self.count = index, count
        self.context = context

    def part(self, data):
        """This replica's `Part` of a batch."""
        leaves = [leaf for leaf in tf.nest.flatten(data) if has_examples(leaf)]
        if self.count == 1 or not leaves:
            return Part(self, data)
        size = leaves[0].shape[0]
        size = size if size is not None else examples_in(leaves[0])
        quotient, rest = size // self.count, size % self.count
        start = self.index * quotient + least(self.index, rest)
        length = quotient + select(self.index < rest, 1, 0)
        # A batch of fewer examples than replicas: each has all of them, and those of the first count.
        few = size < self.count
        start, length = select(few, 0, start), select(few, size, length)
        fraction = select(few, 1.0, ratio(length, size))
        share = select(few, 1.0 / self.count, fraction)
        counts = True if self.index == 0 else select(few, False, True)
        mine = tf.nest.map_structure(lambda leaf: cut(leaf, start, length), data)
        return Part(self, mine, share, counts, fraction)


class Part:
    """What one replica does of a batch.

    Args:
        replica: the `Replica`.
        data: its examples.
        share: of the whole batch, a number or a float scalar.
        counts: whether its metrics count, or repeat what another replica has.
        fraction: of the examples of the batch; all of them, where there are fewer than replicas.
    """

    def __init__(self, replica, data, share=1.0, counts=True, fraction=1.0):
        self.data, self.share, self.counts, self.fraction = data, share, counts, fraction
        self._replica = replica
        self._reduced = []

    @property
    def replicated(self):
        return self._replica.context is not None

    def reduced(self, gradients, weighted=False):
        """The gradients of the whole batch; those that are so already as they are.

        `weighted`: whether they are of a loss that was weighted by the share already.
        """
        gradients = list(gradients)
        there = [g for g in gradients if g is not None]
        if self._replica.context is None or all(any(g is r for r in self._reduced) for g in there):
            return gradients
        if self._replica.count > 1 and not weighted:
            there = [scaled(g, self.share) for g in there]
        reduced = iter(self._replica.context.all_reduce(tf.distribute.ReduceOp.SUM, there))
        found = [None if g is None else shaped(next(reduced), g) for g in gradients]
        self._reduced += [g for g in found if g is not None]
        return found

    @contextlib.contextmanager
    def metrics_of(self, model):
        """Within this metric objects are updated, and afterwards they are as before if this part does not count."""
        if self.counts is True:
            yield
            return
        variables = [v.value for m in terms.all_metrics(model) for v in m.variables]
        before = [v.read_value() for v in variables]
        yield
        for variable, value in zip(variables, before, strict=True):
            variable.assign(select(self.counts, variable.read_value(), value))

    def counted(self, row):
        """The row, with no examples if they do not count."""
        if self.counts is True:
            return row
        return tf.concat([row[:1] * tf.cast(self.counts, row.dtype), row[1:]], 0)


def on_replicas(model, function):
    """`function(Replica)` on each replica of a model; it gives a row, its layout, and whether all was finite or `None`.

    Returns the three for the whole batch.
    """
    strategy = strategy_of(model)
    if strategy is None:
        return function(Replica())
    layouts, guarded = [], []

    def on_one(replica):
        row, layout, finite = function(replica)
        layouts.append(layout)
        guarded.append(finite is not None)
        return tf.concat([row, [1.0 if finite is None else tf.cast(finite, row.dtype)]], 0)[None]

    rows = on_each_replica(strategy, on_one)
    if any(layout.columns != layouts[0].columns for layout in layouts):
        measured = [[column.name for column in layout.columns] for layout in layouts]
        raise ValueError(f"The replicas of a step must measure the same things. They measured {measured}.")
    rows = strategy.gather(rows, 0)
    finite = tf.reduce_min(rows[:, -1]) > 0 if any(guarded) else None
    return over_rows(rows[:, :-1], layouts[0]), layouts[0], finite


def on_each_replica(strategy, function):
    """`function(Replica)` on each replica of a strategy. Returns what `strategy.run` does."""
    shared = _keras.process_state()

    def run():
        context = tf.distribute.get_replica_context()
        replica = Replica(tf.get_static_value(context.replica_id_in_sync_group), context.num_replicas_in_sync, context)
        written = {}

        def note(variable):
            written[id(variable)] = variable

        _local.replica, _local.losses = replica, {}
        _keras.take_process_state(shared)
        try:
            with _keras.observing_assigns(note):
                found = function(replica)
        finally:
            _local.replica = _local.losses = None
        average_over_replicas(written.values(), context)
        return found

    with replicated():
        return strategy.run(run)


def average_over_replicas(variables, context):
    """Replicas that have written different values into a non-trainable weight get their mean."""
    found = [v for v in variables if not v.trainable and v.synchronization != "on_read" and is_float(v)]
    if found and context.num_replicas_in_sync > 1:
        values = [_keras.tensor_of(v).read_value() for v in found]
        for variable, mean in zip(found, context.all_reduce(tf.distribute.ReduceOp.MEAN, values), strict=True):
            _keras.tensor_of(variable).assign(mean)


def is_float(variable):
    return tf.as_dtype(variable.dtype).is_floating


@contextlib.contextmanager
def replicated():
    """While this is open, what follows the rule that losses are divided by the number of replicas does not do so."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (tf.nn, "compute_average_loss", average_loss),
            (tf.nn, "scale_regularization_loss", regularization_loss),
            (keras.random.SeedGenerator, "next", next_seed),
        ):
            stack.enter_context(_keras.patched(owner, name, on_a_replica(replacement)))
        stack.enter_context(_keras.losses_unscaled())
        stack.enter_context(_keras.reducing_losses(on_a_replica(reduced_loss)))
        stack.enter_context(_keras.losses_by_thread(lambda: getattr(_local, "losses", None)))
        stack.enter_context(_keras.updates_of_replicas())
        yield


def on_a_replica(replacement):
    def wrap(original):
        def call(*args, **kwargs):
            replica = getattr(_local, "replica", None)
            if replica is None:
                return original(*args, **kwargs)
            return replacement(replica, original, *args, **kwargs)

        return call

    return wrap


def average_loss(replica, original, per_example_loss, sample_weight=None, global_batch_size=None):
    total = original(per_example_loss, sample_weight, 1)
    if global_batch_size is None:
        return total / tf.cast(tf.shape(per_example_loss)[0], total.dtype)
    # A number of the user's, which may be another than that of the batch.
    return total / tf.cast(global_batch_size, total.dtype) / tf.cast(current_step().part.fraction, total.dtype)


def regularization_loss(replica, original, regularization_loss):
    return tf.reduce_sum(regularization_loss)


def reduced_loss(replica, original, values, sample_weight=None, mask=None, reduction="sum_over_batch_size", dtype=None):
    """A Keras loss of a part, such that the parts' mean by their shares is the loss of the whole batch.

    For a mean over examples it is the part's own. A sum, and a mean over what a mask or weights leave, are not.
    """
    loss = original(values, sample_weight, mask, reduction, dtype)
    part = getattr(current_step(), "part", None)
    if part is None or replica.count == 1 or reduction in (None, "none"):
        return loss
    if reduction == "sum":
        return loss / tf.cast(part.fraction, loss.dtype)
    mine = _keras.loss_denominator(sample_weight, mask, reduction, loss.dtype)
    if mine is None:
        return loss
    whole = replica.context.all_reduce(tf.distribute.ReduceOp.SUM, mine)
    return loss * tf.math.divide_no_nan(mine, whole) / tf.cast(part.share, loss.dtype)


def next_seed(replica, original, *args, **kwargs):
    """Another seed on each replica; on the first that of a single device."""
    seed = original(*args, **kwargs)
    if not replica.index:
        return seed
    folded = tf.random.experimental.stateless_fold_in(tf.cast(seed, tf.int32), replica.index)
    return tf.cast(tf.bitcast(folded, tf.uint32), seed.dtype)


def shaped(reduced, gradient):
    """A sum over replicas, which knows the shape of what was added up, but for the number of slices."""
    if isinstance(reduced, tf.IndexedSlices):
        reduced.values.set_shape([None, *gradient.values.shape[1:]])
        reduced.indices.set_shape([None])
    elif not tf.executing_eagerly():
        reduced.set_shape(gradient.shape)
    return reduced


# Numbers that may be known when the step is traced.


def select(condition, one, other):
    if isinstance(condition, bool):
        return one if condition else other
    return tf.where(condition, one, other)


def least(one, other):
    return min(one, other) if isinstance(other, int) else tf.minimum(one, other)


def ratio(one, other):
    return one / other if isinstance(other, int) else tf.cast(one, tf.float32) / tf.cast(other, tf.float32)


def has_examples(leaf):
    return leaf is not None and getattr(leaf.shape, "rank", len(leaf.shape)) != 0


def examples_in(leaf):
    return leaf.nrows(tf.int32) if isinstance(leaf, tf.RaggedTensor) else tf.shape(leaf, tf.int32)[0]


def cut(leaf, start, length):
    """The examples of a leaf from one on."""
    if not has_examples(leaf):
        return leaf
    if isinstance(leaf, tf.SparseTensor):
        shape = tf.shape(leaf, tf.int64)
        rest = tf.zeros_like(shape[1:])
        return tf.sparse.slice(
            leaf,
            tf.concat([[tf.cast(start, tf.int64)], rest], 0),
            tf.concat([[tf.cast(length, tf.int64)], shape[1:]], 0),
        )
    return leaf[start : start + length]
