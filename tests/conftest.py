"""Support for the tests: models in sessions of their own, trained runs, and browsers."""

import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # as the module does, which is imported later
os.environ["MPLBACKEND"] = "agg"  # no window opens, whatever display there is

import matplotlib.figure
import numpy as np
import pytest
import runs
import tensorflow.compat.v1 as tf
from reference import Reference

import vae_mnist


@contextmanager
def built(**settings):
    """Yield a model with its initial weights, and its session."""
    with tf.Graph().as_default():
        model = vae_mnist.VAE(**settings)
        with vae_mnist.session() as sess:
            sess.run(tf.global_variables_initializer())
            yield model, sess


@contextmanager
def rough(scale=1.5, **settings):
    """Yield a model with larger weights and random biases, its session, and the same in NumPy."""
    rng = np.random.default_rng(0)
    with built(**settings) as (model, sess):
        for v in model.weights:
            value = scale * sess.run(v) if "kernel" in v.name else rng.normal(0, 0.3, v.shape)
            v.load(value.astype(np.float32), sess)
        yield model, sess, Reference(sess.run(model.weights), settings.get("decoder", "tutorial"))


@contextmanager
def figures_saved():
    """Yield a list, to which every figure is added that is saved."""
    figures = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure, *arguments, **how):
        figures.append(figure)
        savefig(figure, *arguments, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", keep)
        yield figures


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a short finished run; tests copy it before they change it."""
    output = tmp_path_factory.mktemp("finished")
    assert runs.main(output) == 0
    return output


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def unfinished(tmp_path):
    """A run of 6 iterations that was killed in its second save, so that its checkpoint is of 3."""
    kill = ("vae_mnist.Run.save", 2, signal.SIGKILL)
    killed = runs.Forked(tmp_path / "run", signals=kill)
    assert killed.end()[0] == -signal.SIGKILL
    return tmp_path / "run"


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
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    for flag in [*flags.split(), "--host-resolver-rules=MAP * ~NOTFOUND"]:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


@contextmanager
def webkit(folder):
    """Yield WebKitGTK, the engine of Safari's relatives, or None where it or Xvfb is missing."""
    from selenium import webdriver

    driver = shutil.which("WebKitWebDriver")
    browsers = sorted(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"))
    server = shutil.which("Xvfb")
    if not (driver and browsers and server):
        yield None
        return
    # Xvfb writes the number of a display that is free.
    command = [server, "-displayfd", "1", "-screen", "0", "1600x1200x24", "-nolisten", "tcp"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **how) as display:
        environment = {**os.environ, "HOME": str(folder), "LIBGL_ALWAYS_SOFTWARE": "1"}
        environment["DISPLAY"] = ":" + display.stdout.readline().strip()
        environment["WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS"] = "1"  # root has no other way
        options = webdriver.WebKitGTKOptions()
        options.binary_location = str(browsers[-1])
        options.add_argument("--automation")
        service = webdriver.webkitgtk.service.Service(driver, env=environment)
        browser = webdriver.WebKitGTK(options, service)
        browser.set_window_size(1400, 1000)
        yield browser
        browser.quit()
        display.terminate()


def pytest_configure(config):
    """Name the marker of the tests that start and kill processes for many seconds."""
    config.addinivalue_line("markers", 'slow: not in a quick run, pytest -m "not slow"')
