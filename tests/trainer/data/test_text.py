import re

import numpy as np
import pytest
import tensorflow as tf
import tokenizers

from tests import servers
from trainer.data import files, text_tokens
from trainer.data import text as module
from trainer.data.text import text
from trainer.errors import BadRecord, ConfigError

SEPARATOR = 256
DOCUMENTS = [b'Hello', b'', b'\x00\xff\n', 'Grüße, 世界\n'.encode() * 20, b'x']


@pytest.fixture
def corpus(tmp_path):
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / f'{number}.txt').write_bytes(document)
    return str(tmp_path / '*.txt')


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer.json, trained on a sentence."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(['Grüße, 世界, the quick brown fox jumps over the dog\n'] * 9, trainer)
    made.enable_padding(length=50)
    made.enable_truncation(2)
    made.save(str(tmp_path / 'tokenizer.json'))
    return str(tmp_path / 'tokenizer.json')


def read(source):
    batch = source.fetch(tf.range(source.num_examples, dtype=tf.int64))
    return batch['tokens'].numpy(), batch['targets'].numpy()


def assert_windows(source, stream, length):
    """All windows are there, in order, and each token but the first is to be predicted once."""
    tokens, targets = read(source)
    count = (len(stream) - 1) // length
    assert source.num_examples == count
    np.testing.assert_array_equal(tokens.ravel(), stream[: count * length])
    np.testing.assert_array_equal(targets.ravel(), stream[1 : count * length + 1])


@pytest.mark.parametrize('length', [1, 3, 7, 64, 300])
def test_windows_of_bytes_are_the_files_one_after_another(corpus, length):
    stream = np.concatenate([[SEPARATOR, *document] for document in DOCUMENTS])
    source = text(corpus, length)
    assert source.element_spec == {
        'tokens': tf.TensorSpec([length], tf.int32),
        'targets': tf.TensorSpec([length], tf.int32),
    }
    assert source.vocabulary_size == 257
    assert source.bounds('targets') == (0, 256)
    assert_windows(source, stream, length)


def test_windows_are_fetched_in_any_order_in_a_graph(corpus):
    source = text(corpus, 16)
    tokens, _ = read(source)
    fetched = tf.function(source.fetch)(tf.constant([9, 0, 9], tf.int64))
    np.testing.assert_array_equal(fetched['tokens'], tokens[[9, 0, 9]])
    graph = tf.function(source.fetch).get_concrete_function(tf.TensorSpec([4], tf.int64))
    assert graph.structured_outputs['targets'].shape == [4, 16]


