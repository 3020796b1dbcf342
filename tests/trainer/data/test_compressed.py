import gzip
import zlib

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.preparing import checksums, prepare
from trainer.data import compressed
from trainer.data.compressed import decompressing, is_compressed
from trainer.data.prepared import prepared
from trainer.data.tfrecord import tfrecord
from trainer.errors import ConfigError

FEATURES = {'image': ('uint8', (8, 8, 1)), 'label': ('int64', ())}


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A file of the 297 digits of the test set."""
    out = prepare(tmp_path_factory.mktemp('plain') / 'out', files='tfrecord')
    return out / 'test-00000-of-00001.tfrecord'


def gzipped(content):
    # Two streams one after another, as `cat a.gz b.gz` makes them.
    return gzip.compress(content[:5000]) + gzip.compress(content[5000:])


@pytest.mark.parametrize('compress', [gzipped, zlib.compress])
def test_a_compressed_file_is_prepared_like_a_plain_one(plain, tmp_path, compress):
    path = tmp_path / 'digits.tfrecord.z'
    path.write_bytes(compress(plain.read_bytes()))
    with pytest.raises(ConfigError, match='is compressed'):
        tfrecord(str(path), FEATURES)
    with decompressing(tmp_path / 'aside'):
        source = tfrecord(str(path), FEATURES)
        again = tfrecord([str(path), str(plain)], FEATURES)
    assert again.num_examples == 2 * 297
    assert source.where(7).startswith(f'{path}, record 7 ')
    expected = tfrecord(str(plain), FEATURES)
    assert source.fingerprint == expected.fingerprint
    first = prepare(tmp_path / 'first', {'train': source})
    second = prepare(tmp_path / 'second', {'train': expected})
    assert checksums(first) == checksums(second)
    labels = prepared(first).fetch(tf.range(297, dtype=tf.int64))['label']
    np.testing.assert_array_equal(labels, expected.fetch(tf.range(297, dtype=tf.int64))['label'])


@pytest.mark.parametrize('compress', [gzip.compress, zlib.compress])
def test_little_is_in_memory_however_much_comes_of_a_file(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(compressed, '_BLOCK', 1000)
    path, content = tmp_path / 'zeros', bytes(300_000)
    path.write_bytes(compress(content) + (compress(b'end') if compress is gzip.compress else b''))
    blocks = list(compressed._decompressed(str(path), path.stat().st_size))
    end = b'end' if compress is gzip.compress else b''
    assert b''.join(blocks) == content + end
    assert max(map(len, blocks)) == 1000


def test_a_file_that_shrinks_while_it_is_read_is_told(plain, tmp_path):
    path = tmp_path / 'a.gz'
    path.write_bytes(gzip.compress(plain.read_bytes())[:100])
    with pytest.raises(ConfigError, match='is cut off at byte 100'):
        list(compressed._decompressed(str(path), 5000))


def test_what_tensorflow_compresses_is_recognised(plain, tmp_path):
    for kind in ('GZIP', 'ZLIB'):
        with tf.io.TFRecordWriter(str(tmp_path / kind), kind) as writer:
            writer.write(b'a record')
        assert is_compressed(str(tmp_path / kind))
    assert not is_compressed(str(plain))
    # A record as long as the first two bytes of zlib data say.
    with tf.io.TFRecordWriter(str(tmp_path / 'plain')) as writer:
        writer.write(bytes(int.from_bytes(b'\x78\x9c', 'little')))
    assert (tmp_path / 'plain').read_bytes()[:2] == b'\x78\x9c'
    assert not is_compressed(str(tmp_path / 'plain'))


@pytest.mark.parametrize('keep', [0.9, 20])
def test_a_damaged_compressed_file_is_told(plain, tmp_path, keep):
    path, content = tmp_path / 'a.gz', bytearray(gzip.compress(plain.read_bytes()))
    if keep < 1:
        del content[int(len(content) * keep) :]
        message = 'is cut off at byte'
    else:
        content[len(content) // 2] ^= 255
        message = 'is damaged: it cannot be decompressed'
    path.write_bytes(content)
    with decompressing(tmp_path / 'aside'), pytest.raises(ConfigError, match=message):
        tfrecord(str(path), FEATURES)
    assert list((tmp_path / 'aside').iterdir()) == []
