import pytest

from trainer.errors import ConfigError
from trainer.resume import check_unchanged, tell_changes

NOW = {'seed': 0, 'global_batch_size': 64, 'num_examples': 1500, 'data_fingerprint': 'abc'}
THEN = {**NOW, 'step': 400}


def test_an_unchanged_run_may_continue():
    check_unchanged(THEN, NOW, ())


@pytest.mark.parametrize(
    ('name', 'value'),
    [('seed', 1), ('global_batch_size', 32), ('num_examples', 1499), ('data_fingerprint', 'abd')],
)
def test_a_change_is_refused_with_both_values_and_the_mend_unless_it_is_allowed(name, value):
    now = {**NOW, name: value}
    with pytest.raises(ConfigError) as error:
        check_unchanged(THEN, now, ())
    message = error.value.message
    assert f'step 400 was trained with {name} = {NOW[name]!r} (now {value!r})' in message
    assert f"train.allow_changes = ('{name}',)" in message
    check_unchanged(THEN, now, (name,))


def test_the_mend_for_several_changes_is_complete():
    now = {**NOW, 'seed': 1, 'global_batch_size': 32, 'num_examples': 9}
    with pytest.raises(ConfigError) as error:
        check_unchanged(THEN, now, ('seed',))
    assert "('seed', 'global_batch_size', 'num_examples')" in error.value.message
    assert 'seed = 0' not in error.value.message


def test_an_allowed_change_is_logged(caplog):
    check_unchanged(THEN, {**NOW, 'seed': 1}, ('seed',))
    assert 'seed was 0 and is now 1' in caplog.text


def test_a_value_that_the_manifest_lacks_is_a_change():
    with pytest.raises(ConfigError, match=r'seed = None \(now 0\)'):
        check_unchanged({'step': 400, **{k: v for k, v in NOW.items() if k != 'seed'}}, NOW, ())


def test_a_bare_string_is_one_name():
    check_unchanged(THEN, {**NOW, 'seed': 1}, 'seed')


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"names 'sed'.*Did you mean 'seed'"):
        check_unchanged(THEN, NOW, ('sed',))


def test_another_topology_is_told_because_the_bits_depend_on_it(caplog):
    then = {'replicas': 2, 'kind': 'multi_worker', 'onednn': True}
    tell_changes(then, then)
    assert not caplog.records
    tell_changes(then, {**then, 'replicas': 1, 'kind': 'one_device'})
    assert caplog.records[0].getMessage() == (
        "The bits will be other ones than before: replicas was 2, is 1; kind was 'multi_worker', "
        "is 'one_device'."
    )
