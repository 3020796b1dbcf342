"""Phalanx's trainer: synchronous data-parallel training on `tf.distribute`.

The public names below are loaded when they are first used, so that programs which only look at
flags, clusters or directories never wait for TensorFlow.
"""

import importlib

_PUBLIC = {
    'Checkpoints': 'checkpoint',
    'Cluster': 'cluster',
    'ConfigError': 'errors',
    'Data': 'data.pipeline',
    'Diverged': 'errors',
    'Keep': 'checkpoint',
    'ModelDir': 'model_dir',
    'Preempted': 'errors',
    'Result': 'train',
    'Source': 'data.source',
    'build_strategy': 'strategy',
    'evaluate': 'evaluate',
    'export': 'export.saved_model',
    'train': 'train',
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_PUBLIC[name]}'), name)


def __dir__() -> list[str]:
    return __all__
