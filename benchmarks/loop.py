"""The training loop against one written by hand, and against Keras's `fit`.

Ours is `TrainStep.run` as `trainer.train` calls it: many steps a call, with loss, accuracy,
gradient norm, a check that all is finite, and the clock of the input. By hand is a `tf.function`
with `tf.range` around `strategy.run`, on the same model, optimizer and iterator, with a Keras mean
of the loss and an accuracy, and without the rest. `fit` gets the same model, optimizer and batch
size, from NumPy arrays or a `tf.data` pipeline, whichever is faster here. Op determinism, Phalanx's
default, is on for all of them; Keras then compiles nothing with XLA.

The tiny model is the network of TensorFlow's quick start for beginners, without its dropout (28x28
images, 128 units, 101,770 weights); the smallest (8x8 images, 32 units, 2,410 weights) is next to
nothing but overhead; the CNN is that of `trainer.models.cnn` (347,114 weights).
"""

import functools
import itertools

import pairs

# isort: split
import keras
import numpy as np
import tensorflow as tf

from trainer.cluster import Cluster
from trainer.data.arrays import Arrays
from trainer.data.augment import scale_images
from trainer.data.batch import Data
from trainer.data.pipeline import train_batches
from trainer.models.cnn import cnn
from trainer.objective import Objective
from trainer.state import build_state
from trainer.step import TrainStep
from trainer.strategy import build_strategy

BATCH_SIZE = 128
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SECONDS_PER_CALL = 0.5


def mlp(units: int, name: str) -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [layers.Flatten(), layers.Dense(units, activation='relu'), layers.Dense(10)], name=name
    )


def arrays(rows: int) -> dict[str, np.ndarray]:
    """Something of the shape of MNIST, or of smaller images."""
    random = np.random.default_rng(0)
    return {
        'image': random.integers(0, 256, (60_000, rows, rows, 1), np.uint8),
        'label': random.integers(0, 10, 60_000),
    }


def our_loop(strategy, model, shape, iterator, precision='float32', **options):
    """Returns a function that takes steps with Phalanx; `options` are those of `TrainStep`."""
    spec = tf.TensorSpec([None, *shape])
    state = build_state(strategy, model, keras.optimizers.Adam, spec, precision=precision)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name='accuracy')
    step = TrainStep(strategy, state, Objective(LOSS), [accuracy], **options)

    def take(steps: int) -> dict[str, float]:
        return step.results(step.run(iterator, steps))

    return take


def bare_loop(strategy, model, shape, iterator, batch_size=BATCH_SIZE):
    """Returns a function that takes steps as one would write it by hand."""
    with strategy.scope():
        net = model()
        net.build((None, *shape))
        optimizer = keras.optimizers.Adam()
        optimizer.build(net.trainable_variables)
        mean_loss = keras.metrics.Mean()
        accuracy = keras.metrics.SparseCategoricalAccuracy()
    losses_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction='none')
    replicas = strategy.num_replicas_in_sync

    def replica(batch):
        with tf.GradientTape() as tape:
            outputs = net(batch['inputs'], training=True)
            losses = losses_of(batch['labels'], outputs)
            loss = tf.reduce_sum(losses) / batch_size + sum(net.losses) / replicas
        gradients = tape.gradient(loss, net.trainable_variables)
        optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))
        mean_loss.update_state(losses)
        accuracy.update_state(batch['labels'], outputs)

    @tf.function
    def run(iterator, steps):
        for _ in tf.range(steps):
            strategy.run(replica, args=(next(iterator),))

    def take(steps: int) -> dict[str, float]:
        run(iterator, tf.constant(steps, tf.int64))
        values = {'loss': float(mean_loss.result()), 'accuracy': float(accuracy.result())}
        mean_loss.reset_state()
        accuracy.reset_state()
        return values

    return take


