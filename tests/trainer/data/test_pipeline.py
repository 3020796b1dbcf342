"""Batches are functions of (seed, step) alone: of no history, and of no topology."""

import dataclasses
import functools
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.processes import environment
from trainer.data import augment, order
from trainer.data.arrays import Arrays
from trainer.data.batch import Data, batch_spec, model_inputs, raw_spec
from trainer.data.digits import digits
from trainer.data.pipeline import eval_batches, train_batches
from trainer.errors import ConfigError

BATCH = 8
START = {'seed': 0, 'start_step': 0}
AUGMENT = augment.chain(
    [functools.partial(augment.random_shift, max_pixels=2), augment.random_flip]
)


@functools.cache
def plain():
    return Data(digits('test'))


@functools.cache
def augmented():
    return Data(digits('test'), preprocess=augment.scale_images, augment=AUGMENT)


def numbered(num_examples, **options):
    """Data whose label is the record number and whose weight is that plus 1."""
    numbers = np.arange(num_examples)
    arrays = {'image': numbers[:, np.newaxis], 'label': numbers, 'weight': numbers + 1}
    return Data(Arrays(arrays), **options)


def take(iterator, strategy, steps):
    """Reads steps; returns each as a list with the batch of each replica."""

    def part(replica, batch):
        return tf.nest.map_structure(
            lambda value: strategy.experimental_local_results(value)[replica].numpy(), batch
        )

    replicas = range(strategy.num_replicas_in_sync)
    batches = (next(iterator) for _ in range(steps))
    return [[part(replica, batch) for replica in replicas] for batch in batches]


def train(data, strategy, steps, *, start_step=0, seed=5, batch=BATCH):
    iterator = train_batches(
        data, strategy, seed=seed, global_batch_size=batch, start_step=start_step
    )
    return take(iterator, strategy, steps)


def joined(step, key):
    """The global batch of a step, from the parts of its replicas in their order."""
    return np.concatenate([replica[key] for replica in step])


def sha256(steps):
    digest = hashlib.sha256()
    for step in steps:
        for key in sorted(step[0]):
            value = joined(step, key)
            digest.update(f'{key} {value.dtype} {value.shape}'.encode() + value.tobytes())
    return digest.hexdigest()


@functools.cache
def reference(data, one_device):
    return train(data(), one_device, 50)


@pytest.mark.parametrize('data', [plain, augmented])
@pytest.mark.parametrize('start_step', [0, 1, 45])
def test_a_step_has_the_same_bits_wherever_training_starts_on_any_number_of_replicas(
    make_strategy, strategy, data, start_step
):
    expected = reference(data, make_strategy(1))
    steps = train(data(), strategy, 5, start_step=start_step)
    assert sha256(steps) == sha256(expected[start_step : start_step + 5])


def test_augmentation_changes_images_and_nothing_else(make_strategy):
    unchanged = dataclasses.replace(augmented(), augment=None)
    for with_it, without in zip(
        train(augmented(), make_strategy(1), 3), train(unchanged, make_strategy(1), 3), strict=True
    ):
        assert not np.array_equal(joined(with_it, 'inputs'), joined(without, 'inputs'))
        for key in ('labels', 'ids'):
            np.testing.assert_array_equal(joined(with_it, key), joined(without, key))


def test_an_example_is_augmented_anew_in_every_epoch(make_strategy):
    data = Data(
        Arrays(
            {'image': np.tile(digits().fetch([3])['image'], (8, 1, 1, 1)), 'label': np.zeros(8)}
        ),
        augment=AUGMENT,
    )
    images = np.stack([joined(step, 'inputs') for step in train(data, make_strategy(1), 5)])
    assert len(np.unique(images.reshape(40, -1), axis=0)) > 20


def test_the_order_is_that_of_the_seed(strategy):
    for seed in (0, 2**31 - 1):
        steps = train(numbered(20), strategy, 4, seed=seed, start_step=3)
        for step, batch in enumerate(steps, 3):
            expected = order.records(order.positions(step, BATCH), num_examples=20, seed=seed)
            np.testing.assert_array_equal(joined(batch, 'ids'), expected)


@pytest.mark.parametrize('num_examples', [3, 8, 20, 61])
def test_every_epoch_has_every_example_once_even_where_batches_straddle_it(strategy, num_examples):
    epochs, steps = BATCH, num_examples  # the same number of examples
    ids = np.concatenate(
        [joined(step, 'ids') for step in train(numbered(num_examples), strategy, steps)]
    )
    for epoch in ids.reshape(epochs, num_examples):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_examples))


def test_the_parts_of_a_batch_belong_to_the_same_examples(strategy):
    for replica in train(numbered(20, weight='weight'), strategy, 2)[1]:
        np.testing.assert_array_equal(replica['labels'], replica['ids'])
        np.testing.assert_array_equal(replica['inputs'][:, 0], replica['ids'])
        np.testing.assert_array_equal(replica['weights'], replica['ids'] + 1)
        assert replica['weights'].dtype == np.float32


