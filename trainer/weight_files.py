"""Weights out of files of many kinds, as arrays by name. Nothing in a file is executed.

Our checkpoints hold the paths of variables. So do TensorFlow's: those with an object graph (a
`tf.train.Checkpoint`, a SavedModel) say of every tensor which variable it was. Keras's files hold
places instead, 'layers/dense_1/vars/0', counted by class, beside the names of the layers; which
variable that is, only a model of the same structure can tell.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import h5py
import keras
import numpy as np
import tensorflow as tf
from keras.src.saving import saving_lib
from tensorflow.core.protobuf import trackable_object_graph_pb2

from trainer import hdf5, proof
from trainer.checkpoint import CheckpointDamaged, Checkpoints
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir
from trainer.state import AVERAGES

_GRAPH = '_CHECKPOINTABLE_OBJECT_GRAPH'
_NOT_OF_THE_MODEL = ('optimizer', 'compile_metrics', '_metrics')  # What `compile` has added.
_VALUE = '/.ATTRIBUTES/VARIABLE_VALUE'


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        kind: what the file is, in words.
        arrays: name -> array.
        note: how sure the names are, '' if they are the paths of variables.
    """

    kind: str
    arrays: dict[str, np.ndarray]
    note: str = ''


def read(path: str, model: keras.Model, *, averages: bool = False) -> Weights:
    """Reads all weights of a file or directory, those of optimizers left out where they are known.

    Args:
        path: a model_dir or a checkpoint of ours, a `.weights.h5` or `.keras` file, a SavedModel,
            or a TensorFlow checkpoint (its prefix, or a directory with a file `checkpoint`).
        model: gives the variables of Keras's files their names; it is not changed.
        averages: whether to take the averages that the optimizer kept of weights, in place of
            these; of a checkpoint of ours alone.

    Raises:
        ConfigError: there is nothing there, or nothing that can be read, it is damaged, or has no
            averages.
    """
    place = Path(path)
    try:
        if (place / proof.MANIFEST).is_file():
            return Weights('checkpoint', _ours(proof.load(place)[0], averages, path))
        if (place / 'checkpoints').is_dir():
            checkpoints = Checkpoints(ModelDir(place).checkpoints, writer=False)
            step = checkpoints.choose(None)
            tensors, _ = checkpoints.read(step)
            return Weights(f'checkpoint of step {step}', _ours(tensors, averages, path))
        if averages:
            raise ConfigError(
                f'WarmStart.averages = True, but {path!r} is no model_dir and no checkpoint of '
                'Phalanx, which alone hold averages that are known. Set it to False, or give one '
                'of these.'
            )
        if place.name.endswith(('.h5', '.keras')):
            if not place.is_file():
                raise ConfigError(f'There is no file {path!r} for the warm start.')
            return _keras_file(place, model)
        if (place / 'saved_model.pb').is_file():
            prefix = place / 'variables' / 'variables'
            return Weights('SavedModel', _tensorflow_checkpoint(str(prefix)))
        prefix = tf.train.latest_checkpoint(path) if place.is_dir() else path
        if prefix and Path(f'{prefix}.index').is_file():
            return Weights('TensorFlow checkpoint', _tensorflow_checkpoint(prefix))
    except (CheckpointDamaged, tf.errors.OpError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'{path!r} cannot be read for the warm start: {error}') from error
    there = 'holds nothing that is known' if place.exists() else 'does not exist'
    raise ConfigError(
        f'{path!r} {there}, so no warm start is possible. Give a model_dir, a checkpoint '
        '(.../checkpoints/step-00001000), a .weights.h5 or .keras file, a SavedModel, or the '
        'prefix of a TensorFlow checkpoint.'
    )


def _ours(tensors: Mapping[str, np.ndarray], averages: bool, path: str) -> dict[str, np.ndarray]:
    kept = {n.removeprefix(AVERAGES): a for n, a in tensors.items() if n.startswith(AVERAGES)}
    if averages and not kept:
        raise ConfigError(
            f'{path!r} holds no averages of its weights: its optimizer had no use_ema. Set '
            'WarmStart.averages = False.'
        )
    weights = {name: array for name, array in tensors.items() if not name.startswith(AVERAGES)}
    return {**_without_optimizers(weights), **(kept if averages else {})}


