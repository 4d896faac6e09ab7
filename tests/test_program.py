"""The program as its user meets it: processes, wrong options, the tutorial's main block, a notebook."""

import os
import pty
import re
import resource
import subprocess
import sys
import threading
from functools import partial

import pytest
from processes import ROOT
from runs import SHORT, Forked, main, own_lines, program, stopped

import vae_mnist

FILES = ["checkpoints", "explore.html", "latent.png", "log.csv"]


@pytest.mark.slow
def test_run_prints_its_losses_alone_and_a_live_line_on_a_terminal(tmp_path):
    """All defaults but the number of iterations, as a user starts it, beside another one."""
    how = {"stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    command = program("--iterations", 301)
    ours, theirs = pty.openpty()
    on_terminal = subprocess.Popen([*command, "--output-dir", "other"], stderr=theirs, **how)
    os.close(theirs)
    done = subprocess.run(command, stderr=subprocess.PIPE, check=True, **how)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:
        pass  # how Linux says that the other end was closed
    os.close(ours)
    out, _ = on_terminal.communicate(timeout=60)
    assert re.search(rb"\d+%, \d+ iterations/s, \d+ s left", shown)
    assert shown.endswith(b"\r\x1b[K")  # nothing of it is left behind
    assert own_lines(done.stderr) == []  # no live line, and no warning
    lines = done.stdout.splitlines()
    assert out.splitlines()[:4] == lines[:4]
    for i, line in zip((0, 100, 200, 300), lines):
        assert re.fullmatch(rf"Iteration {i}: KLD = \d+\.\d{{6}}, RecLoss = \d+\.\d{{6}}", line)
    losses = [float(line.split()[-1]) for line in lines[:4]]
    assert 540 < losses[0] < 546  # 784 log 2 = 543.4: a coin's toss for every pixel
    assert losses[-1] < 205
    assert len(lines) == 5 and "outputs/latent.png" in lines[4] and "explore.html" in lines[4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "outputs"]
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == FILES


def test_few_iterations_lower_the_losses(tmp_path, capsys):
    """A smoke test on the real data."""
    options = ["--iterations", "61", "--log-every", "20", "--output-dir", str(tmp_path / "a" / "b")]
    assert vae_mnist.main(options) == 0
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:4]]
    assert 540 < losses[0] < 546 and losses[-1] < 230
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == FILES


BAD_OPTIONS = [
    ("--iterations", "0", "expected int from 1 to 2147483647"),
    ("--iterations", "9" * 5000, "expected int from 1"),
    ("--batch-size", "²", "expected int from 1"),
    ("--seed", "-1", "expected int from 0"),
    ("--learning-rate", "nan", "expected float from 1e-30 to 1e+30"),
    ("--learning-rate", "1e-60", "expected float"),
    ("--learning-rate", "fast", "expected float"),
    ("--decoder", "large", "mirrored"),
    ("--shards", "65", "expected int from 1 to 64"),
    ("--output-dir", "lr=[1]", "without * ? ["),  # TensorFlow would look for what this matches
    ("--output-dir", "gs://bucket/run", "a directory on this machine"),
    ("--output-dir", "s3://bucket/run", "a directory on this machine"),
]


