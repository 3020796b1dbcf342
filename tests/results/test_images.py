"""The results that docs/models/images.md states."""

from tests.results.running import MNIST_DIR, final_metrics, needs_mnist


@needs_mnist
def test_the_cnn_reaches_98_6_percent_on_mnist(tmp_path):
    found = final_metrics('runs/mnist_cnn.gin', tmp_path, f"--gin.DATA_DIR='{MNIST_DIR}'")
    assert found['eval/accuracy'] >= 0.986
