"""Networks of keras.applications: weights from files, what is frozen, what images become."""

import functools
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.families import lively
from tests.trainer.training import Training, assert_equal, make_data
from trainer.errors import ConfigError
from trainer.models.application import application

SHAPE = (32, 32, 3)
SMALL = {'alpha': 0.25}
mobilenet = functools.partial(application, 'MobileNet', 4, SHAPE, options=SMALL)


def body_of(model):
    return next(layer for layer in model.layers if isinstance(layer, keras.Model))


def images(count, shape=SHAPE):
    return np.random.default_rng(1).random((count, *shape)).astype(np.float32)


@pytest.fixture(scope='module')
def network():
    """A network with its own head, as another program has trained it."""
    keras.utils.set_random_seed(7)
    network = keras.applications.MobileNet(
        weights=None, include_top=True, classes=9, input_shape=SHAPE, alpha=0.25
    )
    for variable in network.non_trainable_variables:
        variable.assign(variable + 0.5)
    return network


@pytest.fixture(scope='module')
def files(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')
    network.compile('adam', 'sparse_categorical_crossentropy')
    network.optimizer.build(network.trainable_variables)  # Which is then in the files.
    network.save_weights(folder / 'net.weights.h5')
    network.save(folder / 'net.keras')
    network.save(folder / 'net.h5')
    return folder


@pytest.mark.parametrize('ending', ['weights.h5', 'keras', 'h5'])
def test_weights_of_every_kind_of_file_are_those_of_the_network(ending, network, files, caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        body = body_of(mobilenet(weights=str(files / f'net.{ending}')))
    for layer in (each for each in body.layers if each.weights):
        theirs = network.get_layer(layer.name).get_weights()
        for own, given in zip(layer.get_weights(), theirs, strict=True):
            np.testing.assert_array_equal(own, given)
    said = caplog.text
    assert 'weights of 54 of 54 layers' in said
    assert 'left over: conv_preds\n' in said


def test_layers_of_other_shapes_keep_their_own_weights_and_are_told(network, files, caplog):
    path = str(files / 'net.weights.h5')
    # Its depthwise convolutions are of other shapes, and what follows them.
    with caplog.at_level(logging.INFO, 'absl'):
        body = body_of(mobilenet(options={'alpha': 0.25, 'depth_multiplier': 2}, weights=path))
    assert 'of other shapes, so left as they were: conv_dw_1 (' in caplog.text
    first, second = (body.get_layer(name).get_weights()[0] for name in ('conv1', 'conv_dw_1'))
    np.testing.assert_array_equal(first, network.get_layer('conv1').get_weights()[0])
    assert second.shape == (3, 3, 8, 2)


def test_a_file_of_which_nothing_fits_is_told(files):
    said = (
        r'for none of the 54 layers .*Of other shapes: conv1 \(\(3, 3, 3, 8\) in the file, \(3, 3'
    )
    with pytest.raises(ConfigError, match=said):
        mobilenet(options={'alpha': 0.5}, weights=str(files / 'net.weights.h5'))


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        (None, "There is no file of weights '.*ne.weights.h5'. Did you mean 'net.weights.h5'"),
        (b'text', "'.*ne.weights.h5' is no file of weights"),
    ],
)
def test_a_file_that_is_none_is_told(content, said, files):
    path = files / 'ne.weights.h5'
    if content is not None:
        path.write_bytes(content)
    try:
        with pytest.raises(ConfigError, match=said):
            mobilenet(weights=str(path))
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        ({'name': 'MobilNetV2'}, "'MobilNetV2' is no network .* Did you mean 'MobileNetV2'"),
        ({'weights': 'imagenet'}, r'Nothing is downloaded here(.|\n)*MobileNet.weights.h5'),
        ({'options': {'alfa': 1}}, r"options = {'alfa': 1} are not those of MobileNet: .*alfa"),
        ({'input_shape': (32, 32, 4)}, r'\(32, 32, 4\), but .* see 3 channels, or 1'),
        ({'frozen': 'conv_pw_99'}, "'conv_pw_99' is found in the name of no layer .* Did you mean"),
        ({'frozen': '('}, 'is no regular expression'),
        ({'frozen': -500}, r'frozen = -500, but .* has 87 layers: give 1 to 86 .* -1 to -86'),
    ],
)
def test_mistakes_are_told(wrong, said):
    given = {'name': 'MobileNet', 'num_classes': 4, 'input_shape': SHAPE, 'options': SMALL, **wrong}
    with pytest.raises(ConfigError, match=said):
        application(**given)


