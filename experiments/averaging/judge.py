"""The accuracy of the weights that training left, and of their average with either statistics."""

import keras

import tfloop


class Judge(keras.callbacks.Callback):
    """Measures all three after every epoch in which there is an average.

    `curves`: name -> accuracies; `"last"`: the weights as they are; `"old_statistics"`: the average with the
    BatchNorm statistics of the last weights; `"own_statistics"`: with those measured anew.
    """

    def __init__(self, average, train, test):
        super().__init__()
        self.average, self.train, self.test = average, train, test
        self.epochs = []
        self.curves = {"last": [], "old_statistics": [], "own_statistics": []}

    def get_state(self):
        """What a checkpoint keeps, so that a resumed run draws whole curves."""
        return {"epochs": self.epochs, "curves": self.curves}

    def set_state(self, state):
        self.epochs, self.curves = list(state["epochs"]), {k: list(v) for k, v in state["curves"].items()}

    def on_epoch_end(self, epoch, logs=None):
        if int(self.average.count.numpy()) == 0:
            return
        self.epochs.append(epoch + 1)
        for name, accuracy in accuracies(self.model, self.train, self.test).items():
            self.curves[name].append(accuracy)


def accuracies(model, train, test):
    found = {"last": accuracy(model, test)}
    with tfloop.averaged(model):
        found["old_statistics"] = accuracy(model, test)
        tfloop.reestimate_batch_norm(model, train, verbose=0)
        found["own_statistics"] = accuracy(model, test)
    return found


def accuracy(model, data):
    return float((model.predict(data[0], verbose=0).argmax(-1) == data[1]).mean())
