import os

import pytest

from trainer import gin_files
from trainer.errors import ConfigError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f'{name}.gin').write_text(text)

    return write


def bound(script):
    return [(binding.name, binding.value) for binding in script.bindings]


def message(*arguments):
    with pytest.raises(ConfigError) as raised:
        gin_files.read(*arguments)
    return raised.value.message


def test_an_include_counts_as_pasted_where_it_stands(write):
    write(a='X = 1\ninclude "b.gin"\nY = 3\n', b='X = 2\nY = 2\n')
    script = gin_files.read(['a.gin'], ['Z = 4'])
    assert bound(script) == [('X', 1), ('X', 2), ('Y', 2), ('Y', 3), ('Z', 4)]
    assert [b.where for b in script.bindings] == [
        'a.gin:1', 'b.gin:1', 'b.gin:2', 'a.gin:3', 'the command line',
    ]  # fmt: skip
    assert ''.join(script.text.split()) == 'X=1X=2Y=2Y=3Z=4'


def test_scopes_blocks_references_and_macros_are_read(write):
    write(a='import os\ns/f:\n  # why\n  x = @t/g()\n  y = [%M, @h]\n')
    script = gin_files.read(['a.gin'])
    assert script.imports == [('os', 'a.gin:1')]
    assert repr(bound(script)) == "[('s/f.x', @t/g()), ('s/f.y', [%M, @h])]"


def test_a_shipped_name_is_found_from_any_directory(write):
    assert gin_files.read(['base.gin']).bindings


def test_the_including_directory_comes_first_then_the_working_one_then_the_search_path(
    write, tmp_path
):
    for directory in ('beside', 'path'):
        os.mkdir(tmp_path / directory)
        (tmp_path / directory / 'x.gin').write_text(f'X = "{directory}"')
    (tmp_path / 'beside' / 'a.gin').write_text('include "x.gin"')
    (tmp_path / 'path' / 'base.gin').write_text('X = "mine"')
    path = [str(tmp_path / 'path')]
    assert bound(gin_files.read(['beside/a.gin'], (), path)) == [('X', 'beside')]
    assert bound(gin_files.read(['x.gin'], (), path)) == [('X', 'path')]
    write(x='X = "here"')
    assert bound(gin_files.read(['x.gin'], (), path)) == [('X', 'here')]
    assert bound(gin_files.read(['base.gin'], (), path)) == [('X', 'mine')]


def test_a_missing_file_names_the_nearest_one_and_where_was_looked(write):
    assert message(['runs/digit.gin'], (), ['elsewhere']) == (
        "There is no file 'runs/digit.gin'. Did you mean 'runs/digits.gin'? Looked in: the "
        f'working directory, elsewhere, {gin_files.shipped_configs()}.'
    )


def test_a_missing_include_names_the_line_that_wants_it(write):
    write(a='\ninclude "bsae.gin"\n')
    assert message(['a.gin']).startswith(
        "a.gin:2: There is no file 'bsae.gin'. Did you mean 'base.gin'?"
    )


def test_files_that_include_each_other_are_refused(write):
    write(a='include "b.gin"', b='include "a.gin"')
    assert 'a.gin includes b.gin includes a.gin' in message(['a.gin'])


@pytest.mark.parametrize(
    ('text', 'wanted'),
    [
        ('X = 1\nY = 2 * 3\n', 'a.gin:2: Y = 2 * 3\nGin does not calculate; write the result.'),
        ('Y = half  # a bit\n', 'a.gin:1: Y = half  # a bit\nA text needs quotes: Y = "half"'),
        ('Y = true\n', 'a.gin:1: Y = true\nGin writes it as Python does: Y = True'),
        ('Y = "x\n', 'a.gin:1: Y = "x\nA quote stays open.'),
        ('Y =\n', 'a.gin:1: Y =\nIt has no value.'),
        ('f.x = @g(1)\n', "a.gin:1: f.x = @g(1)\nExpected ')'. A value is a Python literal, an "
         '@reference or a %macro.'),
    ],
)  # fmt: skip
def test_an_unreadable_line_is_shown_with_its_remedy(write, text, wanted):
    write(a=text)
    assert message(['a.gin']) == wanted


def test_an_open_bracket_is_named(write):
    write(a='X = [1,\nY = 2\n')
    assert message(['a.gin']) == 'a.gin:2: Y = 2\nA bracket stays open, here or above.'
    write(a='X = 1\nY = [1,\n')
    assert message(['a.gin']).endswith('Y = [1,\nA bracket stays open, here or above.')


@pytest.mark.parametrize(
    ('binding', 'mend'),
    [
        ('MODEL_DIR=/data/x', """--gin.MODEL_DIR='"/data/x"'"""),
        ('STEPS=2 epochs', """--gin.STEPS='"2 epochs"'"""),
        ('train.precision=bfloat16', """--gin.train.precision='"bfloat16"'"""),
    ],
)
def test_an_unquoted_text_on_the_command_line_shows_the_quoting_that_works(binding, mend):
    assert message([], [binding]) == (
        f'--gin.{binding} cannot be read. A text needs quotes: {mend}'
    )


def test_what_was_read_can_be_handed_to_a_process_that_has_no_files(tmp_path):
    (tmp_path / 'part.gin').write_text('A = 1\n\nB = [\n  2,\n]\n')
    (tmp_path / 'all.gin').write_text("import math\nA = 0\ninclude 'part.gin'\n\nf.x = %A\n")
    script = gin_files.read([str(tmp_path / 'all.gin')], ['C = @g()'])
    script.save(tmp_path / 'saved.json')
    for path in tmp_path.glob('*.gin'):
        path.unlink()
    again = gin_files.load(str(tmp_path / 'saved.json'), ['D = 4'])
    assert again.text == script.text + 'D = 4\n'
    assert again.imports == script.imports
    # Each still knows its file and line.
    assert again.bindings[:-1] == script.bindings
    assert again.bindings[2].where.endswith('part.gin:3')


def test_what_is_no_saved_script_is_refused(tmp_path):
    (tmp_path / 'a.gin').write_text('A = 1\n')
    with pytest.raises(ConfigError, match=r'It is written by `phalanx run`; give --gin_file'):
        gin_files.load(str(tmp_path / 'a.gin'))