def test_text_is_read_by_url(corpus, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv('PHALANX_CACHE', str(tmp_path / 'cache'))
    (tmp_path / '2.txt').write_bytes(b'the quick\n')
    with servers.http(tmp_path) as port:
        for options in ({}, {'tokenizer': tokenizer}):
            by_path = text(corpus, 7, **options)
            by_url = text(f'http://127.0.0.1:{port}/*.txt', 7, **options)
            np.testing.assert_equal(read(by_url), read(by_path))
            place = by_path.where(5).removeprefix(str(tmp_path))
            assert by_url.where(5) == f'http://127.0.0.1:{port}{place}'


def test_where_a_window_of_bytes_begins_is_known(corpus):
    source = text(corpus, 7)
    # H e l l o, two separators and a zero are the first window's, with the separator before them.
    assert source.where(0).endswith('0.txt, byte 0')
    assert source.where(1).endswith('2.txt, byte 0')
    assert source.where(2).endswith('3.txt, byte 2')


def test_a_file_that_has_become_shorter_is_a_damaged_record(corpus, tmp_path):
    source = text(corpus, 100)
    read(source)
    (tmp_path / '3.txt').write_bytes(b'short')
    with pytest.raises(BadRecord, match=r'3\.txt has become shorter'):
        source._stream.read(np.array([100]), 101)
    with pytest.raises(tf.errors.InvalidArgumentError, match='has become shorter'):
        tf.function(source.fetch)(tf.constant([1], tf.int64))


def test_tokens_are_those_of_the_tokenizer(corpus, tmp_path, tokenizer):
    (tmp_path / '2.txt').write_bytes(b'the quick\n')
    encode = tokenizers.Tokenizer.from_file(tokenizer)
    encode.no_padding()
    encode.no_truncation()
    documents = [path.read_text() for path in sorted(tmp_path.glob('*.txt'))]
    stream = np.concatenate([[0, *encode.encode(document).ids] for document in documents])
    source = text(corpus, 8, tokenizer=tokenizer)
    assert source.vocabulary_size == encode.get_vocab_size()
    assert source.bounds('tokens') == (0, encode.get_vocab_size() - 1)
    assert source._stream._kind == np.uint16
    assert_windows(source, stream, 8)


def test_long_files_are_tokenized_in_pieces(tmp_path, tokenizer, monkeypatch):
    lines = [f'line {number}: the dog, Grüße 世界\n' for number in range(100)]
    (tmp_path / 'a.txt').write_text(''.join(lines) + '世' * 90)
    (tmp_path / 'b.txt').write_text('fox\n')
    monkeypatch.setattr(text_tokens, '_PIECE_BYTES', 100)
    monkeypatch.setattr(text_tokens, '_PIECES_AT_ONCE', 3)
    source = text(str(tmp_path / '?.txt'), 5, tokenizer=tokenizer)
    assert len(source._stream._pieces) > 20
    stream = source._stream._tokens
    content = (tmp_path / 'a.txt').read_bytes()
    made = tokenizers.Tokenizer.from_file(tokenizer)
    assert made.decode(stream.tolist(), skip_special_tokens=True).encode() == content + b'fox\n'
    for index in range(0, source.num_examples, 7):
        file, byte = re.fullmatch(r'.*/(.)\.txt, byte (\d+)', source.where(index)).groups()
        expected = content[int(byte) :] + b'fox\n' if file == 'a' else b'fox\n'[int(byte) :]
        # A token may begin within a character, of at most three bytes here.
        rest = made.decode(stream[index * 5 :].tolist()).lstrip('\ufffd').encode()
        assert expected.endswith(rest)
        assert len(expected) - len(rest) <= 3


def test_what_is_not_utf8_is_named_where_a_tokenizer_needs_it(corpus, tokenizer):
    with pytest.raises(ConfigError, match=r'2\.txt, byte 1: this is not UTF-8 \(invalid start by'):
        text(corpus, 4, tokenizer=tokenizer)


def test_a_tokenizer_that_is_none_or_lacks_the_separator_is_refused(corpus, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"no token '<eos>' .* such as <\|endoftext\|>\."):
        text(corpus, 4, tokenizer=tokenizer, separator='<eos>')
    (tmp_path / 'bad.json').write_text('{}')
    with pytest.raises(ConfigError, match=r'bad\.json cannot be read as the tokenizer\.json'):
        text(corpus, 4, tokenizer=str(tmp_path / 'bad.json'))


@pytest.mark.parametrize('length', [300, 500])
def test_too_little_text_for_a_window_is_told(tmp_path, length):
    (tmp_path / 'a.txt').write_bytes(b'x' * 299)
    with pytest.raises(ConfigError, match=r'have 300 tokens, too few .* Set text\.length to 299'):
        text(str(tmp_path / 'a.txt'), length)
    with pytest.raises(ConfigError, match=r'text\.length is 0'):
        text(str(tmp_path / 'a.txt'), 0)


def test_the_fingerprint_is_of_contents_and_length(corpus, tmp_path, tokenizer):
    source = text(corpus, 7)
    assert text(corpus, 7).fingerprint == source.fingerprint != text(corpus, 8).fingerprint
    (tmp_path / '2.txt').write_bytes(b'fox')
    changed = text(corpus, 7)
    assert changed.fingerprint != source.fingerprint
    tokens = text(corpus, 7, tokenizer=tokenizer)
    assert tokens.fingerprint != changed.fingerprint
    (tmp_path / '2.txt').write_bytes(b'dog')
    assert text(corpus, 7, tokenizer=tokenizer).fingerprint != tokens.fingerprint


def test_what_is_known_of_files_is_kept(corpus, tokenizer, tmp_path, monkeypatch):
    (tmp_path / '2.txt').write_bytes(b'the quick\n')
    first = read(text(corpus, 7)), read(text(corpus, 7, tokenizer=tokenizer))
    monkeypatch.setattr(files, 'fingerprint', None)
    monkeypatch.setattr(text_tokens, '_pieces', None)
    again = read(text(corpus, 7)), read(text(corpus, 7, tokenizer=tokenizer))
    np.testing.assert_equal(again, first)


def test_no_more_is_read_of_a_file_than_a_window_needs(tmp_path, monkeypatch):
    path = tmp_path / 'large.bin'
    with open(path, 'wb') as file:
        file.truncate(2**40)
        file.seek(2**39)
        file.write(b'the middle')
    source = text(str(path), 1024)
    assert source.num_examples == 2**30
    asked = []
    read_ranges = files.read_ranges
    monkeypatch.setattr(
        module.data_files, 'read_ranges', lambda parts: asked.extend(parts) or read_ranges(parts)
    )
    window = source.fetch(tf.constant([2**29], tf.int64))['tokens'].numpy()[0]
    assert bytes(window[1:11].tolist()) == b'the middle'
    assert [part.length for part in asked] == [1025]
