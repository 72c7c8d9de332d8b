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
    more = measured_extras() if FLAGS.extras else {}
    if FLAGS.json:
        pathlib.Path(FLAGS.json).write_text(json.dumps({"workloads": results, **more}, indent=2))


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
    rounds = FLAGS.rounds
    more = {"watched": extras.watched(rounds)}
    print(report.listing("Watched scalars", more["watched"], "ms a step", 1e3), flush=True)
    for name, measure in (("A run on disk", costs.runs), ("Spectral norm", costs.spectral)):
        more[name] = measure(max(1, rounds // 3))
        print(report.listing(name, more[name], "ms a step", 1e3), flush=True)
    more["starts"] = extras.starts()
    print(report.listing("In a process of their own", more["starts"], "s"), flush=True)
    more["memory"] = extras.memory()
    print(report.listing("Peak memory on 400 MB of arrays", more["memory"], "MB"), flush=True)
    more["growth"] = extras.growth(rounds)
    for name, seconds in more["growth"].items():
        print(report.listing(name, seconds, "ms a step", 1e3), flush=True)
    return more


if __name__ == "__main__":
    app.run(main)
