"""Records in files, read in a random order: batches of uint8 images and labels, nothing else done.

The same records, of 1, 4 and 100 kB, lie in TFRecord and ArrayRecord files that are in the page
cache. On the other side are the usual `tf.data` pipeline (interleaved files, a shuffle buffer, then
either parse and batch or batch and parse), PyTorch's DataLoader with two workers over the package
`tfrecord`, and Grain over ArrayRecord with 16 threads, its default and the fastest of its ways
here. All have their buffers filled, and what lay ready in them taken out, before the clock starts.
Only Phalanx and Grain read in an order that is random over all records. PyTorch and Grain need not
be in this environment: `--torch_python` and `--grain_python` name interpreters that have them,
NumPy and `tfrecord`, whose protocol buffers serve both.

Then 50 million records in 10,000 shards, which are 10,000 names of one file: what it takes to make
the index and to open it, and the first batch at record 10 million against the first of all.
"""

import argparse
import functools
import glob
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pairs

# isort: split
import numpy as np

BATCH_SIZE = 128
SHARDS = 8
AHEAD = 16
# Size -> side of the square images, records, batches in a measurement.
SIZES = {'1 kB': (18, 80_000, 300), '4 kB': (36, 40_000, 200), '100 kB': (182, 3_000, 20)}
MANY_SHARDS, PER_SHARD = 10_000, 5_000


