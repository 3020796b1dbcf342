"""The task of a host, up to the meeting."""

import pytest

from launch import task

RUN = ['--gin_file=runs/digits.gin', '--scheduler=ray', '--workers_per_host=2']


@pytest.mark.parametrize(('workers', 'hosts'), [('6', 3), ('6-8', 3)])
def test_fewer_hosts_than_will_do_are_a_mistake(tmp_path, monkeypatch, capsys, workers, hosts):
    where = {'RANK': '0', 'HOSTS': '2', 'LEADER': 'node1', 'PORT': '2222'}
    for name, value in where.items():
        monkeypatch.setenv(f'PHALANX_{name}', value)
    assert task.main([*RUN, f'--workers={workers}', f'--model_dir={tmp_path / "run"}']) == 2
    said = capsys.readouterr().err
    assert f'needs {hosts} hosts at least, but ray has given 2.' in said
    assert not (tmp_path / 'run').exists()
