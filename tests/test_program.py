"""The program as its user meets it: real runs on the real data, wrong options, the live line."""

import os
import pty
import re
import resource
import subprocess
import sys

import matplotlib.image
import pytest
from conftest import ROOT, SMALL_RUN, program, run_program

import vae_mnist


@pytest.mark.slow
def test_same_seed_gives_the_same_log_and_picture(tmp_path, capsys):
    """In a process of its own, and in this one."""
    first = run_program(*SMALL_RUN, "--output-dir", tmp_path / "a" / "b")
    assert first.returncode == 0, first.stderr
    assert not first.stderr  # no live line, and no word of TensorFlow's
    assert vae_mnist.main([*SMALL_RUN, "--output-dir", str(tmp_path / "c")]) == 0
    second = capsys.readouterr().out.splitlines()
    assert vae_mnist.main([*SMALL_RUN, "--output-dir", str(tmp_path / "d"), "--seed", "1"]) == 0
    other = capsys.readouterr().out.splitlines()
    lines = first.stdout.splitlines()
    number = r"\d+\.\d{6}"
    for i, line in zip((0, 2), lines):
        assert re.fullmatch(rf"Iteration {i}: KLD = {number}, RecLoss = {number}", line)
    assert len(lines) == 3 and str(tmp_path / "a" / "b" / "latent.png") in lines[2]
    assert second[:2] == lines[:2] != other[:2]
    pictures = [(tmp_path / d / "latent.png").read_bytes() for d in ("a/b", "c", "d")]
    assert pictures[0] == pictures[1] != pictures[2]
    assert matplotlib.image.imread(tmp_path / "c" / "latent.png").shape[0] > 840


def test_losses_fall(tmp_path, capsys):
    assert (
        vae_mnist.main(["--iterations", "61", "--log-every", "20", "--output-dir", str(tmp_path)])
        == 0
    )
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:4]]
    assert 540 < losses[0] < 546  # 784 log 2 = 543.4: a coin's toss for every pixel
    assert losses[-1] < 230


