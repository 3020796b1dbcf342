"""The results that docs/models/images.md states."""

from tests.results.running import MNIST_DIR, final_metrics, needs_mnist, run, shown


@needs_mnist
def test_the_cnn_reaches_98_6_percent_on_mnist(tmp_path):
    found = final_metrics('runs/mnist_cnn.gin', tmp_path, f"--gin.DATA_DIR='{MNIST_DIR}'")
    assert found['eval/accuracy'] >= 0.986


@needs_mnist
def test_the_resnet_reaches_99_3_percent_on_mnist(tmp_path):
    found = final_metrics('runs/mnist_resnet.gin', tmp_path, f"--gin.DATA_DIR='{MNIST_DIR}'")
    assert found['eval/accuracy'] >= 0.993


def test_the_vision_transformer_reaches_88_percent_on_digits(tmp_path):
    found = final_metrics('runs/digits_vit.gin', tmp_path)
    assert found['eval/accuracy'] >= 0.88


@needs_mnist
def test_fine_tuning_by_hand_reaches_65_percent(tmp_path):
    page = 'docs/models/images.md'
    for name, where, first in (
        ('make_photos.py', 'docs/data/images.md', 'from pathlib import Path'),
        ('pretrain.py', page, 'import sys'),
        ('tuned.gin', page, "include 'runs/fine_tune.gin'"),
    ):
        (tmp_path / name).write_text(shown(where, first))
    run('make_photos.py', cwd=tmp_path)
    run('pretrain.py', MNIST_DIR, cwd=tmp_path)
    found = final_metrics('tuned.gin', 'runs/tuned', '--gin.FROZEN=False', cwd=tmp_path)
    assert found['eval/accuracy'] >= 0.65
