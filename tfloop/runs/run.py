"""`Run`: one training on disk, that goes on where it was left."""

from pathlib import Path

import keras

from tfloop import replicas, reproducibility
from tfloop.model import Model
from tfloop.runs import flags, workdir
from tfloop.runs.checkpoint import Checkpoints, ReadOnly
from tfloop.runs.errors import Refused
from tfloop.runs.sentry import MOST_ROLLBACKS, NonFiniteError, RolledBack
from tfloop.runs.session import Session, refusing_watches
from tfloop.runs.signals import Stop

ON_NAN = ("stop", "skip", "rollback", "ignore")


class Run:
    """A training on disk: a folder with its configuration, records, checkpoints and logs.

    The same program run again goes on where the last was left, at the very step, and ends with the same
    bytes. Make the run before the model: it sets the seed, and finds out whether the folder can be used.

    Args:
        workdir: the run's folder; `None`: a new one, `runs/run/<n>`.
        seed: of everything random; `None`: whatever `set_seed` was told.
        checkpoint_every: steps (`100`), seconds (`"60s"`) or `"epoch"`. There is always one at the end.
        keep: how many checkpoints are kept, besides the `best`.
        resume: `"auto"` goes on with what is there, `"never"` refuses a used folder, `"restart"` moves what
            is there to `previous-<n>/`, `"partial"` takes from a checkpoint what fits the model.
        on_nan: `"stop"`, `"skip"`, `"rollback"` or `"ignore"`, for a loss or gradient that is not finite.
        log: of `"tensorboard"` and `"csv"`; `metrics.jsonl` is always written.
        spike: a `tfloop.runs.guard.SpikeRule`: a loss that it calls a spike is rolled back, as if not finite.
        best: a metric (`"val_loss"`, its minimum) or `("val_accuracy", "max")` whose best checkpoint is kept.
        profile: whether some steps are traced for TensorBoard.
        settings: what else `config.json` shall hold under `flags`; differences are refused on a resume.

    Under a `MultiWorkerMirroredStrategy` every process makes the run, in the strategy's scope, with the same
    `workdir`. The chief writes to it; the others have a folder of their own until they end, so that what is drawn
    or written after `fit` can be the same code.

    Raises `tfloop.runs.errors.Refused` when the folder cannot be used, is locked, or holds another run.

    ```python
    import tempfile

    run = tfloop.Run(tempfile.mkdtemp(), seed=1)
    model = tfloop.Model(x := keras.Input((3,)), layers.Dense(1)(x))
    model.compile("adam", "mse")
    history = run.fit(model, np.ones((8, 3)), np.ones((8, 1)), epochs=2, verbose=0)
    assert (run.folder / "summary.json").exists() and run.steps == 2
    ```
    """

    def __init__(
        self,
        workdir=None,
        seed=0,
        checkpoint_every="epoch",
        keep=3,
        resume="auto",
        on_nan="stop",
        log=("tensorboard",),
        *,
        spike=None,
        profile=False,
        best=None,
        settings=None,
    ):
        if on_nan not in ON_NAN:
            raise ValueError(f"on_nan must be one of {', '.join(ON_NAN)}, got {on_nan!r}.")
        self.every = flags.parse_every(checkpoint_every)
        self.log = flags.parse_log(log if isinstance(log, str) else ",".join(log))
        self.keep, self.resume, self.on_nan, self.spike, self.best = keep, resume, on_nan, spike, best
        self.seed, self.profile = seed, profile
        self.settings = dict(settings or {})
        self.history = None
        self._session = None
        self._place = None
        self.team = replicas.current_team()
        self.folder = self._open(workdir).folder
        self.shared = self.folder if self.team.chief else Path(workdir).absolute()
        if seed is not None:
            reproducibility.set_seed(seed)

    def _open(self, path, resume=None):
        if path is None and self.team.size > 1:
            raise Refused("Processes that train together share a run folder: give its path as `workdir`.")
        path = path if path is not None else workdir.numbered("runs", "run")
        self._place = workdir.Workdir(path, resume or self.resume) if self.team.chief else workdir.Aside()
        return self._place

    def fit(self, model, x=None, y=None, **arguments):
        """Trains a compiled `tfloop.Model`: `model.fit(x, y, ...)`, recorded, saved and resumed.

        Takes the arguments of `fit`; `epochs` counts from the run's beginning. SIGTERM and the first Ctrl-C
        finish the step, save and end with `SystemExit(143)` or `KeyboardInterrupt`.

        Returns the `keras.callbacks.History` of the whole run, of earlier processes too. Steps are counted as
        the model's updates: one that was trained before its run goes on from there.
        """
        if not isinstance(model, Model):
            raise TypeError(
                f"A run trains a tfloop.Model, and {getattr(model, 'name', model)!r} is of class "
                f"{type(model).__name__}. Make it one: `tfloop.Model(model.inputs, model.outputs)`."
            )
        if self._place is None:
            self._open(self.folder, "auto")
        callbacks = arguments.pop("callbacks", None)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            raise TypeError("A run takes a list of callbacks, not a CallbackList.")
        callbacks = list(keras.tree.flatten(callbacks or []))
        stop = Stop()
        try:
            with stop.listening(), reproducibility.ordering(self.seed):  # another run may have set its own since
                self._fit(model, x, y, callbacks, stop, {"epochs": 1, **arguments})
        finally:
            self.close()
        self.history = model.history
        return self.history

    def _fit(self, model, x, y, callbacks, stop, arguments):
        """Fits, and after a rollback goes on from the last checkpoint as a new process would."""
        skipped, random = (), reproducibility.random_state()
        for _ in range(MOST_ROLLBACKS + 1):
            self._session = Session(self, self._place, self._checkpoints(), stop, arguments, skipped)
            try:
                with self._session, refusing_watches():
                    model.fit(x, y, callbacks=[*callbacks, self._session], **arguments)
                return
            except Refused:
                self.abandon()
                raise
            except RolledBack as rolled:
                skipped = rolled.skipped.ranges
                reproducibility.set_random_state(random)
        raise NonFiniteError(f"Rolled back {MOST_ROLLBACKS} times in one process; batches left out: {skipped}.")

    def _checkpoints(self):
        if not self.team.chief:
            return ReadOnly(workdir.place_in(self.shared, workdir.CHECKPOINTS))
        found = Checkpoints(self._place.path(workdir.CHECKPOINTS), self.keep, self.best)
        found.sweep()
        return found

    @property
    def steps(self):
        """The number of completed updates."""
        return self._session.updates if self._session else 0

    @property
    def was_finished(self):
        """Whether the folder held all epochs asked for, so that `fit` had nothing to do."""
        return self._session is not None and self._session.was_finished

    def path(self, name):
        """A path in the run's folder: `run.path("samples.png")`."""
        return Path(self.folder) / name

    def abandon(self):
        """Gives a new folder back that nothing was written to."""
        if self._place is not None:
            self._place.abandon()
        self.close()

    def close(self):
        """Gives the folder back; `fit` does it at its end."""
        if self._place is not None:
            self._place.close()
            self._place = None