class Worker:
    """Another process, under another interpreter, that makes batches when told to."""

    def __init__(self, python: str, kind: str, files: str, side: int):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
        self._process = subprocess.Popen(
            [
                *(python, str(Path(__file__).resolve())),
                *(f'--worker={kind}', f'--files={files}', f'--side={side}'),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def records_a_second(self, batches: int) -> float:
        self._process.stdin.write(f'{batches}\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(self._log.read().decode()[-4000:])
        return batches * BATCH_SIZE / float(line)

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def work(options: argparse.Namespace) -> None:
    """Is a worker: reads numbers of batches, answers with seconds."""
    make = {'torch': torch_batches, 'grain': grain_batches}[options.worker]
    # What they say while they start is no answer.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    batches = make(options.files, options.side)
    for line in sys.stdin:
        for _ in range(2 * AHEAD):  # Those made while the others were measured.
            next(batches)
        begin = time.perf_counter()
        for _ in range(int(line)):
            batch = next(batches)
            assert tuple(batch['image'].shape) == (BATCH_SIZE, options.side, options.side, 3)
        print(time.perf_counter() - begin, file=answers, flush=True)


def torch_batches(files: str, side: int) -> Iterator:
    from tfrecord.tools.tfrecord2idx import create_index
    from tfrecord.torch.dataset import MultiTFRecordDataset
    from torch.utils.data import DataLoader

    names = [Path(path).name for path in sorted(glob.glob(files))]
    directory = Path(files).parent
    for name in names:
        create_index(str(directory / name), str(directory / f'{name}.index'))

    def arrays(features: dict) -> dict:
        image = np.frombuffer(features['image'], np.uint8).reshape(side, side, 3)
        return {'image': image, 'label': features['label'][0]}

    dataset = MultiTFRecordDataset(
        str(directory / '{}'),
        str(directory / '{}.index'),
        dict.fromkeys(names, 1 / len(names)),
        {'image': 'byte', 'label': 'int'},
        shuffle_queue_size=1000,
        transform=arrays,
    )
    return iter(DataLoader(dataset, BATCH_SIZE, num_workers=2, drop_last=True))


def grain_batches(files: str, side: int) -> Iterator:
    import grain
    from tfrecord import example_pb2

    def arrays(record: bytes) -> dict:
        features = example_pb2.Example.FromString(record).features.feature
        image = np.frombuffer(features['image'].bytes_list.value[0], np.uint8)
        label = np.int64(features['label'].int64_list.value[0])
        return {'image': image.reshape(side, side, 3), 'label': label}

    source = grain.sources.ArrayRecordDataSource(sorted(glob.glob(files)))
    dataset = grain.MapDataset.source(source).seed(0).shuffle().repeat().map(arrays)
    # By default it holds 500 batches ready, gigabytes of the larger records.
    options = grain.ReadOptions(num_threads=16, prefetch_buffer_size=AHEAD)
    return iter(dataset.batch(BATCH_SIZE).to_iter_dataset(options))


def features(side: int) -> dict:
    return {'image': ('uint8', (side, side, 3)), 'label': ('int64', ())}


def write(directory: Path, side: int, count: int) -> None:
    """Writes the same records in both formats."""
    import tensorflow as tf
    from array_record.python.array_record_module import ArrayRecordWriter

    from trainer.data import example

    random, spec = np.random.default_rng(0), example.spec(features(side))
    for shard in range(SHARDS):
        array_record = ArrayRecordWriter(f'{directory}/{shard}.array_record', 'group_size:1')
        with tf.io.TFRecordWriter(f'{directory}/{shard}.tfrecord') as tfrecord:
            for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                image = random.integers(0, 256, (side, side, 3), np.uint8)
                record = example.serialize({'image': image, 'label': number % 10}, spec)
                tfrecord.write(record)
                array_record.write(record)
        array_record.close()


def usual(files: str, side: int, *, batch_first: bool):
    import tensorflow as tf

    stored = {
        'image': tf.io.FixedLenFeature([], tf.string),
        'label': tf.io.FixedLenFeature([], tf.int64),
    }

    def parse_one(record):
        found = tf.io.parse_single_example(record, stored)
        image = tf.reshape(tf.io.decode_raw(found['image'], tf.uint8), [side, side, 3])
        return {'image': image, 'label': found['label']}

    def parse_batch(records):
        found = tf.io.parse_example(records, stored)
        image = tf.reshape(tf.io.decode_raw(found['image'], tf.uint8), [-1, side, side, 3])
        return {'image': image, 'label': found['label']}

    dataset = tf.data.Dataset.list_files(files, shuffle=True).interleave(
        tf.data.TFRecordDataset, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False
    )
    dataset = dataset.repeat().shuffle(1000)
    if batch_first:
        dataset = dataset.batch(BATCH_SIZE).map(parse_batch, num_parallel_calls=tf.data.AUTOTUNE)
    else:
        dataset = dataset.map(parse_one, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH_SIZE)
    return dataset.prefetch(tf.data.AUTOTUNE)


def records_a_second(make_iterator: Callable[[], Iterator], batches: int) -> float:
    """Fetches batches from a new iterator, after some that fill buffers off the clock."""
    iterator = make_iterator()
    fetch(iterator, max(10, batches // 4))
    return pairs.rate(batches * BATCH_SIZE, fetch, iterator, batches)()


def fetch(iterator: Iterator, batches: int) -> None:
    fetch_in_graph()(iterator, np.int64(batches))


@functools.cache
def fetch_in_graph() -> Callable:
    import tensorflow as tf

    @tf.function(reduce_retracing=True)
    def run(iterator, batches):
        for _ in tf.range(batches):
            next(iterator)

    return run


def random_order(options: argparse.Namespace, table: pairs.Table, strategy) -> None:
    from trainer.data.array_record import ArrayRecords
    from trainer.data.batch import Data
    from trainer.data.pipeline import train_batches
    from trainer.data.tfrecord import TFRecords

    def ours(source) -> Iterator:
        return train_batches(
            Data(source), strategy, seed=0, global_batch_size=BATCH_SIZE, start_step=0
        )

    for size, (side, count, batches) in SIZES.items():
        with tempfile.TemporaryDirectory(dir=options.directory or None) as name:
            write(Path(name), side, count)
            tfrecords, array_records = f'{name}/*.tfrecord', f'{name}/*.array_record'
            workers = {}
            if options.torch_python:
                workers['torch'] = Worker(options.torch_python, 'torch', tfrecords, side)
            if options.grain_python:
                workers['grain'] = Worker(options.grain_python, 'grain', array_records, side)
            takes = {
                'TFRecord': functools.partial(ours, TFRecords(tfrecords, features(side))),
                'ArrayRecord': functools.partial(ours, ArrayRecords(array_records, features(side))),
                'map, batch': functools.partial(iter, usual(tfrecords, side, batch_first=False)),
                'batch, map': functools.partial(iter, usual(tfrecords, side, batch_first=True)),
            }
            takes = {k: functools.partial(records_a_second, v, batches) for k, v in takes.items()}
            for kind, worker in workers.items():
                takes[kind] = functools.partial(worker.records_a_second, batches)
            try:
                values = pairs.alternate(*takes.values(), rounds=options.rounds)
            finally:
                for worker in workers.values():
                    worker.close()
        taken = dict(zip(takes, values, strict=True))
        for kind, what, theirs, target in (
            ('TFRecord', 'tf.data, parse and batch', 'map, batch', '>= 2'),
            ('TFRecord', 'tf.data, batch and parse', 'batch, map', ''),
            ('TFRecord', 'PyTorch', 'torch', '>= 1'),
            ('ArrayRecord', 'Grain', 'grain', '>= 1'),
        ):
            row = f'{size} {kind}, {what}'
            table.row(row, taken[kind], taken.get(theirs), 'records/s', target)


def fifty_million(options: argparse.Namespace, table: pairs.Table, strategy) -> None:
    import tensorflow as tf

    from trainer.data import example
    from trainer.data.batch import Data
    from trainer.data.pipeline import train_batches
    from trainer.data.tfrecord import TFRecords

    spec = example.spec(features(4))
    with tempfile.TemporaryDirectory(dir=options.directory or None) as name:
        with tf.io.TFRecordWriter(f'{name}/one') as writer:
            for number in range(PER_SHARD):
                image = np.full((4, 4, 3), number % 256, np.uint8)
                writer.write(example.serialize({'image': image, 'label': number % 10}, spec))
        for shard in range(MANY_SHARDS):
            os.link(f'{name}/one', f'{name}/{shard:05d}.tfrecord')

        def open_all() -> TFRecords:
            return TFRecords(f'{name}/*.tfrecord', features(4))

        table.row('index of 50 million records', [pairs.seconds(open_all)()], None, 's')
        opened = pairs.alternate(pairs.seconds(open_all), rounds=options.rounds)[0]
        table.row('open 10,000 shards', [1000 * s for s in opened], None, 'ms')
        data = Data(open_all())
        assert data.source.num_examples == MANY_SHARDS * PER_SHARD

        def first_batch(record: int) -> None:
            next(
                train_batches(
                    data,
                    strategy,
                    seed=0,
                    global_batch_size=BATCH_SIZE,
                    start_step=record // BATCH_SIZE,
                )
            )

        later, first = pairs.alternate(
            pairs.seconds(first_batch, 10_000_000),
            pairs.seconds(first_batch, 0),
            rounds=options.rounds,
        )
        what = 'first batch at record 10 million'
        table.row(what, [1000 * s for s in later], [1000 * s for s in first], 'ms', '<= 1.2')


def main() -> None:
    options = pairs.arguments(
        __doc__,
        rounds=7,
        torch_python='',
        grain_python='',
        directory='',
        worker='',
        files='',
        side=0,
    )
    if options.worker:
        work(options)
        return
    from trainer.cluster import Cluster
    from trainer.strategy import build_strategy

    strategy = build_strategy(cluster=Cluster(), devices_per_worker=1, deterministic=False)
    table = pairs.Table('Records in files', 'Phalanx', 'the other', markdown=options.markdown)
    fifty_million(options, table, strategy)
    random_order(options, table, strategy)


if __name__ == '__main__':
    main()
