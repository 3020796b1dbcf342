import gzip
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests import servers
from trainer.data import bad_records, example, files, tfrecord_index
from trainer.data.tfrecord import TFRecords, tfrecord
from trainer.errors import BadRecord, ConfigError

CHECKOUT = Path(__file__).resolve().parents[3]
FEATURES = {'x': ('int64', ()), 'y': ('uint8', (4,))}


def serialized(number):
    values = {'x': number, 'y': np.full(4, number % 256, np.uint8)}
    return example.serialize(values, example.spec(FEATURES))


def write(path, records, options=None):
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for record in records:
            writer.write(record)
    return str(path)


def shards(directory, sizes):
    """Files of `sizes` records each, numbered through."""
    first = np.cumsum([0, *sizes])
    return [
        write(directory / f'a-{i:05d}.tfrecord', map(serialized, range(begin, begin + size)))
        for i, (begin, size) in enumerate(zip(first, sizes, strict=False))
    ]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file of three records."""
    # Some tests make an index hundreds of times.
    monkeypatch.setattr(os, 'fsync', lambda _: None)
    return Path(shards(tmp_path, [3])[0])


@pytest.mark.parametrize('sizes', [[1], [5], [3, 1, 7], [1] * 20])
def test_records_are_read_in_any_order_across_files(tmp_path, sizes):
    shards(tmp_path, sizes)
    source = tfrecord(f'{tmp_path}/*.tfrecord', FEATURES)
    assert source.num_examples == sum(sizes)
    assert source.element_spec == {
        'x': tf.TensorSpec([], tf.int64),
        'y': tf.TensorSpec([4], tf.uint8),
    }
    random = np.random.default_rng(0)
    everything = np.arange(sum(sizes))
    for indices in (everything, everything[::-1], random.integers(0, sum(sizes), 50)):
        batch = source.fetch(tf.constant(indices))
        np.testing.assert_array_equal(batch['x'], indices)
        np.testing.assert_array_equal(batch['y'], np.repeat(indices[:, None], 4, 1))


def test_records_are_the_bytes_that_were_written(tmp_path):
    records = [
        serialized(0),
        b'',
        b'\x00',
        b'ends with zeros\x00\x00',
        bytes(100_000),
        b'\xff' * 17,
    ]
    source = TFRecords(write(tmp_path / 'a', records), FEATURES)
    assert list(source.read(np.arange(6))) == records
    assert list(source.read(np.array([5, 3, 3, 1]))) == [records[i] for i in (5, 3, 3, 1)]


@pytest.mark.parametrize('part', [16, 17, 100, 4096])
def test_the_index_does_not_depend_on_how_a_file_is_read(tmp_path, monkeypatch, part):
    random = np.random.default_rng(part)
    records = [serialized(0), *map(random.bytes, random.integers(0, 300, 199))]
    path = write(tmp_path / 'a', records)
    monkeypatch.setattr(tfrecord_index, '_LOCAL_PART', 2 * part)
    monkeypatch.setattr(tfrecord_index, '_SMALL_PART', part)
    monkeypatch.setattr(tfrecord_index, '_LARGE_RECORD', 150)
    source = TFRecords(path, FEATURES)
    assert list(source.read(np.arange(200))) == records


def test_a_record_has_a_place(tmp_path):
    paths = shards(tmp_path, [3, 2])
    source = TFRecords(paths, FEATURES)
    length = len(serialized(0)) + 16
    assert source.where(0) == f'{paths[0]}, record 0 (byte 0)'
    assert source.where(2) == f'{paths[0]}, record 2 (byte {2 * length})'
    assert source.where(3) == f'{paths[1]}, record 0 (byte 0)'


def test_the_fingerprint_is_of_the_records_and_their_order(tmp_path):
    def fingerprint(name, sizes, change=lambda records: records):
        (tmp_path / name).mkdir()
        paths = shards(tmp_path / name, sizes)
        write(paths[-1], change(list(map(serialized, range(sum(sizes[:-1]), sum(sizes))))))
        return TFRecords(paths, FEATURES).fingerprint

    first = fingerprint('a', [2, 3])
    assert len(first) == 64
    assert fingerprint('b', [4, 1]) == first
    assert fingerprint('c', [2, 3], lambda records: records[::-1]) != first
    assert fingerprint('d', [2, 3], lambda records: [*records[:2], serialized(9)]) != first


def test_the_index_is_made_once_and_again_when_a_file_has_changed(tmp_path, monkeypatch):
    scanned = []
    scan = tfrecord_index._scan
    monkeypatch.setattr(tfrecord_index, '_scan', lambda path: scanned.append(path) or scan(path))
    paths = shards(tmp_path, [2, 2])
    assert TFRecords(paths, FEATURES).num_examples == 4
    assert sorted(scanned) == paths
    scanned.clear()
    source = TFRecords(paths, FEATURES)
    assert scanned == []
    source.read(np.arange(4))
    # Written aside and renamed, so that the file held open is not the one of this name any more.
    os.rename(write(tmp_path / 'new', map(serialized, [7, 8, 9])), paths[1])
    source = TFRecords(paths, FEATURES)
    assert sorted(scanned) == paths
    assert source.fetch(tf.range(5, dtype=tf.int64))['x'].numpy().tolist() == [0, 1, 7, 8, 9]


def test_several_who_need_the_index_at_once_get_the_same(tmp_path):
    paths = shards(tmp_path, [50] * 4)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(TFRecords(paths, FEATURES).fingerprint))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    kept = [path.name for path in (tmp_path / '.phalanx').iterdir()]
    assert len([name for name in kept if not name.endswith('.lock')]) == 1


@pytest.mark.parametrize('compress', [gzip.compress, zlib.compress], ids=['gzip', 'zlib'])
def test_compressed_files_are_refused_with_a_way_out(small, compress, request):
    small.write_bytes(compress(small.read_bytes()))
    kind = request.node.callspec.id
    with pytest.raises(ConfigError, match=rf'compressed \({kind}\).*phalanx prepare'):
        TFRecords(str(small), FEATURES)


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        (b'', 'is empty'),
        (b'text that is no record', 'is no TFRecord file'),
        (b'text', r'is cut off in record 0 \(byte 0\)'),
        (bytes(100), 'is no TFRecord file'),
    ],
)
def test_what_is_no_tfrecord_file_is_refused_by_name(tmp_path, content, said):
    paths = shards(tmp_path, [2, 2, 2])
    Path(paths[1]).write_bytes(content)
    with pytest.raises(ConfigError, match=f'a-00001.tfrecord {said}'):
        TFRecords(paths, FEATURES)
    with pytest.raises(ConfigError, match=f'a-00001.tfrecord {said}'):
        TFRecords(paths[1], FEATURES)


def test_missing_files_are_named(tmp_path):
    shards(tmp_path, [1])
    with pytest.raises(ConfigError, match=r"no data file .*Did you mean '.*a-00000.tfrecord'"):
        TFRecords(f'{tmp_path}/a-00000.tfrecords', FEATURES)


def test_a_file_cut_off_anywhere_is_refused_or_holds_fewer_whole_records(small):
    content = small.read_bytes()
    length = len(content) // 3
    for end in range(len(content)):
        small.write_bytes(content[:end])
        if end and end % length == 0:
            source = TFRecords(str(small), FEATURES)
            assert source.num_examples == end // length
            continue
        said = 'is empty' if not end else rf'cut off in record {end // length} \(byte '
        with pytest.raises(ConfigError, match=said):
            TFRecords(str(small), FEATURES)


@pytest.mark.parametrize('flip', [0x01, 0x80, 0xFF])
def test_a_wrong_byte_anywhere_is_noticed(small, flip):
    content = small.read_bytes()
    length = len(content) // 3
    expected = [serialized(i) for i in range(3)]
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= flip
        small.write_bytes(damaged)
        record, within = divmod(place, length)
        if within < tfrecord_index.HEADER:
            said = 'no TFRecord file|cut off in record 0' if record == 0 else f'record {record} '
            with pytest.raises(ConfigError, match=said):
                TFRecords(str(small), FEATURES)
            continue
        source = TFRecords(str(small), FEATURES)
        for other in {0, 1, 2} - {record}:
            assert source.read(np.array([other]))[0] == expected[other]
        for indices in ([record], [0, 1, 2]):
            with pytest.raises(BadRecord, match='do not fit their checksum'):
                source.read(np.array(indices))


def test_a_file_that_changes_under_a_run_is_noticed(small):
    source = TFRecords(str(small), FEATURES)
    content = small.read_bytes()
    small.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadRecord, match='checksum'):
        source.read(np.arange(2))


def test_a_damaged_record_fails_the_batch_as_an_invalid_argument(small):
    content = bytearray(small.read_bytes())
    content[-5] ^= 1
    small.write_bytes(content)
    source = TFRecords(str(small), FEATURES)
    with pytest.raises(tf.errors.InvalidArgumentError, match='do not fit their checksum'):
        tf.function(source.fetch, autograph=False)(tf.range(3, dtype=tf.int64))


@pytest.mark.parametrize(
    ('records', 'features', 'said'),
    [
        ([b'\xff\xfe'], {'x': ('int64', ())}, 'is no tf.train.Example'),
        (
            [serialized(1)],
            {'z': ('int64', ()), 'y': ('uint8', (4,))},
            r"has no feature 'z', but \['x', 'y'\]",
        ),
        (
            [serialized(1)],
            {'x': ('float32', (2,))},
            "'x' as 1 value.s. in a int64_list, but float32 of shape .* are 2 in a float_list",
        ),
        (
            [serialized(1)],
            {'y': ('uint8', (3, 3))},
            r"4 bytes as the feature 'y', but uint8 of shape \(3, 3\) are 9",
        ),
    ],
)
def test_records_of_another_kind_are_refused_before_training(tmp_path, records, features, said):
    with pytest.raises(ConfigError, match=rf'a-00000.tfrecord, record 0 \(byte 0\) .*{said}'):
        TFRecords(write(tmp_path / 'a-00000.tfrecord', records), features)


@pytest.mark.parametrize('record', [b'\xff\xfe', b'text'])
def test_a_record_that_is_no_example_is_damaged_and_is_left_out(tmp_path, record):
    path = write(tmp_path / 'a', [serialized(0), record, serialized(2)])
    source = TFRecords(path, FEATURES)
    damage = bad_records.find(source, [np.arange(3)], 'x')
    assert (damage.record, damage.reason) == (1, 'no tf.train.Example')
    features, good = bad_records.fetch_good(source, tf.range(3, dtype=tf.int64), 'x')
    assert good.numpy().tolist() == [True, False, True]
    assert features['x'].numpy()[[0, 2]].tolist() == [0, 2]


def test_a_damaged_index_is_not_used(small):
    TFRecords(str(small), FEATURES)
    (checksums,) = small.parent.glob('.phalanx/tfrecord-index-*/checksums')
    with open(checksums, 'rb+') as file:
        file.truncate(8)
    with pytest.raises(ConfigError, match=r'is damaged\. Delete it'):
        TFRecords(str(small), FEATURES)


def test_only_so_many_files_are_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, '_FEW_FILES', 4)
    monkeypatch.setattr(files, '_limit', lambda: 16)
    source = TFRecords(shards(tmp_path, [1] * 100), FEATURES)
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(2):
        batch = source.fetch(tf.random.shuffle(tf.range(100, dtype=tf.int64)))
        assert sorted(batch['x'].numpy()) == list(range(100))
        assert len(os.listdir('/proc/self/fd')) <= before + 16


def test_a_slow_disk_is_told_beforehand_and_gives_the_same(tmp_path, monkeypatch):
    told = []
    expect = files._Descriptor.expect
    monkeypatch.setattr(files._Descriptor, 'expect', lambda *a: told.append(a[1]) or expect(*a))
    monkeypatch.setattr(files, '_SLOW', -1)
    source = TFRecords(shards(tmp_path, [20, 20]), FEATURES)
    for _ in range(2):
        batch = source.fetch(tf.range(0, 40, 2, dtype=tf.int64))
        assert batch['x'].numpy().tolist() == list(range(0, 40, 2))
    assert len(told) >= 20
    told.clear()
    monkeypatch.setattr(files, '_SLOW', 60)
    source.read(np.arange(0, 40, 2))
    told.clear()
    source.read(np.arange(0, 40, 2))
    assert told == []


def test_files_are_read_by_url(tmp_path, monkeypatch):
    monkeypatch.setenv('PHALANX_CACHE', str(tmp_path / 'cache'))
    shards(tmp_path, [3, 2])
    with servers.http(tmp_path) as port:
        source = TFRecords(f'http://127.0.0.1:{port}/*.tfrecord', FEATURES)
        batch = source.fetch(tf.constant([4, 0, 1, 2, 3], tf.int64))
        assert batch['x'].numpy().tolist() == [4, 0, 1, 2, 3]
    assert source.where(4).endswith('/a-00001.tfrecord, record 1 (byte 45)')
    assert source.fingerprint == TFRecords(f'{tmp_path}/*.tfrecord', FEATURES).fingerprint


@pytest.mark.slow
def test_several_processes_read_more_files_than_each_may_open(tmp_path):
    paths = shards(tmp_path, [1] * 1100)
    code = (
        'import numpy as np, sys\n'
        'from trainer.data.tfrecord import TFRecords\n'
        "source = TFRecords(sys.argv[1], {'x': ('int64', ())})\n"
        'for _ in range(2):\n'
        '    assert len(set(source.read(np.random.permutation(1100)))) == 1100\n'
        'print(source.num_examples, source.fingerprint)\n'
    )
    processes = [
        subprocess.Popen(
            ['bash', '-c', f'ulimit -Sn 256; ulimit -Hn {most}; exec "$@"', 'bash', sys.executable]
            + ['-c', code, f'{tmp_path}/*.tfrecord'],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for most in (300, 4096)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said[0] == said[1] == f'1100 {TFRecords(paths, FEATURES).fingerprint}\n'
