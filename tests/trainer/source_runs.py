"""A short run on every kind of source, on one topology; the program of one worker of it.

usage: python tests/trainer/source_runs.py DATA_DIR OUT_DIR DEVICES_PER_WORKER [SEED]  (TF_CONFIG)

With a seed each run is ended after a random number of steps, and goes on in a second call.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

STEPS, BATCH = 14, 16

_SMALL = [
    f'STEPS = {STEPS}',
    f'BATCH_SIZE = {BATCH}',
    'train.sample_log = True',
    'train.save_every = 5',
    'train.eval_every = None',
    'train.log_every = 7',
]
_IMAGES = [
    'INPUT_SHAPE = (8, 8, 1)',
    'NUM_CLASSES = 10',
    'scale_images.scale = 0.0625',
]
# Without dropout, whose masks differ from replica to replica.
_CNN = ['cnn.filters = 4', 'cnn.units = 8', 'cnn.dropout = 0.0']
_MLP = ['mlp.dropout = 0.0']
_FILES = """
TRAIN_FILES = '{data}/{name}/train-*.{name}'
EVAL_FILES = '{data}/{name}/test-*.{name}'
"""
_MIXED = """
include 'runs/digits.gin'
Data.source = @mixture()
train/mixture.sources = [@ones/subset(), @others/subset(), @prepared()]
train/mixture.weights = [1, 2, 0.5]
eval/mixture.sources = [@eval/digits()]
ones/subset.source = @train/digits()
ones/subset.end = 0.1
others/subset.source = @train/digits()
others/subset.begin = 0.1
prepared.directory = '{data}/array_record'
prepared.split = 'test'
train/Data.class_weights = (1, 1, 2, 1, 1, 1, 1, 1, 1, 0.5)
"""
# Digits, one after another, from a generator of the user's own.
_STREAM = """
import gin
import tensorflow as tf

from trainer.data.digits import digits
from trainer.data.stream import Stream

FEATURES = {{'image': ('uint8', (8, 8, 1)), 'label': ('int64', ())}}


@gin.register
def digit_stream(split, num_examples):
    def elements():
        features = digits(split).fetch(tf.range(num_examples, dtype=tf.int64))
        for image, label in zip(features['image'].numpy(), features['label'].numpy()):
            yield {{'image': image, 'label': label}}

    return Stream('digits', elements, features=FEATURES, num_examples=num_examples)
"""
_STREAM_RUN = """
import digit_stream
include 'runs/digits.gin'
Data.source = @digit_stream()
train/digit_stream.split = 'train'
train/digit_stream.num_examples = 150
eval/digit_stream.split = 'test'
eval/digit_stream.num_examples = 60
"""
_SKIP = ["Data.on_bad_record = 'skip'"]


def cases(data: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> (.gin files, bindings)."""

    def gin(name: str, text: str) -> str:
        path = data / f'{name}.gin'
        path.write_text(text.format(data=data, name=name.removeprefix('bad_')))
        return str(path)

    def image_folder(name: str) -> list[str]:
        return [
            *_IMAGES,
            'INPUT_SHAPE = (16, 16, 3)',
            'resnet.filters = 4',
            f"DATA_DIR = '{data}/{name}'",
        ]

    def table(name: str) -> list[str]:
        return [*_MLP, f"FILES = '{data}/{name}'", "LABEL = 'species'", 'NUM_CLASSES = 3']

    text = [
        f"TRAIN_FILES = '{data}/*.csv'",
        f"EVAL_FILES = '{data}/penguins.csv'",
        'LENGTH = 32',
        'transformer_lm.units = 8',
        'transformer_lm.blocks = 2',
    ]
    files = {name: gin(name, _FILES) for name in ('tfrecord', 'array_record')}
    bad_files = {
        name: gin(f'bad_{name}', _FILES.replace('train-', 'bad-'))
        for name in ('tfrecord', 'array_record')
    }
    return {
        'arrays': (['runs/digits.gin'], [*_IMAGES, *_CNN]),
        'tfrecord': (['runs/tfrecord.gin', files['tfrecord']], [*_IMAGES, *_CNN]),
        'array_record': (['runs/array_record.gin', files['array_record']], [*_IMAGES, *_CNN]),
        'prepared': (['runs/prepared.gin'], [*_IMAGES, *_CNN, f"DATA_DIR = '{data}/tfrecord'"]),
        'image_folder': (['runs/image_folder.gin'], image_folder('images')),
        'csv': (['runs/table.gin'], table('penguins.csv')),
        'parquet': (['runs/table.gin'], table('penguins.parquet')),
        'text': (['runs/text.gin'], text),
        'tokens': (
            ['runs/tokens.gin'],
            [*text, 'NUM_CLASSES = 300', f"TOKENIZER = '{data}/tokenizer.json'"],
        ),
        'tfds': (
            ['runs/tfds.gin'],
            [*_IMAGES, *_CNN, "NAME = 'digits'", f"DATA_DIR = '{data}/tfds'"],
        ),
        'stream': ([gin('stream', _STREAM_RUN)], [*_IMAGES, *_CNN]),
        'mixture': ([gin('mixture', _MIXED)], [*_IMAGES, *_CNN]),
        'bad_tfrecord': (['runs/tfrecord.gin', bad_files['tfrecord']], [*_IMAGES, *_CNN, *_SKIP]),
        'bad_array_record': (
            ['runs/array_record.gin', bad_files['array_record']],
            [*_IMAGES, *_CNN, *_SKIP],
        ),
        'bad_images': (['runs/image_folder.gin'], [*image_folder('bad_images'), *_SKIP]),
    }