@pytest.mark.parametrize(
    ('name', 'options'),
    [('MobileNet', SMALL), ('ResNet50', {}), ('MobileNetV3Small', {'alpha': 0.35})],
)
def test_the_network_sees_images_as_its_own_preprocessing_makes_them(name, options):
    # Of 'tf', 'caffe' and none: [-1, 1]; BGR less a mean; 0 to 255.
    module = {'MobileNet': 'mobilenet', 'ResNet50': 'resnet', 'MobileNetV3Small': 'mobilenet_v3'}
    prepare = getattr(keras.applications, module[name]).preprocess_input
    stored = (images(2) * 255).astype(np.uint8)
    expected = prepare(stored.astype(np.float32))
    for white, given in ((255.0, stored), (1.0, stored.astype(np.float32) / 255)):
        layer = application(name, 4, SHAPE, white=white, options=options).get_layer('preprocess')
        np.testing.assert_allclose(layer(given), expected, rtol=1e-5, atol=1e-4)


def test_grey_images_are_seen_in_three_equal_channels():
    grey = images(2, (32, 32, 1))
    keras.utils.set_random_seed(0)
    of_grey = application('MobileNet', 4, (32, 32, 1), options=SMALL)
    keras.utils.set_random_seed(0)
    of_colours = mobilenet()
    np.testing.assert_allclose(of_grey(grey), of_colours(grey.repeat(3, -1)), rtol=1e-5)


@pytest.mark.parametrize(
    ('frozen', 'trained'),
    [
        (True, set()),
        (-6, {'conv_dw_13_bn', 'conv_pw_13', 'conv_pw_13_bn'}),
        ('^(?!conv_pw_13$)', {'conv_pw_13'}),
    ],
)
def test_frozen_layers_stay_as_they_are_and_the_others_learn(make_strategy, frozen, trained):
    training = Training(
        make_strategy(1),
        lambda: lively(mobilenet(frozen=frozen)),
        data=make_data({'image': images(24)}),
    )
    before = training.variables()
    training.run(2)
    after = training.variables()
    changed = {p.split('/')[0] for p in before if not np.array_equal(before[p], after[p])}
    assert changed - {'phalanx', 'sgd'} == {'head', *trained}
    # What is frozen is in the checkpoint, statistics too.
    assert {'conv1/kernel', 'conv1_bn/moving_mean'} <= before.keys()


def test_frozen_variables_are_not_sent_to_other_replicas(make_strategy):
    data = make_data({'image': images(24)})
    training = Training(make_strategy(2), functools.partial(mobilenet, frozen=True), data=data)
    training.run()
    assert len(training.state.moving) > 100
    assert not any(training.step._gradients._moves)


def test_where_all_is_frozen_the_network_is_in_inference():
    keras.utils.set_random_seed(0)
    model = application('EfficientNetB0', 4, SHAPE, frozen=True)
    batch = images(2)
    assert_equal({'': model(batch, training=True).numpy()}, {'': model(batch).numpy()})
    model = mobilenet()
    assert not np.allclose(model(batch, training=True), model(batch))


def test_raw_bytes_can_be_served():
    model = mobilenet(white=255.0)
    assert model(tf.zeros([1, *SHAPE], tf.uint8)).dtype == tf.float32
