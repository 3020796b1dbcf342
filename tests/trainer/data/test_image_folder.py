import logging
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests import servers
from trainer.data import image_decode
from trainer.data.batch import Data
from trainer.data.digits import digits
from trainer.data.image_folder import image_folder
from trainer.data.pipeline import train_batches
from trainer.errors import ConfigError

SHAPE = (16, 16, 1)


def write_digits(directory, split='test', count=60, endings=('png', 'jpg')):
    """Writes handwritten digits into a folder for each class; returns the class of each file."""
    batch = digits(split).fetch(tf.range(count))
    written = {}
    for number, (image, label) in enumerate(
        zip(batch['image'], batch['label'].numpy(), strict=True)
    ):
        path = directory / f'digit {label}' / f'{number:04}.{endings[number % len(endings)]}'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.repeat(np.repeat(image.numpy()[..., 0] * 15, 2, 0), 2, 1)
        Image.fromarray(pixels).save(path, quality=95)
        written[f'digit {label}/{path.name}'] = int(label)
    return written


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / 'photos'
    write_digits(directory)
    return directory


def plain(directory, count=3, classes=('cat', 'dog')):
    for name in classes:
        (directory / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full([4, 4, 3], 10 * number, np.uint8)
            Image.fromarray(pixels).save(directory / name / f'{number}.png')
    return directory


def read(source, indices=None):
    indices = range(source.num_examples) if indices is None else indices
    batch = tf.function(source.fetch)(tf.constant(list(indices), tf.int64))
    return batch['image'].numpy(), batch['label'].numpy()


def names(source):
    return [os.path.basename(source.where(i)) for i in range(source.num_examples)]


def test_every_image_is_read_with_the_number_of_its_class(directory):
    source = image_folder(directory, SHAPE)
    assert source.class_names == tuple(f'digit {n}' for n in range(10))
    assert source.element_spec == {
        'image': tf.TensorSpec(SHAPE, tf.uint8),
        'label': tf.TensorSpec([], tf.int64),
    }
    assert source.num_examples == 60
    assert source.bounds('label') == (0, 9)
    images, labels = read(source)
    for index in range(60):
        path = source.where(index)
        assert path.startswith(f'{directory}/digit {labels[index]}/')
        np.testing.assert_array_equal(images[index, ..., 0], Image.open(path))
    assert sorted(labels) == sorted(digits('test').fetch(tf.range(60))['label'].numpy())


def test_records_are_read_in_any_order_and_repeatedly(directory):
    source = image_folder(directory, SHAPE)
    images, labels = read(source)
    chosen = [59, 0, 7, 7, 31]
    np.testing.assert_array_equal(read(source, chosen)[0], images[chosen])
    np.testing.assert_array_equal(read(source, chosen)[1], labels[chosen])


def test_batches_are_equal_on_one_device_and_two_replicas(directory, make_strategy):
    data = Data(image_folder(directory, SHAPE))
    batches = []
    for replicas in (1, 2):
        strategy = make_strategy(replicas)
        batch = next(train_batches(data, strategy, seed=0, global_batch_size=8, start_step=3))
        parts = tf.nest.map_structure(strategy.experimental_local_results, batch)
        batches.append({name: np.concatenate(part) for name, part in parts.items()})
    for name, value in batches[0].items():
        np.testing.assert_array_equal(batches[1][name], value)


def test_order_is_that_of_classes_and_then_of_names(tmp_path):
    for name in ('b/1.png', 'b/10.png', 'b/2.png', 'a/x/1.png', 'a/3.png', 'B2/1.png', 'a b/1.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (2, 2)).save(tmp_path / name)
    source = image_folder(tmp_path, SHAPE)
    found = [os.path.relpath(source.where(i), tmp_path) for i in range(source.num_examples)]
    assert found == [
        'B2/1.png',
        'a/3.png',
        'a/x/1.png',
        'a b/1.png',
        'b/1.png',
        'b/10.png',
        'b/2.png',
    ]


def test_endings_may_be_in_capitals_and_what_is_hidden_is_left_out(tmp_path):
    plain(tmp_path)
    (tmp_path / 'cat' / '0.png').rename(tmp_path / 'cat' / '0.PNG')
    for name in ('.phalanx/1.png', 'cat/.1.png', 'dog/.thumbnails/1.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / 'dog' / '0.png', tmp_path / name)
    source = image_folder(tmp_path, SHAPE)
    assert names(source) == ['0.PNG', '1.png', '2.png', '0.png', '1.png', '2.png']


def test_names_may_be_any_bytes(tmp_path):
    plain(tmp_path)
    for name in ('schräg 漢字 %41 *[x].png', os.fsdecode(b'\xff\xfe.png')):
        shutil.copy(tmp_path / 'cat' / '2.png', tmp_path / 'cat' / name)
    source = image_folder(tmp_path, SHAPE)
    assert source.num_examples == 8
    assert read(source)[0].max() == 20
    assert len(source.fingerprint) == 64


def test_linked_folders_are_followed(tmp_path):
    plain(tmp_path / 'kept')
    (tmp_path / 'photos').mkdir()
    for name in ('cat', 'dog'):
        (tmp_path / 'photos' / name).symlink_to(tmp_path / 'kept' / name)
    assert image_folder(tmp_path / 'photos', SHAPE).num_examples == 6


def test_a_link_to_a_folder_above_is_refused(tmp_path):
    plain(tmp_path)
    (tmp_path / 'cat' / 'all').symlink_to(tmp_path)
    with pytest.raises(OSError, match='leads to a folder that it lies in'):
        image_folder(tmp_path, SHAPE)


def test_what_is_left_out_is_told(directory, caplog):
    (directory / 'digit 3' / 'notes.txt').write_text('threes')
    Image.new('L', (2, 2)).save(directory / 'alone.png')
    with caplog.at_level(logging.INFO, logger='absl'):
        source = image_folder(directory, SHAPE)
    assert source.num_examples == 60
    assert "2 files such as 'alone.png' are left out" in caplog.text
    assert '60 images of 10 classes: digit 0 (0), digit 1 (1)' in caplog.text


def test_splits_have_the_classes_of_train(tmp_path, caplog):
    plain(tmp_path / 'train', classes=('cat', 'dog', 'eel'))
    plain(tmp_path / 'test', classes=('dog', 'eel'))
    assert read(image_folder(tmp_path, SHAPE, 'train'))[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with caplog.at_level(logging.WARNING, logger='absl'):
        test = image_folder(tmp_path, SHAPE, 'test')
    assert test.class_names == ('cat', 'dog', 'eel')
    assert read(test)[1].tolist() == [1, 1, 1, 2, 2, 2]
    assert "no images of 1 classes: 'cat'" in caplog.text


def test_for_the_names_of_classes_not_all_of_train_is_looked_at(tmp_path, monkeypatch):
    plain(tmp_path / 'train')
    plain(tmp_path / 'test')
    looked = []
    scandir = os.scandir

    def counted(path):
        looked.append(os.path.relpath(path, tmp_path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', counted)
    image_folder(tmp_path, SHAPE, 'test')
    assert 'train' in looked
    assert not [path for path in looked if path.startswith('train/')]


def test_a_split_with_a_class_that_train_lacks_is_refused(tmp_path):
    plain(tmp_path / 'train', classes=('cat', 'dog'))
    plain(tmp_path / 'test', classes=('cat', 'dogs'))
    with pytest.raises(ConfigError, match=r"test' holds the folder 'dogs'.*mean 'dog'\?"):
        image_folder(tmp_path, SHAPE, 'test')


def test_given_classes_number_the_labels(tmp_path):
    source = image_folder(plain(tmp_path), SHAPE, classes=['dog', 'cat'])
    assert source.class_names == ('dog', 'cat')
    assert os.path.relpath(source.where(0), tmp_path) == 'dog/0.png'
    assert source.num_examples == 6


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (lambda d: os.rename(d, f'{d}s'), r"no image folder '.*/photos'.*mean '.*/photoss'\?"),
        (lambda d: shutil.rmtree(d / 'cat'), "one class only, 'dog'.*classes = \\['dog'\\]"),
        (lambda d: (d / 'eel').mkdir(), "no images of the class 'eel'.*delete the folder"),
        (lambda d: (d / 'cat').rename(d / 'Dog'), "'Dog' and 'dog' are one class given twice"),
        (lambda d: [p.unlink() for p in d.glob('*/*')], 'holds no images. Those read are called'),
        (
            lambda d: [p.rename(p.with_suffix('.webp')) for p in d.glob('*/*')],
            r"holds no images.*it holds 6 files such as 'cat/0\.webp'",
        ),
        (
            lambda d: [p.rename(d / f'{p.parent.name}{p.name}') for p in d.glob('*/*')],
            'holds 6 images, but no folders of them',
        ),
        (lambda d: (shutil.rmtree(d), d.write_text('x')), 'is a file, and no folder'),
    ],
    ids=['gone', 'one', 'empty', 'case', 'nothing', 'others', 'flat', 'file'],
)
def test_a_folder_that_cannot_be_trained_on_is_refused(tmp_path, change, said):
    directory = plain(tmp_path / 'photos')
    change(directory)
    with pytest.raises(ConfigError, match=said):
        image_folder(directory, SHAPE)


@pytest.mark.parametrize(
    ('setting', 'said'),
    [
        ({'classes': 'cat'}, "classes is 'cat'; it must be a list"),
        ({'classes': ['cat', 'cat']}, "'cat' and 'cat' are one class given twice"),
        ({'classes': ['cat', 'dogs']}, r"the folder 'dog', .*mean 'dogs'\?"),
        ({'fit': 'corp'}, r"fit is 'corp'; it must be one of crop, pad, stretch.*mean 'crop'\?"),
        ({'shape': (16, 16)}, r'shape is \(16, 16\)'),
        ({'shape': (16, 16, 4)}, r'channels \(1 or 3\)'),
        ({'shape': (16, 0, 3)}, r'shape is \(16, 0, 3\)'),
        ({'directory': 'https://me:key@host/x'}, r"'https://host/x', but servers .* do not list"),
        (
            {'split': 'train'},
            r"no folder 'train'; it holds 'cat', 'dog'\..*split = None .*@subset\(\)",
        ),
    ],
)
def test_a_mistaken_setting_is_refused(tmp_path, setting, said):
    plain(tmp_path)
    with pytest.raises(ConfigError, match=said):
        image_folder(**{'directory': tmp_path, 'shape': SHAPE, **setting})


def test_the_fingerprint_is_that_of_the_contents_wherever_they_lie(directory, tmp_path):
    before = image_folder(directory, SHAPE).fingerprint
    shutil.copytree(directory, tmp_path / 'copy')
    assert image_folder(tmp_path / 'copy', SHAPE).fingerprint == before


def grow(path):
    path.write_bytes(path.read_bytes() + b'\0')


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    'change',
    [
        lambda path: path.unlink(),
        lambda path: shutil.copy(path, path.with_name('new.png')),
        lambda path: path.rename(path.with_name('other.png')),
        lambda path: path.rename(path.parents[1] / 'digit 9' / path.name),
        grow,
        flip_a_bit,
    ],
    ids=['removed', 'added', 'renamed', 'moved', 'grown', 'changed'],
)
def test_the_fingerprint_notices_a_file_that_is(directory, change):
    before = image_folder(directory, SHAPE).fingerprint
    change(sorted(directory.glob('digit 1/*.png'))[0])
    assert image_folder(directory, SHAPE).fingerprint != before


def test_the_fingerprint_depends_on_what_is_made_of_the_files(directory):
    settings = [{}, {'fit': 'pad'}, {'shape': (8, 8, 1)}, {'shape': (16, 16, 3)}]
    found = {image_folder(directory, **{'shape': SHAPE, **s}).fingerprint for s in settings}
    assert len(found) == len(settings)


@pytest.mark.parametrize(
    'content',
    [
        lambda good: b'',
        lambda good: b'This is no image.',
        lambda good: good[: len(good) // 2],
        lambda good: good[:30],
        lambda good: good[:-60] + bytes(8) + good[-52:],
        lambda good: b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0',
    ],
    ids=['empty', 'text', 'half', 'header', 'overwritten', 'bomb'],
)
def test_a_damaged_image_fails_by_itself_and_can_be_named(directory, content):
    source = image_folder(directory, SHAPE)
    images, _ = read(source)
    damaged = next(i for i in range(60) if source.where(i).endswith('.png'))
    with open(source.where(damaged), 'rb') as file:
        good = file.read()
    with open(source.where(damaged), 'wb') as file:
        file.write(content(good))
    source = image_folder(directory, SHAPE)
    with pytest.raises(tf.errors.InvalidArgumentError):
        read(source)
    with pytest.raises(tf.errors.InvalidArgumentError):
        read(source, [damaged])
    others = [i for i in range(60) if i != damaged]
    np.testing.assert_array_equal(read(source, others)[0], images[others])


def test_the_listing_of_a_file_that_is_gone_fails_the_fetch(directory):
    source = image_folder(directory, SHAPE)
    os.remove(source.where(5))
    with pytest.raises(tf.errors.OpError, match='No such file'):
        read(source, [5])


@pytest.mark.slow
def test_a_folder_in_a_store_of_objects_is_the_same_data(directory, tmp_path, monkeypatch):
    for folder in list(directory.iterdir()):
        folder.rename(folder.with_name(folder.name.replace(' ', '-')))
    local = image_folder(directory, SHAPE)
    with servers.s3(tmp_path) as port:
        for name, value in servers.clients(port).items():
            monkeypatch.setenv(name, value)
        remote = image_folder(f's3://{servers.BUCKET}/photos', SHAPE)
        assert remote.class_names == local.class_names
        assert remote.fingerprint == local.fingerprint
        name = os.path.relpath(local.where(7), directory)
        assert remote.where(7) == f's3://{servers.BUCKET}/photos/{name}'
        for found, expected in zip(read(remote), read(local), strict=True):
            np.testing.assert_array_equal(found, expected)
        with pytest.raises(ConfigError, match='no data file'):
            image_folder(f's3://{servers.BUCKET}/photo', SHAPE)


@pytest.fixture
def large(tmp_path):
    """A folder with photographs of more than 1 MB, one of whose headers is longer than 64 kB."""
    pixels = np.random.default_rng(0).integers(0, 256, [1000, 1200, 3], np.uint8)
    for name, more in (('cat', {}), ('dog', {'icc_profile': bytes(200_000)})):
        (tmp_path / name).mkdir()
        path = tmp_path / name / 'größe 1.jpg'
        Image.fromarray(pixels).save(path, quality=95, **more)
        assert path.stat().st_size > 2**20
    return tmp_path


def test_large_files_are_decoded_to_the_same_as_their_contents(large):
    source = image_folder(large, (32, 40, 3))
    contents = source.stored(np.arange(2))['image']
    contents, plans = image_decode.plan(contents, (32, 40, 3), 'crop')
    expected = image_decode.decode(tf.constant(contents), tf.constant(plans), (32, 40, 3))
    np.testing.assert_array_equal(read(source)[0], expected)


def test_a_large_file_that_is_cut_short_fails(large):
    path = large / 'cat' / 'größe 1.jpg'
    os.truncate(path, 2**20 + 5)
    with pytest.raises(tf.errors.InvalidArgumentError, match='JPEG'):
        read(image_folder(large, (32, 40, 3)), [0])