def write_data(data: Path) -> None:
    """Writes what the cases read: digits in every format, whole and with damage, and a table."""
    import pyarrow.csv
    import pyarrow.parquet
    import tensorflow as tf
    import tokenizers

    from trainer.data import table
    from trainer.data.digits import digits

    for name in ('tfrecord', 'array_record'):
        command = ['-m', 'launch', 'prepare', data / name, '--gin_file=data/digits.gin']
        command += [f'--format={name}', '--shards=3']
        subprocess.run([sys.executable, *map(str, command)], check=True)
        for number, shard in enumerate(sorted((data / name).glob('test-*'))):
            content = bytearray(shard.read_bytes())
            # In the contents of records, of 113 bytes in TFRecord: framing is checked beforehand.
            for place in (40, 40 + 20 * 113, 40 + 60 * 113) if name == 'tfrecord' else (1000, 5000):
                content[place] ^= 0xFF
            (data / name / f'bad-{number}.{name}').write_bytes(content)
    for split in ('train', 'test'):
        source = digits(split)
        features = source.fetch(tf.range(200 if split == 'train' else 60, dtype=tf.int64))
        for number, (image, label) in enumerate(
            zip(features['image'], features['label'], strict=True)
        ):
            folder = data / 'images' / split / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            encode = tf.io.encode_png if number % 2 else tf.io.encode_jpeg
            suffix = 'png' if number % 2 else 'jpg'
            content = encode(tf.repeat(tf.repeat(image * 15, 4, axis=0), 3, axis=1)).numpy()
            (folder / f'{number}.{suffix}').write_bytes(content)
    shutil.copytree(data / 'images', data / 'bad_images')
    for number, path in enumerate(sorted((data / 'bad_images').rglob('*.*'))):
        if number % 40 == 7:
            path.write_bytes((b'', b'no image', path.read_bytes()[:-40])[number // 40 % 3])
    shutil.copy(Path(table.__file__).with_name('penguins.csv'), data)
    (data / 'digit_stream.py').write_text(_STREAM.format())
    _write_tfds(data / 'tfds', digits)
    rows = pyarrow.csv.read_csv(data / 'penguins.csv')
    pyarrow.parquet.write_table(rows, data / 'penguins.parquet', row_group_size=100)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(data / 'penguins.csv')], trainer)
    tokenizer.save(str(data / 'tokenizer.json'))


def _write_tfds(directory: Path, digits) -> None:
    import numpy as np
    import tensorflow as tf
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=(8, 8, 1)),
            'label': tfds.features.ClassLabel(num_classes=10),
        }
    )
    splits = {
        split: tf.data.Dataset.from_tensor_slices(
            digits(split).fetch(tf.constant(np.arange(200, dtype=np.int64)))
        )
        for split in ('train', 'test')
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        'digits', '1.0.0', features, splits, data_dir=directory
    )


def run(strategy, cluster, files, bindings, model_dir: Path, end_at: int | None) -> dict:
    """Trains, in one call or in two; returns what came of it."""
    from trainer import gin_files, gin_setup

    said = [*_SMALL, *bindings, f"MODEL_DIR = '{model_dir}'"]
    gin_setup.load(gin_files.read([str(f) for f in files], said), unused=('evaluate', 'export'))
    arguments = {'strategy': strategy, 'cluster': cluster, 'config': gin_setup.record}
    if end_at is not None:
        gin_setup.train(**arguments, eval_data=None, max_steps=end_at)
    result = gin_setup.train(**arguments)
    bad = sorted((model_dir / 'bad-records').glob('*.tsv'))
    return {
        'step': result.step,
        'metrics': result.metrics,
        'state_sha256': result.state_sha256,
        'sample_sha256': result.sample_sha256,
        'samples': (model_dir / 'samples.tsv').read_text(),
        'bad': sorted({line for path in bad for line in path.read_text().splitlines()}),
    }


def main(data: str, out: str, devices: str, seed: str | None = None) -> None:
    from trainer.cluster import from_environ
    from trainer.meeting import meet
    from trainer.strategy import build_strategy

    sys.path.insert(0, data)
    cluster = from_environ()
    meet(cluster, digest='sources', deadline_seconds=120)
    strategy = build_strategy(cluster=cluster, devices_per_worker=int(devices))
    rng = random.Random(seed)
    for name, (files, bindings) in cases(Path(data)).items():
        end_at = rng.randrange(1, STEPS) if seed else None
        print(name, 'ends at', end_at, flush=True)
        result = run(strategy, cluster, files, bindings, Path(out) / name, end_at)
        if cluster.is_chief:
            (Path(out) / f'{name}.json').write_text(json.dumps(result))


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(*sys.argv[1:])
