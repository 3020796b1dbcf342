"""Phalanx's trainer: synchronous data-parallel training on `tf.distribute`.

The public names below are loaded when they are first used, so that programs which only look at
flags, clusters or directories never wait for TensorFlow. The three verbs are in modules of their
own names: `trainer.train.train`, `trainer.evaluate.evaluate`, `trainer.export.saved_model.export`.
"""

import importlib
import os

# TensorFlow and Keras read these when they are imported. oneDNN makes a CNN on CPU some three times
# faster where it is off by default; where the machine has no NVIDIA driver, TensorFlow's complaints
# about the missing one hide what matters.
os.environ['KERAS_BACKEND'] = 'tensorflow'
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
_HAS_DRIVER = os.path.exists('/proc/driver/nvidia') or os.path.exists('/dev/dxg')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2' if _HAS_DRIVER else '3')

_PUBLIC = {
    'Checkpoints': 'checkpoint',
    'Cluster': 'cluster',
    'ConfigError': 'errors',
    'Data': 'data.batch',
    'Diverged': 'errors',
    'Keep': 'checkpoint',
    'ModelDir': 'model_dir',
    'Preempted': 'errors',
    'Result': 'train',
    'Source': 'data.source',
    'build_strategy': 'strategy',
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_PUBLIC[name]}'), name)


def __dir__() -> list[str]:
    return __all__
