import contextlib
import functools
import glob
import http.server
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf

from tests import faults, servers
from tests.processes import environment
from trainer.data import example, files, remote
from trainer.data.tfrecord import tfrecord
from trainer.errors import BadRecord, ConfigError, ReadError, shown

SIZE = 1_500_000
# What is in a folder whose name begins with a dot, in one with the characters of patterns.
ODD = [('in/y.bin', 8), ('x.bin', 5)]
STORES = {
    's3': (servers.s3, f's3://{servers.BUCKET}'),
    'gcs': (servers.gcs, f'gs://{servers.BUCKET}'),
    'http': (servers.http, 'http://127.0.0.1:{port}'),
}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp('objects')
    (directory / 'd').mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        (directory / 'd' / f'train-{number}.bin').write_bytes(rng.bytes(SIZE))
    for name in ('x.bin', 'in/.hidden/x.bin', 'in/.x.bin', 'in/y.bin'):
        path = directory / 'e' / '.v1' / 'a[b]*?' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (directory / 'd' / 'large.bin').write_bytes(rng.bytes(10_000_000))
    return directory


@pytest.fixture(scope='module')
def port(directory):
    with servers.http(directory) as port:
        yield port


@pytest.fixture
def network(port, monkeypatch):
    """A function: faults -> URL of the directory, through a proxy that has them."""
    monkeypatch.setattr(remote, '_client', remote._Client())
    monkeypatch.setenv('PHALANX_READ_SECONDS', '6')
    with contextlib.ExitStack() as stack:

        def network(**options):
            network.proxy = stack.enter_context(faults.Faults(port, **options))
            return f'http://127.0.0.1:{network.proxy.port}/d'

        yield network


def ranges(url, count=40, length=500):
    """Parts of three files, too far apart to come by one request."""
    return [
        files.Range(f'{url}/train-{number % 3}.bin', number * 37_000, length)
        for number in range(count)
    ]


def expected(directory, parts):
    return [
        (directory / 'd' / part.path.rpartition('/')[2]).read_bytes()[part.offset :][: part.length]
        for part in parts
    ]


def test_a_pattern_gives_its_objects_in_order_of_names(network):
    url = network()
    assert files.expand(f'{url}/train-*.bin') == tuple(f'{url}/train-{n}.bin' for n in range(3))
    assert files.expand([f'{url}/train-2.bin', f'{url}/train-0.bin'])[0].endswith('train-2.bin')
    assert files.stat(f'{url}/train-0.bin').size == SIZE


def test_an_object_that_is_not_there_is_told_with_the_nearest(network):
    url = network()
    with pytest.raises(ConfigError, match=r"no data file '.*train-7.*mean '.*train-"):
        files.expand(f'{url}/train-7.bin')
    with pytest.raises(ConfigError, match=r"no data file '.*tain"):
        files.expand(f'{url}/tain-*.bin')
    with pytest.raises(ConfigError, match='no data file'):
        files.expand(f'{url}/nowhere/train-*.bin')


def test_parts_are_what_the_files_hold_and_end_where_they_end(network, directory):
    url = network()
    parts = [
        *ranges(url),
        files.Range(f'{url}/train-0.bin', 7, 90_000),
        files.Range(f'{url}/train-0.bin', SIZE - 10, 100),
        files.Range(f'{url}/train-0.bin', SIZE + 10, 100),
        files.Range(f'{url}/train-1.bin', 100, 0),
        files.Range(f'{url}/large.bin', 0, 10_000_000),
        files.Range(f'{url}/large.bin', 5_000_000, 5),
    ]
    assert files.read_ranges(parts) == expected(directory, parts)
    assert files.read(f'{url}/large.bin') == (directory / 'd' / 'large.bin').read_bytes()


def test_an_empty_object_is_empty(network, directory):
    (directory / 'd' / 'empty.bin').touch()
    url = f'{network()}/empty.bin'
    assert files.expand(url) == (url,)
    assert files.read(url) == b''
    (directory / 'd' / 'empty.bin').unlink()  # The emulator of Google's store takes none.


def test_random_parts_in_one_call_may_overlap(network, directory):
    url, rng = network(), np.random.default_rng(0)
    parts = [
        files.Range(f'{url}/large.bin', int(offset), int(length))
        for offset, length in zip(
            rng.integers(0, 10_000_000, 60), 2 ** rng.integers(0, 23, 60), strict=True
        )
    ]
    assert files.read_ranges(parts) == expected(directory, parts)