def ways_to_fit(strategy, model, features, steps_per_execution, batch_size=BATCH_SIZE):
    """Yields ways to call `fit`: name, and a function that trains some epochs."""
    images, labels = features['image'], features['label']
    as_numpy = {'x': images.astype(np.float32) / 255, 'y': labels, 'batch_size': batch_size}
    dataset = (
        tf.data.Dataset.from_tensor_slices((images, labels))
        .shuffle(len(labels), seed=0)
        .batch(batch_size)
        .map(lambda x, y: (tf.cast(x, tf.float32) / 255, y), num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )
    inputs = {'NumPy': as_numpy, 'tf.data': {'x': dataset}}
    for name, data in inputs.items():
        with strategy.scope():
            net = model()
            net.build((None, *images.shape[1:]))
            net.compile(
                keras.optimizers.Adam(),
                LOSS,
                metrics=['accuracy'],
                steps_per_execution=steps_per_execution,
            )
        yield name, functools.partial(net.fit, **data, verbose=0)


def fastest_fit(*how):
    """Returns name and function of the way with the shortest epoch of three, after a first."""
    ways, took = {}, {}
    for name, fit in ways_to_fit(*how):
        fit()
        ways[name] = fit
    for _ in range(3):
        for name, fit in ways.items():
            took[name] = min(took.get(name, float('inf')), pairs.seconds(fit)())
    best = min(took, key=took.get)
    return best, ways[best]


def against_bare(
    strategy, model, rows: int, steps: int | None, rounds: int, builds: int
) -> list[list[float]]:
    """Returns steps a second of Phalanx and of the bare loop; without `steps`, in half-seconds."""
    shape = (rows, rows, 1)
    data = Data(Arrays(arrays(rows)), preprocess=scale_images)
    batches = train_batches(data, strategy, seed=0, global_batch_size=BATCH_SIZE, start_step=0)
    taken: list[list[float]] = [[], []]
    # Two loops of the same code can differ by some percent, so several of each are built.
    for _ in range(builds):
        loops = [make(strategy, model, shape, batches) for make in (our_loop, bare_loop)]
        for take in loops:
            take(50)
        if steps is None:
            quickest = min(pairs.seconds(loops[1], 50)() for _ in range(3))
            steps = max(1, round(50 * SECONDS_PER_CALL / quickest))
        takes = [pairs.rate(steps, take, steps) for take in loops]
        for old, new in zip(taken, pairs.alternate(*takes, rounds=rounds), strict=True):
            old += new
    return taken


def against_fit(strategy, model, rows: int, steps_per_execution: int, rounds: int):
    """Returns what fit was given, and steps a second of Phalanx and of fit."""
    features = arrays(rows)
    data = Data(Arrays(features), preprocess=scale_images)
    batches = train_batches(data, strategy, seed=0, global_batch_size=BATCH_SIZE, start_step=0)
    ours = our_loop(strategy, model, (rows, rows, 1), batches)
    how, fit = fastest_fit(strategy, model, features, steps_per_execution)
    steps = -(-len(features['label']) // BATCH_SIZE)
    takes = pairs.rate(steps, ours, steps), pairs.rate(steps, fit)
    return how, pairs.alternate(*takes, rounds=rounds)


# Name -> model, rows of its square images.
MODELS = {
    'smallest': (functools.partial(mlp, 32, 'smallest'), 8),
    'tiny': (functools.partial(mlp, 128, 'tiny'), 28),
    'CNN': (functools.partial(cnn, 10), 28),
}


def main() -> None:
    options = pairs.arguments(__doc__, rounds=15, builds=3)
    strategies = {
        # The first makes the devices.
        '2 devices': build_strategy(cluster=Cluster(), devices_per_worker=2),
        '1 device': build_strategy(cluster=Cluster(), kind='one_device'),
    }
    table = pairs.Table(
        'Training loop, against a loop by hand', 'Phalanx', 'by hand', markdown=options.markdown
    )
    cases = [*itertools.product(MODELS, ('1 device', '2 devices'), (None,))]
    for name, devices, steps in [*cases, ('tiny', '1 device', 100)]:
        taken = against_bare(
            strategies[devices], *MODELS[name], steps, options.rounds, options.builds
        )
        calls = f', calls of {steps} steps' if steps else ''
        target = '' if name == 'smallest' else '>= 0.97'
        table.row(f'{name}, {devices}{calls}', *taken, 'steps/s', target)
    table = pairs.Table('Training loop, against fit', 'Phalanx', 'fit', markdown=options.markdown)
    for name, devices, steps_per_execution, target in (
        ('smallest', '1 device', 1, '>= 1.5'),
        ('tiny', '1 device', 1, '>= 1.5'),
        ('tiny', '2 devices', 1, '>= 1.5'),
        ('tiny', '1 device', 100, ''),
    ):
        how, taken = against_fit(
            strategies[devices], *MODELS[name], steps_per_execution, options.rounds
        )
        many = f', {steps_per_execution} steps/call' if steps_per_execution > 1 else ''
        table.row(f'{name}, {devices} ({how}{many})', *taken, 'steps/s', target)


if __name__ == '__main__':
    main()
