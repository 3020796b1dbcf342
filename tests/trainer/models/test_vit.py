"""The Vision Transformer: its size, its positions, and what it refuses."""

import keras
import numpy as np
import pytest

from trainer.errors import ConfigError
from trainer.models.vit import sincos, vit


def test_vit_s_16_has_the_size_that_is_known():
    # timm counts 22,050,664 with a class token and its position, of 384 numbers each:
    # https://huggingface.co/timm/vit_small_patch16_224.augreg_in1k
    with keras.StatelessScope():
        model = vit(1000, (224, 224, 3), 16, 384, 12, 6, 'learned')
    size = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert size == 22_050_664 - 2 * 384


def test_positions_are_sines_and_cosines_of_column_and_row():
    table = sincos(3, 5, 8)
    assert table.shape == (3, 5, 8)
    expected = [np.sin(4), np.sin(4e-4), np.cos(4), np.cos(4e-4)]
    expected += [np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)]
    np.testing.assert_allclose(table[2, 4], expected, rtol=1e-6)


@pytest.mark.parametrize('positions', ['sincos', 'learned'])
def test_where_a_patch_is_makes_a_difference(positions):
    model = vit(3, (8, 8, 1), 4, 8, 1, 2, positions)
    image = np.zeros((1, 8, 8, 1), np.float32)
    image[:, :4, :4] = np.random.default_rng(0).normal(size=(1, 4, 4, 1))
    moved = np.roll(image, 4, axis=1)
    assert not np.allclose(model(image), model(moved), atol=1e-5)


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        ({'patch': 3}, 'vit.patch = 3 does not divide images of 8 x 12; 1, 2, 4 do'),
        ({'heads': 5}, 'vit.heads = 5 does not divide vit.units = 8'),
        ({'positions': 'learnt'}, "vit.positions = 'learnt' is none .* Did you mean 'learned'"),
        ({'units': 6, 'heads': 2}, "vit.units = 6 is no multiple of 4.*set 'learned'"),
    ],
)
def test_what_does_not_divide_is_told(wrong, said):
    with pytest.raises(ConfigError, match=said):
        vit(3, (8, 12, 1), **{'patch': 4, 'units': 8, 'blocks': 1, 'heads': 2, **wrong})
