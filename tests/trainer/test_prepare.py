import json
import os

import numpy as np
import pytest
import tensorflow as tf

from tests.disks import small_disk
from tests.trainer.preparing import Numbered, checksums, missing, prepare
from trainer.data.arrays import Arrays
from trainer.data.digits import digits
from trainer.data.prepared import prepared
from trainer.data.scan import Scan
from trainer.errors import ConfigError, WriteError
from trainer.prepare import Options, ShardWriter, plan
from trainer.unfinished import Unfinished

FORMATS = ('array_record', 'tfrecord')


def description(directory):
    return json.loads((directory / 'dataset.json').read_text())


def read_all(source):
    return source.fetch(tf.range(source.num_examples, dtype=tf.int64))


@pytest.mark.parametrize('files', FORMATS)
def test_what_is_read_from_the_files_is_what_the_source_has(tmp_path, files):
    source = Numbered()
    prepare(tmp_path / 'out', {'train': source}, files=files, shards=3)
    again = prepared(tmp_path / 'out', 'train')
    assert again.num_examples == 20
    assert again.element_spec == source.element_spec
    assert again.class_names == ('even', 'odd')
    expected, found = read_all(source), read_all(again)
    for name in source.element_spec:
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].dtype == expected[name].dtype


def test_dataset_json_describes_everything(tmp_path):
    out = prepare(tmp_path / 'out', {'train': Numbered()}, files='tfrecord', shards=3)
    told = description(out)
    assert (told['format'], told['files']) == (1, 'tfrecord')
    train = told['splits']['train']
    assert train['records'] == 20
    assert train['source'] == {'records': 20, 'fingerprint': Numbered().fingerprint}
    assert train['class_names'] == ['even', 'odd']
    assert train['features'] == {
        'label': ['int64', [], 'values'],
        'picture': ['uint8', [2, 3, 1], 'bytes'],
        'word': ['string', [], 'values'],
        'x': ['float32', [2], 'values'],
    }
    files = checksums(out)
    assert [(s['file'], s['first'], s['end'], s['records']) for s in train['shards']] == [
        ('train-00000-of-00003.tfrecord', 0, 6, 6),
        ('train-00001-of-00003.tfrecord', 6, 13, 7),
        ('train-00002-of-00003.tfrecord', 13, 20, 7),
    ]
    for shard in train['shards']:
        assert files.pop(shard['file']) == shard['sha256']
        assert (out / shard['file']).stat().st_size == shard['bytes']
    assert set(files) == {'dataset.json'}
    label = train['statistics']['label']
    assert (label['count'], label['min'], label['max'], label['not_finite']) == (20, 0, 1, 0)
    assert (label['mean'], label['std']) == pytest.approx((0.5, 0.5))
    assert label['counts'] == {'0': 10, '1': 10}
    numbers = np.stack([np.arange(20), np.arange(20) / 4])
    x = train['statistics']['x']
    assert (x['count'], x['min'], x['max']) == (40, 0, 19)
    assert (x['mean'], x['std']) == pytest.approx((numbers.mean(), numbers.std()))
    assert 'word' not in train['statistics']


def test_sizes_tell_how_many_shards_there_are(tmp_path):
    record = len(tf.io.serialize_tensor(tf.zeros([64, 64, 1], tf.uint8)).numpy())
    source = Arrays({'image': np.zeros([100, 64, 64, 1], np.uint8)})
    shards = plan({'train': source}, Options(shard_mb=10 * record / 10**6))
    assert len(shards['splits']['train']['shards']) == 10
    assert len(plan({'train': source}, Options())['splits']['train']['shards']) == 1
    assert len(plan({'train': source}, Options(shards=1000))['splits']['train']['shards']) == 100


@pytest.mark.parametrize('files', FORMATS)
def test_equal_bytes_come_whenever_it_was_killed(tmp_path, files):
    expected = checksums(prepare(tmp_path / 'undisturbed', files=files, shards=3))
    sources = {'train': digits('train'), 'test': digits('test')}
    how = Options(files=files, shards=3)
    planned, unfinished = plan(sources, how), Unfinished(tmp_path / 'out')
    shards = missing(planned, ())
    for number, (split, name, first, end) in enumerate(shards):
        with unfinished.lock():
            unfinished.begin(planned)
            assert len(unfinished.written(planned)) == number
            # As a process leaves it that is killed while it writes: half a file, and one that is
            # whole but not yet known to be.
            (unfinished.path / f'.tmp-{name}').write_bytes(b'half')
            (unfinished.path / shards[-1][1]).write_bytes(b'not known')
            writer = ShardWriter(sources[split], split, how)
            record = writer.write(unfinished.path / name, first, end, lambda count: None)
            unfinished.keep(name, record)
            assert not unfinished.finished
    prepare(tmp_path / 'out', files=files, shards=3)
    assert checksums(tmp_path / 'out') == expected
    assert os.listdir(tmp_path / 'out') != []
    assert not (tmp_path / 'out.partial').exists()
    assert not (tmp_path / 'out' / '.progress').exists()