def test_weights_are_there_in_training_only_if_they_are_in_the_data(make_strategy):
    assert sorted(train(plain(), make_strategy(1), 1)[0][0]) == ['ids', 'inputs', 'labels']


def test_training_never_asks_whether_there_is_a_next_batch(strategy):
    iterator = train_batches(plain(), strategy, **START, global_batch_size=BATCH)
    graph = tf.function(lambda: next(iterator)).get_concrete_function().graph.as_graph_def()
    ops = {
        node.op
        for part in (graph, *graph.library.function)
        for node in getattr(part, 'node', ()) or part.node_def
    }
    assert 'IteratorGetNext' in ops
    assert 'IteratorGetNextAsOptional' not in ops


def test_shapes_are_static(strategy):
    iterator = train_batches(augmented(), strategy, **START, global_batch_size=BATCH)
    shapes = []

    def replica(batch):
        shapes.append({key: value.shape for key, value in batch.items()})

    tf.function(lambda: strategy.run(replica, args=(next(iterator),))).get_concrete_function()
    part = BATCH // strategy.num_replicas_in_sync
    assert shapes[0] == {'inputs': [part, 8, 8, 1], 'labels': [part], 'ids': [part]}


@pytest.mark.parametrize('num_examples', [1, 8, 20, 24])
def test_evaluation_has_every_example_once_and_pads_with_weight_zero(strategy, num_examples):
    iterator, num_steps = eval_batches(numbered(num_examples), strategy, global_batch_size=BATCH)
    assert num_steps == -(-num_examples // BATCH)
    steps = take(iterator, strategy, num_steps)
    ids = np.concatenate([joined(step, 'ids') for step in steps])
    weights = np.concatenate([joined(step, 'weights') for step in steps])
    labels = np.concatenate([joined(step, 'labels') for step in steps])
    padding = num_steps * BATCH - num_examples
    np.testing.assert_array_equal(ids, [*range(num_examples), *[-1] * padding])
    np.testing.assert_array_equal(weights, [1.0] * num_examples + [0.0] * padding)
    np.testing.assert_array_equal(labels[:num_examples], range(num_examples))


def test_evaluation_weighs_as_the_data_says(make_strategy):
    iterator, _ = eval_batches(
        numbered(5, weight='weight'), make_strategy(2), global_batch_size=BATCH
    )
    (step,) = take(iterator, make_strategy(2), 1)
    np.testing.assert_array_equal(joined(step, 'weights'), [1, 2, 3, 4, 5, 0, 0, 0])


def test_evaluation_starts_over_after_a_pass(strategy):
    iterator, num_steps = eval_batches(numbered(20), strategy, global_batch_size=BATCH)
    first, second = (take(iterator, strategy, num_steps) for _ in range(2))
    assert sha256(first) == sha256(second)


def test_evaluation_preprocesses_but_does_not_augment(make_strategy):
    iterator, _ = eval_batches(augmented(), make_strategy(1), global_batch_size=BATCH)
    (step,) = take(iterator, make_strategy(1), 1)
    stored = digits('test').fetch(tf.range(BATCH))['image'].numpy()
    np.testing.assert_allclose(joined(step, 'inputs'), stored / 255.0, rtol=1e-6)


def test_several_inputs_are_a_dict(make_strategy):
    data = numbered(20, inputs=('image', 'weight'))
    (((batch,)),) = train(data, make_strategy(1), 1)
    np.testing.assert_array_equal(batch['inputs']['image'][:, 0], batch['ids'])
    np.testing.assert_array_equal(batch['inputs']['weight'], batch['ids'] + 1)
    assert batch_spec(data)['inputs'] == raw_spec(data)


def test_an_input_may_be_the_label_too():
    data = Data(digits(), label='image', preprocess=augment.scale_images)
    image = tf.TensorSpec([None, 8, 8, 1], tf.float32)
    assert batch_spec(data) == {'inputs': image, 'labels': image}
    assert 'image' in raw_spec(data)


def test_preprocess_sees_what_a_served_model_gets_and_augment_sees_all():
    seen = {}

    def preprocess(features):
        seen['preprocess'] = sorted(features)
        return features

    def augmentation(features, seeds):
        seen['augment'] = sorted(features), seeds.shape
        return features

    data = numbered(20, weight='weight', preprocess=preprocess, augment=augmentation)
    assert list(raw_spec(data)) == ['image']
    train(data, tf.distribute.OneDeviceStrategy('CPU:0'), 1)
    assert seen == {'preprocess': ['image'], 'augment': (['image', 'label', 'weight'], [BATCH, 3])}


def test_a_served_model_sees_what_the_trained_one_saw(make_strategy):
    data = dataclasses.replace(augmented(), augment=None)
    ((batch,),) = train(data, make_strategy(1), 1)
    stored = data.source.fetch(batch['ids'])
    served = model_inputs(data, {name: stored[name] for name in raw_spec(data)})
    np.testing.assert_array_equal(served, batch['inputs'])


def test_specs_are_those_of_batches_of_any_size():
    assert batch_spec(augmented()) == {
        'inputs': tf.TensorSpec([None, 8, 8, 1], tf.float32),
        'labels': tf.TensorSpec([None], tf.int64),
    }
    assert raw_spec(augmented()) == {'image': tf.TensorSpec([None, 8, 8, 1], tf.uint8)}


@pytest.mark.parametrize('evaluation', [False, True], ids=['training', 'evaluation'])
@pytest.mark.parametrize(
    ('size', 'said'),
    [
        (10, '10, cannot be divided among 4 .* 8 or 12'),
        (3, 'Use 4'),
        (0, 'Use 4'),
        (-4, 'Use 4'),
        (8.0, '8.0; it must be a whole number'),
    ],
)
def test_a_batch_that_does_not_divide_among_replicas_is_refused(
    make_strategy, size, said, evaluation
):
    batches = eval_batches if evaluation else functools.partial(train_batches, **START)
    with pytest.raises(ConfigError, match=said):
        batches(plain(), make_strategy(4), global_batch_size=size)


@pytest.mark.parametrize('seed', [-1, 2**31, 1.5, None, True])
def test_a_seed_that_is_no_small_whole_number_is_refused(make_strategy, seed):
    with pytest.raises(ConfigError, match=r'The seed is .* from 0 to 2\*\*31 - 1'):
        train(plain(), make_strategy(1), 1, seed=seed)


def halved(features, seeds=None):
    return {**features, 'image': features['image'][:4]}


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'inputs': 'imag'}, r"Data\.inputs names 'imag'.*Did you mean 'image'"),
        ({'inputs': ('image', 'wieght')}, r"Data\.inputs names 'wieght'.*Did you mean 'weight'"),
        ({'inputs': ()}, r'Data\.inputs is empty'),
        ({'label': 'lable'}, r"Data\.label names 'lable'.*Did you mean 'label'"),
        ({'weight': 'weigth'}, r"Data\.weight names 'weigth'.*Did you mean 'weight'"),
        ({'weight': 'image'}, r"Data\.weight, 'image', must be one number per example.*\[1\]"),
        ({'preprocess': lambda f: f['image']}, r'Data\.preprocess must return a dict'),
        ({'preprocess': lambda f: {}}, r"Data\.inputs names 'image', but"),
        ({'preprocess': halved}, r"Data\.preprocess must keep the number.*'image' of shape \(4, 1"),
        ({'preprocess': lambda f: {'image': 1.0}}, r'Data\.preprocess must keep the number'),
        ({'augment': lambda f, s: f['image']}, r'Data\.augment must return a dict'),
        ({'augment': lambda f, s: None}, r'Data\.augment must return a dict.*NoneType'),
        ({'augment': halved}, r"Data\.augment must keep the number.*'image' of shape \(4, 1"),
        ({'augment': lambda f, s: {'image': f['image']}}, r"Data\.label names 'label', but"),
    ],
)
def test_data_that_does_not_fit_together_is_refused_before_anything_is_read(
    strategy, options, said
):
    with pytest.raises(ConfigError, match=said):
        train_batches(numbered(20, **options), strategy, **START, global_batch_size=32)


