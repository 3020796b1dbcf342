import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import tensorflow as tf

from tests import servers
from trainer.data import table_build, table_column, table_files
from trainer.data.table import table
from trainer.errors import ConfigError

PENGUINS = Path(__file__).parents[3] / 'trainer' / 'data' / 'penguins.csv'
_QUOTED_LINES = pyarrow.csv.ParseOptions(newlines_in_values=True)
MIXED = 'n,x,t,b\n1,0.5,red,true\n2,,"a\nb",FALSE\n-3,1e3,,true\n'


@pytest.fixture
def write(tmp_path):
    def write(content, name='data.csv'):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def in_small_blocks(monkeypatch):
    """Files are read some rows at a time, as large ones are."""
    monkeypatch.setattr(table_files, '_BLOCK_BYTES', 100)
    monkeypatch.setattr(table_files, '_BATCH_ROWS', 7)
    monkeypatch.setattr(table_column, '_ROWS_AT_ONCE', 11)


def read(source):
    batch = source.fetch(tf.range(source.num_examples, dtype=tf.int64))
    return {name: tensor.numpy().tolist() for name, tensor in batch.items()}


def column(write, values, **options):
    """Reads a column of these cells, beside one that has something in every row."""
    path = write('id,c\n' + ''.join(f'{i},{value}\n' for i, value in enumerate(values)))
    return table(path, **options)


def refused(write, content, message, name='data.csv', **options):
    with pytest.raises(ConfigError) as raised:
        table(write(content, name), **options)
    assert message in raised.value.message


def test_types_are_found_out_and_missing_values_kept(write):
    source = table(write(MIXED))
    assert source.kinds == {'n': 'integer', 'x': 'number', 't': 'text', 'b': 'integer'}
    assert source.element_spec == {
        'n': tf.TensorSpec([], tf.int64),
        'x': tf.TensorSpec([], tf.float32),
        't': tf.TensorSpec([], tf.string),
        'b': tf.TensorSpec([], tf.int64),
    }
    found = read(source)
    assert found['n'] == [1, 2, -3]
    np.testing.assert_array_equal(found['x'], [0.5, np.nan, 1000.0])
    assert found['t'] == [b'red', b'a\nb', b'']
    assert found['b'] == [1, 0, 1]
    assert source.bounds('n') == (-3, 2)
    assert source.bounds('x') is None


@pytest.mark.parametrize(
    ('content', 'name'),
    [
        (b'\xef\xbb\xbf' + MIXED.encode(), 'bom.csv'),
        (MIXED.replace('\n', '\r\n').replace('"a\r\nb"', '"a\nb"').encode(), 'windows.csv'),
        (gzip.compress(MIXED.encode()), 'data.csv.gz'),
        (MIXED.replace(',', '\t').encode(), 'data.tsv'),
        (gzip.compress(MIXED.replace(',', '\t').encode()), 'data.tsv.gz'),
    ],
)
def test_other_ways_to_write_the_same_give_the_same(write, content, name):
    plain, other = table(write(MIXED)), table(write(content, name))
    assert str(read(other)) == str(read(plain))
    assert other.fingerprint == plain.fingerprint


def test_tables_are_read_by_url(write, tmp_path, monkeypatch):
    monkeypatch.setenv('PHALANX_CACHE', str(tmp_path / 'cache'))
    expected = table(write(MIXED))
    write(gzip.compress(MIXED.encode()), 'data.csv.gz')
    rows = pa.csv.read_csv(write(MIXED), parse_options=_QUOTED_LINES)
    pa.parquet.write_table(rows, tmp_path / 'data.parquet')
    with servers.http(tmp_path) as port:
        for name in ('data.csv', 'data.csv.gz', 'data.parquet'):
            source = table(f'http://127.0.0.1:{port}/{name}')
            assert str(read(source)) == str(read(expected))
            assert source.fingerprint == expected.fingerprint
            assert source.where(1) == f'http://127.0.0.1:{port}/{name}, row 2'