@pytest.mark.slow
def test_live_line_is_there_on_a_terminal_only(tmp_path):
    ours, theirs = pty.openpty()
    arguments = ["--iterations", 150, "--output-dir", tmp_path]
    with subprocess.Popen(program(*arguments), stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:
            pass  # how Linux says that the other end was closed
        out = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0
    assert re.search(rb"\d+%, \d+ iterations/s, \d+ s left", shown)
    assert shown.endswith(b"\r\x1b[K")  # nothing of it is left behind
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == ["Iteration 0", "Iteration 100"]


BAD_OPTIONS = [
    ("--iterations", "0", "from 1"),
    ("--iterations", "-3", "from 1"),
    ("--iterations", "2.5", "whole number"),
    ("--iterations", "many", "whole number"),
    ("--iterations", "99999999999999999999", "whole number"),
    ("--batch-size", "0", "from 1"),
    ("--batch-size", "²", "whole number"),
    ("--log-every", "0", "from 1"),
    ("--seed", "-1", "from 0"),
    ("--learning-rate", "nan", "above 0"),
    ("--learning-rate", "inf", "above 0"),
    ("--learning-rate", "0", "above 0"),
    ("--learning-rate", "-0.1", "above 0"),
    ("--learning-rate", "1e-60", "above 0"),
    ("--learning-rate", "fast", "above 0"),
    ("--decoder", "large", "mirrored"),
    ("--shards", "0", "from 1 to 64"),
    ("--shards", "65", "from 1 to 64"),
    ("--output-dir", "out\udcff", "a name in UTF-8"),
    ("--output-dir", "lr=[1]", "no * ? ["),  # TensorFlow would look for what this matches
    ("--output-dir", "a\\b", "no * ? ["),
]


@pytest.mark.parametrize(("option", "value", "expected"), BAD_OPTIONS)
def test_wrong_option_is_refused_in_one_line(option, value, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        vae_mnist.main(["--output-dir", str(tmp_path / "out"), option + "=" + value])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1
    assert option in err and expected in err and repr(value) in err
    assert not (tmp_path / "out").exists()


def test_unknown_option_and_stray_argument_are_refused_in_one_line(capsys):
    for argv in (["--epochs", "3"], ["data.npz"], ["--data"], ["--two\nlines"]):
        with pytest.raises(SystemExit) as stop:
            vae_mnist.main(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_output_directory_that_cannot_be_used_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/version/x", "/proc/1"):
        with pytest.raises(SystemExit) as stop:
            vae_mnist.main(["--output-dir", str(path)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and str(path) in err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_batch_beyond_memory_is_one_line(tmp_path):
    """With a bound on the process, since a machine may promise more memory than it has."""
    process = run_program(
        *("--batch-size", 2**31 - 1, "--output-dir", tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36)),
    )
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "no memory, with batches of 2147483647 images" in process.stderr


@pytest.mark.slow
def test_standard_output_that_cannot_be_written_is_named_and_a_closed_one_is_no_fault(tmp_path):
    ours, theirs = os.pipe()
    os.close(ours)  # as `| head -n 1` does after a line
    full = os.open("/dev/full", os.O_WRONLY)
    cases = {  # where it goes, the exit status and what is said of it
        "closed": (">&-", 0, ""),
        "full": (f">&{full}", 1, "vae_mnist.py: error: standard output: No space left on device\n"),
        "broken": (f">&{theirs}", 1, "vae_mnist.py: error: standard output: Broken pipe\n"),
    }
    processes = []
    for name, (where, _, _) in cases.items():
        command = " ".join([*program(*SMALL_RUN, "--output-dir", tmp_path / name), where])
        how = {"stderr": subprocess.PIPE, "text": True, "pass_fds": (full, theirs)}
        processes.append(subprocess.Popen(["bash", "-c", command], **how))
    for process, (_, status, said) in zip(processes, cases.values()):
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (status, said)
    os.close(full)
    os.close(theirs)
    assert (tmp_path / "closed" / "latent.png").exists()


@pytest.mark.slow
def test_real_process_says_what_is_wrong_in_one_line(tmp_path):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    names = {"no-such.npz": "no-such.npz", "\udcff": "\\udcff"}  # the byte 255, as Python has it
    processes = [subprocess.Popen(program("--data", name), **how) for name in names]
    for process, shown in zip(processes, names.values()):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2 and not out
        assert err == f"vae_mnist.py: error: {shown}: No such file or directory\n"
    assert not list(tmp_path.iterdir())


def test_help_gives_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        vae_mnist.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for option, default in [
        ("--data FILE", "data/mnist.npz"),
        ("--output-dir OUTPUT_DIR", "outputs"),
        ("--iterations ITERATIONS", "5000"),
        ("--batch-size BATCH_SIZE", "256"),
        ("--learning-rate LEARNING_RATE", "0.001"),
        ("--decoder {tutorial,mirrored}", "tutorial"),
        ("--seed SEED", "0"),
        ("--log-every LOG_EVERY", "100"),
        ("--checkpoint-every CHECKPOINT_EVERY", "500"),
        ("--shards SHARDS", "as suits the machine"),
        ("--resume", "False"),
        ("--overwrite", "False"),
        ("--report", "False"),
        ("--show", "False"),
    ]:
        assert re.search(rf"{option} [^()]*\(default: {default}\)", text), option


@pytest.mark.slow
def test_module_writes_nothing_on_import(tmp_path):
    code = "import os, vae_mnist; print(sorted(os.listdir()), 'TF_CPP_MIN_LOG_LEVEL' in os.environ)"
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert done.stdout.decode() == "[] False\n"


# The tutorial's own main block, its last listing. The names that a PDF broke are whole again, and
# iterations and its data are given from outside; nothing else is changed.
MAIN_BLOCK = """
if __name__ == '__main__':
    # ignore testing data and labels
    (x_train, _),_ = mnist.load_data()
    x_train = (x_train / 255.0).reshape(-1, 28**2)
    model = VAE()
    batch = 256
    iterations = 5000
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for i in range(iterations):
            batch_idx = np.random.randint(len(x_train), size=batch)
            x_batch = x_train[batch_idx, :]
            kld, rec_loss = model.step(x_batch, sess)
            if i % 100 == 0:
                print("Iteration%d:KLD=%f,RecLoss=%f" % (i, kld, rec_loss))
        display_manifold(model, sess)
"""


@pytest.mark.slow
def test_main_block_of_the_tutorial_runs_as_it_stands(tmp_path):
    code = f"""
import numpy as np
import tensorflow.compat.v1 as tf
import vae_mnist
from vae_mnist import VAE, display_manifold
class mnist: load_data = vae_mnist.load_mnist
tf.disable_eager_execution()
{MAIN_BLOCK.replace("5000", "301")}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"Iteration{i}" for i in (0, 100, 200, 300)]
    first, last = (float(line.split("RecLoss=")[1]) for line in (lines[0], lines[-1]))
    assert first > 500 and last < 250
    assert [path.name for path in tmp_path.iterdir()] == ["latent.png"]
    assert matplotlib.image.imread(tmp_path / "latent.png").shape[0] > 840
