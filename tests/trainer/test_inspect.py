import io
import re
import types

import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

from launch import inspect
from launch.__main__ import main
from tests.trainer.preparing import Numbered, prepare
from trainer import inspect_data
from trainer.data.arrays import Arrays
from trainer.data.digits import digits
from trainer.data.scan import Scan, spread
from trainer.errors import ConfigError, WriteError


def survey(source, records=None, threads=2):
    records = np.arange(source.num_examples) if records is None else records
    read = []
    found = inspect_data.survey(source, records, threads=threads, progress=read.append)
    assert sum(read) == found.read == len(records)
    return found


def shown(source, found=None):
    """What is shown of a source, as text."""
    console = Console(file=io.StringIO(), width=160)
    found = found or survey(source)
    inspect._show(console, 'train', source, found.numbers, found)
    return console.file.getvalue()


def test_every_damaged_record_is_named_beside_its_good_neighbours():
    found = survey(Numbered(1000, bad=[3, 4, 700]))
    assert [(bad.record, bad.where, bad.reason) for bad in found.bad] == [
        (3, 'numbers.txt, line 4', '3 is spoilt'),
        (4, 'numbers.txt, line 5', '4 is spoilt'),
        (700, 'numbers.txt, line 701', '700 is spoilt'),
    ]
    assert found.numbers['label'].count == 997
    assert found.numbers['label'].counts == {0: 498, 1: 499}


def test_the_number_of_threads_changes_nothing():
    assert survey(digits(), threads=1) == survey(digits(), threads=4)


def test_a_sample_is_spread_over_all_records():
    assert spread(Numbered(100), 5).tolist() == [0, 24, 49, 74, 99]
    assert spread(Numbered(3), 5).tolist() == [0, 1, 2]


def test_a_batch_holds_what_fits_into_memory():
    assert Scan(digits()).batch_size == 256
    large = Arrays({'image': np.zeros([2, 4096, 4096, 1], np.uint8)})
    assert Scan(large).batch_size == 1


def test_features_classes_and_examples_are_shown():
    text = shown(Numbered(20))
    assert re.search(r'picture +uint8 +2 x 3 x 1 +0 +19 +9\.5', text)
    assert re.search(r'word +string +one value *\n', text)
    assert re.search(r'1 +odd +10 +50\.0% ', text)
    assert re.search(r'19 +19 4\.75 +word 19 +1 +19 19 19 19 19 19 +numbers\.txt, line 20', text)
    assert '20 records were read; none damaged' in text
    assert 'not finite' not in text


def test_damage_and_what_is_not_finite_are_shown():
    text = shown(Numbered(20, bad=[7]))
    assert 'damaged: numbers.txt, line 8: 7 is spoilt' in text
    assert '20 records were read; 1 damaged' in text
    text = shown(Arrays({'x': np.array([1.0, np.nan, 2.0])}))
    assert re.search(r'std +not finite', text)
    assert re.search(r'x +float64 +one value +1 +2 +1\.5 +0\.5 +1', text)


def test_of_many_classes_the_most_and_least_frequent_are_shown():
    labels = np.repeat(np.arange(100), np.arange(1, 101))
    text = shown(Arrays({'label': labels}))
    assert re.search(r'99 +100 ', text)
    assert re.search(r'\.\.\. +80 more', text)
    assert re.search(r'\n *0 +1 ', text)
    assert not re.search(r'\n *50 +51 ', text)


