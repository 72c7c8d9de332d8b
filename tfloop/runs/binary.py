"""Training binaries: a model, data and `absl.app.run`; flags, folder, resuming and exit status are here.

```
from absl import app
import keras, tfloop

tfloop.binary.define_flags(epochs=20)                 # at import; the defaults of this binary


def main(argv):
    (x, y), validation = ...
    model = tfloop.Model(...)
    model.compile(keras.optimizers.Adam(tfloop.binary.FLAGS.learning_rate), loss=...)
    tfloop.binary.train(model, x, y, validation_data=validation)


if __name__ == "__main__":
    app.run(main)
```

Once the flags are parsed, and before `main` builds anything, they are checked and the seed, the precision and
the strategy are set. `train` makes the run's folder, adds what `--watch` and `--parametrize` ask for, trains
and ends as the contract says: 0 done, 1 failure, 2 refused, 130 Ctrl-C, 143 SIGTERM.
"""

import contextlib
import os
import pathlib
import sys

import keras
import tensorflow as tf
from absl import app, logging
from absl import flags as absl_flags

from tfloop import reproducibility, weights
from tfloop.model import Model
from tfloop.runs import flags, rehearsal, workdir
from tfloop.runs.errors import CheckpointError, Refused
from tfloop.runs.run import Run
from tfloop.runs.sentry import NonFiniteError

FLAGS = absl_flags.FLAGS

_prepared = False
_scope = contextlib.ExitStack()  # held until the process ends: what is forgotten is left


def define_flags(**defaults):
    """Defines the flags of every training binary; `epochs=20` and the like set this binary's defaults.

    To be called at import, before `app.run`. A binary adds its own by absl's `flags.DEFINE_...`.
    """
    if "workdir" not in FLAGS:
        app.call_after_init(prepare)
    flags.define(**defaults)


def prepare():
    """Checks the flags and sets what must be set before a model is built. `app.run` calls it."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    logging.set_verbosity(max(logging.get_verbosity(), logging.WARNING))
    with refusing():
        flags.check(flags.leftovers(sys.argv))
        if FLAGS.strategy != "none":
            distribute()  # first of all: several processes must find each other before TensorFlow does anything
        reproducibility.set_seed(FLAGS.seed, deterministic=FLAGS.deterministic)
        keras.config.set_dtype_policy(FLAGS.precision)


def distribute():
    """Enters the scope of the strategy that the flags ask for, for the rest of the process."""
    if FLAGS.jit in ("step", "loop"):
        raise Refused(
            f"--jit={FLAGS.jit}: with --strategy={FLAGS.strategy} steps run as a graph, not through XLA. "
            "Leave --jit out."
        )
    tf.get_logger().setLevel("WARNING")  # it would tell of every reduction
    if FLAGS.strategy == "mirrored":
        strategy = tf.distribute.MirroredStrategy()
    else:
        if FLAGS.workdir is None:
            raise Refused("--strategy=multiworker: the processes share a run folder. Give its path: --workdir=...")
        if not os.environ.get("TF_CONFIG"):
            raise Refused(
                "--strategy=multiworker: the environment has no TF_CONFIG, which says who trains together. For example "
                '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}.'
            )
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    _scope.enter_context(strategy.scope())


def experiment():
    """The name of the running binary: of its module (`experiments.vae` -> `vae`) or of its file."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return [part for part in spec.name.split(".") if part != "__main__"][-1]
    return pathlib.Path(getattr(main, "__file__", "run.py")).stem


def train(model, x=None, y=None, *, name=None, best=None, **arguments):
    """Trains a compiled model as the flags say: `Run(...).fit(model, x, y, ...)`. Returns the `Run`.

    Args:
        model: a compiled `tfloop.Model`.
        x, y, arguments: as of `fit`. `epochs` and `batch_size` are the flags' if not given.
        name: of this network's own folder below the run's, where a binary trains several.
        best: the metric whose best checkpoint is kept: `"val_loss"` or `("val_accuracy", "max")`.

    Afterwards `run.history` is the history of the whole run and `run.path("samples.png")` a place in its
    folder. A binary of one network ends here, with status 0, if the run was finished before; one of several
    goes on with the trained network. With `--dry_run` and `--verify` it ends here too.

    ```
    run = tfloop.binary.train(model, x, y, validation_data=(x_val, y_val))
    save_picture(run.path("reconstructions.png"), model)
    ```
    """
    prepare()
    with refusing():
        adapt(model)
        arguments = _arguments(x, arguments)
        if FLAGS.overfit_one_batch:
            x, y, arguments = rehearsal.one_batch(x, y, arguments)
        with refusing_patterns():
            if FLAGS.parametrize:
                rehearsal.build(model, x, y, arguments)
            if FLAGS.dry_run or FLAGS.verify:
                rehearse(model, x, y, arguments)
        run = _run(name, best)
        run.fit(model, x, y, **arguments)
    if run.was_finished and name is None:
        sys.exit(0)
    return run