def test_a_finished_shard_that_is_damaged_meanwhile_is_written_again(tmp_path):
    expected = checksums(prepare(tmp_path / 'undisturbed', files='tfrecord'))
    sources, how = {'train': digits('train'), 'test': digits('test')}, Options(files='tfrecord')
    planned, unfinished = plan(sources, how), Unfinished(tmp_path / 'out')
    with unfinished.lock():
        unfinished.begin(planned)
        split, name, first, end = missing(planned, ())[0]
        path = unfinished.path / name
        unfinished.keep(name, ShardWriter(sources[split], split, how).write(path, first, end, int))
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
        assert unfinished.written(planned) == {}
    assert checksums(prepare(tmp_path / 'out', files='tfrecord')) == expected


def test_a_finished_directory_stays_as_it_is(tmp_path):
    out = prepare(tmp_path / 'out', shards=2)
    unfinished = Unfinished(out)
    with unfinished.lock():
        assert unfinished.finished
        unfinished.begin(plan({s: digits(s) for s in ('train', 'test')}, Options(shards=2)))
    assert not (tmp_path / 'out.partial').exists()


@pytest.mark.parametrize('is_finished', [True, False])
@pytest.mark.parametrize(
    ('sources', 'options', 'wrong'),
    [
        ({'train': digits('train')}, {}, "it has the splits ['train', 'test'], not ['train']"),
        (
            {'train': digits('test'), 'test': digits('test')},
            {},
            "source of the split 'train' was {'records': 1500,",
        ),
        (None, {'shards': 3}, "the split 'train' was divided into another number of shards"),
        (None, {'files': 'tfrecord'}, "files was 'array_record' and is 'tfrecord' now"),
    ],
)
def test_something_else_is_not_written_into_the_same_directory(
    tmp_path, is_finished, sources, options, wrong
):
    both = {'train': digits('train'), 'test': digits('test')}
    unfinished = Unfinished(tmp_path / 'out')
    if is_finished:
        prepare(tmp_path / 'out')
    else:
        with unfinished.lock():
            unfinished.begin(plan(both, Options()))
    other = plan(sources or both, Options(**options))
    with unfinished.lock(), pytest.raises(ConfigError) as error:
        unfinished.begin(other)
    assert wrong in error.value.message
    assert 'Name another directory, or delete this one.' in error.value.message


def test_a_damaged_record_stops_it_and_is_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        prepare(tmp_path / 'out', {'train': Numbered(bad=[13, 17])})
    assert error.value.message == (
        "A record of the split 'train' is damaged: numbers.txt, line 14: 13 is spoilt. Mend it, "
        'or leave out what is damaged with --on_bad_record=skip. Finished shards are kept.'
    )
    assert not (tmp_path / 'out').exists()
    assert not list((tmp_path / 'out.partial').glob('*record'))


def test_damaged_records_can_be_left_out_and_are_listed(tmp_path):
    bad = [0, *range(7, 14), 19]  # One shard has nothing left.
    out = prepare(
        tmp_path / 'out',
        {'train': Numbered(bad=bad)},
        files='tfrecord',
        shards=3,
        on_bad_record='skip',
    )
    train = description(out)['splits']['train']
    assert train['records'] == 20 - len(bad)
    assert [each['record'] for each in train['left_out']] == bad
    assert train['left_out'][-1] == {
        'record': 19,
        'where': 'numbers.txt, line 20',
        'reason': '19 is spoilt',
    }
    assert train['statistics']['label']['count'] == 20 - len(bad)
    labels = read_all(prepared(out))['x'].numpy()[:, 0]
    np.testing.assert_array_equal(labels, [n for n in range(20) if n not in bad])


