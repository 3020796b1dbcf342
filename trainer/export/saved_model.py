"""SavedModels in TensorFlow Serving's numbered layout, proved in a fresh process.

The model is built anew outside any strategy and filled from a checkpoint, so nothing of the
training, replicas least of all, leaks into what is served. The signature `serving_default` takes
raw features: the data's deterministic preprocessing is inside.

A model may offer further signatures by a method `signatures()`, without arguments, that returns
{name: (function, example)}. The function is a `tf.function` with an `input_signature` that returns
a dict of tensors; the example has a value for each of its arguments, with which it is tried out,
and for which it must always return the same.
"""

import inspect
import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.checkpoint import Checkpoints
from trainer.data.batch import Data, batch_spec, learnt, model_inputs, raw_spec
from trainer.data.scan import Scan
from trainer.data.source import Features, Source
from trainer.errors import ConfigError
from trainer.export import verify
from trainer.model_dir import ModelDir
from trainer.state import State, build_model

_DEFAULT = 'serving_default'
_EXAMPLES = 8
# The folder of a SavedModel that is left to whoever writes it.
_ORIGIN = 'assets.extra/phalanx.json'
# The fresh process may use other threads and kernels: the last bits may differ, which in half
# precision are not far from the first.
_TOLERANCE = {'float32': 1e-4, 'float16': 1e-2, 'bfloat16': 5e-2}


class _Call(NamedTuple):
    """What a signature is tried out with, by argument, and what it returns here."""

    inputs: Features
    outputs: Features


