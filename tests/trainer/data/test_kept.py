import os
import time

import pytest

from trainer.data import kept


@pytest.fixture
def path(tmp_path):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'a')
    return path


def build(directory):
    (directory / 'made').write_text('made')


def age(directory, seconds):
    for path in (*directory.iterdir(), directory):
        os.utime(path, (time.time() - seconds,) * 2)


def names(path):
    return sorted(each.name for each in (path.parent / '.phalanx').iterdir() if each.is_dir())


def test_a_file_has_one_index_whatever_it_is_called(path, monkeypatch):
    (path.parent / 'in').mkdir()
    (path.parent / 'link').symlink_to(path.parent)
    found = {kept.keep('index-1', [str(path)], build)}
    monkeypatch.chdir(path.parent)
    for name in ('a.bin', './in/../a.bin', f'{path.parent}/link/a.bin'):
        found.add(kept.keep('index-1', [name], build))
    assert len(found) == 1
    assert len(names(path)) == 1


def test_what_was_made_of_older_files_is_deleted_when_nobody_uses_it_any_more(path):
    first = kept.keep('index-1', [str(path)], build)
    path.write_bytes(b'ab')
    second = kept.keep('index-1', [str(path)], build)
    assert names(path) == sorted([first.name, second.name])  # It may be about to be opened.
    age(first, 4000)
    age(second, 4000)
    assert kept.keep('index-1', [str(path)], build) == second
    path.write_bytes(b'abc')
    third = kept.keep('index-1', [str(path)], build)
    assert names(path) == sorted([second.name, third.name])


def test_what_a_killed_builder_has_left_is_deleted_after_a_day(path):
    def dies(directory):
        build(directory)
        os._exit(9)

    for _ in range(2):
        child = os.fork()
        if not child:
            kept.keep('index-1', [str(path)], dies)
        os.waitpid(child, 0)
    left = sorted((path.parent / '.phalanx').glob('.tmp-*'))
    age(left[0], 90_000)
    age(left[1], 80_000)
    target = kept.keep('index-1', [str(path)], build)
    assert names(path) == sorted([left[1].name, target.name])


def test_of_two_builders_without_a_lock_the_slower_takes_what_is_there(path):
    """What two processes do on a file system that has no locks."""
    target = kept.keep('index-1', [str(path)], build)
    kept._build(target, lambda directory: (directory / 'made').write_text('again'))
    assert (target / 'made').read_text() == 'made'
    assert names(path) == [target.name]
