"""Runs of the program on few images, in this process or in one of its own, and what they leave."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from processes import CONTEXT, ROOT, be_the_program

import vae_mnist

FOLDER = TemporaryDirectory()  # gone when the tests have ended
DATA = Path(FOLDER.name) / "small.npz"  # the first images of MNIST
SHORT = ["--iterations", "6", "--batch-size", "8", "--log-every", "2", "--checkpoint-every", "3"]
SHORT += ["--data", str(DATA)]
(X_TRAIN, Y_TRAIN), TEST = ((x[:200], y[:200]) for x, y in vae_mnist.load_mnist())
np.savez(DATA, x_train=X_TRAIN, y_train=Y_TRAIN, x_test=TEST[0], y_test=TEST[1])


def main(output, *options):
    """Run the program in this process; return its exit status."""
    try:
        return vae_mnist.main([*SHORT, "--output-dir", str(output), *map(str, options)])
    except SystemExit as stop:
        return stop.code


def stopped(capsys, status, output, *options):
    """Run the program, which must say in one line why it ends with a status; return the line."""
    capsys.readouterr()
    assert main(output, *options) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def refused(capsys, output, *options):
    """Run the program, which must refuse in one line and change no file; return the line."""
    before = content(output)
    err = stopped(capsys, 2, output, *options)
    assert content(output) == before
    return err


def program(*arguments):
    """Return the command that starts the program as a user does."""
    return [sys.executable, str(ROOT / "vae_mnist.py"), *map(str, arguments)]


def started(*arguments, **how):
    """Start the program as a user does."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    return subprocess.Popen(program(*SHORT, *arguments), **how)


class Forked:
    """The program in a process of its own, which begins with TensorFlow loaded."""

    def __init__(self, output, *options, first=(), signals=()):
        """Start it; `first` are functions to call before, `signals` are for signal_in_call."""
        self.out = Path(f"{output}.out")
        self.err = Path(f"{output}.err")
        for path in (self.out, self.err):
            path.write_text("")
        self.options = [*SHORT, "--output-dir", *map(str, [output, *options])]
        arguments = (self.options, self.out, self.err, first, signals)
        self.process = CONTEXT.Process(target=be_the_program, args=arguments, daemon=True)
        with pytest.MonkeyPatch.context() as patch:  # for the server, which the first one starts
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))
            self.process.start()
        self.pid = self.process.pid

    def end(self):
        """Wait for its end; return its status, or minus the signal that ended it, and its errors."""
        self.process.join(60)
        return self.process.exitcode, self.err.read_text()


@contextmanager
def training(output, *options, first=()):
    """Yield a process that has begun to train for a long time; kill it in the end."""
    options = ["--iterations", 100_000, "--checkpoint-every", 100_000, *options]
    forked = Forked(output, *options, first=first)
    try:
        while "Iteration" not in forked.out.read_text():
            assert forked.process.is_alive()
            time.sleep(0.01)
        yield forked
    finally:
        forked.process.kill()
        forked.process.join()


def own_lines(err):
    """Return the lines of a process's standard error but for what TensorFlow says as it loads."""
    loading = ("WARNING: All log messages before absl", "I0000 ")
    return [line for line in err.splitlines() if not line.startswith(loading)]


def content(folder):
    """Return the bytes of every file below a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def settings(output):
    """Return what run.json says."""
    return json.loads((output / "checkpoints" / "run.json").read_text())


def made(output):
    """Return how many updates the newest checkpoint has, by the variable in it."""
    name = tf.train.latest_checkpoint(output / "checkpoints")
    return int(tf.train.load_variable(name, "global_step")) if name else 0


def variables(output):
    """Return every variable of the newest checkpoint, by name, as bytes."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(output / "checkpoints"))
    names = reader.get_variable_to_shape_map()
    return {name: reader.get_tensor(name).tobytes() for name in names}


def assert_same_run(output, expected, but=()):
    """Every variable, log, picture and page are the same bytes, and no stray file is left."""
    assert variables(output) == variables(expected)
    for name in {"log.csv", "latent.png", "explore.html"} - set(but):
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name
    assert content(output).keys() == content(expected).keys()
