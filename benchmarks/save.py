"""How long a checkpoint holds up training, against a synchronous `tf.train.CheckpointManager`.

Both save all variables of the same model and its Adam optimizer to the same disk. Ours returns
after `State.snapshot` and starting a thread, which hashes, writes, reads back and syncs the file
while the next steps run; what it costs them is measured too: the time that steps take from the
save until its thread has ended, beyond what as many steps took before. The manager writes and
neither verifies nor syncs.
"""

import statistics
import tempfile
import threading
import time

import pairs
import keras
import numpy as np
import tensorflow as tf

from trainer.checkpoint import Checkpoints
from trainer.state import State, build_state
from trainer.step import TrainStep

BATCH_SIZE = 32
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def model(width: int) -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [layers.Dense(width, activation='relu'), layers.Dense(width), layers.Dense(10)]
    )


class Training:
    """A run with a state of about 24 * width**2 bytes."""

    def __init__(self, width: int):
        strategy = tf.distribute.OneDeviceStrategy('CPU:0')
        self.state: State = build_state(
            strategy,
            lambda: model(width),
            keras.optimizers.Adam,
            tf.TensorSpec([None, width]),
        )
        self._step = TrainStep(strategy, self.state, LOSS)
        random = np.random.default_rng(0)
        batch = {
            'inputs': tf.constant(random.random((BATCH_SIZE, width), np.float32)),
            'labels': tf.constant(random.integers(0, 10, BATCH_SIZE)),
            'ids': tf.range(BATCH_SIZE, dtype=tf.int64),
        }
        self._batches = iter(tf.data.Dataset.from_tensors(batch).repeat())

    def steps(self, count: int) -> float:
        """Takes steps, one a call; returns how long they took in seconds."""
        begin = time.perf_counter()
        for _ in range(count):
            self._step.run(self._batches, tf.constant(1, tf.int64))
        return time.perf_counter() - begin


def main() -> None:
    options = pairs.arguments(__doc__, rounds=9)
    table = pairs.Table(
        'Saving: how long it holds up training',
        'Phalanx',
        'CheckpointManager',
        markdown=options.markdown,
    )
    for width in (2048, 4096):
        training = Training(width)
        megabytes = training.state.num_bytes / 1e6
        training.steps(3)
        number = 0
        slowed: list[float] = []
        with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
            checkpoints = Checkpoints(ours)
            manager = tf.train.CheckpointManager(
                tf.train.Checkpoint(variables=training.state.variables), theirs, max_to_keep=3
            )

            def save_ours() -> float:
                nonlocal number
                number += 1
                pace = statistics.median(training.steps(1) for _ in range(5))
                begin = time.perf_counter()
                checkpoints.save(training.state.snapshot(), {'step': number, 'metrics': {}})
                blocked = time.perf_counter() - begin
                steps, spent = 0, 0.0
                while any(thread.name == f'save-{number}' for thread in threading.enumerate()):
                    spent += training.steps(1)
                    steps += 1
                slowed.append(1e3 * (spent - steps * pace))
                return 1e3 * blocked

            def save_theirs() -> float:
                training.steps(5)
                return 1e3 * pairs.seconds(manager.save)()

            blocked, synchronous = pairs.alternate(save_ours, save_theirs, rounds=options.rounds)
            checkpoints.close()
        whole = [b + s for b, s in zip(blocked, slowed[1:], strict=True)]  # The first is a warm-up.
        table.row(f'{megabytes:.0f} MB: save() blocks', blocked, synchronous, 'ms')
        table.row(f'{megabytes:.0f} MB: and with what later steps lose', whole, synchronous, 'ms')


if __name__ == '__main__':
    main()
