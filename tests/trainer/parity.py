"""The same training on different topologies; also the program of one worker of such a run.

usage: python tests/trainer/parity.py OUT_DIR DEVICES_PER_WORKER        (with TF_CONFIG)
"""

import functools
import pickle
import sys
from pathlib import Path

STEPS, BATCH, EXAMPLES, SEED = 20, 32, 100, 3


def cases():
    """Name -> (model, optimizer, data, further arguments of TrainStep)."""
    import keras
    import numpy as np

    from trainer.data.arrays import Arrays
    from trainer.data.batch import Data

    layers = keras.layers
    rng = np.random.default_rng(0)
    arrays = {
        'image': rng.normal(size=(EXAMPLES, 6, 6, 1)).astype(np.float32),
        'label': rng.integers(0, 4, EXAMPLES),
        'weight': (rng.random(EXAMPLES) * (rng.random(EXAMPLES) > 0.3)).astype(np.float32),
        'words': rng.integers(0, 50, (EXAMPLES, 7)),
    }
    poisoned = {**arrays, 'image': arrays['image'].copy()}
    poisoned['image'][17, 2, 2, 0] = np.inf
    data = Data(Arrays(arrays))
    sgd = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9)

    def dense(*middle, l2=None):
        return keras.Sequential(
            [
                layers.Flatten(),
                layers.Dense(16, activation='tanh', kernel_regularizer=l2),
                *middle,
                layers.Dense(4),
            ]
        )

    def wide():
        return dense(layers.Dense(1024, activation='tanh'))  # large enough for a fused kernel

    def words():
        return keras.Sequential(
            [layers.Embedding(50, 8), layers.GlobalAveragePooling1D(), layers.Dense(4)]
        )

    def normalised():
        return dense(layers.BatchNormalization(synchronized=True))

    clipped = functools.partial(sgd, global_clipnorm=0.05)
    return {
        'plain': (dense, sgd, data, {}),
        'adam': (dense, functools.partial(keras.optimizers.Adam, 1e-3, epsilon=1e-3), data, {}),
        'fused_adam': (wide, functools.partial(keras.optimizers.Adam, 1e-3), data, {}),
        'fused_sgd': (wide, functools.partial(sgd, nesterov=True), data, {}),
        'clipping': (dense, clipped, data, {}),
        'accumulation': (dense, sgd, data, {'accumulate': 4}),
        'weights': (dense, sgd, Data(Arrays(arrays), weight='weight'), {}),
        'weights_and_accumulation': (
            dense,
            clipped,
            Data(Arrays(arrays), weight='weight'),
            {'accumulate': 2},
        ),
        'l2': (lambda: dense(l2=keras.regularizers.L2(0.01)), sgd, data, {}),
        'batch_norm': (normalised, sgd, data, {}),
        'embedding': (words, sgd, Data(Arrays(arrays), inputs='words'), {}),
        'poisoned_record': (dense, sgd, Data(Arrays(poisoned)), {}),
    }


def run(strategy, name):
    """Returns the loss of each step, the final variables, and the number of skipped steps."""
    import keras
    import numpy as np

    from trainer.data.batch import batch_spec
    from trainer.data.pipeline import train_batches
    from trainer.objective import Objective
    from trainer.state import build_state
    from trainer.step import TrainStep

    model, optimizer, data, options = cases()[name]
    state = build_state(strategy, model, optimizer, batch_spec(data)['inputs'], seed=SEED)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name='accuracy')
    step = TrainStep(strategy, state, Objective(loss), [accuracy], seed=SEED, **options)
    batches = train_batches(data, strategy, seed=SEED, global_batch_size=BATCH, start_step=0)
    results = [step.results(step.run(batches, 1)) for _ in range(STEPS)]
    return {
        'losses': np.array([r['loss'] for r in results]),
        'norms': np.array([r['gradient_norm'] for r in results]),
        'accuracies': np.array([r['accuracy'] for r in results]),
        'variables': {path: np.array(value) for path, value in state.snapshot().items()},
        'skipped': int(state.skipped.numpy()),
    }


def main(out_dir, devices_per_worker):
    from trainer.cluster import from_environ
    from trainer.meeting import meet
    from trainer.strategy import build_strategy

    cluster = from_environ()
    meet(cluster, digest='parity', deadline_seconds=120)
    strategy = build_strategy(cluster=cluster, devices_per_worker=devices_per_worker)
    results = {name: run(strategy, name) for name in cases()}
    Path(out_dir, f'{cluster.index}.pickle').write_bytes(pickle.dumps(results))


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1], int(sys.argv[2]))
