"""Every kind of damage in every format: the promised message, or the promised skip."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import table as table_module
from trainer.data.array_record import array_record
from trainer.data.bad_record_list import listing
from trainer.data.bad_records import find
from trainer.data.batch import Data
from trainer.data.image_folder import image_folder
from trainer.data.pipeline import train_batches
from trainer.data.table import table
from trainer.data.tfrecord import tfrecord
from trainer.errors import ConfigError

N, BAD, CLASSES = 12, 5, 3
FEATURES = {'image': ('uint8', (4, 4, 1)), 'label': ('int64', ())}
ENCODED = {**FEATURES, 'image': ('uint8', (4, 4, 1), 'image')}


def example(number, encoded=False, without=(), label=None, length=16):
    pixels = np.full([4, 4, 1], number, np.uint8)
    image = tf.io.encode_png(pixels).numpy() if encoded else pixels.tobytes()[:length]
    feature = {
        'image': tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        'label': tf.train.Feature(
            int64_list=tf.train.Int64List(value=[number % CLASSES if label is None else label])
        ),
    }
    for name in without:
        del feature[name]
    message = tf.train.Example(features=tf.train.Features(feature=feature))
    return message.SerializeToString()


def write(path, records):
    if path.suffix == '.tfrecord':
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
        return
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
    for record in records:
        writer.write(record)
    writer.close()


def records_with(bad, encoded=False):
    records = [example(i, encoded=encoded) for i in range(N)]
    records[BAD] = bad
    return records


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def cut(path, share=0.7):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


# ---- How each data set is made and damaged: (directory) -> a function that opens it.


def record_files(directory, suffix, *, bad=None, encoded=False, spoil=None):
    path = directory / f'x.{suffix}'
    write(path, records_with(example(BAD, encoded) if bad is None else bad, encoded))
    if spoil is not None:
        spoil(path)
    make = tfrecord if suffix == 'tfrecord' else array_record
    return functools.partial(make, str(path), ENCODED if encoded else FEATURES)


def flip_contents(path):
    """Flips a byte of the image of record BAD, wherever the format keeps it."""
    content = path.read_bytes()
    place = content.find(bytes([BAD]) * 16)
    assert place > 0
    flip(path, place + 3)


def images(directory, content):
    for number in range(N):
        folder = directory / f'class-{number % CLASSES}'
        folder.mkdir(exist_ok=True)
        pixels = tf.fill([40, 40, 3], tf.constant(number, tf.uint8))
        (folder / f'{number:02}.jpg').write_bytes(tf.io.encode_jpeg(pixels).numpy())
    bad = directory / 'class-1' / '04.jpg'  # Record 5: the classes one after another.
    bad.write_bytes(content(bad.read_bytes()))
    return functools.partial(image_folder, str(directory), shape=(8, 8, 3))


def rows(directory, spoil, suffix='csv', label='species'):
    lines = Path(table_module.__file__).with_name('penguins.csv').read_text().splitlines()[: N + 1]
    path = directory / f'x.{suffix}'
    path.write_text('\n'.join(spoil(lines)) + '\n')
    if suffix == 'parquet':
        import pyarrow.csv
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.csv.read_csv(path), path)
        cut(path)
    return functools.partial(table, files=str(path), label=label)


BEFORE_TRAINING = {
    'tfrecord, cut off': (
        lambda d: record_files(d, 'tfrecord', spoil=cut),
        r'x\.tfrecord .*cut off|x\.tfrecord ends',
    ),
    'tfrecord, framing': (
        lambda d: record_files(d, 'tfrecord', spoil=lambda p: flip(p, 2)),
        r'x\.tfrecord',
    ),
    'tfrecord, empty': (
        lambda d: record_files(d, 'tfrecord', spoil=lambda p: p.write_bytes(b'')),
        r'x\.tfrecord',
    ),
    'array_record, cut off': (
        lambda d: record_files(d, 'array_record', spoil=cut),
        r'x\.array_record',
    ),
    'array_record, foreign': (
        lambda d: record_files(d, 'array_record', spoil=lambda p: p.write_bytes(b'text' * 999)),
        r'x\.array_record',
    ),
    'csv, a row too short': (
        lambda d: rows(d, lambda lines: [*lines[:6], 'Adelie,1', *lines[6:]]),
        r'x\.csv, row 6: 2 cells instead of',
    ),
    'csv, not text': (
        lambda d: rows(d, lambda lines: [*lines[:6], '\x00\x01' * 40, *lines[6:]]),
        r'x\.csv',
    ),
    'parquet, cut off': (lambda d: rows(d, lambda lines: lines, 'parquet'), r'x\.parquet'),
    'images, none': (lambda d: functools.partial(image_folder, str(d)), 'no '),
}

AT_THE_RECORD = {
    'tfrecord, contents': (
        lambda d: record_files(d, 'tfrecord', spoil=flip_contents),
        r'x\.tfrecord, record 5 \(byte \d+\)',
        'checksum',
    ),
    'tfrecord, feature missing': (
        lambda d: record_files(d, 'tfrecord', bad=example(BAD, without=['label'])),
        r'x\.tfrecord, record 5 \(byte \d+\)',
        'label',
    ),
    'tfrecord, wrong length': (
        lambda d: record_files(d, 'tfrecord', bad=example(BAD, length=9)),
        r'x\.tfrecord, record 5 \(byte \d+\)',
        'image',
    ),
    'tfrecord, no example': (
        lambda d: record_files(d, 'tfrecord', bad=b'no example at all'),
        r'x\.tfrecord, record 5 \(byte \d+\)',
        '',
    ),
    'tfrecord, undecodable image': (
        lambda d: record_files(d, 'tfrecord', bad=example(BAD), encoded=True),
        r'x\.tfrecord, record 5 \(byte \d+\)',
        'image',
    ),
    'tfrecord, label out of range': (
        lambda d: record_files(d, 'tfrecord', bad=example(BAD, label=CLASSES)),
        r'x\.tfrecord, record 5 \(byte \d+\)',
        "the label 'label' is not one of the classes 0 to 2",
    ),
    'array_record, contents': (
        lambda d: record_files(d, 'array_record', spoil=flip_contents),
        r'x\.array_record, record 5',
        '',
    ),
    'array_record, feature missing': (
        lambda d: record_files(d, 'array_record', bad=example(BAD, without=['image'])),
        r'x\.array_record, record 5',
        'image',
    ),
    'array_record, undecodable image': (
        lambda d: record_files(d, 'array_record', bad=example(BAD), encoded=True),
        r'x\.array_record, record 5',
        'image',
    ),
    'array_record, label out of range': (
        lambda d: record_files(d, 'array_record', bad=example(BAD, label=-1)),
        r'x\.array_record, record 5',
        "the label 'label' is not one of the classes 0 to 2",
    ),
    'images, empty': (lambda d: images(d, lambda _: b''), r'class-1/04\.jpg$', ''),
    'images, no image': (lambda d: images(d, lambda _: b'<html>'), r'class-1/04\.jpg$', ''),
    'images, cut off': (lambda d: images(d, lambda c: c[: len(c) // 2]), r'class-1/04\.jpg$', ''),
}


@pytest.mark.parametrize('case', BEFORE_TRAINING)
def test_what_can_be_seen_is_told_before_training(case, tmp_path):
    make, message = BEFORE_TRAINING[case]
    with pytest.raises(ConfigError, match=message):
        _ = make(tmp_path)().fingerprint


@pytest.mark.parametrize('case', AT_THE_RECORD)
def test_a_damaged_record_is_named_and_can_be_skipped_on_any_topology(
    case, tmp_path, make_strategy
):
    make, where, why = AT_THE_RECORD[case]
    (tmp_path / 'data').mkdir()
    source = make(tmp_path / 'data')()
    damage = find(source, [np.arange(N)], 'label', CLASSES)
    assert damage.record == BAD
    assert re.search(where, damage.where)
    assert why in damage.reason

    data = Data(source, on_bad_record='skip')
    found = []
    for replicas in (1, 2):
        strategy = make_strategy(replicas)
        with listing.kept_in(tmp_path / f'bad-{replicas}.tsv'):
            iterator = train_batches(
                data, strategy, seed=0, global_batch_size=6, start_step=0, num_classes=CLASSES
            )
            batches = []
            for _ in range(4):  # Two epochs.
                parts = strategy.experimental_local_results(next(iterator))
                batches.append(
                    {
                        key: np.concatenate([part[key] for part in parts])
                        for key in ('ids', 'weights')
                    }
                )
        found.append(batches)
        listed = (tmp_path / f'bad-{replicas}.tsv').read_text().splitlines()
        assert len(listed) == 1
        assert listed[0].startswith(f'{BAD}\t')
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one['ids'], two['ids'])
        np.testing.assert_array_equal(one['weights'], np.where(one['ids'] == -2 - BAD, 0.0, 1.0))
        np.testing.assert_array_equal(two['weights'], one['weights'])
    ids = np.concatenate([batch['ids'] for batch in found[0]])
    assert sorted(ids) == sorted([-2 - BAD, *(i for i in range(N) if i != BAD)] * 2)
