"""python -m experiments.benchmark [--workloads=tabular,vae] [--json=results.json]"""

import json
import pathlib

import keras
from absl import app, flags

from experiments.benchmark import costs, extras, report
from experiments.benchmark.rivals import interleaved, rivals
from experiments.benchmark.workloads import WORKLOADS

FLAGS = flags.FLAGS
flags.DEFINE_list("workloads", list(WORKLOADS), "What to train. An empty list leaves the extras alone.")
flags.DEFINE_bool("extras", True, "Also watched scalars, cold starts, imports, memory and growth.")
flags.DEFINE_integer("rounds", 15, "Measurements of each rival.", lower_bound=1)
flags.DEFINE_string("json", None, "File for the results.")
flags.DEFINE_string("picture", "build/benchmark.png", "File for the picture.")


@flags.validator("workloads", message=f"Expected some of {', '.join(WORKLOADS)}.")
def known(names):
    return all(name in WORKLOADS for name in names)


def main(argv):
    results = {name: measured(WORKLOADS[name]) for name in FLAGS.workloads}
    if results:
        print(report.table(results), flush=True)
        pathlib.Path(FLAGS.picture).parent.mkdir(parents=True, exist_ok=True)
        report.picture(results, FLAGS.picture)
    written = {"workloads": results}
    for name, found in measured_extras() if FLAGS.extras else ():
        written[name] = found
        write(written)
    write(written)


def write(results):
    """Writes what there is so far, so that an interrupted run has not been for nothing."""
    if FLAGS.json:
        pathlib.Path(FLAGS.json).write_text(json.dumps(results, indent=2))


def measured(workload):
    """The medians of all rivals on one workload, in turns."""
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    found = rivals(workload, workload.data())
    seconds = interleaved(found, FLAGS.rounds)
    which = {name: which for name, (_, which) in found.items()}
    share = seconds["tfloop"] / seconds["keras"]
    print(f"{workload.name}: {1e3 * seconds['tfloop']:.3g} ms a step, {share:.2f} of Keras' fit", flush=True)
    return {"seconds": seconds, "which": which, "target": workload.target}


def measured_extras():
    """Prints what is measured besides the time of a step, and yields `(name, seconds or megabytes)`."""
    rounds = FLAGS.rounds
    for name, measure, unit, scale in (
        ("Watched scalars", lambda: extras.watched(rounds), "ms a step", 1e3),
        ("A run on disk", lambda: costs.runs(rounds), "ms a step", 1e3),
        ("Checkpoints", lambda: costs.checkpoints(rounds), "ms a step", 1e3),
        ("Single batches", lambda: costs.single_batches(2 * rounds), "ms a batch", 1e3),
        ("Spectral norm", lambda: costs.spectral(2 * rounds), "ms a step", 1e3),
        ("In a process of their own", extras.starts, "s", 1),
        ("Peak memory on 400 MB of arrays", extras.memory, "MB", 1),
    ):
        found = measure()
        print(report.listing(name, found, unit, scale), flush=True)
        yield name, found
    for name, seconds in extras.growth(rounds):
        print(report.listing(name, seconds, "ms a step", 1e3), flush=True)
        yield name, seconds


if __name__ == "__main__":
    app.run(main)
