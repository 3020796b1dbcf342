"""Weights of layers by name, out of the files that Keras writes.

`keras.Model.load_weights` finds layers of .weights.h5 files by their kind and order, so a network
with another head, or without, gets those of other layers, or none. Both kinds of file hold the
names of the layers too.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import h5py
import keras
import numpy as np
from absl import logging

from trainer import hdf5
from trainer.errors import ConfigError, nearest

# The variables of a layer, by their numbers as texts: as Keras's `load_own_variables` takes them.
Store = dict[str, np.ndarray]


def load_layer_weights(model: keras.Model, path: str) -> None:
    """Sets the variables of those layers of a model that a file has under the same names.

    Says in the log which it did not have, or had in other shapes, and which of it were left over.

    Args:
        model: a built model.
        path: a .weights.h5 or .keras file of Keras 3, or an .h5 file of earlier versions.

    Raises:
        ConfigError: it is none of these, or has none of the model's layers.
    """
    stored = _read(path)
    layers = {layer.name: layer for layer in _with_variables(model)}
    missing = [name for name in layers if name not in stored]
    misfits: list[str] = []
    loaded: list[str] = []
    for name in (name for name in layers if name in stored):
        own, given = _shapes(_own(layers[name])), _shapes(stored[name])
        if own == given:
            layers[name].load_own_variables(stored[name])
            loaded.append(name)
        else:
            misfits.append(f'{name} ({_told(given)} in the file, {_told(own)} in the model)')
    if not loaded:
        why = f' Of other shapes: {_some(sorted(misfits))}.' if misfits else ''
        raise ConfigError(
            f'{path!r} has weights for none of the {len(layers)} layers of {model.name!r}, such as '
            f'{", ".join(list(layers)[:3])}; it has {_some(list(stored))}.{why} Give a file of the '
            'same network and the same options.'
        )
    logging.info('%s: weights of %d of %d layers', path, len(loaded), len(layers))
    if missing:
        logging.warning('%s: not in it, so as random as before: %s', path, _some(missing))
    if misfits:
        logging.warning('%s: of other shapes, so left as they were: %s', path, _some(misfits))
    over = [name for name in stored if name not in layers]
    if over:
        logging.info('%s: left over: %s', path, _some(over))


def _read(path: str) -> dict[str, Store]:
    if not os.path.exists(path):
        folder = os.path.dirname(path) or '.'
        beside = os.listdir(folder) if os.path.isdir(folder) else []
        raise ConfigError(
            f'There is no file of weights {path!r}.{nearest(os.path.basename(path), beside)}'
        )
    with hdf5.opened(path) as file:
        old = 'layer_names' in file.attrs or 'model_weights' in list(file)
        return dict(_layers_of_keras_2(file) if old else _layers_of_keras_3(file))


def _layers_of_keras_3(file: h5py.File) -> Iterator[tuple[str, Store]]:
    found: list[h5py.Group] = []

    def look(path: str, item) -> None:
        of_layer = isinstance(item, h5py.Group) and not path.startswith('optimizer/')
        if of_layer and 'name' in item.attrs and len(item):
            found.append(item)

    file.visititems(look)
    for item in found:
        yield _text(item.attrs['name']), {key: hdf5.array(item, key) for key in item}


def _layers_of_keras_2(file: h5py.File) -> Iterator[tuple[str, Store]]:
    group = hdf5.member(file, 'model_weights') if 'model_weights' in list(file) else file
    for name in map(_text, group.attrs['layer_names']):
        stores: dict[str, Store] = {}
        for path in map(_text, hdf5.member(group, name).attrs['weight_names']):
            # A layer that is a model itself has the names of its layers in those of its weights.
            *_, layer, _ = [name, *path.split('/')]
            store = stores.setdefault(layer, {})
            store[str(len(store))] = hdf5.array(group, f'{name}/{path}')
        yield from stores.items()


def _with_variables(model: keras.Model) -> Iterator[keras.Layer]:
    for layer in model._flatten_layers(include_self=False):
        if not isinstance(layer, keras.Model) and _own(layer):
            yield layer


def _own(layer: keras.Layer) -> Store:
    store: Store = {}
    layer.save_own_variables(store)
    return store


def _shapes(store: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in store.items()}


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ', '.join(str(shapes[key]) for key in sorted(shapes, key=lambda key: (len(key), key)))


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _some(names: Sequence[str]) -> str:
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')