def test_neighbours_come_by_one_request(network):
    url = network()
    files.expand(f'{url}/train-0.bin')
    before = network.proxy.requests
    files.read_ranges([files.Range(f'{url}/train-0.bin', 1000 * n, 400) for n in range(200)])
    assert network.proxy.requests == before + 1


def test_local_and_remote_parts_come_in_the_order_asked_for(network, directory):
    url = network()
    parts = [
        files.Range(path, 10, 20)
        for path in (f'{url}/train-0.bin', str(directory / 'd/train-1.bin'), f'{url}/train-2.bin')
    ]
    assert files.read_ranges(parts) == expected(directory, parts)


@pytest.mark.parametrize('kind', faults.ALL)
def test_what_fails_once_is_read_again(network, directory, kind):
    parts = ranges(network(every=3, kinds=[kind]), count=12)
    assert files.read_ranges(parts) == expected(directory, parts)
    assert network.proxy.injected >= 4


def test_an_outage_ends_with_a_sentence(network, monkeypatch):
    monkeypatch.setenv('PHALANX_READ_SECONDS', '1')
    url = network()
    files.expand(f'{url}/train-0.bin')
    network.proxy.out = True
    with pytest.raises(ReadError, match=r'train-0.bin could not be .* \d+ tries and \d.\d s: .*\w'):
        files.read(f'{url}/train-0.bin', 0, 10)
    network.proxy.out = False
    assert len(files.read(f'{url}/train-0.bin', 0, 10)) == 10


@pytest.mark.parametrize('seconds', ['abc', '0', '-1', 'inf', 'nan'])
def test_a_patience_that_is_none_is_told(network, monkeypatch, seconds):
    url = network()
    monkeypatch.setenv('PHALANX_READ_SECONDS', seconds)
    with pytest.raises(ConfigError, match=f"PHALANX_READ_SECONDS is '{seconds}'"):
        files.expand(f'{url}/train-0.bin')


def test_what_the_store_refuses_is_not_asked_again(network):
    url = network()
    with pytest.raises(ReadError, match=r'in 1 try and .*: there is no such object'):
        files.stat(f'{url}/train-7.bin')
    assert network.proxy.requests == 1


def test_an_object_that_has_changed_is_noticed(network, directory):
    url = network()
    path = directory / 'd' / 'changing.bin'
    path.write_bytes(b'a' * 1000)
    files.expand(f'{url}/changing.bin')
    path.write_bytes(b'b' * 2000)
    with pytest.raises(ReadError, match='not the object any more'):
        files.read_ranges([files.Range(f'{url}/changing.bin', 0, 10)])
    files.expand(f'{url}/changing.bin')  # A new start takes it as it is.
    assert files.read(f'{url}/changing.bin') == b'b' * 2000


def test_reads_of_several_threads_run_side_by_side(network, directory):
    url = network(latency=0.5)
    parts = ranges(url, count=24)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda part: files.read_ranges([part])[0], parts))
    assert read == expected(directory, parts)
    assert network.proxy.most >= 6


def test_a_forked_process_reads_for_itself(network, directory):
    program = f"""
import os
from trainer.data import files
url = '{network()}/train-0.bin'
before = files.read(url)
child = os.fork()
if not child:
    os._exit(0 if files.read(url) == before else 1)
assert os.waitpid(child, 0)[1] == 0 and files.read(url) == before
"""
    subprocess.run([sys.executable, '-c', program], check=True, env=environment(), timeout=60)


def test_a_server_that_does_not_serve_parts_is_told(directory, network):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=directory)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with pytest.raises(ConfigError, match='does not serve parts'):
                files.expand(f'http://127.0.0.1:{server.server_port}/d/train-0.bin')
        finally:
            server.shutdown()


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(remote, '_client', remote._Client())
    monkeypatch.setitem(sys.modules, 's3fs', None)
    with pytest.raises(ConfigError, match=r"s3fs is not installed.*pip install 'phalanx\[s3\]'"):
        files.expand('s3://bucket/train.tfrecord')


def test_an_unknown_kind_of_store_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'htps://host/x'.*Did you mean 'https'"):
        files.expand('htps://host/x')