@pytest.mark.slow
def test_a_script_ends_that_still_holds_its_batches():
    program = """
import numpy as np, tensorflow as tf
from trainer.data.batch import Data
from trainer.data.pipeline import train_batches
from trainer.data.source import Source

class Slow(Source):
    num_examples, fingerprint = 1000, ''
    element_spec = {'image': tf.TensorSpec([4]), 'label': tf.TensorSpec([], tf.int64)}

    def fetch(self, indices):
        def read(rows):
            return np.full((len(rows), 4), sum(range(100_000)), np.float32), rows

        spec = [tf.float32, tf.int64]
        image, label = tf.numpy_function(read, [indices], spec, stateful=False)
        size = indices.shape[0]
        return {'image': tf.ensure_shape(image, [size, 4]), 'label': tf.ensure_shape(label, size)}

cpu = tf.config.list_physical_devices('CPU')[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])
batches = train_batches(Data(Slow()), strategy, seed=0, global_batch_size=32, start_step=0)
next(batches)
print('end')
"""
    for _ in range(8):  # About one in four hung.
        command = [sys.executable, '-c', program]
        ended = subprocess.run(command, env=environment(), capture_output=True, timeout=90)
        assert (ended.returncode, ended.stdout) == (0, b'end\n'), ended.stderr
