"""What it costs a run to be watched: its steps with the launcher's watch and without.

One process takes real steps of the tiny model, TensorFlow's quick-start network, in calls of about
a second, and after each call does what `trainer.train` does. Watched, it says so in its record of
phases, and a second process follows that record with `launch.watch.Watch` as often as the
supervisor does; otherwise there is no record, and that process is stopped. The two ways take turns.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pairs

# isort: split
import keras
import numpy as np
import tensorflow as tf

from trainer.agreement import Agreement
from trainer.cluster import Cluster
from trainer.data.arrays import Arrays
from trainer.data.augment import scale_images
from trainer.data.batch import Data
from trainer.data.pipeline import train_batches
from trainer.model_dir import ModelDir
from trainer.objective import Objective
from trainer.observe import phases
from trainer.observe.report import Report
from trainer.state import build_state
from trainer.step import TrainStep
from trainer.strategy import build_strategy
from trainer.train import SECONDS_PER_CALL

BATCH_SIZE = 128
CALLS = 2
LAST_STEP = 10**9
# What the supervisor does while nothing happens.
WATCHER = f"""
import sys
import time
from pathlib import Path

sys.path.insert(0, {str(pairs.CHECKOUT)!r})
from launch.follower import POLL_SECONDS
from launch.watch import Watch

watch = Watch([Path(sys.argv[1])], {{}}, 60.0)
while True:
    watch.read()
    watch.stuck([int(sys.argv[2])])
    time.sleep(POLL_SECONDS)
"""


class Run:
    """A run whose steps are taken a call at a time, as the loop of `trainer.train` takes them."""

    def __init__(self, directory: str):
        random = np.random.default_rng(0)
        arrays = Arrays(
            {
                'image': random.integers(0, 256, (60_000, 28, 28, 1), np.uint8),
                'label': random.integers(0, 10, 60_000),
            }
        )
        strategy = build_strategy(cluster=Cluster(), devices_per_worker=1)
        self._state = build_state(
            strategy, _tiny, keras.optimizers.Adam, tf.TensorSpec([None, 28, 28, 1])
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        accuracy = keras.metrics.SparseCategoricalAccuracy(name='accuracy')
        self._train_step = TrainStep(strategy, self._state, Objective(loss), [accuracy])
        self._batches = train_batches(
            Data(arrays, preprocess=scale_images),
            strategy,
            seed=0,
            global_batch_size=BATCH_SIZE,
            start_step=0,
        )
        self._agreement = Agreement(strategy, Cluster())
        dirs = ModelDir(directory)
        dirs.create()
        self._report = Report(
            dirs, writes=True, step=0, last_step=LAST_STEP, batch_size=BATCH_SIZE, config_text=''
        )
        self._step = 0

    def take(self, steps: int) -> None:
        """Takes one call's steps."""
        began = time.monotonic()
        totals = self._train_step.run(self._batches, steps)
        totals.pop('skipped_steps')
        seconds = time.monotonic() - began
        self._step += steps
        self._report.add(totals, self._step - steps, steps, seconds)
        phases.enter('stepping', step=self._step, **self._report.figures(totals, steps, seconds))
        self._agreement.sum([0.0, seconds, seconds / steps])


def _tiny() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [layers.Flatten(), layers.Dense(128, activation='relu'), layers.Dense(10)], name='tiny'
    )


def main() -> None:
    options = pairs.arguments(__doc__, rounds=41)
    with tempfile.TemporaryDirectory() as directory:
        run, record = Run(directory), Path(directory) / 'worker-0.phases.jsonl'
        for _ in range(3):
            run.take(100)
        steps = max(1, round(100 * SECONDS_PER_CALL / pairs.seconds(run.take, 100)()))
        watcher = subprocess.Popen([sys.executable, '-c', WATCHER, str(record), str(os.getpid())])

        def measure(watched: bool) -> float:
            if watched:
                os.environ[phases.VARIABLE] = str(record)
            else:
                os.environ.pop(phases.VARIABLE, None)
            watcher.send_signal(signal.SIGCONT if watched else signal.SIGSTOP)
            return pairs.rate(CALLS * steps, lambda: [run.take(steps) for _ in range(CALLS)])()

        try:
            table = pairs.Table(
                'Being watched: steps with the launcher watching, against steps alone',
                'watched',
                'alone',
                markdown=options.markdown,
            )
            takes = (lambda: measure(True)), (lambda: measure(False))
            watched, alone = pairs.alternate(*takes, rounds=options.rounds)
            if watcher.poll() is not None or not record.stat().st_size:
                raise RuntimeError('nobody has watched')
        finally:
            watcher.kill()
            watcher.wait()
    table.row(f'tiny, calls of {steps} steps', watched, alone, 'steps/s', '>= 0.99')


if __name__ == '__main__':
    main()
