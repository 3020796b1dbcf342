"""Node lists are read as Slurm reads them."""

import pytest

from launch.nodelist import expand
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ('text', 'names'),
    [
        ('', []),
        ('node1', ['node1']),
        ('ctl.example-site.org', ['ctl.example-site.org']),
        ('b,a', ['b', 'a']),
        ('node[1-3,7]', ['node1', 'node2', 'node3', 'node7']),
        ('node[2,10]', ['node2', 'node10']),
        ('n[9-11]', ['n9', 'n10', 'n11']),
        ('n[08-11]', ['n08', 'n09', 'n10', 'n11']),
        ('n[098-101]', ['n098', 'n099', 'n100', 'n101']),
        ('n[99,100,001]', ['n99', 'n100', 'n001']),
        ('gpu-a[01-03]-ib', ['gpu-a01-ib', 'gpu-a02-ib', 'gpu-a03-ib']),
        ('a[1-2]b[3-4]', ['a1b3', 'a1b4', 'a2b3', 'a2b4']),
        ('[1-2]', ['1', '2']),
        ('a[1],b,c[3,5-6]d,e', ['a1', 'b', 'c3d', 'c5d', 'c6d', 'e']),
    ],
)
def test_a_node_list_is_expanded_in_the_order_of_slurm(text, names):
    assert expand(text) == names


def test_a_node_list_may_have_a_million_names_and_not_one_more():
    assert len(expand('n[1-1000000]')) == 1_000_000
    for text in ('n[1-1000001]', 'n[1-1000000],x', 'n[0-999]m[0-1000]', 'n[1-99999999999999]'):
        with pytest.raises(ConfigError, match='has more than 1,000,000 names'):
            expand(text)


@pytest.mark.parametrize(
    'text',
    ['n[1-3', 'n1-3]', 'n[]', 'n[a-b]', 'n[1-2-3]', 'n[3-1]', 'n[1,,2]', 'n[1-]', 'n[[1-2]]']
    + ['a,,b', 'a,', ',a', 'a b', 'n[1- 2]', '[', ']'],
)
def test_a_malformed_node_list_is_refused_with_a_right_one(text):
    with pytest.raises(ConfigError) as caught:
        expand(text)
    assert repr(text) in str(caught.value)
    assert str(caught.value).endswith('A right one: node[1-3,7],gpu-a[01-03]-ib')


def test_the_message_on_a_long_list_is_short():
    with pytest.raises(ConfigError) as caught:
        expand('n,' * 10_000)
    assert len(str(caught.value)) < 250
