import os
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordWriter

from trainer.data import bad_records, example, files
from trainer.data.array_record import ArrayRecords, array_record
from trainer.errors import BadRecord, ConfigError, ReadError

FEATURES = {'x': ('int64', ()), 'y': ('uint8', (4,))}


def serialized(number):
    values = {'x': number, 'y': np.full(4, number % 256, np.uint8)}
    return example.serialize(values, example.spec(FEATURES))


def write(path, records, options='group_size:1'):
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def shards(directory, sizes, options='group_size:1'):
    """Files of `sizes` records each, numbered through."""
    first = np.cumsum([0, *sizes])
    return [
        write(directory / f'a-{i:05d}.array_record', map(serialized, range(b, b + n)), options)
        for i, (b, n) in enumerate(zip(first, sizes, strict=False))
    ]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file of three records."""
    # Some tests make an index hundreds of times.
    monkeypatch.setattr(os, 'fsync', lambda _: None)
    return Path(shards(tmp_path, [3])[0])


@pytest.mark.parametrize('options', ['group_size:1', 'group_size:4', 'group_size:1,uncompressed'])
@pytest.mark.parametrize('sizes', [[1], [5], [3, 1, 70]])
def test_records_are_read_in_any_order_across_files(tmp_path, sizes, options):
    shards(tmp_path, sizes, options)
    source = array_record(f'{tmp_path}/*.array_record', FEATURES)
    assert source.num_examples == sum(sizes)
    random = np.random.default_rng(0)
    everything = np.arange(sum(sizes))
    for indices in (everything, everything[::-1], random.integers(0, sum(sizes), 50)):
        batch = source.fetch(tf.constant(indices))
        np.testing.assert_array_equal(batch['x'], indices)
        np.testing.assert_array_equal(batch['y'], np.repeat(indices[:, None], 4, 1))


def test_several_threads_read_at_once(tmp_path):
    source = ArrayRecords(shards(tmp_path, [300, 200]), FEATURES)
    expected = [serialized(i) for i in range(500)]
    right = []

    def read(seed):
        random = np.random.default_rng(seed)
        for _ in range(50):
            indices = random.integers(0, 500, 32)
            right.append(list(source.read(indices)) == [expected[i] for i in indices])

    threads = [threading.Thread(target=read, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 400


def test_a_record_has_a_place(tmp_path):
    paths = shards(tmp_path, [3, 2])
    source = ArrayRecords(paths, FEATURES)
    assert source.where(2) == f'{paths[0]}, record 2'
    assert source.where(3) == f'{paths[1]}, record 0'


def test_the_fingerprint_tells_files_apart(tmp_path):
    def fingerprint(name, numbers):
        path = write(tmp_path / name, map(serialized, numbers))
        return ArrayRecords(path, FEATURES).fingerprint

    assert fingerprint('a', [1, 2]) == fingerprint('b', [1, 2])
    assert fingerprint('c', [2, 1]) != fingerprint('a', [1, 2])


def test_a_file_that_has_changed_is_read_as_it_is_now(tmp_path):
    paths = shards(tmp_path, [2, 2])
    ArrayRecords(paths, FEATURES).read(np.arange(4))
    os.rename(write(tmp_path / 'new', map(serialized, [7, 8, 9])), paths[1])
    source = ArrayRecords(paths, FEATURES)
    assert source.fetch(tf.range(5, dtype=tf.int64))['x'].numpy().tolist() == [0, 1, 7, 8, 9]


@pytest.mark.parametrize('content', [b'', b'text', b'text' * 50_000], ids=['empty', 'text', 'long'])
def test_what_is_no_array_record_file_is_refused_by_name(tmp_path, content):
    paths = shards(tmp_path, [2, 2, 2])
    Path(paths[1]).write_bytes(content)
    with pytest.raises(ConfigError, match=r'a-00001\.array_record is no ArrayRecord file'):
        ArrayRecords(paths, FEATURES)


def test_a_file_without_records_is_refused(tmp_path):
    path = write(tmp_path / 'a', [])
    with pytest.raises(ConfigError, match='holds no records'):
        ArrayRecords(path, FEATURES)


def test_urls_are_refused_with_a_way_out():
    with pytest.raises(ConfigError, match=r'is a URL.*TFRecord files'):
        ArrayRecords('s3://bucket/a.array_record', FEATURES)


def test_a_file_cut_off_anywhere_is_refused(small):
    content = small.read_bytes()
    for end in [*range(0, len(content), 499), len(content) - 1]:
        small.write_bytes(content[:end])
        with pytest.raises(ConfigError, match='is no ArrayRecord file, or cut off'):
            ArrayRecords(str(small), FEATURES)


def test_a_wrong_byte_anywhere_is_noticed_or_does_no_harm(small):
    content = small.read_bytes()
    expected = [serialized(i) for i in range(3)]
    told = {ConfigError: 0, BadRecord: 0}
    # Most of a small file is padding between the records, its index and the mark of its end.
    used = np.flatnonzero(np.frombuffer(content, np.uint8)).tolist()
    for place in [*used, *range(0, len(content), 997)]:
        damaged = bytearray(content)
        damaged[place] ^= 0x41
        small.write_bytes(damaged)
        try:
            source = ArrayRecords(str(small), FEATURES)
        except ConfigError:
            told[ConfigError] += 1
            continue
        found = []
        for record in range(3):
            try:
                found.append(source.read(np.array([record]))[0])
            except BadRecord:
                found.append(None)
        told[BadRecord] += None in found
        assert all(f in (None, e) for f, e in zip(found, expected, strict=True))
        assert sum(f is None for f in found) <= 1
    assert told[ConfigError] > 50
    assert told[BadRecord] > 100


def test_a_damaged_record_fails_the_batch_as_an_invalid_argument(small):
    content = bytearray(small.read_bytes())
    content[110] ^= 0xFF  # The first record begins at byte 104, behind three headers.
    small.write_bytes(content)
    source = ArrayRecords(str(small), FEATURES)
    with pytest.raises(tf.errors.InvalidArgumentError, match='data hash mismatch'):
        tf.function(source.fetch, autograph=False)(tf.range(3, dtype=tf.int64))


def test_a_disk_that_fails_is_no_damage(tmp_path):
    (path,) = shards(tmp_path, [40])
    source = ArrayRecords(path, FEATURES)
    source.read(np.array([0]))
    opened = [
        int(name)
        for name in os.listdir('/proc/self/fd')
        if os.path.realpath(f'/proc/self/fd/{name}') == path
    ]
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        for number in opened:  # Reading a directory fails as reading from a bad disk does.
            os.dup2(directory, number)
        with pytest.raises(ReadError, match=r'a-00000\.array_record could not .*pread\(\) failed'):
            source.read(np.array([7]))
        with pytest.raises(ReadError), bad_records.told(source, [], 'x', skips=True):
            bad_records.fetch_good(source, tf.constant([7, 8], tf.int64), 'x')
    finally:
        os.close(directory)


def test_only_so_many_files_are_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, '_FEW_FILES', 4)
    monkeypatch.setattr(files, '_limit', lambda: 16)
    source = ArrayRecords(shards(tmp_path, [1] * 60), FEATURES)
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(2):
        batch = source.fetch(tf.random.shuffle(tf.range(60, dtype=tf.int64)))
        assert sorted(batch['x'].numpy()) == list(range(60))
        assert len(os.listdir('/proc/self/fd')) <= before + 16
