"""The program in a real Jupyter kernel, in a thread, and where there are no streams or docstrings."""

import os
import re
import subprocess
import sys
import threading

import nbformat
import pytest
from conftest import ROOT, SMALL_RUN, program
from nbclient import NotebookClient

import vae_mnist

BEFORE = """
import os, signal, sys, warnings
before = (sys.stdout, sys.stderr, dict(os.environ), signal.getsignal(signal.SIGINT),
          signal.getsignal(signal.SIGTERM))
"""
AFTER = """
assert (sys.stdout, sys.stderr) == before[:2]
assert dict(os.environ) == before[2]
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before[3:]
warnings.warn("still seen")
"""


def run_cells(directory, cells):
    """Run cells in a kernel of this environment; return what each one printed, by stream."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    resources = {"metadata": {"path": str(directory)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    printed = []
    for cell in notebook.cells:
        streams = {"stdout": "", "stderr": ""}
        for output in cell.outputs:
            assert output.output_type == "stream", output
            streams[output.name] += output.text
        printed.append(streams)
    return printed


@pytest.mark.slow
def test_notebook_runs_it_again_and_again_and_keeps_what_is_its_own(tmp_path):
    """As README says: %run, the module's text in a cell, and the program of another environment."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    text = (ROOT / "vae_mnist.py").read_text().replace("ITERATIONS = 5000", "ITERATIONS = 4")
    text = text.replace("default=100", "default=2")  # of --log-every
    magic = f"%run {ROOT / 'vae_mnist.py'} {' '.join(SMALL_RUN)}"
    shell = f"!{sys.executable} {ROOT / 'vae_mnist.py'} {' '.join(SMALL_RUN)}"
    printed = run_cells(tmp_path, [BEFORE, magic, AFTER, magic, text, AFTER, shell])
    for i in (1, 3, 4, 6):
        out = printed[i]["stdout"]
        assert re.search(r"Iteration 0: KLD = \d+\.\d{6}, RecLoss = \d+\.\d{6}\r?\n", out), out
        assert "The manifold of the latent codes is in outputs/latent.png" in out
    assert "Replacing the finished run" in printed[3]["stdout"]
    assert "still seen" in printed[2]["stderr"] and "still seen" in printed[5]["stderr"]
    assert (tmp_path / "outputs" / "latent.png").exists()


def test_thread_runs_it_without_taking_signals(tmp_path):
    results = []

    def run():
        results.append(vae_mnist.main([*SMALL_RUN, "--output-dir", str(tmp_path)]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [0] and (tmp_path / "latent.png").exists()


@pytest.mark.slow
def test_interactive_host_goes_on_after_an_interrupt(tmp_path):
    """Python's -i: the handler of Ctrl-C is its own again, so a later one is an exception there."""
    command = [sys.executable, "-i", *program(*SMALL_RUN, "--output-dir", tmp_path)[1:]]
    typed = "import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt: "
    typed += "print('caught')\n\nprint(signal.getsignal(signal.SIGINT))\n"
    done = subprocess.run(
        command, input=typed, capture_output=True, text=True, timeout=120, check=False
    )
    assert "caught" in done.stdout and "default_int_handler" in done.stdout


@pytest.mark.slow
def test_program_without_standard_error_or_docstrings_runs(tmp_path):
    command = " ".join([*program(*SMALL_RUN, "--output-dir", tmp_path / "run"), "2>&-"])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "run" / "latent.png").exists()
    assert "latent.png" in done.stdout
    command = [sys.executable, "-OO", *program("--help")[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--iterations" in done.stdout and not done.stderr


@pytest.mark.slow
def test_tensorflow_is_heard_where_the_user_asks_for_it(tmp_path):
    """And a fatal word of it while it loads is not lost."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"}
    fatal = {**environment, "TF_XLA_FLAGS": "--nonsense"}
    how = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    processes = []
    for i, env in enumerate((environment, fatal)):
        command = program(*SMALL_RUN, "--output-dir", tmp_path / str(i))
        processes.append(subprocess.Popen(command, env=env, **how))
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[0].returncode == 0 and "oneDNN" in said[0]
    assert processes[1].returncode != 0 and "nonsense" in said[1]
