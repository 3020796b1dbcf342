"""What the tests of the launcher compare with."""

import pytest

from tests.chaos.jobs import Job, bits, processes_of


@pytest.fixture(scope='session')
def undisturbed_job(tmp_path_factory):
    """The bits of a job that nothing happened to."""
    model_dir = tmp_path_factory.mktemp('undisturbed') / 'run'
    with Job(model_dir) as job:
        code, output = job.end()
    assert code == 0, output
    assert job.attempts() == 1, 'a false alarm'
    assert not processes_of(model_dir)
    return bits(model_dir)
