"""Support for the tests: a model in a session of its own, and the same model in NumPy float64."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
os.environ["MPLBACKEND"] = "agg"  # no window opens, whatever display there is
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import vae_mnist

LINEAR = {"tutorial": (3, 7, 8), "mirrored": (3, 7)}  # layers without ELU, for Reference
SMALL_RUN = ["--iterations", "4", "--batch-size", "32", "--log-every", "2"]


@contextmanager
def built(**settings):
    """Yield a model with its initial weights, and its session."""
    with tf.Graph().as_default():
        model = vae_mnist.VAE(**settings)
        with vae_mnist.session() as sess:
            sess.run(tf.global_variables_initializer())
            yield model, sess


@pytest.fixture(scope="session")
def mnist():
    """The real data set, as load_mnist returns it."""
    return vae_mnist.load_mnist()


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory):
    """Output directories of both decoders; after 1,000 iterations, mirrored posteriors are narrow."""
    directories = {}
    for decoder, iterations in (("tutorial", "300"), ("mirrored", "1000")):
        directories[decoder] = tmp_path_factory.mktemp(decoder)
        options = ["--decoder", decoder, "--iterations", iterations, "--learning-rate", "0.002"]
        assert vae_mnist.main([*options, "--output-dir", str(directories[decoder])]) == 0
    return directories


def program(*arguments):
    """Return the command that starts the program as a process of its own."""
    return [sys.executable, str(ROOT / "vae_mnist.py"), *map(str, arguments)]


def run_program(*arguments, **how):
    """Run the program to its end as a process of its own."""
    how = {"capture_output": True, "text": True, "timeout": 120, **how}
    return subprocess.run(program(*arguments), check=False, **how)


def chromium(profile):
    """Return a Chromium or Chrome that finds no host, None where it or its driver is missing."""
    from selenium import webdriver

    names = ("chromium", "google-chrome", "chrome")
    chrome = next((path for path in map(shutil.which, names) if path), None)
    driver = shutil.which("chromedriver")
    if not (chrome and driver):
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


class Reference:
    """The tutorial's network in NumPy and float64: losses, and gradients by backpropagation.

    parameters: kernel, bias, kernel, bias, ... of the encoder's and then the decoder's layers. The
    last layer of either is linear, and so is the 4-unit one (the last but one of the decoder).
    """

    def __init__(self, parameters, linear=LINEAR["tutorial"]):
        self.kernels = [np.asarray(p, np.float64) for p in parameters[::2]]
        self.biases = [np.asarray(p, np.float64) for p in parameters[1::2]]
        self.linear = linear

    def forward(self, value, layers):
        """Apply layers; keep what each got and gave."""
        for i in layers:
            self.inputs[i] = value
            value = value @ self.kernels[i] + self.biases[i]
            if i not in self.linear:
                value = np.where(value > 0, value, np.expm1(np.minimum(value, 0)))
            self.outputs[i] = value
        return value

    def backward(self, gradient, layers):
        """Keep the gradients of the layers' parameters; return the one of their input."""
        for i in reversed(layers):
            if i not in self.linear:
                gradient = gradient * np.where(self.outputs[i] > 0, 1, self.outputs[i] + 1)
            self.gradients[2 * i] = self.inputs[i].T @ gradient
            self.gradients[2 * i + 1] = gradient.sum(axis=0)
            gradient = gradient @ self.kernels[i].T
        return gradient

    def run(self, x, eps):
        """Return kld, rec_loss; leave mu, log_sig_sq, z, logits and the gradients of their sum."""
        self.inputs, self.outputs, self.gradients = {}, {}, {}
        x, eps, count = np.asarray(x, np.float64), np.asarray(eps, np.float64), len(x)
        encoder, decoder = range(4), range(4, len(self.kernels))
        code = self.forward(x, encoder)
        self.mu, self.log_sig_sq = mu, s = code[:, :2], code[:, 2:]
        self.z = mu + np.exp(s / 2) * eps
        self.logits = logits = self.forward(self.z, decoder)
        kld = 0.5 * np.sum(np.exp(s) - s + mu**2 - 1) / count
        rec_loss = np.sum(np.logaddexp(0, logits) - x * logits) / count
        dz = self.backward((1 / (1 + np.exp(-logits)) - x) / count, decoder)
        d_mu = dz + mu / count
        d_s = dz * eps * np.exp(s / 2) / 2 + (np.exp(s) - 1) / 2 / count
        self.backward(np.concatenate([d_mu, d_s], axis=1), encoder)
        return kld, rec_loss


def pytest_configure(config):
    """Name the marker of the tests that start and kill processes for many seconds."""
    config.addinivalue_line("markers", 'slow: not in a quick run, pytest -m "not slow"')
