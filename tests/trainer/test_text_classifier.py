"""The classifier of texts: masks, bytes in and out, the folder it reads, a run on two replicas."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import tiny
from trainer.data.batch import Data, model_inputs
from trainer.data.table import table
from trainer.data.text_folder import byte_tokens, text_folder
from trainer.errors import ConfigError
from trainer.models.text_classifier import text_classifier
from trainer.state import build_model


def write(directory, texts):
    for name, text in texts.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(text)


@pytest.fixture
def folder(tmp_path):
    write(
        tmp_path,
        {
            'train/eggs/2.txt': b'two',
            'train/eggs/more/1': b'',
            'train/spam/1.txt': bytes(range(256)),
            'train/.hidden/1.txt': b'not read',
            'test/spam/1.txt': 'später'.encode(),
        },
    )
    return tmp_path


def test_a_folder_has_a_class_for_each_folder_in_it_and_the_texts_byte_for_byte(folder):
    source = text_folder(folder, 'train')
    assert source.class_names == ('eggs', 'spam')
    assert [source.where(i).removeprefix(f'{folder}/train/') for i in range(3)] == [
        'eggs/2.txt',
        'eggs/more/1',
        'spam/1.txt',
    ]
    features = source.fetch(tf.constant([2, 0, 1, 2], tf.int64))
    whole = bytes(range(256))
    assert features['text'].numpy().tolist() == [whole, b'two', b'', whole]
    assert features['label'].numpy().tolist() == [1, 0, 0, 1]
    assert source.bounds('label') == (0, 1)
    assert source.bounds('text') is None


def test_all_splits_have_the_classes_of_train(folder):
    source = text_folder(folder, 'test')
    assert source.class_names == ('eggs', 'spam')
    assert source.fetch(tf.constant([0], tf.int64))['label'].numpy().tolist() == [1]


def test_a_text_is_read_as_far_as_is_asked_for(folder):
    source = text_folder(folder, 'train', max_bytes=2)
    assert source.fetch(tf.range(3, dtype=tf.int64))['text'].numpy().tolist() == [
        b'tw',
        b'',
        b'\0\1',
    ]


def test_the_fingerprint_tells_apart_what_is_read(folder):
    before = text_folder(folder, 'train').fingerprint
    assert text_folder(folder, 'train').fingerprint == before
    assert text_folder(folder, 'train', max_bytes=2).fingerprint != before
    assert text_folder(folder, 'train', classes=['spam', 'eggs']).fingerprint != before
    write(folder, {'train/eggs/2.txt': b'owt'})
    assert text_folder(folder, 'train').fingerprint != before


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'split': 'trian'}, "trian' cannot be read: No such file.*Did you mean .*train"),
        ({'split': 'train', 'classes': ['spam']}, "folder 'eggs', which is none of the classes"),
        ({'split': 'train', 'max_bytes': 0}, 'max_bytes is 0; it must be 1 or more'),
        ({'split': 'train/eggs/more'}, 'holds no folders with texts'),
    ],
)
def test_a_folder_that_cannot_be_read_is_told(folder, given, message):
    with pytest.raises(ConfigError, match=message):
        text_folder(folder, **given)


def test_texts_become_tokens_cut_or_filled_up():
    features = {'review': tf.constant([b'', b'\0\xff', b'abcd']), 'stars': tf.constant([1, 2, 3])}
    found = byte_tokens(features, feature='review', length=3)
    assert found['tokens'].numpy().tolist() == [[0, 0, 0], [1, 256, 0], [98, 99, 100]]
    assert found['stars'] is features['stars']
    with pytest.raises(ConfigError, match=r"'text', but the features that are texts are \['revi"):
        byte_tokens(features)


def test_a_column_of_a_table_becomes_tokens(tmp_path):
    (tmp_path / 'reviews.csv').write_text('review,opinion\nab,good\nabcde,bad\n')
    preprocess = functools.partial(byte_tokens, feature='review', length=4)
    rows = table(str(tmp_path / 'reviews.csv'), label='opinion')
    data = Data(rows, 'tokens', label='opinion', preprocess=preprocess)
    found = model_inputs(data, rows.fetch(tf.constant([1, 0], tf.int64)))
    assert found.numpy().tolist() == [[98, 99, 100, 101], [98, 99, 0, 0]]


def build(**options):
    options = {'units': 16, 'blocks': 2, 'heads': 2, **options}
    spec = tf.TensorSpec([None, None], tf.int32)
    return build_model(lambda: text_classifier(3, **options), spec)[0]


def rows(texts, length):
    return byte_tokens({'text': tf.constant(texts)}, length=length)['tokens']


def test_padding_does_not_change_the_logits():
    model = build()
    texts = [b'a', b'four', b'five!', b'six, seven, eight and nine']
    short = model(rows(texts, 26)).numpy()
    np.testing.assert_allclose(model(rows(texts, 27)), short, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model(rows(texts, 64)), short, rtol=1e-4, atol=1e-6)
    alone = [model(rows([text], len(text))).numpy()[0] for text in texts]
    np.testing.assert_allclose(alone, short, rtol=1e-4, atol=1e-6)
    assert len(np.unique(short[:, 0].round(5))) == 4


def test_an_empty_text_has_finite_logits():
    model = build()
    np.testing.assert_array_equal(model(rows([b''], 8)), model.logits.bias[None])


def test_classes_of_texts_are_learnt_on_two_replicas(make_strategy, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 60), ('test', 21)):
        for label, letters in (('low', b'abcd'), ('high', b'wxyz')):
            for number in range(count):
                size = int(rng.integers(1, 24))
                text = bytes(rng.choice(list(letters + b' .'), size).tolist()) + letters[:1]
                write(tmp_path, {f'{split}/{label}/{number}': text})
    preprocess = functools.partial(byte_tokens, length=16)
    train, test = (
        Data(text_folder(tmp_path, split), 'tokens', preprocess=preprocess)
        for split in ('train', 'test')
    )
    result = tiny.run(
        make_strategy(2),
        tmp_path / 'run',
        model=lambda: text_classifier(2, units=16, blocks=1, heads=2),
        train_data=train,
        eval_data=test,
        eval_every=None,
        steps=40,
    )
    assert result.metrics['eval/accuracy'] > 0.9