def test_parquet_gives_the_same_as_csv(write, tmp_path, in_small_blocks):
    rng = np.random.default_rng(0)
    columns = {
        'n': rng.integers(-9, 9, 100),
        'x': rng.normal(size=100).astype(np.float32),
        't': rng.choice(['red', 'green', 'blue'], 100),
    }
    whole = pa.table({**columns, 'x': pa.array(columns['x'], mask=columns['n'] == 3)})
    paths = [str(tmp_path / f'{i}.parquet') for i in range(2)]
    pa.parquet.write_table(whole.slice(0, 30), paths[0])
    encoded = whole.set_column(2, 't', whole['t'].dictionary_encode())
    pa.parquet.write_table(encoded.slice(30), paths[1])
    lines = [
        f'{n},{"" if n == 3 else repr(float(x))},{t}\n'
        for n, x, t in zip(*columns.values(), strict=True)
    ]
    csv = write('n,x,t\n' + ''.join(lines))
    source = table(str(tmp_path / '*.parquet'))
    assert source.kinds == {'n': 'integer', 'x': 'number', 't': 'text'}
    assert str(read(source)) == str(read(table(csv)))
    assert source.fingerprint == table(csv).fingerprint
    assert source.where(29) == f'{paths[0]}, row 30'
    assert source.where(30) == f'{paths[1]}, row 1'


@pytest.mark.parametrize(
    ('cells', 'kind'),
    [
        (['1'] * 90 + ['0.5'], 'number'),
        (['1'] * 90 + [''], 'number'),
        ([''] * 90 + ['0.5'], 'number'),
        ([''] * 90 + ['red'], 'text'),
        ([''] * 90, 'number'),
        (['red'] * 46 + ['7'] * 45, 'text'),
        (['7'] * 45 + ['red'] * 46, 'text'),
        (['true'] * 90 + ['maybe'], 'text'),
        (['true'] * 90 + [''], 'number'),
        ([' 7', '+7', '7 '] * 30, 'number'),
        (['0x7'] * 90, 'text'),
        (['infinity'] * 90, 'text'),
        ([' 16777217', '7 '] * 30, 'integer'),
        ([''] * 120 + [' 12.5', '13.5 ', ' 99'], 'number'),
        ([''] * 120 + ['+.5', '7.', ' 1e3'] * 2 + ['2'] * 200 + [''] * 120 + [' 4'], 'number'),
        ([''] * 120 + ['true'] * 9 + [''] * 120, 'number'),
        ([''] * 120 + [' 7', 'red', ' red'], 'text'),
    ],
)
@pytest.mark.parametrize('batch_rows', [7, 150, 10_000])
def test_types_are_those_of_all_rows(write, monkeypatch, batch_rows, cells, kind):
    monkeypatch.setattr(table_files, '_BLOCK_BYTES', 10 * batch_rows)
    monkeypatch.setattr(table_files, '_BATCH_ROWS', batch_rows)
    monkeypatch.setattr(table_column, '_ROWS_AT_ONCE', 11)
    source = column(write, cells)
    assert source.kinds['c'] == kind
    found = read(source)
    assert found['id'] == list(range(len(cells)))
    if kind == 'text':
        assert found['c'] == [cell.encode() for cell in cells]
    else:
        expected = [float({'true': '1'}.get(cell, cell) or 'nan') for cell in cells]
        np.testing.assert_array_equal(found['c'], expected)


def test_declared_types_hold(write):
    codes = read(column(write, ['007', '12', ''], types={'c': 'text'}))['c']
    assert codes == [b'007', b'12', b'']
    assert column(write, ['1', '2'], types={'c': 'number'}).kinds['c'] == 'number'


