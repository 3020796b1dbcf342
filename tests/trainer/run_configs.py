"""Every file of configs/runs for a few steps on two replicas, and exports; a program.

usage: python tests/trainer/run_configs.py DIR     where `write_data` has been

Those that `source_runs` trains, on several topologies, are left to it. Prints a line for each run.
"""

import struct
import sys
from pathlib import Path

STEPS = 3
# Each is proved in a process of its own; the other models are exported by tests of the export.
EXPORTED = ('breast_cancer', 'digits_gan', 'digits_simclr')
_SMALL = [f'STEPS = {STEPS}', 'BATCH_SIZE = 8', 'train.max_steps = 3', 'DEVICES = 2']


def cases(data: Path) -> dict[str, list[str]]:
    """Run -> what its user has to say."""
    images, mnist = f"DATA_DIR = '{data}/images'", f"DATA_DIR = '{data}/mnist'"
    penguins = [f"FILES = '{data}/penguins.csv'", "LABEL = 'body_mass_g'"]
    return {
        'breast_cancer': [],
        'digits_gan': [],
        'digits_mlp': [],
        'digits_resnet': [],
        'digits_simclr': [],
        'digits_vit': [],
        'fine_tune': [images, 'NUM_CLASSES = 2', 'INPUT_SHAPE = (32, 32, 3)', 'WEIGHTS = None'],
        'mnist_cnn': [mnist],
        'mnist_resnet': [mnist],
        'table_regression': penguins,
        'text_folder': [f"DATA_DIR = '{data}/texts'", 'NUM_CLASSES = 2', 'LENGTH = 64'],
    }


def write_data(data: Path) -> None:
    """Writes a few examples of each kind."""
    import numpy as np
    import tensorflow as tf

    from trainer.data import table
    from trainer.data.digits import digits

    lines = Path(table.__file__).with_name('penguins.csv').read_text().splitlines()
    place = lines[0].split(',').index('body_mass_g')
    weighed = [line for line in lines if line.split(',')[place] not in ('', 'NA')]
    (data / 'penguins.csv').write_text('\n'.join(weighed) + '\n')
    (data / 'mnist').mkdir()
    for split, prefix in (('train', 'train'), ('test', 't10k')):
        features = digits(split).fetch(tf.range(60, dtype=tf.int64))
        pixels = np.pad(features['image'].numpy()[..., 0] * 15, ((0, 0), (10, 10), (10, 10)))
        labels = features['label'].numpy().astype(np.uint8)
        for kind, array in ((f'{prefix}-images-idx3', pixels), (f'{prefix}-labels-idx1', labels)):
            header = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
            content = header + array.astype(np.uint8).tobytes()
            (data / 'mnist' / f'{kind}-ubyte').write_bytes(content)
        for number in range(20):
            for root, name in (('images', f'{number}.png'), ('texts', f'{number}.txt')):
                folder = data / root / split / 'ab'[number % 2]
                folder.mkdir(parents=True, exist_ok=True)
                image = np.repeat(pixels[number][..., None], 3, axis=-1).astype(np.uint8)
                content = tf.io.encode_png(image).numpy()
                (folder / name).write_bytes(content if root == 'images' else b'word ' * number)


def main(directory: str) -> None:
    from trainer import gin_files, gin_setup
    from trainer.cluster import Cluster
    from trainer.strategy import build_strategy

    data, cluster = Path(directory), Cluster()
    strategy = build_strategy(cluster=cluster, devices_per_worker=2)
    for name, said in cases(data).items():
        model_dir = data / 'runs' / name
        lines = [*said, *_SMALL, f"MODEL_DIR = '{model_dir}'"]
        gin_setup.load(gin_files.read([f'runs/{name}.gin'], lines), unused=('evaluate',))
        result = gin_setup.train(strategy=strategy, cluster=cluster, config=gin_setup.record)
        exported = gin_setup.export() if name in EXPORTED else '-'
        print(name, strategy.num_replicas_in_sync, result.step, exported, flush=True)


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1])
