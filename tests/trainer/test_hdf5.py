"""Files of weights that lead out of themselves, or are damaged, as both readers see them."""

import zipfile

import h5py
import keras
import numpy as np
import pytest

from trainer import weight_files
from trainer.errors import ConfigError
from trainer.models.layer_weights import load_layer_weights

SECRET = np.full([3, 2], 7.0, np.float32)
DENSE = 'layers/dense/vars'


@pytest.fixture
def model():
    return keras.Sequential([keras.Input([3]), keras.layers.Dense(2, name='dense')])


@pytest.fixture
def secret(tmp_path):
    """Another file of the host."""
    with h5py.File(tmp_path / 'secret.h5', 'w') as file:
        file['kernel'] = SECRET
    SECRET.tofile(tmp_path / 'secret.raw')
    return tmp_path


def external_link(group, name, secret):
    group[name] = h5py.ExternalLink(str(secret / 'secret.h5'), 'kernel')


def soft_link(group, name, secret):
    external_link(group.file, 'aside', secret)
    group[name] = h5py.SoftLink('/aside')


def external_storage(group, name, secret):
    raw = [(str(secret / 'secret.raw'), 0, h5py.h5f.UNLIMITED)]
    group.create_dataset(name, SECRET.shape, 'float32', external=raw)


def virtual(group, name, secret):
    layout = h5py.VirtualLayout(SECRET.shape, 'float32')
    layout[:] = h5py.VirtualSource(secret / 'secret.h5', 'kernel', SECRET.shape, 'float32')
    group.create_virtual_dataset(name, layout)


def with_weights_3(model, path):
    """Where a file has the kernel of the layer."""
    model.save_weights(path)
    return DENSE, '0'


def with_weights_2(model, path):
    model.save(path)
    return f'model_weights/dense/{model.name}/dense', 'kernel'


ways = pytest.mark.parametrize('way', [external_link, soft_link, external_storage, virtual])


def replaced(path, group, name, way, secret):
    with h5py.File(path, 'a') as file:
        before = file[group][name].shape
        assert before == SECRET.shape
        del file[group][name]
        way(file[group], name, secret)
        np.testing.assert_array_equal(file[group][name], SECRET)  # To h5py it is an array.


@ways
@pytest.mark.parametrize('save', [with_weights_3, with_weights_2])
def test_no_layer_gets_the_content_of_another_file(model, secret, way, save):
    path = secret / ('net.weights.h5' if save is with_weights_3 else 'net.h5')
    replaced(path, *save(model, path), way, secret)
    with pytest.raises(ConfigError, match=r"net.*h5' is no file of weights.*refers to (an)?other"):
        load_layer_weights(model, str(path))


@pytest.mark.parametrize('whole', ['model_weights', 'model_weights/dense'])
def test_no_group_lies_in_another_file(model, secret, whole):
    path = secret / 'net.h5'
    model.save(path)
    (secret / 'other.h5').write_bytes(path.read_bytes())
    with h5py.File(path, 'a') as file:
        del file[whole]
        file[whole] = h5py.ExternalLink(str(secret / 'other.h5'), whole)
    with pytest.raises(ConfigError, match=f"'{whole.rpartition('/')[2]}' refers to another"):
        load_layer_weights(model, str(path))


@ways
def test_no_warm_start_takes_the_content_of_another_file(model, secret, way):
    path = secret / 'net.weights.h5'
    replaced(path, *with_weights_3(model, path), way, secret)
    if way in (external_storage, virtual):
        with pytest.raises(ConfigError, match=f"'{DENSE}/0' refers to other files"):
            weight_files.read(str(path), model)
    else:  # A link is as if it were not there.
        assert [array.shape for array in weight_files.read(str(path), model).arrays.values()] == [
            (2,)
        ]


# ---- Damage.


def warm_start(model, path):
    weight_files.read(path, model)


def keras_file(model, path, change, **options):
    """A .keras file, its members written again with others' bytes or flags."""
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        place = archive.getinfo('model.weights.h5').header_offset
    content = bytearray(path.read_bytes())
    change(content, place)
    path.write_bytes(content)


def one_byte(content, place):
    content[place + 1000] ^= 0xFF


def encrypted(content, place):
    directory = content.rindex(b'PK\x01\x02', 0, content.rindex(b'model.weights.h5'))
    content[place + 6] |= 1
    content[directory + 8] |= 1


def deflated_badly(content, place):
    content[place + 46 : place + 76] = b'\xff' * 30


@pytest.mark.parametrize(
    ('change', 'compression', 'said'),
    [
        (one_byte, zipfile.ZIP_STORED, 'Bad CRC-32'),
        (encrypted, zipfile.ZIP_STORED, 'encrypted'),
        (deflated_badly, zipfile.ZIP_DEFLATED, 'decompressing'),
    ],
)
@pytest.mark.parametrize('read', [load_layer_weights, warm_start])
def test_a_damaged_archive_is_named_with_what_to_do(
    model, tmp_path, change, compression, said, read
):
    path = tmp_path / 'net.keras'
    keras_file(model, path, change, compression=compression)
    with pytest.raises(ConfigError, match=f"net.keras' is no file.*{said}.*Copy it again"):
        read(model, str(path))


def test_weights_of_names_that_are_no_numbers_are_told(model, tmp_path):
    path = tmp_path / 'net.weights.h5'
    model.save_weights(path)
    with h5py.File(path, 'a') as file:
        file[DENSE].move('0', 'kernel')
    with pytest.raises(ConfigError, match=r'Of other shapes: dense \(\(2,\), \(3, 2\) in the file'):
        load_layer_weights(model, str(path))