@pytest.mark.parametrize(
    ('cells', 'options', 'message'),
    [
        (['1'] * 90 + ['abc'], {}, "row 91: 'c' is 'abc', but 90 of the 91 values"),
        (['abc'] + ['1'] * 90, {}, "row 1: 'c' is 'abc', but 90 of the 91 values"),
        (['1', 'abc'], {'types': {'c': 'number'}}, "row 2: 'c' is 'abc', which is no number."),
        (['1', '1.5'], {'types': {'c': 'integer'}}, "row 2: 'c' is 1.5, but whole numbers"),
        (['1', ''], {'types': {'c': 'integer'}}, "row 2: 'c' is missing, but whole numbers"),
        (['1', ''], {'label': 'c'}, "row 2: the label, 'c', is missing."),
        (['1', '-2e38', '1e39'], {}, "row 3: 'c' is 1e+39, beyond what float32 holds."),
        (['16777217', ''], {}, "row 2: 'c' is missing, and elsewhere it holds whole numbers"),
        (['a' * 70_000], {}, 'a text of 70000 bytes. Look for a quote'),
    ],
)
def test_what_does_not_fit_its_column_is_located(
    write, in_small_blocks, monkeypatch, cells, options, message
):
    monkeypatch.setattr(table_files, '_BLOCK_BYTES', max(100, 2 * len(max(cells))))
    with pytest.raises(ConfigError, match=r'data\.csv, row') as raised:
        column(write, cells, **options)
    assert message in raised.value.message


def test_a_column_of_too_many_texts_is_no_category(write, monkeypatch):
    monkeypatch.setattr(table_column, '_MAX_VOCABULARY', 50)
    with pytest.raises(ConfigError, match="'c' has more than 50 different texts"):
        column(write, [f'name {i}' for i in range(50)])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'data.csv is empty.'),
        (b'a,b\n', 'There are no rows in '),
        (b'a,b,a\n1,2,3\n', "data.csv: two columns are called 'a'."),
        (b'a,b\n1,2\n3\n5,6\n', "data.csv, row 2: 1 cells instead of 2: '3'. Mend the row"),
        (b'a,b\n' + b'1,2\n' * 99 + b'3,4,5\n', "row 100: 3 cells instead of 2: '3,4,5'"),
        (b'a,b\n1,"x\n' + b'2,y\n' * 99, 'data.csv has a row of more than 100 bytes. Look for a q'),
        (b'a,b\n1,x\n2,caf\xe9\n', 'data.csv, line 3, byte 13 is not UTF-8.'),
        (b'a,caf\xe9\n1,x\n', 'data.csv, line 1, byte 5 is not UTF-8.'),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(write, in_small_blocks, content, message):
    refused(write, content, message)


def test_damage_to_other_formats_is_told(write):
    refused(write, b'PAR1 and no more', 'data.parquet cannot be read', 'data.parquet')
    damaged = gzip.compress(MIXED.encode())[:-12]
    refused(write, damaged, 'data.csv.gz cannot be read', 'data.csv.gz')


def test_a_type_that_is_neither_number_nor_text_is_refused(tmp_path):
    path = tmp_path / 'a.parquet'
    days = pa.array([1, 2], pa.int32()).cast(pa.date32())
    pa.parquet.write_table(pa.table({'n': [1, 2], 'day': days}), path)
    with pytest.raises(ConfigError, match=r"the column 'day' holds date32.*table\.columns"):
        table(str(path))
    assert read(table(str(path), columns=['n'])) == {'n': [1, 2]}


def test_files_with_different_columns_are_refused(write, tmp_path):
    write('a,b\n1,2\n', '1.csv')
    write('b,c\n3,4\n', '2.csv')
    both = str(tmp_path / '?.csv')
    with pytest.raises(ConfigError, match=r"'a' is in .*1\.csv, but not in .*2\.csv"):
        table(both)
    assert read(table(both, columns=['b'])) == {'b': [2, 3]}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'label': 'specie'}, "table.label names 'specie', which is no column of"),
        ({'columns': ['sax']}, "Did you mean 'sex'?"),
        ({'types': {'yaer': 'text'}}, "table.types names 'yaer'"),
        ({'types': {'year': 'float'}}, "'year' 'float'; a column is 'integer', 'number' or 'text'"),
    ],
)
def test_a_slip_of_the_pen_is_told(write, options, message):
    path = write(PENGUINS.read_bytes())
    with pytest.raises(ConfigError, match=re.escape(message)):
        table(path, **options)


