"""Exported models serve raw features to who has nothing but TensorFlow, or are not put in place."""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.processes import environment
from tests.trainer import tiny
from tests.trainer.families import lively
from trainer.checkpoint import Checkpoints
from trainer.data.arrays import Arrays
from trainer.data.batch import Data, batch_spec, model_inputs, raw_spec
from trainer.errors import BadRecord, ConfigError
from trainer.export import verify
from trainer.export.saved_model import argument_names, export
from trainer.models.application import application
from trainer.models.mlp import mlp
from trainer.models.resnet import resnet
from trainer.models.vit import vit
from trainer.state import State, build_model

SERVE = """
import sys
sys.modules.update(dict.fromkeys(('keras', 'trainer', 'gin')))  # As if they were not installed.
import numpy as np
import tensorflow as tf
for directory in sys.argv[1:]:
    served = tf.saved_model.load(directory).signatures['serving_default']
    with np.load(directory + '.npz') as raw:
        outputs = served(**{name: tf.constant(raw[name]) for name in raw.files})
    np.savez(directory + '.out.npz', **{name: value.numpy() for name, value in outputs.items()})
"""


def two_headed():
    layers = keras.layers
    image, mark = layers.Input((4, 4, 1), name='image'), layers.Input((2,), name='mark')
    x = layers.Concatenate()([layers.Flatten()(image), mark])
    x = layers.Dropout(0.5)(layers.Dense(8, activation='relu')(x))
    outputs = {'logits': layers.Dense(tiny.CLASSES)(x), 'size': layers.Dense(1)(x)}
    return keras.Model({'image': image, 'mark': mark}, outputs)


def two_losses(labels, outputs):
    own = keras.losses.sparse_categorical_crossentropy(labels, outputs['logits'], from_logits=True)
    return own + tf.square(outputs['size'][:, 0])


def listed():
    image = keras.layers.Input((4, 4, 1))
    x = keras.layers.Flatten()(image)
    return keras.Model(image, [keras.layers.Dense(3)(x), keras.layers.Dense(1)(x)])


def named_data():
    rng = np.random.default_rng(0)
    arrays = {
        'image': rng.integers(0, 256, (20, 4, 4, 1)).astype(np.uint8),
        'mark': rng.normal(size=(20, 2)).astype(np.float32),
        'label': rng.integers(0, tiny.CLASSES, 20),
        'weight': rng.random(20).astype(np.float32),
    }
    return Data(
        Arrays(arrays), inputs=('image', 'mark'), weight='weight', preprocess=tiny.scale_images
    )


def fine_tuned():
    """Takes bytes; its own preprocessing is all there is."""
    model = application(
        'MobileNet', tiny.CLASSES, (32, 32, 1), frozen=True, white=255.0, options={'alpha': 0.25}
    )
    return lively(model)


def larger_images():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32, 1)).astype(np.uint8)
    return Arrays({'image': images, 'label': rng.integers(0, tiny.CLASSES, 20)})


# Name -> what differs from the tiny run.
MODELS = {
    'sequential': {},
    'bfloat16': {'precision': 'bfloat16'},
    'subclassed': {'model': functools.partial(mlp, tiny.CLASSES, units=8)},
    'named inputs and outputs': {
        'model': two_headed,
        'train_data': named_data(),
        'loss': two_losses,
    },
    'a list of outputs': {
        'model': listed,
        'loss': lambda labels, outputs: tf.abs(outputs[0][:, 0] - outputs[1][:, 0]),
    },
    'resnet': {'model': functools.partial(resnet, tiny.CLASSES, (4, 4, 1), 4, (1,))},
    'vit': {'model': functools.partial(vit, tiny.CLASSES, (4, 4, 1), 2, 8, 1, 2)},
    'application': {'model': fine_tuned, 'train_data': Data(larger_images())},
}


def trained(strategy, model_dir, **changes):
    """Trains two steps; returns what `export` is to be given."""
    changes = {'steps': 2, 'eval_data': None, 'metrics': [], **changes}
    tiny.run(strategy, model_dir, **changes)
    return {
        'model_dir': str(model_dir),
        'model': changes.get('model', tiny.model),
        'data': changes.get('train_data', tiny.train_data()),
        'precision': changes.get('precision', 'float32'),
    }


def own_outputs(arguments, features):
    """The outputs of the trained model itself, from its last checkpoint."""
    data, precision = arguments['data'], arguments['precision']
    spec = batch_spec(data)['inputs']
    built, output_spec = build_model(arguments['model'], spec, precision=precision)
    checkpoints = Checkpoints(f'{arguments["model_dir"]}/checkpoints', writer=False)
    State(built, None, output_spec).restore(checkpoints.read(checkpoints.choose(None))[0])
    outputs = built(model_inputs(data, features), training=False)
    if isinstance(outputs, list):
        return {f'output_{i}': value for i, value in enumerate(outputs)}
    return outputs if isinstance(outputs, dict) else {'outputs': outputs}


