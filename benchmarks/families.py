"""Training of each family of models, against Keras's `fit` on the same model and data.

One device, Adam, float32, an accuracy, op determinism as Phalanx sets it. `fit` gets arrays that
were prepared beforehand, or a `tf.data` pipeline that prepares them as Phalanx does, whichever is
faster here; it shuffles, as Phalanx does. `--only=resnet` measures one family.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import pairs

# isort: split
import keras
import numpy as np
import tensorflow as tf

from trainer.cluster import Cluster
from trainer.data.arrays import Arrays
from trainer.data.augment import scale_images
from trainer.data.batch import Data, batch_spec, model_inputs
from trainer.data.pipeline import train_batches
from trainer.data.table_features import table_features
from trainer.models.linear import linear
from trainer.models.mlp import mlp
from trainer.models.resnet import resnet
from trainer.models.transformer_lm import transformer_lm
from trainer.models.wide_and_deep import wide_and_deep
from trainer.objective import Objective
from trainer.state import build_state
from trainer.step import TrainStep
from trainer.strategy import build_strategy

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclasses.dataclass(frozen=True)
class Family:
    """What is trained on what.

    Attributes:
        model: builds it.
        data: in memory, a few seconds' worth, of whole batches.
        batch_size: examples a step.
    """

    model: Callable[[], keras.Model]
    data: Data
    batch_size: int = 128

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.data.source.num_examples // self.batch_size


def image_data(count: int) -> Data:
    """Something of the shape of MNIST."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 28, 28, 1), np.uint8)
    labels = random.integers(0, 10, count)
    return Data(Arrays({'image': images, 'label': labels}), preprocess=scale_images)


def token_data(count: int, length: int) -> Data:
    """Windows of bytes, and the byte after each."""
    tokens = np.random.default_rng(0).integers(0, 257, (count, length + 1), np.int32)
    windows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:]}
    return Data(Arrays(windows), 'tokens', label='targets')


def table_data(count: int) -> Data:
    """Something of the shape of a table of thirty numbers."""
    random = np.random.default_rng(0)
    columns = {f'x{i}': random.normal(size=count).astype(np.float32) for i in range(30)}
    source = Arrays({**columns, 'label': random.integers(0, 10, count)})
    return Data(source, 'features', preprocess=table_features(source))


FAMILIES: dict[str, Callable[[], Family]] = {
    'resnet': lambda: Family(functools.partial(resnet, 10, (28, 28, 1)), image_data(10 * 128)),
    # As in `runs/text.gin`.
    'transformer': lambda: Family(
        functools.partial(transformer_lm, 257, window=128), token_data(10 * 16, 128), 16
    ),
    'linear': lambda: Family(functools.partial(linear, 10), table_data(200 * 128)),
    'mlp': lambda: Family(functools.partial(mlp, 10), table_data(200 * 128)),
    'wide_and_deep': lambda: Family(functools.partial(wide_and_deep, 10), table_data(200 * 128)),
}


def ours(strategy: tf.distribute.Strategy, family: Family) -> Callable[[], object]:
    """Returns a function that trains an epoch with Phalanx."""
    spec = batch_spec(family.data)['inputs']
    state = build_state(strategy, family.model, keras.optimizers.Adam, spec)
    objective = Objective(LOSS)
    objective.find_names(strategy, state, batch_spec(family.data, family.batch_size))
    step = TrainStep(strategy, state, objective, [keras.metrics.SparseCategoricalAccuracy()])
    batches = train_batches(
        family.data, strategy, seed=0, global_batch_size=family.batch_size, start_step=0
    )
    return lambda: step.results(step.run(batches, family.steps))


def ways_to_fit(
    strategy: tf.distribute.Strategy, family: Family
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields names and functions that train an epoch with `fit`."""
    data = family.data
    stored = data.source.fetch(tf.range(data.source.num_examples, dtype=tf.int64))

    def prepared(features):
        return model_inputs(data, features), features[data.label]

    inputs, labels = tf.nest.map_structure(np.asarray, prepared(stored))
    dataset = (
        tf.data.Dataset.from_tensor_slices(stored)
        .shuffle(data.source.num_examples, seed=0)
        .batch(family.batch_size)
        .map(prepared, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )
    arrays = {'x': inputs, 'y': labels, 'batch_size': family.batch_size}
    for name, given in {'NumPy': arrays, 'tf.data': {'x': dataset}}.items():
        with strategy.scope():
            model = family.model()
            accuracy = keras.metrics.SparseCategoricalAccuracy()
            model.compile(keras.optimizers.Adam(), LOSS, metrics=[accuracy])
        yield name, functools.partial(model.fit, **given, verbose=0)


def fastest_fit(
    strategy: tf.distribute.Strategy, family: Family
) -> tuple[str, Callable[[], object]]:
    """Returns the way with the shortest epoch of three, after a first."""
    ways = dict(ways_to_fit(strategy, family))
    took = {name: [] for name in ways}
    for _ in range(4):
        for name, fit in ways.items():
            took[name].append(pairs.seconds(fit)())
    best = min(took, key=lambda name: min(took[name][1:]))
    return best, ways[best]


def main() -> None:
    options = pairs.arguments(__doc__, rounds=15, only='')
    strategy = build_strategy(cluster=Cluster(), kind='one_device')
    table = pairs.Table('Families, against fit', 'Phalanx', 'fit', markdown=options.markdown)
    for name, make in FAMILIES.items():
        if options.only not in ('', name):
            continue
        family = make()
        own = ours(strategy, family)
        how, fit = fastest_fit(strategy, family)
        count = family.steps * family.batch_size
        takes = pairs.rate(count, own), pairs.rate(count, fit)
        taken = pairs.alternate(*takes, rounds=options.rounds)
        table.row(f'{name} ({how})', *taken, 'examples/s', '>= 1.0')


if __name__ == '__main__':
    main()
