import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.preparing import Numbered, prepare
from trainer.data.arrays import Arrays
from trainer.data.digits import digits
from trainer.data.prepared import prepared
from trainer.errors import BadRecord, ConfigError


@pytest.fixture(scope='module', params=['array_record', 'tfrecord'])
def out(request, tmp_path_factory):
    """The digits, prepared in each of the formats in turn."""
    out = tmp_path_factory.mktemp(request.param) / 'digits'
    return prepare(out, files=request.param, shards=3)


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / 'copy')


def shards(directory, split='train'):
    return sorted(directory.glob(f'{split}-*-of-*'))


def test_a_split_holds_the_records_of_its_source(out):
    for split in ('train', 'test'):
        source, expected = prepared(out, split), digits(split)
        assert source.num_examples == expected.num_examples
        everything = tf.range(expected.num_examples, dtype=tf.int64)
        found, wanted = source.fetch(everything), expected.fetch(everything)
        np.testing.assert_array_equal(found['image'], wanted['image'])
        np.testing.assert_array_equal(found['label'], wanted['label'])


def test_bounds_come_from_the_statistics(out):
    assert prepared(out).bounds('label') == (0.0, 9.0)
    assert prepared(out).bounds('image') == (0.0, 16.0)
    assert prepared(out).numbers['label'].counts[3] == 153


def test_what_is_no_number_or_not_finite_has_no_bounds(tmp_path):
    source = prepared(prepare(tmp_path / 'out', {'train': Numbered()}))
    assert source.bounds('word') is None
    source.numbers['x'] = source.numbers['x'].__class__(count=1, not_finite=1, min=0, max=1)
    assert source.bounds('x') is None


def test_the_fingerprint_is_of_the_contents_and_not_of_the_place(out, copy):
    assert prepared(out).fingerprint == prepared(copy).fingerprint
    assert prepared(out, 'train').fingerprint != prepared(out, 'test').fingerprint


def test_a_record_is_found_in_its_shard(out):
    first, second, _ = shards(out)
    assert prepared(out).where(0).startswith(f'{first}, record 0')
    assert prepared(out).where(501).startswith(f'{second}, record 1')


def test_an_unknown_split_gets_the_nearest(out):
    with pytest.raises(ConfigError) as error:
        prepared(out, 'tset')
    assert error.value.message == (
        f"{str(out)!r} has no split 'tset', only 'train', 'test'. Did you mean 'test'?"
    )


def test_a_missing_shard_is_told(copy):
    missing = shards(copy)[1]
    missing.unlink()
    with pytest.raises(ConfigError, match=f'{missing}, a shard of dataset.json, is missing. Run '):
        prepared(copy)
    assert prepared(copy, 'test').num_examples == 297


def test_a_truncated_shard_is_told(copy):
    shard = shards(copy)[0]
    size = shard.stat().st_size
    with open(shard, 'rb+') as file:
        file.truncate(size - 1)
    with pytest.raises(ConfigError, match=f'{shard} has {size - 1:,} bytes instead of {size:,}. '):
        prepared(copy)


def other_digits():
    """The digits with the label of record 700 mended, and the image of record 500."""
    arrays = {
        name: tensor.numpy().copy()
        for name, tensor in digits().fetch(tf.range(1500, dtype=tf.int64)).items()
    }
    arrays['label'][700] = (arrays['label'][700] + 1) % 10
    arrays['image'][500] = arrays['image'][499]
    return Arrays(arrays)


def test_a_shard_of_other_data_with_the_same_size_is_told(out, copy, tmp_path):
    described = json.loads((out / 'dataset.json').read_text())
    other = prepare(
        tmp_path / 'other', {'train': other_digits()}, files=described['files'], shards=3
    )
    first, second, _ = shards(copy)
    shutil.copy(shards(other)[0], first)
    assert prepared(copy).fingerprint == prepared(out).fingerprint
    assert second.stat().st_size == shards(other)[1].stat().st_size
    shutil.copy(shards(other)[1], second)
    with pytest.raises(ConfigError, match=f'{second} is not the shard that dataset.json describes'):
        prepared(copy)


def test_damage_to_records_is_left_to_who_reads_them(out, copy):
    shard = shards(copy)[0]
    content = bytearray(shard.read_bytes())
    content[150] ^= 255
    shard.write_bytes(content)
    source = prepared(copy)
    assert source.num_examples == 1500
    with pytest.raises(BadRecord):
        source.fetch(tf.range(1500, dtype=tf.int64))


def test_a_shard_too_many_is_told(copy):
    shard = shards(copy)[0]
    another = shard.with_name(shard.name.replace('00000-of-00003', '00000-of-00009'))
    shutil.copy(shard, another)
    with pytest.raises(ConfigError, match=f'{another} is no shard of .*Remove it.'):
        prepared(copy)


def test_a_directory_that_is_none_gets_the_nearest(out):
    with pytest.raises(ConfigError) as error:
        prepared(out.with_name('digit'))
    assert error.value.message == (
        f'{str(out.with_name("digit"))!r} is no prepared data set: it has no dataset.json. Did you '
        f'mean {str(out)!r}?'
    )


def test_an_unfinished_directory_is_told(tmp_path):
    (tmp_path / 'out.partial').mkdir()
    with pytest.raises(ConfigError, match=r'out\.partial is unfinished: run its `phalanx prepare`'):
        prepared(tmp_path / 'out')


@pytest.mark.parametrize('text', ['', '{"format": 1}', '[]', '{"format": 1, "splits": {"a": 1}}'])
def test_a_damaged_description_is_told(copy, text):
    (copy / 'dataset.json').write_text(text)
    with pytest.raises(ConfigError, match=r'dataset\.json is damaged: '):
        prepared(copy)


@pytest.mark.parametrize(
    ('text', 'other'),
    [
        ('"files"', '"file"'),
        ('"files": "', '"files": "x'),
        ('"statistics"', '"statistic"'),
        ('"count":', '"cuont":'),
        ('"counts": {', '"counts": {"": 1,'),
        ('"file": "train', '"fil": "train'),
        ('"bytes":', '"byte":'),
    ],
)
def test_a_description_with_a_damaged_name_is_told(copy, text, other):
    path = copy / 'dataset.json'
    assert text in path.read_text()
    path.write_text(path.read_text().replace(text, other))
    with pytest.raises(ConfigError, match=r'dataset\.json is damaged: '):
        prepared(copy)


@pytest.mark.parametrize('key', ['files', 'statistics', 'left_out', 'bytes'])
def test_a_description_that_lacks_something_is_told(copy, key):
    described = json.loads((copy / 'dataset.json').read_text())
    split = described['splits']['train']
    for part in (described, split, split['shards'][1]):
        part.pop(key, None)
    (copy / 'dataset.json').write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=rf"dataset\.json is damaged: KeyError '{key}'\. Run "):
        prepared(copy)


def test_no_shard_is_read_elsewhere(copy, out):
    described = json.loads((copy / 'dataset.json').read_text())
    shard = described['splits']['train']['shards'][0]
    shard['file'] = f'../../{out.parent.name}/digits/{shard["file"]}'
    (copy / 'dataset.json').write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"dataset\.json is damaged: .*'\.\./.* is no name of a"):
        prepared(copy)


def test_a_description_of_a_later_version_is_told(copy):
    described = json.loads((copy / 'dataset.json').read_text())
    (copy / 'dataset.json').write_text(json.dumps({**described, 'format': 2}))
    with pytest.raises(ConfigError, match='has format 2; this version of Phalanx reads format 1'):
        prepared(copy)