def test_arguments_have_the_names_of_features_or_the_nearest_that_tensorflow_takes():
    names = ['customer id', 'customer_id', 'price (€)', '1st', 'class', 'A', 'a', '']
    assert argument_names(names) == {
        'customer id': 'customer_id_1',
        'customer_id': 'customer_id',
        'price (€)': 'price____',
        '1st': 'arg_1st',
        'class': 'class_1',
        'A': 'A',
        'a': 'a_1',
        '': 'arg_',
    }


@pytest.mark.slow
def test_exports_serve_raw_features_with_tensorflow_alone(make_strategy, tmp_path):
    expected, saved = {}, []
    for replicas, (name, changes) in zip((2, 1, 2, 1, 1, 2, 1, 1), MODELS.items(), strict=True):
        model_dir = tmp_path / name
        arguments = trained(make_strategy(replicas), model_dir, **changes)
        litter = model_dir / 'export' / '.tmp-2-killed'
        litter.mkdir(parents=True)
        path = export(**arguments)
        assert path == model_dir / 'export' / '2'
        assert [p.name for p in path.parent.iterdir()] == ['2'], 'litter is left'
        data = arguments['data']
        examples = data.source.fetch(tf.range(7, dtype=tf.int64))
        raw = {key: examples[key] for key in raw_spec(data)}
        assert 'label' not in raw
        assert raw['image'].dtype == tf.uint8
        expected[path] = own_outputs(arguments, raw)
        np.savez(f'{path}.npz', **{key: value.numpy() for key, value in raw.items()})
        saved.append(str(path))
    done = subprocess.run(
        [sys.executable, '-c', SERVE, *saved],
        env=environment(PYTHONPATH=''),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for path, outputs in expected.items():
        with np.load(f'{path}.out.npz') as served:
            assert set(served.files) == set(outputs)
            for key, value in outputs.items():
                own = tf.cast(value, tf.float32).numpy()
                bound = 0.05 if 'bfloat16' in str(path) else 1e-4
                np.testing.assert_allclose(served[key], own, rtol=bound, atol=bound)


@pytest.mark.slow
def test_an_export_that_would_serve_something_else_is_refused_and_leaves_nothing(
    make_strategy, tmp_path
):
    def preprocess(features):
        # A newcomer's mistake: drawn when the graph is traced, and again at each eager call.
        return {'image': tf.cast(features['image'], tf.float32) * np.random.uniform()}

    data = Data(tiny.source(30, 0), preprocess=preprocess)
    arguments = trained(make_strategy(1), tmp_path, train_data=data)
    with pytest.raises(RuntimeError, match=r'SavedModel was refused: .* differs from'):
        export(**arguments)
    assert not list((tmp_path / 'export').iterdir())


def test_an_export_is_replaced_only_by_one_of_another_state_and_never_lost(make_strategy, tmp_path):
    arguments = trained(make_strategy(1), tmp_path)
    there = tmp_path / 'export' / '2'
    there.mkdir()
    (there / 'saved_model.pb').write_text('mine')
    assert export(**arguments) == there
    assert (tmp_path / 'export' / '2.replaced-1' / 'saved_model.pb').read_text() == 'mine'
    written = (there / 'saved_model.pb').stat()
    assert export(**arguments) == there
    assert (there / 'saved_model.pb').stat() == written
    assert sorted(p.name for p in there.parent.iterdir()) == ['2', '2.replaced-1']


def test_an_export_names_the_classes_of_the_data(make_strategy, tmp_path):
    source = tiny.source(30, 0)
    source.class_names = ('eins', 'zwei', 'drei\n')
    data = Data(source, preprocess=tiny.train_data().preprocess)
    exported = export(**trained(make_strategy(1), tmp_path, train_data=data))
    told = json.loads((exported / 'assets.extra' / 'phalanx.json').read_text())
    assert told['class_names'] == ['eins', 'zwei', 'drei\n']


class Spoilt(Arrays):
    """The first records are damaged, and others too."""

    def fetch(self, indices):
        def check(records):
            if (records % 10 < self.spoilt).any():
                raise BadRecord('it is spoilt')
            return records

        return super().fetch(
            tf.ensure_shape(tf.numpy_function(check, [indices], tf.int64), indices.shape)
        )


@pytest.mark.parametrize('spoilt', [1, 8])
def test_an_export_is_tried_out_on_examples_that_can_be_read(make_strategy, tmp_path, spoilt):
    arguments = trained(make_strategy(1), tmp_path)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 4, 4, 1)).astype(np.uint8)
    source = Spoilt({'image': images, 'label': np.zeros(30, np.int64)})
    source.spoilt = spoilt
    arguments['data'] = dataclasses.replace(arguments['data'], source=source, on_bad_record='skip')
    path = export(**arguments)
    assert (path / 'saved_model.pb').exists()