def test_the_log_says_what_columns_were_taken_for_and_warns_of_names_of_rows(write, caplog):
    rows = ''.join(f'{i},p{i},{"ab"[i % 2]},{"dog" if i % 3 else "cat"}\n' for i in range(101))
    with caplog.at_level('INFO', logger='absl'):
        table(write('n,id,t,y\n' + rows), label='y')
    said, warned = (record.getMessage() for record in caplog.records[-2:])
    assert '101 rows; numbers: n; texts (how many different): id (101), t (2); 2 cla' in said
    assert said.endswith('classes: cat (0), dog (1)')
    assert "Most texts in 'id' are different" in warned


def test_a_file_with_another_delimiter_is_told_by_its_only_column(write):
    said = "Its columns are x;y. If cells are separated by ';', set table.delimiter."
    refused(write, 'x;y\n1;2\n', said, label='y')


def test_files_without_a_header_get_their_names(write):
    source = table(write('1;x\n2;y\n'), names=['n', 't'], delimiter=';')
    assert read(source) == {'n': [1, 2], 't': [b'x', b'y']}
    refused(write, '1;x\n2\n', 'row 2: 1 cells', 'bad.csv', names=['n', 't'], delimiter=';')


def test_text_labels_are_classes_in_the_order_of_the_alphabet(write):
    source = table(write('x,y\n1,dog\n2,cat\n3,dog\n'), label='y')
    assert source.class_names == ('cat', 'dog')
    assert source.element_spec['y'] == tf.TensorSpec([], tf.int64)
    assert read(source)['y'] == [1, 0, 1]
    assert source.bounds('y') == (0, 1)


def test_evaluation_data_take_types_and_classes_from_the_training_data(write):
    train = table(write('x,y\n1.5,dog\n2,cat\n3,emu\n', 'train.csv'), label='y')
    test = table(write('x,y\n1,emu\n2,dog\n', 'test.csv'), like=train)
    assert read(test) == {'x': [1.0, 2.0], 'y': [2, 1]}
    assert test.element_spec == train.element_spec
    bad = write('x,y\n1,emu\n2,dgo\n', 'bad.csv')
    with pytest.raises(ConfigError, match=r"bad\.csv, row 2: the label 'y' is 'dgo'.*'dog'\?"):
        table(bad, like=train)
    with pytest.raises(ConfigError, match=r"odd\.csv, row 1: 'x' is 'one', which is no number"):
        table(write('x,y\none,emu\n', 'odd.csv'), like=train)


def test_rows_are_fetched_in_any_order_by_several_in_one_graph(write):
    source = table(write(PENGUINS.read_bytes()), label='species')
    fetch = tf.function(source.fetch)
    batch = fetch(tf.constant([343, 3, 343], tf.int64))
    assert batch['species'].numpy().tolist() == [1, 0, 1]
    assert batch['sex'].numpy().tolist() == [b'female', b'', b'female']
    np.testing.assert_array_equal(batch['body_mass_g'], np.float32([3775, np.nan, 3775]))
    graph = fetch.get_concrete_function(tf.TensorSpec([4], tf.int64))
    assert {n: t.shape for n, t in graph.structured_outputs.items()} == {
        name: [4] for name in source.kinds
    }


def test_the_fingerprint_is_of_the_contents(write):
    source = table(write(MIXED, 'a.csv'))
    assert table(write(MIXED, 'b.csv')).fingerprint == source.fingerprint
    for changed in (
        MIXED.replace('0.5', '0.6'),
        MIXED.replace('red', 'ref'),
        MIXED.replace('n,x', 'm,x'),
    ):
        assert table(write(changed, 'c.csv')).fingerprint != source.fingerprint


def test_a_file_is_read_once_and_again_when_it_has_changed(write, monkeypatch):
    path = write('n\n1\n')
    assert read(table(path)) == {'n': [1]}
    with monkeypatch.context() as patched:
        patched.setattr(table_build, 'build', None)
        assert read(table(path)) == {'n': [1]}
    write('n\n1\n2\n')
    assert read(table(path)) == {'n': [1, 2]}
