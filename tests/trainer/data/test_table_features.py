import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import table_features as module
from trainer.data.arrays import Arrays
from trainer.data.subset import subset
from trainer.data.table import table
from trainer.data.table_features import table_features
from trainer.errors import ConfigError

PENGUINS = Path(__file__).parents[3] / 'trainer' / 'data' / 'penguins.csv'
ROWS = 'x,n,t,y\n1,2000,red,0\n3,2002,blue,1\n,2004,red,0\n5,2006,,1\n'


@pytest.fixture
def source(tmp_path):
    (tmp_path / 'data.csv').write_text(ROWS)
    return table(str(tmp_path / 'data.csv'), label='y')


@pytest.fixture
def penguins(tmp_path):
    (tmp_path / 'penguins.csv').write_bytes(PENGUINS.read_bytes())
    return subset(table(str(tmp_path / 'penguins.csv'), label='species'), begin=0.2)


def apply(preprocess, source, **changed):
    """The preprocessed rows of a source, computed in a graph, as the pipeline does."""
    features = source.fetch(tf.range(source.num_examples, dtype=tf.int64))
    features = {n: tensor for n, tensor in features.items() if n not in ('y', 'species')}
    features |= {name: tf.constant(value) for name, value in changed.items()}
    out = tf.function(preprocess, autograph=False)(features)
    return {name: tensor.numpy() for name, tensor in out.items()}


def test_the_vector_holds_scaled_numbers_gaps_and_categories(source):
    # x and n, whether x is missing, red, '' and blue: the most frequent first, then by name.
    deviation_x, deviation_n = np.sqrt(8 / 3), np.sqrt(5)
    np.testing.assert_allclose(
        apply(table_features(source), source)['features'],
        [
            [-2 / deviation_x, -3 / deviation_n, 0, 1, 0, 0],
            [0, -1 / deviation_n, 0, 0, 0, 1],
            [0, 1 / deviation_n, 1, 1, 0, 0],
            [2 / deviation_x, 3 / deviation_n, 0, 0, 1, 0],
        ],
        rtol=1e-6,
        atol=1e-7,
    )


def test_what_training_never_saw_is_nothing(source):
    row = apply(table_features(source), source, t=['green', 'Red', 'red', ''])['features'][:, 3:]
    np.testing.assert_array_equal(row, [[0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]])


def test_the_rarest_categories_share_a_place(source):
    preprocess = table_features(source, max_categories=2)
    row = apply(preprocess, source, t=['red', '', 'blue', 'green'])['features'][:, 3:]
    np.testing.assert_array_equal(row, [[0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]])


def test_whole_numbers_may_be_categories_and_numbers_be_cut_into_intervals(source):
    preprocess = table_features(source, categories=['n'], buckets={'x': 2}, indexed=['n', 'x'])
    found = apply(preprocess, source, n=np.int64([2000, 2006, 2004, 1999]))
    np.testing.assert_array_equal(found['n'], [1, 4, 3, 0])
    # The median of 1, 3 and 5 parts them; a missing one has no interval.
    np.testing.assert_array_equal(found['x'], [1, 2, 0, 2])
    np.testing.assert_array_equal(found['features'], [[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]])
    one_hot = apply(table_features(source, buckets={'x': 2}), source)['features'][:, 1:4]
    np.testing.assert_array_equal(one_hot, [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]])


def test_crosses_apart_are_a_feature_of_their_own(penguins):
    options = {'crosses': [('island', 'sex')], 'cross_buckets': 16}
    together = apply(table_features(penguins, **options), penguins)['features']
    apart = apply(table_features(penguins, **options, crosses_apart=True), penguins)
    assert set(apart) == {'features', 'crosses'}
    np.testing.assert_array_equal(
        np.concatenate([apart['features'], apart['crosses']], axis=1), together
    )
    with pytest.raises(ConfigError, match='there are no crosses'):
        table_features(penguins, crosses_apart=True)


def test_what_was_learnt_before_there_were_crosses_apart_still_holds(source):
    state = table_features(source).state
    old = {**state, 'settings': {k: v for k, v in state['settings'].items() if 'apart' not in k}}
    assert table_features(source).with_state(old).state == old


def test_a_cross_has_one_place_for_each_combination(penguins):
    preprocess = table_features(penguins, crosses=[('island', 'sex')], cross_buckets=1000)
    crossed = apply(preprocess, penguins)['features'][:, -1000:]
    assert np.all(crossed.sum(axis=1) == 1)
    raw = penguins.fetch(tf.range(penguins.num_examples, dtype=tf.int64))
    pairs = list(zip(raw['island'].numpy(), raw['sex'].numpy(), strict=True))
    places = {}
    for pair, place in zip(pairs, crossed.argmax(axis=1), strict=True):
        places.setdefault(pair, set()).add(int(place))
    assert all(len(found) == 1 for found in places.values())
    assert len(set.union(*places.values())) == len(places) > 6


