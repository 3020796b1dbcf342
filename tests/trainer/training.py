"""Steps of small models, without the loop of `train` around them."""

import functools

import keras
import numpy as np
import tensorflow as tf

from trainer.checkpoint import state_sha256
from trainer.data.arrays import Arrays
from trainer.data.batch import Data, batch_spec
from trainer.data.pipeline import train_batches
from trainer.objective import Objective, WholeStep
from trainer.state import build_state
from trainer.step import TrainStep

CLASSES, FEATURES, EXAMPLES, BATCH = 4, 5, 24, 8
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def arrays(num_examples=EXAMPLES):
    rng = np.random.default_rng(0)
    return {
        'image': rng.normal(size=(num_examples, FEATURES)).astype(np.float32),
        'label': rng.integers(0, CLASSES, num_examples),
    }


def make_data(changes=(), **options):
    """The standard examples with some arrays changed or added."""
    return Data(Arrays({**arrays(), **dict(changes)}), **options)


def dense():
    return keras.Sequential([keras.layers.Dense(CLASSES)])


def noisy():
    """Dropout, and batch normalisation whose statistics differ from replica to replica."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Dense(8, activation='relu'),
            layers.BatchNormalization(),
            layers.Dropout(0.4),
            layers.Dense(CLASSES, dtype='float32'),
        ]
    )


def sgd(*args, **options):
    return functools.partial(keras.optimizers.SGD, *(args or (0.1,)), **options)


def no_loss(labels, outputs):
    """Leaves the penalties and the optimizer's own decay alone at work."""
    return 0.0 * tf.reduce_sum(outputs, axis=-1)


class Training:
    """A state, its step, and the batches it reads."""

    def __init__(
        self,
        strategy,
        model=dense,
        optimizer=None,
        data=None,
        *,
        loss=LOSS,
        metrics=(),
        train_step=None,
        groups=(),
        batch_size=BATCH,
        precision='float32',
        seed=0,
        **options,
    ):
        self.strategy, self.seed, self.batch_size = strategy, seed, batch_size
        self.data = data or make_data()
        spec = batch_spec(self.data)['inputs']
        self.state = build_state(
            strategy,
            model,
            optimizer or sgd(),
            spec,
            groups=groups,
            seed=seed,
            precision=precision,
        )
        objective = Objective(loss) if train_step is None else WholeStep(train_step)
        share = batch_size // strategy.num_replicas_in_sync
        objective.find_names(strategy, self.state, batch_spec(self.data, share))
        self.step = TrainStep(strategy, self.state, objective, metrics, seed=seed, **options)
        self.start_at(0)

    def start_at(self, step):
        self.state.step.assign(step)
        self.batches = train_batches(
            self.data,
            self.strategy,
            seed=self.seed,
            global_batch_size=self.batch_size,
            start_step=step,
        )

    def totals(self, num_steps=1):
        return self.step.run(self.batches, num_steps)

    def run(self, num_steps=1):
        return self.step.results(self.totals(num_steps))

    def variables(self):
        return {path: np.array(value) for path, value in self.state.snapshot().items()}

    def weights(self):
        """The trainable variables alone."""
        return {path: value.copy() for path, value in self.state.weights().items()}

    def sha256(self):
        return state_sha256(self.state.snapshot())

    def copies(self, variable):
        """The value of a variable on each replica."""
        if isinstance(variable, keras.Variable):
            variable = variable.value
        return [v.numpy() for v in self.strategy.experimental_local_results(variable)]


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=rtol, atol=atol, err_msg=name)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
