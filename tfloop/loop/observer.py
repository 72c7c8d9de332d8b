"""Observer: what accompanies a fit between its chunks, and may bound, log, save and resume it.

A `Position` is where a fit stands: so many batches of an epoch are done, and this is what they measured.
"""

import dataclasses

import keras

from tfloop.loop.record import Aggregate


@dataclasses.dataclass
class Position:
    """`batch` batches of epoch `epoch` are done; `aggregate` holds what they measured."""

    epoch: int = 0
    batch: int = 0
    aggregate: Aggregate = dataclasses.field(default_factory=Aggregate)


class Observer(keras.callbacks.Callback):
    """Given to `fit` as a callback; this one does nothing. The loop calls

        on_built(loop, source, callbacks)
                                once: all variables are there, the engine is not chosen yet
        start(position)         once, after `on_train_begin`: where to begin, with the state as it was there
        on_place(drew)          then, when the source has been read up to that epoch: whether reading it drew from the
                                global random numbers of Python or NumPy; None if nothing was read, and it yet may
        enter(position)         at the beginning of an epoch, after `on_epoch_begin`
        leaves_out(position)    before each chunk: whether the next batch is passed over
        limit(steps)            then: how many steps the chunk may have
        before_chunk()          when the batches are there: from now on variables move
        on_chunk(record, feed)  after it, before the callbacks see it; gives the record to go on with
        after_chunk()           when they have seen it: what is done by now is done
        before_end(validates)   when an epoch's batches are done, before it is validated and the callbacks see its end
        on_validation()         between chunks of the validation
        on_epoch(epoch, logs)   when an epoch is over, after the callbacks
        finish()                when the last one is, before what the end of training does to the weights

    An exception that one of them raises ends the fit. `was_finished`, from `on_built` on: whether there is nothing left
    to train; then the other callbacks hear nothing.
    """

    was_finished = False

    def on_built(self, loop, source, callbacks):
        pass

    def start(self, position):
        return position

    def on_place(self, drew):
        pass

    def enter(self, position):
        pass

    def leaves_out(self, position):
        return False

    def limit(self, steps):
        return steps

    def before_chunk(self):
        pass

    def on_chunk(self, record, feed):
        return record

    def after_chunk(self):
        pass

    def before_end(self, validates):
        pass

    def on_validation(self):
        pass

    def on_epoch(self, epoch, logs):
        pass

    def finish(self):
        pass


def observer_of(callbacks):
    """The observer among callbacks, or one that does nothing. Raises `ValueError` for two of them."""
    found = [c for c in callbacks if isinstance(c, Observer)]
    if len(found) > 1:
        raise ValueError("A fit has one observer: it cannot be part of two runs.")
    return found[0] if found else Observer()