def test_numbers_that_hardly_repeat_are_not_shown_as_classes():
    assert 'share' not in shown(Arrays({'number': np.arange(100) * 2 // 3}))
    assert 'share' in shown(Arrays({'number': np.arange(100) // 2}))


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (b'some\n words', 'some words'),
        (b'x' * 100, 'x' * 60 + '...'),
        (b'\xff\xd8\xff\xe0', '4 bytes: ff d8 ff e0 ...'),
        (np.int64(1234), '1,234'),
        (np.array([0.5, 1.0]), '0.5 1'),
        (np.arange(100), '0 to 99, mean 49.5'),
        (np.array([b'red', b'', b'a\nb'], object), 'red, , a b'),
        (np.array([b'x'] * 9, object), 'x, x, x, x, x, x, x, x, ...'),
    ],
)
def test_a_value_is_shown_short(value, text):
    assert inspect._value(value) == text


def test_images_are_found_by_their_shape():
    assert inspect_data.image_of(digits()) == 'image'
    assert inspect_data.image_of(Arrays({'x': np.zeros([4, 8, 2])})) is None
    texts = types.SimpleNamespace(element_spec={'x': tf.TensorSpec([8, 8, 1], tf.string)})
    assert inspect_data.image_of(texts) is None


def test_pictures_go_from_black_to_white():
    images = np.array([0, 8, 16], np.uint8).reshape(1, 1, 3, 1)
    np.testing.assert_array_equal(inspect_data.as_pictures(images, (0, 16)).ravel(), [0, 128, 255])


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_a_sheet_and_tensorboard_show_labelled_pictures(tmp_path, channels):
    pictures = np.random.default_rng(0).integers(0, 256, [5, 6, 7, channels]).astype(np.uint8)
    labels = ['cat', 'dog', 'cat', 'cow', '3']
    inspect_data.save_sheet(tmp_path / 'a.png', pictures, labels)
    sheet = tf.io.decode_png((tmp_path / 'a.png').read_bytes())
    assert sheet.shape[0] > 100
    assert len(np.unique(sheet)) > 50
    tags = [f'{label}/{number}' for number, label in enumerate(labels)]
    inspect_data.to_tensorboard(tmp_path / 'tb', 'train', pictures, tags)
    (events,) = (tmp_path / 'tb' / 'train').iterdir()
    found = {}
    for event in tf.compat.v1.train.summary_iterator(str(events)):
        for value in event.summary.value:
            found[value.tag] = tf.io.decode_png(tf.make_ndarray(value.tensor)[2])
    assert list(found) == tags
    np.testing.assert_array_equal(found['cow/3'], pictures[3])


def test_images_without_a_finite_number_are_black(tmp_path):
    images = np.full([4, 6, 6, 1], np.nan, np.float32)
    inspect._picture({'train': Arrays({'image': images})}, None, str(tmp_path / 'tb'))
    (events,) = (tmp_path / 'tb' / 'train').iterdir()
    found = [
        tf.io.decode_png(tf.make_ndarray(value.tensor)[2]).numpy()
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
    ]
    assert len(found) == 4
    assert not np.any(found)


def test_where_all_images_are_damaged_it_is_told(tmp_path):
    bad = Numbered(5, bad=range(5))
    with pytest.raises(ConfigError, match='all that were looked at are damaged'):
        inspect._picture({'train': bad}, str(tmp_path / 'a.png'), None)
    inspect._picture({'train': bad, 'test': Numbered(5)}, str(tmp_path / 'a.png'), None)
    assert (tmp_path / 'a.png').exists()


def test_pictures_that_cannot_be_written_are_told(tmp_path):
    pictures = np.zeros([1, 6, 6, 1], np.uint8)
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='No such file or directory'):
        inspect_data.save_sheet(tmp_path / 'none' / 'a.png', pictures, ['0'])
    with pytest.raises(WriteError, match='cannot be written'):
        inspect_data.to_tensorboard(tmp_path / 'file', 'train', pictures, ['0'])


def test_where_there_are_no_images_it_is_told():
    with pytest.raises(ConfigError, match='no feature has the shape'):
        inspect._picture({'train': Arrays({'x': np.zeros([4, 8])})}, 'a.png', None)


def test_a_prepared_directory_is_shown_without_reading_it(tmp_path, capsys):
    out = prepare(
        tmp_path / 'out',
        {'train': Numbered(20, bad=[7])},
        files='tfrecord',
        on_bad_record='skip',
    )
    assert main(['inspect', str(out)]) == 0
    text = capsys.readouterr().out
    assert 'train: 1 damaged records were left out of the 20 it was made of' in text
    assert '19 records' in text
    assert 'were read' not in text


def test_damage_of_a_prepared_directory_is_found_and_told_by_the_exit_code(tmp_path, capsys):
    out = prepare(tmp_path / 'out', {'train': digits(), 'test': digits('test')}, files='tfrecord')
    assert main(['inspect', str(out), '--verify']) == 0
    shard = out / 'train-00000-of-00001.tfrecord'
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert main(['inspect', str(out), '--verify']) == 1
    text = ' '.join(capsys.readouterr().out.split())
    assert f'{shard} has changed: its sha256 is not the one of dataset.json.' in text
    assert f'damaged: {shard}, record 0 (byte 0): ' in text
    assert '1,500 records were read; 1 damaged' in text
    assert '297 records were read; none damaged' in text
    shard.unlink()
    assert main(['inspect', str(out), '--verify']) == 1
    assert 'a shard of dataset.json, is missing.' in capsys.readouterr().out
