"""Prepared data for tests, written in this process."""

import hashlib

import numpy as np
import tensorflow as tf

from trainer.data.digits import digits
from trainer.data.source import Source
from trainer.errors import BadRecord
from trainer.prepare import Options, ShardWriter, plan
from trainer.unfinished import Unfinished


def prepare(out, sources=None, **options):
    """Writes what `phalanx prepare` would; without sources, the digits."""
    sources = sources or {'train': digits('train'), 'test': digits('test')}
    how = Options(**options)
    unfinished, planned = Unfinished(out), plan(sources, how)
    with unfinished.lock():
        unfinished.begin(planned)
        written = unfinished.written(planned, incomplete=how.on_bad_record == 'skip')
        for split, name, first, end in missing(planned, written):
            writer = ShardWriter(sources[split], split, how)
            record = writer.write(unfinished.path / name, first, end, lambda count: None)
            unfinished.keep(name, record)
            written[name] = record
        unfinished.commit(planned, written)
    return out


def missing(planned, written):
    """The shards that are still to be written: split, file, first, end."""
    return [
        (split, shard['file'], shard['first'], shard['end'])
        for split, each in planned['splits'].items()
        for shard in each['shards']
        if shard['file'] not in written
    ]


def checksums(directory):
    """The sha256 of each file of a directory, but for what readers keep beside them."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file()
    }


class Numbered(Source):
    """Records of all kinds of features, each telling its number; some may be damaged."""

    def __init__(self, count=20, bad=()):
        self._count, self._bad = count, bad

    num_examples = property(lambda self: self._count)
    fingerprint = property(lambda self: hashlib.sha256(b'%d' % self._count).hexdigest())
    element_spec = property(
        lambda self: {
            'x': tf.TensorSpec([2], tf.float32),
            'word': tf.TensorSpec([], tf.string),
            'label': tf.TensorSpec([], tf.int64),
            'picture': tf.TensorSpec([2, 3, 1], tf.uint8),
        }
    )
    class_names = ('even', 'odd')

    def fetch(self, indices):
        def read(records):
            if found := set(self._bad) & set(records.tolist()):
                raise BadRecord(f'{min(found)} is spoilt')
            x = np.stack([records, records / 4], axis=1).astype(np.float32)
            words = np.array([b'word %d' % record for record in records], object)
            picture = np.zeros([len(records), 2, 3, 1], np.uint8) + records.reshape(-1, 1, 1, 1)
            return x, words, records % 2, picture.astype(np.uint8)

        dtypes = [tf.float32, tf.string, tf.int64, tf.uint8]
        features = tf.numpy_function(read, [indices], dtypes)
        names = ('x', 'word', 'label', 'picture')
        return {
            name: tf.ensure_shape(value, [None, *self.element_spec[name].shape])
            for name, value in zip(names, features, strict=True)
        }

    def where(self, index):
        return f'numbers.txt, line {index + 1}'


_SLOW = """
import time

import gin
import tensorflow as tf

from trainer.data.digits import digits


@gin.register
def slow_digits(split='train'):
    source = digits(split)
    fetch = source.fetch

    def slow_fetch(indices):
        def wait(records):
            time.sleep(0.2)
            return records

        indices = tf.ensure_shape(tf.numpy_function(wait, [indices], tf.int64), [None])
        return fetch(indices)

    source.fetch = slow_fetch
    return source
"""


def slow_digits(directory):
    """Makes data that take long enough to read to be killed meanwhile; returns the flag."""
    (directory / 'slow.py').write_text(_SLOW)
    (directory / 'slow.gin').write_text(
        'import slow\ninclude "data/digits.gin"\nData.source = @slow_digits()\n'
        'train/slow_digits.split = "train"\neval/slow_digits.split = "test"\n'
    )
    return '--gin_file=slow.gin'
