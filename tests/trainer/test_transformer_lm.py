"""The language model: what a token sees, rotary positions, tied weights, generation, bits."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import ConfigError
from trainer.metrics import BitsPerByte
from trainer.models import transformer_lm as lm
from trainer.models.transformer import rotate, rotation
from trainer.state import build_model

NONE = lm.NONE


def build(num_classes=257, precision='float32', spread=1.0, **options):
    """A tiny model; `spread` times its weights, that its choices are clear."""
    options = {'units': 16, 'blocks': 2, 'heads': 2, **options}
    spec = tf.TensorSpec([None, None], tf.int32)
    model, _ = build_model(
        lambda: lm.transformer_lm(num_classes, **options), spec, precision=precision
    )
    for variable in model.trainable_variables:
        variable.assign(variable * (spread if 'norm' not in variable.path else 1.0))
    return model


def tokens(*shape, classes=257):
    return np.random.default_rng(0).integers(0, classes, shape).astype(np.int32)


def differing(model, at, length=24):
    """The positions whose logits change with the token at `at`."""
    before = tokens(1, length)
    after = before.copy()
    after[0, at] = (after[0, at] + 1) % 257
    differ = np.any(model(before).numpy() != model(after).numpy(), axis=(0, 2))
    return np.flatnonzero(differ).tolist()


def test_no_position_sees_a_later_token_and_all_later_ones_see_it():
    assert differing(build(spread=10), 10) == list(range(10, 24))


def test_a_window_ends_what_each_block_sees():
    # Two blocks of 4 tokens, the last one itself, see 3 + 3 back.
    assert differing(build(spread=10, window=4), 10) == list(range(10, 17))


def test_the_product_of_rotated_vectors_depends_on_their_distance_alone():
    rng = np.random.default_rng(0)
    query, key = (tf.constant(rng.normal(size=(1, 1, 1, 8)), tf.float32) for _ in range(2))

    def product(i, j):
        turned = [rotate(x, rotation(tf.constant([at]), 8)) for x, at in ((query, i), (key, j))]
        return float(tf.reduce_sum(turned[0] * turned[1]))

    assert product(7, 3) == pytest.approx(product(107, 103), rel=1e-4)
    assert product(0, 0) == pytest.approx(float(tf.reduce_sum(query * key)))
    assert product(7, 3) != pytest.approx(product(7, 4), rel=1e-2)


def test_a_rotated_pair_is_turned_by_its_angle():
    x = tf.constant([[[[1.0, 1.0, 0.0, 0.0]]]])
    cos, sin = rotation(tf.constant([3]), 4, base=100.0)
    np.testing.assert_allclose(
        tf.squeeze(rotate(x, (cos, sin))),
        [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)],
        rtol=1e-6,
    )


def test_weights_are_those_counted_by_hand_the_tied_embedding_once():
    model = build(units=24, hidden=10, blocks=2)
    block = 24 * (3 * 24) + 24 * 24 + 24 * 20 + 10 * 24 + 2 * 24
    sizes = [int(np.prod(v.shape)) for v in model.trainable_variables]
    assert sum(sizes) == 257 * 24 + 2 * block + 24


def test_logits_are_float32_in_half_precision():
    model = build(precision='bfloat16')
    assert model.blocks[0].compute_dtype == 'bfloat16'
    logits = model(tokens(2, 5))
    assert logits.dtype == tf.float32
    assert np.isfinite(logits).all()


def test_heads_of_an_odd_width_and_too_few_tokens_are_refused():
    with pytest.raises(ConfigError, match='units to a multiple of 6'):
        lm.transformer_lm(257, units=16, heads=3)
    with pytest.raises(ConfigError, match='num_classes is 10, but there are 257 tokens of bytes'):
        lm.transformer_lm(10)


def pad(rows):
    width = max(map(len, rows))
    return np.array([[*row, *[NONE] * (width - len(row))] for row in rows], np.int32)


def generate(model, rows, count, temperature=0.0, top_k=0, seed=0, end=NONE):
    settings = (tf.constant(v) for v in (count, temperature, top_k, seed, end))
    return model.generate(tf.constant(pad(rows)), *settings).numpy()


def greedily(model, row, count):
    """Without a cache: the whole row is read again for each token."""
    row = list(row)
    for _ in range(count):
        row.append(int(np.argmax(model(np.array([row], np.int32)).numpy()[0, -1])))
    return row[-count:]


@pytest.mark.parametrize('window', [None, 5])
def test_generation_with_a_cache_is_that_without_for_prompts_of_any_lengths(window):
    model = build(spread=12, window=window)
    rows = [tokens(9)[:n] for n in (4, 9, 1)]
    found = generate(model, rows, 8)
    expected = [greedily(model, row, 8) for row in rows]
    assert found.tolist() == expected
    assert len({tuple(row) for row in expected}) == 3
    assert len(set(np.ravel(expected))) > 5, 'the choices are too much alike to tell anything'


def test_a_row_ends_at_its_end_and_the_others_go_on():
    model = build(spread=12)
    rows = [tokens(6)[:n] for n in (6, 2)]
    free = generate(model, rows, 8)
    end = free[0, 2]
    assert end not in free[1]
    found = generate(model, rows, 8, end=end)
    assert found[0].tolist() == [*free[0, : list(free[0]).index(end)], *[NONE] * 8][:8]
    assert found[1].tolist() == free[1].tolist()


def test_draws_follow_the_model_the_temperature_and_the_seed():
    model = build(num_classes=8, tokenizer='t.json', spread=6, blocks=1)
    rows = [[3, 1]] * 4000
    probabilities = tf.nn.softmax(model(np.array(rows[:1], np.int32))[0, -1] / 0.7).numpy()
    drawn = generate(model, rows, 1, temperature=0.7, seed=5)[:, 0]
    counts = np.bincount(drawn, minlength=8) / len(rows)
    np.testing.assert_allclose(counts, probabilities, atol=0.04)
    assert (drawn == generate(model, rows, 1, temperature=0.7, seed=5)[:, 0]).all()
    assert (drawn != generate(model, rows, 1, temperature=0.7, seed=6)[:, 0]).any()
    best = np.argsort(probabilities)[-2:]
    two = generate(model, rows, 1, temperature=0.7, top_k=2, seed=5)[:, 0]
    assert set(two) == set(best)
    one = generate(model, rows[:3], 3, temperature=0.7, top_k=1, seed=5)
    assert (one == generate(model, rows[:3], 3)).all()


def test_texts_become_tokens_and_come_back_byte_for_byte():
    texts = ['', 'a', bytes(range(256)), 'é'.encode()]
    rows = lm.bytes_to_tokens(tf.constant(texts)).numpy()
    assert rows.shape == (4, 257)
    assert rows[:, 0].tolist() == [256] * 4
    assert rows[3, 1:4].tolist() == [0xC3, 0xA9, NONE]
    assert lm.tokens_to_bytes(tf.constant(rows)).numpy().tolist() == [
        b'',
        b'a',
        bytes(range(256)),
        'é'.encode(),
    ]


def test_what_cannot_be_generated_is_told():
    function, example = build(blocks=1).signatures()['generate']
    for name, value, message in (
        ('max_new_tokens', 0, 'must be 1 or more'),
        ('temperature', -1.0, 'must be 0 or more'),
        ('top_k', -1, 'must be 0, which is all'),
    ):
        arguments = {k: tf.constant(v) for k, v in {**example, name: value}.items()}
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            function(**arguments)
    function, example = build(blocks=1, tokenizer='t.json').signatures()['generate']
    arguments = {k: tf.constant(v) for k, v in {**example, 'tokens': [[NONE, 1]]}.items()}
    with pytest.raises(tf.errors.InvalidArgumentError, match='must begin with a token'):
        function(**arguments)


def test_bits_per_byte_are_those_of_all_tokens_over_the_number_of_bytes():
    metric = BitsPerByte()
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 257)).astype(np.float32)
    labels = rng.integers(0, 256, (3, 4))
    labels[0, 1] = labels[2, 3] = 256
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bits = -np.log2(np.take_along_axis(probabilities, labels[..., None], -1)[..., 0])
    metric.update_state(labels[:1], logits[:1])
    metric.update_state(labels[1:], logits[1:])
    assert float(metric.result()) == pytest.approx(bits.sum() / 10, rel=1e-5)
    metric.reset_state()
    metric.update_state(labels, logits, sample_weight=[1.0, 0.0, 2.0])
    assert float(metric.result()) == pytest.approx(
        (bits[0].sum() + 2 * bits[2].sum()) / (3 + 2 * 3), rel=1e-5
    )
    with pytest.raises(ConfigError, match='with 257 outputs; this one has 30'):
        metric.update_state(labels, logits[..., :30])


def test_dropout_is_there_in_training_alone():
    model = build(dropout=0.5)
    row = tokens(2, 6)
    same = [np.array_equal(model(row, training=t), model(row, training=t)) for t in (0, 1)]
    assert same == [True, False]
    assert keras.backend.floatx() == 'float32'
