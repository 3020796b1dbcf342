"""Residual networks of the sizes that are known by name."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.training import Training, make_data
from trainer.errors import ConfigError
from trainer.models.norm import make_norm
from trainer.models.resnet import resnet

IMAGENET = functools.partial(resnet, 1000, (224, 224, 3), filters=64, stem='imagenet')
CIFAR = functools.partial(resnet, 10, (32, 32, 3))
# Those of ImageNet as torchvision counts them (https://docs.pytorch.org/vision/stable/models.html);
# those of CIFAR in the paper's table 6, in millions, with fewer digits.
SIZES = {
    'ResNet-18': (functools.partial(IMAGENET, blocks=(2, 2, 2, 2)), 11_689_512),
    'ResNet-34': (functools.partial(IMAGENET, blocks=(3, 4, 6, 3)), 21_797_672),
    'ResNet-50': (functools.partial(IMAGENET, blocks=(3, 4, 6, 3), bottleneck=True), 25_557_032),
    'ResNet-20': (functools.partial(CIFAR, blocks=(3, 3, 3)), 0.27e6),
    'ResNet-56': (functools.partial(CIFAR, blocks=(9, 9, 9)), 0.85e6),
}


def trained(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


@pytest.fixture
def without_values():
    """Nothing is drawn for weights of which only the shapes are looked at."""
    with keras.StatelessScope():
        yield


@pytest.mark.parametrize('name', SIZES)
def test_networks_known_by_name_have_their_sizes(name, without_values):
    maker, size = SIZES[name]
    assert trained(maker()) == pytest.approx(size, abs=0 if isinstance(size, int) else 0.006e6)


def test_a_stage_after_the_first_halves_the_image_and_the_large_stem_quarters_it(without_values):
    def last_image(**options):
        model = resnet(3, (64, 32, 3), 4, (1, 1, 1), **options)
        return model.layers[-3].output.shape[1:]

    assert last_image() == (16, 8, 16)
    assert last_image(stem='imagenet') == (4, 2, 16)
    assert last_image(bottleneck=True) == (16, 8, 64)


def test_every_block_begins_as_the_identity():
    shallow, deep = (resnet(3, (8, 8, 1), 4, (blocks,)) for blocks in (1, 3))
    for layer in shallow.layers[1:3] + shallow.layers[-1:]:  # The stem, and the logits.
        place = deep.layers[1:3] + deep.layers[-1:]
        match = next(each for each in place if type(each) is type(layer))
        match.set_weights(layer.get_weights())
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    np.testing.assert_array_equal(shallow(images), deep(images))


def test_a_group_is_of_sixteen_channels_or_of_what_divides_them():
    groups = [make_norm('group', channels).groups for channels in (4, 16, 64, 24, 7)]
    assert groups == [1, 1, 4, 3, 7]


def test_with_group_norm_a_step_is_the_same_on_any_number_of_replicas(make_strategy):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(24, 8, 8, 1)).astype(np.float32)

    maker = functools.partial(resnet, 4, (8, 8, 1), 4, (1,), norm='group')

    def losses(replicas):
        training = Training(make_strategy(replicas), maker, data=make_data({'image': images}))
        return [training.run()['loss'] for _ in range(3)]

    np.testing.assert_allclose(losses(1), losses(2), rtol=1e-5)


def test_group_norm_keeps_no_statistics():
    assert not resnet(3, (8, 8, 1), 4, (1,), norm='group').non_trainable_variables


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        ({'norm': 'batchs'}, "norm = 'batchs' is none of batch, sync_batch, group. Did you mean"),
        ({'stem': 'ImageNet'}, "resnet.stem = 'ImageNet' is none of .* Did you mean 'imagenet'"),
    ],
)
def test_unknown_parts_are_told_with_the_nearest(wrong, said):
    with pytest.raises(ConfigError, match=said):
        resnet(3, (8, 8, 1), 4, (1,), **wrong)


def test_layers_compute_in_half_precision_and_logits_do_not():
    keras.config.set_dtype_policy('mixed_bfloat16')
    try:
        model = resnet(3, (8, 8, 1), 4, (1,), norm='group')
    finally:
        keras.config.set_dtype_policy('float32')
    assert model.layers[1].compute_dtype == 'bfloat16'
    assert model(tf.zeros([1, 8, 8, 1])).dtype == tf.float32