def _run(name, best):
    run = Run(
        workdir=_folder(name),
        seed=None,
        checkpoint_every=FLAGS.checkpoint_every,
        keep=FLAGS.keep,
        resume=FLAGS.resume,
        on_nan=FLAGS.on_nan,
        log=FLAGS.log,
        profile=FLAGS.profile,
        best=best,
        settings=flags.values(),
    )
    run.seed = FLAGS.seed  # set before the model was built
    print(f"Run folder: {shown(run.shared)}", file=sys.stderr, flush=True)
    return run


def rehearse(model, x, y, arguments):
    """What `--dry_run` and `--verify` do, and ends the process."""
    if FLAGS.dry_run:
        for line in rehearsal.dry_run(model, x, y, **arguments):
            print(line, flush=True)
        sys.exit(0)
    difference = rehearsal.verify(model, x, y, **arguments)
    if difference:
        print(f"The first {rehearsal.STEPS} steps differ when they are made again: {difference}", file=sys.stderr)
        sys.exit(1)
    print(f"The first {rehearsal.STEPS} steps made twice are equal, bit for bit.")
    sys.exit(0)


_root: pathlib.Path | None = None


def folder():
    """The run's folder: `--workdir`, or a new numbered one under `runs/<experiment>/`."""
    global _root
    if _root is None:
        _root = pathlib.Path(FLAGS.workdir) if FLAGS.workdir else workdir.numbered("runs", experiment())
    return _root


def _folder(name):
    return folder() / name if name else folder()


def _arguments(x, arguments):
    given = {"epochs": FLAGS.epochs, "verbose": _VERBOSE[FLAGS.progress]}
    if x is None or hasattr(x, "shape") or isinstance(x, dict | list | tuple):
        given["batch_size"] = FLAGS.batch_size
    return {**given, **arguments}


JIT = {"auto": "auto", "off": False, "step": "step", "loop": "loop"}
_VERBOSE = {"auto": "auto", "bar": "bar", "line": "line", "none": 0}


def adapt(model):
    """Adds what the flags ask for to a compiled model: watches, parametrisations, engine, learning rate."""
    if not isinstance(model, Model):
        raise Refused(
            f"A run trains a tfloop.Model, and {getattr(model, 'name', model)!r} is of class {type(model).__name__}. "
            "Make it one: `tfloop.Model(model.inputs, model.outputs)`."
        )
    if not model.compiled:
        raise Refused("The model is not compiled: call model.compile(optimizer=..., loss=...) before `train`.")
    if FLAGS.strategy != "none":
        model._tfloop_choices["jit_compile"] = False  # whatever the binary says, which may not have thought of replicas
    elif FLAGS["jit"].present:
        model._tfloop_choices["jit_compile"] = JIT[FLAGS.jit]
    if FLAGS["accumulate"].present:
        model._tfloop_choices["accumulate"] = FLAGS.accumulate
    for watch in FLAGS.watch:
        with named(watch, "watch"):
            model.watch(watch.pattern, watch.statistic)
    for asked in FLAGS.parametrize:
        with named(asked, "parametrize"):
            model.parametrize(asked.pattern, parametrization(asked))
    if FLAGS["learning_rate"].present and model.optimizer is not None:
        _set_learning_rate(model.optimizer, FLAGS.learning_rate)


def parametrization(asked):
    """The parametrisation that a `--parametrize` means: `max_norm:2` is `MaxNorm(2)`."""
    kind = getattr(weights, asked.name.title().replace("_", ""))
    return kind(*(int(number) if number.is_integer() else number for number in asked.numbers))


@contextlib.contextmanager
def named(flag, name):
    """What the model says against a flag is a refusal."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Refused(f"--{name}={flag}: {error}") from error


def _set_learning_rate(optimizer, rate):
    """A binary that does not read `--learning_rate` obeys it all the same; a schedule is its own affair."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # a loss scale has no rate of its own
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise Refused(
            f"--learning_rate={rate}: the model has a MultiOptimizer, whose optimizers have rates of their own. Read "
            "the flag where they are made."
        )
    with contextlib.suppress(TypeError):  # of a schedule
        optimizer.learning_rate = rate


def shown(path):
    """A path as a person would write it here."""
    try:
        return path.relative_to(pathlib.Path.cwd())
    except ValueError:
        return path


@contextlib.contextmanager
def refusing_patterns():
    """A pattern that matches nothing is a flag's fault."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(("watch(", "parametrize(")):
            raise Refused(f"--{error}") from error
        raise


@contextlib.contextmanager
def refusing():
    """Within the block what is refused, or stopped by the guard, ends the process with what it says, no traceback."""
    try:
        yield
    except (Refused, NonFiniteError, CheckpointError) as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_status", 1))
    except KeyboardInterrupt:
        sys.exit(130)