def export(
    *,
    model_dir: str,
    model: Callable[[], keras.Model],
    data: Data,
    precision: str = 'float32',
    step: int | Literal['best'] | None = None,
) -> Path:
    """Writes `model_dir/export/<step>` from a checkpoint, unless it is there already.

    What is there from another state, because the step was trained anew, stays beside it as
    `<step>.replaced-1`, which no server takes for a version.

    The SavedModel is written aside, loaded by a process that imports nothing but TensorFlow,
    compared there with the outputs of the trained model on real examples, and then put in place
    by one rename.

    Args:
        model_dir: of the run.
        model, precision: as for `trainer.train`.
        data: whose raw features the signature takes and whose `preprocess` it contains.
        step: the checkpoint's step; None takes the newest, 'best' the one with the best metric.

    Returns:
        The directory of the SavedModel. Its signature `serving_default` maps the raw features
        [batch, ...] to 'outputs', or to the names of a model with several outputs; 'output_0',
        'output_1', ... where they have none. What the features' arguments are called, see
        `argument_names`. The model's own signatures are beside it. `assets.extra/phalanx.json`
        has the names of the classes, if the data has them: 'class_names'.

    Raises:
        ConfigError: there is no such checkpoint, it is of another model, or the model's
            `signatures` are not as they should be.
        RuntimeError: the loaded SavedModel's outputs are not the trained model's.
    """
    dirs = ModelDir(model_dir)
    checkpoints = Checkpoints(dirs.checkpoints, writer=False)
    step = checkpoints.choose(step)
    tensors, manifest = checkpoints.read(step)
    data = learnt(data, manifest.get('preprocess'))
    target = dirs.export / str(step)
    origin = {'step': step, 'state_sha256': manifest['state_sha256']}
    if origin.items() <= _origin(target).items():
        logging.info('%s is there already', target)
        return target
    for litter in dirs.export.glob('.tmp-*'):
        shutil.rmtree(litter, ignore_errors=True)

    with tf.device('CPU:0'):
        built, output_spec = build_model(model, batch_spec(data)['inputs'], precision=precision)
        state = State(built, None, output_spec)
        state.restore(tensors)

        def serve(features):
            outputs = built(model_inputs(data, features), training=False)
            if isinstance(outputs, list | tuple):
                return {f'output_{i}': output for i, output in enumerate(outputs)}
            return outputs if isinstance(outputs, dict) else {'outputs': outputs}

        archive = keras.export.ExportArchive()
        archive.track(built)
        for resource in getattr(data.preprocess, 'resources', ()):
            archive.track(resource)
        arguments = argument_names(raw_spec(data))

        def serve_arguments(tensors):
            return serve({name: tensors[argument] for name, argument in arguments.items()})

        # A named spec is what gives an argument of the signature its name.
        signature = {
            arguments[name]: tf.TensorSpec(spec.shape, spec.dtype, arguments[name])
            for name, spec in raw_spec(data).items()
        }
        archive.add_endpoint(_DEFAULT, serve_arguments, input_signature=[signature])
        examples = _first_good(data.source)
        features = {name: examples[name] for name in arguments}
        inputs = {arguments[name]: value for name, value in features.items()}
        calls = {_DEFAULT: _Call(inputs, tf.function(serve)(features))}
        for name, (function, inputs) in _own_signatures(built).items():
            calls[name] = _Call(inputs, function(**inputs))  # Which traces it, too.
            archive.add_endpoint(name, function)
        dirs.export.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f'.tmp-{step}-', dir=dirs.export))
        try:
            archive.write_out(aside / 'model', verbose=False)
            _prove(aside, calls, _TOLERANCE[precision])
            (aside / 'model' / _ORIGIN).parent.mkdir(exist_ok=True)
            if names := data.source.class_names:
                origin['class_names'] = [str(name) for name in names]
            (aside / 'model' / _ORIGIN).write_text(json.dumps(origin))
            if target.exists():
                _put_aside(target)
            os.rename(aside / 'model', target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def argument_names(features: Iterable[str]) -> dict[str, str]:
    """Returns feature -> the argument of the signature that takes it.

    What is no English letter, digit or '_' becomes '_', as in `customer_id` for 'customer id'; what
    does not begin with a letter gets `arg_` before it. A name that is taken or that Python keeps
    for itself is numbered: `customer_id_1`. TensorFlow does not tell 'A' from 'a'.
    """
    taken = {'self', *map(str.lower, keyword.kwlist)}
    arguments: dict[str, str] = {}
    # Names that can stay as they are come first.
    for name in sorted(features, key=lambda name: (_argument(name) != name, name)):
        argument, copy = _argument(name), 0
        while argument.lower() in taken:
            copy += 1
            argument = f'{_argument(name)}_{copy}'
        taken.add(argument.lower())
        arguments[name] = argument
    return arguments


def _argument(name: str) -> str:
    name = re.sub(r'[^A-Za-z0-9_]', '_', name)
    return name if name[:1].isalpha() else f'arg_{name}'


def _origin(exported: Path) -> dict:
    """Which state a SavedModel was exported from, {} if it does not say so."""
    try:
        return json.loads((exported / _ORIGIN).read_text())
    except (OSError, ValueError):
        return {}


def _put_aside(target: Path) -> None:
    copy = 1
    while (aside := target.with_name(f'{target.name}.replaced-{copy}')).exists():
        copy += 1
    os.rename(target, aside)
    logging.warning('%s was of another state of step %s; it is %s now', target, target.name, aside)


def _own_signatures(built: keras.Model) -> dict[str, tuple[Callable, Features]]:
    """Returns what the method `signatures` of a model does, the examples as tensors."""
    offered = built.signatures() if hasattr(built, 'signatures') else {}
    checked = {}
    for name, (function, example) in offered.items():
        specs = getattr(function, 'input_signature', None)
        if not name.isidentifier() or name == _DEFAULT or specs is None:
            raise ConfigError(
                f'The model {built.name!r} offers the signature {name!r}. It must be a tf.function '
                f'with an input_signature, and its name one of Python other than {_DEFAULT!r}.'
            )
        arguments = list(inspect.signature(function.python_function).parameters)
        if sorted(example) != sorted(arguments):
            raise ConfigError(
                f'The example of the signature {name!r} of the model {built.name!r} is of '
                f'{sorted(example)}, but its arguments are {sorted(arguments)}.'
            )
        types = dict(zip(arguments, specs, strict=True))
        checked[name] = function, {k: tf.constant(example[k], types[k].dtype) for k in arguments}
    return checked


def _plain(tensor: tf.Tensor) -> np.ndarray:
    """Returns a tensor as what a file of numpy's holds; of texts, their bytes in TensorFlow's."""
    if tensor.dtype == tf.string:
        return np.frombuffer(tf.io.serialize_tensor(tensor).numpy(), np.uint8)
    if tensor.dtype == tf.bfloat16:
        return tensor.numpy().astype(np.float32)
    return tensor.numpy()


def _first_good(source: Source) -> Features:
    """Returns the first examples, or of more of them those that can be read.

    Raises:
        ConfigError: none can.
    """
    if source.in_order_only:
        return source.fetch(tf.range(_EXAMPLES, dtype=tf.int64))
    scan = Scan(source)
    for first in range(0, source.num_examples, _EXAMPLES):
        found = scan.read(np.arange(first, min(first + _EXAMPLES, source.num_examples)))
        if len(found.records):
            spec = source.element_spec
            return {name: tf.constant(v, spec[name].dtype) for name, v in found.features.items()}
    raise ConfigError(
        f'The SavedModel is tried out on examples, and all are damaged, the last one being '
        f'{found.bad[-1].where}: {found.bad[-1].reason}. Mend the data.'
    )


def _prove(aside: Path, calls: dict[str, _Call], tolerance: float) -> None:
    """Compares the SavedModel in a fresh process with what its signatures return here."""
    for name, call in calls.items():
        # With '_' before them, as `savez` has parameters of its own.
        np.savez(aside / f'{name}.in.npz', **{f'_{k}': _plain(v) for k, v in call.inputs.items()})
        np.savez(aside / f'{name}.out.npz', **{f'_{k}': _plain(v) for k, v in call.outputs.items()})
    # By its path: the file alone, so that nothing of Phalanx is imported there.
    command = [sys.executable, verify.__file__, os.fspath(aside), str(tolerance)]
    hidden = {'TF_CONFIG': '', 'CUDA_VISIBLE_DEVICES': '-1'}
    environment = {k: v for k, v in {**os.environ, **hidden}.items() if v}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
        raise RuntimeError(f'The exported SavedModel was refused: {"".join(last)}')