def test_an_export_without_an_example_is_told(make_strategy, tmp_path):
    arguments = trained(make_strategy(1), tmp_path)
    source = Spoilt({'image': np.zeros([9, 4, 4, 1], np.uint8), 'label': np.zeros(9, np.int64)})
    source.spoilt = 10
    arguments['data'] = dataclasses.replace(arguments['data'], source=source)
    with pytest.raises(ConfigError, match='all are damaged, the last one being record 8: it is sp'):
        export(**arguments)


class Double(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.uint8, 'x')])
    def serve(self, x):
        return {'outputs': 2.0 * tf.cast(x, tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, 'x')])
    def repeat(self, x):
        return {'text': x + x}


def text(*values):
    return np.frombuffer(tf.io.serialize_tensor(tf.constant(values)).numpy(), np.uint8)


@pytest.fixture
def aside(tmp_path):
    """A folder as `export` hands it to the proof: the model, arguments and right outputs."""
    double = Double()
    signatures = {'serving_default': double.serve, 'repeat': double.repeat}
    tf.saved_model.save(double, str(tmp_path / 'model'), signatures)
    np.savez(tmp_path / 'serving_default.in.npz', _x=np.array([1, 2, 200], np.uint8))
    outputs = np.array([2.0, 4.0, 400.0], np.float32)
    np.savez(tmp_path / 'serving_default.out.npz', _outputs=outputs)
    np.savez(tmp_path / 'repeat.in.npz', _x=text('ab', ''))
    np.savez(tmp_path / 'repeat.out.npz', _text=text('abab', ''))
    return tmp_path


def test_the_proof_accepts_what_is_right(aside, capsys):
    assert verify.main(str(aside), 1e-4) == 0
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('outputs', 'message'),
    [
        ({'_outputs': [2.0, 4.0, 401.0]}, "'outputs' differs from the trained model by 1\n"),
        ({'_outputs': [2.0, 4.0, np.nan]}, "'outputs' differs from the trained model by nan\n"),
        ({'_logits': [2.0]}, "it does not return 'logits', but ['outputs']\n"),
    ],
)
def test_the_proof_refuses_what_differs(aside, capsys, outputs, message):
    arrays = {name: np.array(values, np.float32) for name, values in outputs.items()}
    np.savez(aside / 'serving_default.out.npz', **arrays)
    assert verify.main(str(aside), 1e-4) == 1
    assert capsys.readouterr().out == f'serving_default: {message}'


def test_the_proof_refuses_another_text(aside, capsys):
    np.savez(aside / 'repeat.out.npz', _text=text('abab', 'x'))
    assert verify.main(str(aside), 1e-4) == 1
    assert capsys.readouterr().out == "repeat: 'text' is not what the trained model returns\n"


class Halving(keras.Model):
    """Offers a signature of its own, as any model may."""

    offered = 'halve'
    example: ClassVar = {'size': 3.0}

    def __init__(self):
        super().__init__()
        self.flatten, self.dense = keras.layers.Flatten(), keras.layers.Dense(tiny.CLASSES)

    def call(self, inputs):
        return self.dense(self.flatten(inputs))

    def signatures(self):
        @tf.function(input_signature=[tf.TensorSpec([], tf.float32)])
        def halve(size):
            return {
                'half': size / 2,
                'bias': tf.identity(self.dense.bias),
                'said': tf.constant('½'),
            }

        return {self.offered: (halve, self.example)}


def test_a_model_serves_its_own_signatures(make_strategy, tmp_path):
    path = export(**trained(make_strategy(1), tmp_path, model=Halving))
    served = tf.saved_model.load(str(path)).signatures
    assert sorted(served) == ['halve', 'serving_default']
    found = served['halve'](size=tf.constant(5.0))
    assert found['half'] == 2.5
    assert found['said'].numpy().decode() == '½'
    checkpoint = Checkpoints(tmp_path / 'checkpoints').read(2)[0]
    biases = [value for name, value in checkpoint.items() if name == 'halving/dense/bias']
    np.testing.assert_array_equal(found['bias'], biases[0])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'offered': 'serving_default'}, "its name one of Python other than 'serving_default'"),
        ({'offered': 'a/b'}, "offers the signature 'a/b'"),
        ({'example': {'width': 1.0}}, r"is of \['width'\], but its arguments are \['size'\]"),
    ],
)
def test_signatures_that_cannot_be_served_are_told(make_strategy, tmp_path, changes, message):
    model = type('Changed', (Halving,), changes)
    with pytest.raises(ConfigError, match=message):
        export(**trained(make_strategy(1), tmp_path, model=model))
