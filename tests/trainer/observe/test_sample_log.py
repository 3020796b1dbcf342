import hashlib

import numpy as np

from trainer.observe.sample_log import SampleLog


def write(directory, first, last, *, resume_step=0):
    log = SampleLog(directory, resume_step=resume_step)
    log.write(first, np.arange(first * 2, last * 2).reshape(-1, 2))
    log.close()


def text(directory):
    return (directory / 'samples.tsv').read_text()


def test_a_line_holds_the_step_and_its_records(tmp_path):
    write(tmp_path, 0, 3)
    assert text(tmp_path) == '0\t0 1\n1\t2 3\n2\t4 5\n'


def test_the_digest_is_that_of_the_file_and_needs_no_close(tmp_path):
    log = SampleLog(tmp_path, resume_step=0)
    empty = log.sha256()
    log.write(0, np.array([[7, 8]]))
    assert log.sha256() == hashlib.sha256(b'0\t7 8\n').hexdigest() != empty
    log.close()


def test_steps_that_will_be_taken_again_are_dropped(tmp_path):
    write(tmp_path / '.', 0, 5)
    write(tmp_path, 3, 5, resume_step=3)
    assert [line.split('\t')[0] for line in text(tmp_path).splitlines()] == list('01234')


def test_a_line_that_a_killed_writer_left_half_written_is_dropped(tmp_path):
    write(tmp_path, 0, 3)
    with open(tmp_path / 'samples.tsv', 'a') as file:
        file.write('3\t6')
    write(tmp_path, 3, 4, resume_step=4)
    assert text(tmp_path) == '0\t0 1\n1\t2 3\n2\t4 5\n3\t6 7\n'


def test_a_number_of_steps_at_once_and_one_by_one_are_the_same(tmp_path):
    for name in ('at_once', 'single'):
        (tmp_path / name).mkdir()
    write(tmp_path / 'at_once', 0, 4)
    for step in range(4):
        write(tmp_path / 'single', step, step + 1, resume_step=step)
    assert text(tmp_path / 'single') == text(tmp_path / 'at_once')
    assert not list(tmp_path.rglob('*.tmp'))