def test_a_batch_with_nothing_but_damaged_records_is_left_out(tmp_path):
    source = Numbered(300, bad=range(256, 300))
    assert Scan(source).batch_size == 256
    out = prepare(tmp_path / 'out', {'train': source}, shards=1, on_bad_record='skip')
    assert description(out)['splits']['train']['statistics']['label']['count'] == 256


def test_after_a_damaged_record_it_may_go_on_without_and_from_there_not_with(tmp_path):
    source, out = Numbered(bad=[13]), tmp_path / 'out'
    with pytest.raises(ConfigError, match='13 is spoilt'):
        prepare(out, {'train': source}, shards=4)
    planned = plan({'train': source}, Options(shards=4))
    assert len(Unfinished(out).written(planned)) == 2
    writer = ShardWriter(source, 'train', Options(shards=4, on_bad_record='skip'))
    unfinished, name = Unfinished(out), planned['splits']['train']['shards'][2]['file']
    unfinished.keep(name, writer.write(unfinished.path / name, 10, 15, int))
    assert len(unfinished.written(planned, incomplete=True)) == 3
    assert len(unfinished.written(planned)) == 2
    prepare(out, {'train': source}, shards=4, on_bad_record='skip')
    assert description(out)['splits']['train']['records'] == 19


def test_nothing_but_damaged_records_is_told(tmp_path):
    everything = Numbered(bad=range(20))
    with pytest.raises(ConfigError, match=r"All 20 records of the split 'train' are damaged, the "):
        prepare(tmp_path / 'out', {'train': everything}, on_bad_record='skip')
    assert not (tmp_path / 'out').exists()


class Unreachable(Numbered):
    def fetch(self, indices):
        def read(records):
            raise OSError('the server is gone')

        return {'x': tf.ensure_shape(tf.numpy_function(read, [indices], tf.float32), [None, 2])}

    element_spec = property(lambda self: {'x': tf.TensorSpec([2], tf.float32)})


def test_files_out_of_reach_are_not_taken_for_damage(tmp_path):
    with pytest.raises(OSError, match='the server is gone'):
        prepare(tmp_path / 'out', {'train': Unreachable()}, shards=1, on_bad_record='skip')


class Ragged(Numbered):
    element_spec = property(lambda self: {'x': tf.TensorSpec([None], tf.float32)})


def test_a_feature_that_cannot_be_stored_is_named():
    with pytest.raises(ConfigError, match=r"^The split 'train' cannot be stored. The feature 'x'"):
        plan({'train': Ragged()}, Options(shards=1))


def test_two_at_once_do_not_write_into_one_directory(tmp_path):
    first = Unfinished(tmp_path / 'out')
    with first.lock():
        with pytest.raises(ConfigError, match='is being written by another `phalanx prepare`'):
            prepare(tmp_path / 'out')
        # It was finished between the look and the lock.
        late = Unfinished(tmp_path / 'out')
    prepare(tmp_path / 'out')
    with late.lock():
        assert late.finished
    assert sorted(os.listdir(tmp_path)) == ['out']


@pytest.mark.parametrize('what', ['file', 'full', 'below a file'])
def test_a_directory_that_cannot_be_is_refused_before_anything_is_read(tmp_path, what):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.tex').write_text('')
    place, message = {
        'file': ('file', 'is a file'),
        'full': ('full', 'holds something else than a prepared data set'),
        'below a file': ('file/out', 'cannot be written: Not a directory'),
    }[what]
    with pytest.raises(ConfigError, match=message), Unfinished(tmp_path / place).lock():
        pass
    assert (tmp_path / 'full' / 'thesis.tex').exists()


def test_an_empty_directory_may_be_there_already(tmp_path):
    (tmp_path / 'out').mkdir()
    prepare(tmp_path / 'out')
    assert (tmp_path / 'out' / 'dataset.json').exists()


@pytest.mark.parametrize(('files', 'size'), [('array_record', '240k'), ('tfrecord', '100k')])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path, files, size):
    with small_disk(tmp_path / 'disk', size) as disk:
        with pytest.raises(WriteError, match='No space left on device'):
            prepare(disk / 'out', files=files, shards=2)
        left = [path.name for path in (disk / 'out.partial').iterdir()]
        assert not [name for name in left if name.startswith('.tmp-')]
        assert not (disk / 'out').exists()


def test_a_mount_point_is_refused(tmp_path):
    with small_disk(tmp_path / 'disk', '1m') as disk, pytest.raises(ConfigError) as error:
        Unfinished(disk)
    assert error.value.message == f'{disk} is a mount point. Name a directory in it.'