def test_messages_hide_keys():
    for text, said in [
        ('https://me:secret@host/a?Signature=x', 'https://host/a?...'),
        ("of 'http://me:a@b@host/a?x=1@2/3', row 3.", "of 'http://host/a?...', row 3."),
        ('see https://host/a?x=y, or http://b/c.', 'see https://host/a?..., or http://b/c.'),
        ('https://host/a@v2/b#c', 'https://host/a@v2/b#c'),
        ('s3://bucket/a?b@c', 's3://bucket/a?b@c'),
        ('http/data?.csv', 'http/data?.csv'),
    ]:
        assert shown(text) == said
        for error in (ConfigError, ReadError, BadRecord):
            assert str(error(text)) == said


def test_no_key_of_a_url_is_shown_or_kept(directory, network, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('PHALANX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('PHALANX_READ_SECONDS', '1')
    caplog.set_level('DEBUG', 'absl')
    with tf.io.TFRecordWriter(str(directory / 'd' / 'a.tfrecord')) as writer:
        for number in range(3):
            spec = example.spec({'x': ('int64', ())})
            writer.write(example.serialize({'x': number}, spec))
    (directory / 'd' / 'b.tfrecord').write_bytes(b'no record at all, but some text')
    (directory / 'd' / 'empty.tfrecord').touch()
    place = network().replace('http://', 'http://user:PASSWORD@')

    def signed(name, date=1):
        return f'{place}/{name}?X-Amz-Credential=a/b&X-Amz-Date={date}&X-Amz-Signature=SECRET{date}'

    source = tfrecord(signed('a.tfrecord'), {'x': ('int64', ())})
    said = [source.where(1)]
    assert source.fetch(tf.constant([2, 0], tf.int64))['x'].numpy().tolist() == [2, 0]
    kept = sorted((tmp_path / 'cache').rglob('*'))
    tfrecord(signed('a.tfrecord', 2), {'x': ('int64', ())})
    assert sorted((tmp_path / 'cache').rglob('*')) == kept  # Signed anew, the file is the same.
    network.proxy.out = True
    with pytest.raises(ReadError) as unread:
        source.read(np.array([1]))
    said.append(str(unread.value))
    network.proxy.out = False
    for names in (['b'], ['empty'], ['c'], ['a', 'a'], ['*a'], ['nowhere/a']):
        with pytest.raises(ConfigError) as error:
            tfrecord([signed(f'{name}.tfrecord') for name in names], {'x': ('int64', ())})
        said += [str(error.value), error.value.message]
    assert all('a.tfrecord' in text for text in said[:2])
    (directory / 'd' / 'empty.tfrecord').unlink()
    for path in (tmp_path / 'cache').rglob('*'):
        said += [str(path), *([repr(path.read_bytes())] if path.is_file() else [])]
    for text in (*said, caplog.text):
        assert 'PASSWORD' not in text
        assert 'SECRET' not in text


@pytest.mark.slow
@pytest.mark.parametrize('store', STORES)
def test_every_store_gives_the_same_bytes_through_every_fault(store, directory, monkeypatch):
    serve, url = STORES[store]
    monkeypatch.setattr(remote, '_client', remote._Client())
    monkeypatch.setenv('PHALANX_READ_SECONDS', '6')
    with serve(directory) as port, faults.Faults(port, every=4) as proxy:
        for name, value in servers.clients(proxy.port).items():
            monkeypatch.setenv(name, value)
        url = url.format(port=proxy.port) + '/d'
        names = [f'{url}/train-{number}.bin' for number in range(3)]
        assert files.expand(f'{url}/train-*.bin') == tuple(names)
        listed = [files.stat(name) for name in names]
        if store != 'http':
            assert files.expand(f'{url[:-2]}/**/train-[01].bin') == tuple(names[:2])
            odd = f'{url[:-2]}/e/.v1/a[b]*?'
            assert files.walk(odd) == ODD
            assert files.expand(f'{glob.escape(odd)}/x.*') == (f'{odd}/x.bin',)
        assert files.expand(names) == tuple(names)
        assert [files.stat(name) for name in names] == listed
        assert listed[0].size == SIZE
        for parts in (ranges(url), [files.Range(f'{url}/large.bin', 0, 10_000_000)]):
            assert files.read_ranges(parts) == expected(directory, parts)
        assert proxy.injected >= 5
        with pytest.raises(ConfigError, match=r"no data file '.*train-7.bin'.* Did you mean"):
            files.expand(f'{url}/train-7.bin')
        with pytest.raises(ConfigError, match='no data file'):
            files.expand(f'{url}/tain-*')
        proxy.out = True
        with pytest.raises(ReadError, match=r'train-0.bin could not be read, in \d+ tries'):
            files.read(names[0], 0, 10)
