import functools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.trainer.preparing import checksums, prepare
from trainer.data.arrays import Arrays
from trainer.data.image_folder import image_folder
from trainer.data.prepared import prepared
from trainer.data.subset import subset

SHAPE = (16, 12, 3)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Pictures of several sizes and formats in folders of two classes."""
    directory, rng = tmp_path_factory.mktemp('folder'), np.random.default_rng(0)
    for number in range(12):
        path = directory / ('cat', 'dog')[number % 2] / f'{number}.{("jpg", "png")[number % 3 > 0]}'
        path.parent.mkdir(exist_ok=True)
        small = rng.integers(0, 256, [5, 4, 3]).astype(np.uint8)
        Image.fromarray(small).resize((20 + number, 30), Image.Resampling.BICUBIC).save(path)
    return directory


def stored_as(out):
    source = prepared(out)
    return source._source._features['image'].storage


def check_equal(found, expected):
    everything = tf.range(expected.num_examples, dtype=tf.int64)
    found, expected = found.fetch(everything), expected.fetch(everything)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize('files', ['array_record', 'tfrecord'])
def test_images_stay_encoded_as_they_are_in_their_files(folder, tmp_path, files):
    source = image_folder(folder, SHAPE)
    out = prepare(tmp_path / 'out', {'train': source}, files=files, shards=2)
    assert stored_as(out) == 'image'
    check_equal(prepared(out), source)
    assert prepared(out).class_names == ('cat', 'dog')
    contents = prepared(out).stored(np.arange(12))['image']
    assert contents == [open(source.where(i), 'rb').read() for i in range(12)]  # noqa: SIM115
    # And so they do when what is prepared is prepared again.
    again = prepare(tmp_path / 'again', {'train': prepared(out)}, files=files, shards=2)
    assert checksums(again).items() >= {
        (name, digest) for name, digest in checksums(out).items() if name != 'dataset.json'
    }


def test_so_do_those_of_a_part(folder, tmp_path):
    source = subset(image_folder(folder, SHAPE), end=0.5, seed=3)
    out = prepare(tmp_path / 'out', {'train': source})
    assert stored_as(out) == 'image'
    check_equal(prepared(out), source)
    contents = prepared(out).stored(np.arange(6))['image']
    assert contents == [open(source.where(i), 'rb').read() for i in range(6)]  # noqa: SIM115


def test_what_reading_again_would_change_is_stored_as_pixels(folder, tmp_path):
    source = image_folder(folder, SHAPE, fit='stretch')
    out = prepare(tmp_path / 'out', {'train': source})
    assert stored_as(out) == 'bytes'
    check_equal(prepared(out), source)


class Deceptive(Arrays):
    """Some of what it has stored is not what it gives."""

    def stored(self, indices):
        images = self._arrays['image'][indices]
        encode = [functools.partial(tf.io.encode_png, image) for image in images]
        stored = [each().numpy() for each in encode]
        for row, record in enumerate(indices.tolist()):
            if record == 1:
                stored[row] = tf.io.encode_png(255 - images[row]).numpy()
            if record == 2:
                stored[row] = b'no image'
        return {'image': stored}


def test_a_single_image_that_would_change_is_encoded_anew(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, [200, 4, 5, 1]).astype(np.uint8)
    source = Deceptive({'image': images, 'label': np.arange(200)})
    out = prepare(tmp_path / 'out', {'train': source})
    assert stored_as(out) == 'image'
    check_equal(prepared(out), source)