def test_wrong_options_are_refused_in_one_line(tmp_path, capsys):
    for option, value, expected in BAD_OPTIONS:
        err = stopped(capsys, 2, tmp_path / "out", option + "=" + value)
        assert option in err and expected in err and repr(value) in err
    for words in (["--epochs", "3"], ["data.npz"], ["--data"], ["--over"]):
        stopped(capsys, 2, tmp_path / "out", *words)
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/1"):
        assert str(path) in stopped(capsys, 2, path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_output_directory_may_be_below_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vae_mnist.main([*SHORT, "--output-dir", "~/runs/a"]) == 0
    assert (tmp_path / "runs" / "a" / "latent.png").exists()


@pytest.mark.slow
def test_batch_beyond_the_memory_is_one_line(tmp_path):
    bound = partial(resource.setrlimit, resource.RLIMIT_AS, (2**34, 2**34))
    status, err = Forked(tmp_path / "out", "--batch-size", 2**31 - 1, first=[bound]).end()
    assert status == 1 and err.count("\n") == 1 and "Unable to allocate" in err


def test_standard_output_that_cannot_be_written_is_a_fault_in_one_line(
    tmp_path, monkeypatch, capsys
):
    ours, theirs = os.pipe()
    os.close(ours)  # as `| head -n 1` does after a line
    for where, reason in (("/dev/full", "No space left on device"), (theirs, "Broken pipe")):
        out = open(where, "w")  # noqa: SIM115
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert main(tmp_path) == 1
        err = capsys.readouterr().err
        assert err.startswith("vae_mnist.py: error: ") and reason in err and err.count("\n") == 1
        with pytest.raises(OSError):  # the same line, once more
            out.close()


def test_help_gives_the_options_and_their_defaults(tmp_path, capsys):
    assert main(tmp_path, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    defaults = {"data": "data/mnist.npz", "output-dir": "outputs", "iterations": 5000, "seed": 0}
    defaults |= {"batch-size": 256, "learning-rate": 0.001, "decoder": "tutorial"}
    defaults |= {"log-every": 100, "checkpoint-every": 500, "shards": 2}
    for option, default in defaults.items():
        assert re.search(rf"--{option} [^()]*\(default: {default}\)", text), option


BEFORE_THE_MAIN_BLOCK = """
import os
import numpy as np
import tensorflow.compat.v1 as tf
import vae_mnist
from vae_mnist import VAE, display_manifold
# Importing writes, builds and switches nothing.
assert os.listdir() == []
assert tf.executing_eagerly() and not tf.get_default_graph().get_operations()
class mnist: load_data = vae_mnist.load_mnist
tf.disable_eager_execution()
"""


@pytest.mark.slow
def test_main_block_of_the_tutorial_runs_as_it_stands(tmp_path):
    """Its last listing, with the names that a PDF broke whole again, and fewer iterations."""
    main_block = ROOT / "tests" / "tutorial_checkpoint" / "main_block.txt"
    code = BEFORE_THE_MAIN_BLOCK + main_block.read_text().replace("5000", "201")
    environment = {name: os.environ[name] for name in ("HOME", "PATH")}  # not what we import
    environment["PYTHONPATH"] = str(ROOT)
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=False, **how)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"Iteration{i}" for i in (0, 100, 200)]
    first, last = (float(line.split("RecLoss=")[1]) for line in (lines[0], lines[-1]))
    assert first > 500 and last < 250
    assert [path.name for path in tmp_path.iterdir()] == ["latent.png"]


BEFORE_A_RUN = """
import signal, sys, warnings

def found():
    return sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
before = found()
"""
AFTER_IT = """
assert found() == before
warnings.warn("still seen")
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_notebook_runs_it_again_and_again_and_keeps_what_is_its_own(tmp_path):
    """As README says: %run, and ! with the notebook's own MPLBACKEND."""
    pytest.importorskip("ipykernel", reason="no kernel")
    nbclient = pytest.importorskip("nbclient", reason="nothing to run a notebook with")
    nbformat = pytest.importorskip("nbformat")
    path = ROOT / "vae_mnist.py"
    magic = f"%run {path} {' '.join(SHORT)}"
    shell = f"!{sys.executable} {path} {' '.join(SHORT)}"
    cells = [
        nbformat.v4.new_code_cell(code)
        for code in (BEFORE_A_RUN, magic, AFTER_IT, magic, shell, AFTER_IT)
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources=resources
    ).execute()
    said = ["".join(output.text for output in cell.outputs) for cell in cells]
    for i in (1, 3, 4):
        assert "Iteration 0: KLD = 0." in said[i] and "codes is in outputs/latent.png" in said[i]
    for i in (2, 5):
        assert "still seen" in said[i] and "interrupted" in said[i]
    assert "Replacing the finished run" in said[3] and "Replacing the finished run" in said[4]


def test_thread_runs_it(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(main(tmp_path)))
    thread.start()
    thread.join()
    assert results == [0] and (tmp_path / "latent.png").exists()
