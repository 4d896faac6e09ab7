"""Support for the tests: models in sessions of their own, trained runs, and real processes."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # until TensorFlow is loaded, here alone
os.environ["MPLBACKEND"] = "agg"  # no window opens, whatever display there is
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import runs
import tensorflow.compat.v1 as tf

import vae_mnist

del os.environ["TF_CPP_MIN_LOG_LEVEL"]
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


@pytest.fixture
def data_in_memory(mnist, monkeypatch):
    """Take the real data set from memory in each of the many runs in this process."""
    load = vae_mnist.load_mnist
    monkeypatch.setattr(vae_mnist, "load_mnist", lambda path=None: load(path) if path else mnist)


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
def fail_in_iteration(monkeypatch):
    """A function that starts a run which fails in an iteration that is logged."""

    def fail(iteration, output, *options):
        step = vae_mnist.VAE.step

        def failing(model, batch, sess):
            if sess.run(model.iteration) == iteration:
                raise MemoryError(f"in iteration {iteration}")
            return step(model, batch, sess)

        with monkeypatch.context() as patch:
            patch.setattr(vae_mnist.VAE, "step", failing)
            assert runs.main(output, *options) == 1

    return fail


@pytest.fixture
def unfinished(tmp_path, fail_in_iteration):
    """A run of 6 iterations that failed in iteration 4, so that its checkpoint is of 3."""
    fail_in_iteration(4, tmp_path / "run")
    return tmp_path / "run"


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


@contextmanager
def webkit(folder):
    """Yield WebKitGTK, the engine of Safari's relatives, or None where it or a display is missing."""
    from selenium import webdriver

    driver = shutil.which("WebKitWebDriver")
    browsers = sorted(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"))
    server = shutil.which("Xvfb")
    if not (driver and browsers and (server or "DISPLAY" in os.environ)):
        yield None
        return
    environment = {**os.environ, "HOME": str(folder), "LIBGL_ALWAYS_SOFTWARE": "1"}
    environment["WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS"] = "1"  # root has no other way
    display = None
    if server:  # it writes the number of a free display
        command = [server, "-displayfd", "1", "-screen", "0", "1600x1200x24", "-nolisten", "tcp"]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        display = subprocess.Popen(command, **how)
        environment["DISPLAY"] = ":" + display.stdout.readline().strip()
    options = webdriver.WebKitGTKOptions()
    options.binary_location = str(browsers[-1])
    options.add_argument("--automation")
    service = webdriver.webkitgtk.service.Service(driver, env=environment)
    browser = webdriver.WebKitGTK(options, service)
    browser.set_window_size(1400, 1000)
    yield browser
    browser.quit()
    if display:
        display.terminate()
        display.wait()


def pytest_configure(config):
    """Name the marker of the tests that start and kill processes for many seconds."""
    config.addinivalue_line("markers", 'slow: not in a quick run, pytest -m "not slow"')