def _without_optimizers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves out what is no weight of a model: every optimizer has a counter of iterations."""
    owners = {name.removesuffix('/iteration') for name in tensors if name.endswith('/iteration')}
    return {
        name: array
        for name, array in tensors.items()
        if name.partition('/')[0] not in {*owners, 'phalanx'}
        and not name.endswith('seed_generator_state')
    }


def _tensorflow_checkpoint(prefix: str) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(prefix)
    shapes = reader.get_variable_to_shape_map()
    if _GRAPH not in shapes:
        return _without_optimizers({name: np.asarray(reader.get_tensor(name)) for name in shapes})
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(reader.get_tensor(_GRAPH))
    slots = {slot.slot_variable_node_id for node in graph.nodes for slot in node.slot_variables}
    found: dict[str, np.ndarray] = {}
    for index, node in enumerate(graph.nodes):
        for attribute in node.attributes:
            key = attribute.checkpoint_key
            if index in slots or not key.endswith(_VALUE) or key not in shapes:
                continue
            array = np.asarray(reader.get_tensor(key))
            name = attribute.full_name or key.removesuffix(_VALUE)
            if name in found and not np.array_equal(found[name], array):
                name = key.removesuffix(_VALUE)  # Two variables of one name.
            found[name] = array
    return _without_optimizers(found)


def _keras_file(path: Path, model: keras.Model) -> Weights:
    with hdf5.opened(path) as file:
        if 'layer_names' in file.attrs:
            raise ConfigError(
                f'{str(path)!r} is in the old HDF5 format of Keras 2. Load it with Keras and save '
                'it as .weights.h5.'
            )
        arrays = {place: hdf5.array(file, place) for place in _datasets(file)}
        layers = _layer_names(file)
    kind = 'Keras file'
    places = _places(model)
    mine = {place: variable.path for place, (variable, _) in places.items()}
    shapes = {place: tuple(variable.shape) for place, (variable, _) in places.items()}
    if {place: array.shape for place, array in arrays.items()} == shapes:
        note = 'by position, as the file is of a model of the same structure'
        return Weights(kind, {mine[place]: array for place, array in arrays.items()}, note)
    # Of another structure: a place says little, the names of all layers above it say more.
    by_layer = {named(place, names): v.path for place, (v, names) in places.items()}
    found: dict[str, np.ndarray] = {}
    for place, array in arrays.items():
        name = named(place, layers)
        found[by_layer.get(name, name)] = array
    note = "by the names of layers and the order within each, as the model's structure differs"
    return Weights(kind, found, note)


def named(place: str, layers: Mapping[str, str]) -> str:
    """Returns a place with every layer in it by its name: 'layers/dense_1/vars/0' -> 'head/0'."""
    layer, _, index = place.rpartition('/vars/') if '/vars/' in place else ('', '', place[5:])
    parts = layer.split('/') if layer else []
    above = ['/'.join(parts[: n + 1]) for n in range(len(parts))]
    return '/'.join([*(layers[each] for each in above if each in layers), index])


def _datasets(file: h5py.File) -> list[str]:
    """The places of the model's arrays. Links, external or soft, are not followed."""
    found: list[str] = []

    def look(place: str, item: h5py.Group | h5py.Dataset) -> None:
        of_model = place.partition('/')[0] not in _NOT_OF_THE_MODEL
        if isinstance(item, h5py.Dataset) and of_model and 'seed_generator/vars' not in place:
            found.append(place)

    file.visititems(look)
    return found


def _layer_names(file: h5py.File) -> dict[str, str]:
    """The names of layers, by their places."""
    names: dict[str, str] = {}

    def look(place: str, item: h5py.Group | h5py.Dataset) -> None:
        if place.endswith('/vars') and 'name' in item.attrs:
            names[place.removesuffix('/vars')] = str(item.attrs['name'])

    file.visititems(look)
    return names


def _places(model: keras.Model) -> dict[str, tuple[keras.Variable, dict[str, str]]]:
    """Where Keras would write each variable of a model, and the names of layers by place."""
    store = _Recorder()
    saving_lib._save_state(model, store, None, inner_path='', visited_saveables=set())
    return {
        place: (variable, store.names)
        for place, variable in store.variables.items()
        if isinstance(variable, keras.Variable) and 'seed_generator/vars' not in place
    }


class _Recorder(saving_lib.H5IOStore):
    """A store that remembers where it was asked to put what, and writes nothing."""

    def __init__(self):
        self.variables: dict[str, keras.Variable] = {}
        self.names: dict[str, str] = {}
        self._place = ''

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: dict | None = None):
        self._place = path
        if metadata and path:
            self.names[path] = metadata['name']
        return self

    def __setitem__(self, key: str, value) -> None:
        self.variables[f'{self._place}/vars/{key}'.lstrip('/')] = value
