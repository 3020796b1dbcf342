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

# isort: split
import keras
import numpy as np
import tensorflow as tf

from trainer.checkpoint import Checkpoints
from trainer.objective import Objective
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
        self._step = TrainStep(strategy, self.state, Objective(LOSS))
        random = np.random.default_rng(0)
        batch = {
            'inputs': tf.constant(random.random((BATCH_SIZE, width), np.float32)),
            'labels': tf.constant(random.integers(0, 10, BATCH_SIZE)),
            'ids': tf.range(BATCH_SIZE, dtype=tf.int64),
        }
        self._batches = iter(tf.data.Dataset.from_tensors(batch).repeat())

    @property
    def megabytes(self) -> float:
        """The size of the state."""
        return (
            sum(v.shape.num_elements() * v.dtype.size for v in self.state.variables.values()) / 1e6
        )

    def step_seconds(self) -> float:
        """Takes one step and returns how long it took."""
        return pairs.seconds(self._step.run, self._batches, 1)()


def measure(training: Training, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Returns milliseconds: save() of ours, what later steps lose beside it, save() of theirs."""
    number = 0
    lost: list[float] = []
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        checkpoints = Checkpoints(ours)
        manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(variables=training.state.variables), theirs, max_to_keep=3
        )

        def save_ours() -> float:
            nonlocal number
            number += 1
            pace = statistics.median(training.step_seconds() for _ in range(7))
            begin = time.perf_counter()
            checkpoints.save(training.state.snapshot(), {'step': number})
            blocked = time.perf_counter() - begin
            beside = []
            while any(thread.name == f'save-{number}' for thread in threading.enumerate()):
                beside.append(training.step_seconds())
            lost.append(1e3 * (sum(beside) - len(beside) * pace))
            return 1e3 * blocked

        def save_theirs() -> float:
            training.step_seconds()
            return 1e3 * pairs.seconds(manager.save)()

        blocked, synchronous = pairs.alternate(save_ours, save_theirs, rounds=rounds)
        checkpoints.close()
    return blocked, lost[1:], synchronous  # The first was a warm-up.


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
        blocked, lost, synchronous = measure(training, options.rounds)
        whole = [a + b for a, b in zip(blocked, lost, strict=True)]
        table.row(f'{training.megabytes:.0f} MB: save() blocks', blocked, synchronous, 'ms')
        table.row(
            f'{training.megabytes:.0f} MB: with the steps beside it', whole, synchronous, 'ms'
        )


if __name__ == '__main__':
    main()