def test_buckets_and_whole_numbers_may_be_crossed(source):
    preprocess = table_features(
        source, categories=['n'], buckets={'x': 2}, crosses=[('x', 'n')], cross_buckets=500
    )
    crossed = apply(preprocess, source, n=np.int64([7, 7, 7, 8]))['features'][:, -500:]
    assert len(set(crossed.argmax(axis=1))) == 4
    crossed = apply(preprocess, source, n=np.int64([7] * 4))['features'][:, -500:]
    assert len(set(crossed.argmax(axis=1))) == 3  # 3 and 5 lie in one interval.


def test_statistics_are_those_of_the_whole_subset_read_in_parts(penguins, monkeypatch):
    whole = table_features(penguins, buckets={'bill_depth_mm': 4}).state
    monkeypatch.setattr(module, '_ROWS_AT_ONCE', 50)
    parts = module._learn(penguins, whole['settings'])
    rows = penguins.fetch(tf.range(penguins.num_examples, dtype=tf.int64))
    assert parts.keys() == whole['columns'].keys() == rows.keys()
    for name, column in parts.items():
        if 'mean' in column:
            values = rows[name].numpy().astype(float)
            assert column['mean'] == pytest.approx(np.nanmean(values), rel=1e-12)
            assert column['std'] == pytest.approx(np.nanstd(values), rel=1e-9)
            assert column['missing'] == np.isnan(values).any()
        else:
            assert column == whole['columns'][name]
    vectors = apply(table_features(penguins), penguins)['features']
    present = ~np.isnan(rows['body_mass_g'].numpy())
    np.testing.assert_allclose(vectors[present][:, :4].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(vectors[present][:, :4].std(axis=0), 1, atol=1e-5)


def test_any_source_of_single_values_will_do():
    source = Arrays({'flag': np.array([True, False, True]), 'n': np.uint8([1, 3, 3])})
    found = apply(table_features(source, categories=['n']), source)['features']
    deviation = np.sqrt(2) / 3
    np.testing.assert_allclose(found[:, 0], np.array([1, -2, 1]) / 3 / deviation, rtol=1e-6)
    np.testing.assert_array_equal(found[:, 1:], [[0, 1], [1, 0], [1, 0]])
    with pytest.raises(ConfigError, match=r"'x' is float64 of shape \(2,\)"):
        table_features(Arrays({'x': np.zeros((3, 2))}))


def test_quantiles_of_many_rows_are_those_of_evenly_spaced_ones():
    values = np.arange(1000.0)
    quantiles = module._Quantiles(4, stride=7)
    for part in np.split(values, [10, 333, 334]):
        quantiles.add(part)
    expected = np.quantile(values[::7], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles.result()['boundaries'], expected)


def test_the_state_goes_through_json_and_needs_no_data_again(penguins):
    options = {'buckets': {'bill_depth_mm': 4}, 'crosses': [('island', 'sex')]}
    learnt = table_features(penguins, **options)
    state = json.loads(json.dumps(learnt.state))
    assert state == learnt.state
    other = subset(table(penguins.files[0], label='species'), end=0.2)
    again = table_features(other, **options).with_state(state)
    assert again.state == learnt.state
    np.testing.assert_array_equal(apply(again, other)['features'], apply(learnt, other)['features'])


def test_a_state_of_other_settings_is_refused(penguins):
    state = table_features(penguins).state
    with pytest.raises(ConfigError, match=r"'max_categories': 1000.* now they are .*: 10,"):
        table_features(penguins, max_categories=10).with_state(state)


def test_columns_that_were_not_learnt_from_or_are_withheld_are_refused(source):
    state = table_features(source).state
    del state['columns']['t']
    with pytest.raises(ConfigError, match=r"has learnt from x, n, y, among which there is no 't'"):
        apply(table_features(source).with_state(state), source)
    crossed = table_features(source, categories=['y'], crosses=[('t', 'y')])
    with pytest.raises(ConfigError, match="crosses names 'y', which the model does not get to see"):
        apply(crossed, source)


def test_what_was_learnt_is_kept(penguins, monkeypatch):
    state = table_features(penguins).state
    monkeypatch.setattr(module, '_learn', None)
    assert table_features(penguins).state == state


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'categories': ['isle']}, "table_features.categories names 'isle', which does not exist"),
        ({'categories': ['sex']}, "'sex', which is not fit for it; it may name species, year."),
        ({'buckets': {'bill_depth': 3}}, "Did you mean 'bill_depth_mm'?"),
        ({'buckets': {'year': 1}}, "buckets['year'] is 1; it must be 2 or more"),
        ({'indexed': ['year']}, "indexed names 'year', which is not fit for it"),
        ({'crosses': [('sex', 'year')]}, "crosses names 'year', which is not fit for it"),
        ({'max_categories': 0}, 'table_features.max_categories is 0'),
    ],
)
def test_a_slip_of_the_pen_is_told(penguins, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        table_features(penguins, **options)
