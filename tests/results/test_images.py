"""The results that docs/models/images.md states."""

from tests.results.running import MNIST_DIR, final_metrics, needs_mnist


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
