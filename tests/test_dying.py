"""Runs that are killed, stopped or starved lose nothing that was whole before."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import program, run_program
from runs import SHORT, assert_same_run, content, kept_files, main, record, refused, variables

import vae_mnist

pytestmark = pytest.mark.usefixtures("data_in_memory")
LONG = ["--iterations", 250, "--batch-size", 16, "--log-every", 7, "--checkpoint-every", 1]


def run_until(moment, output, *options):
    """Run the program in a process that ends itself at a moment; return its exit status."""
    script = str(Path(__file__).parent / "killed.py")
    command = [sys.executable, script, moment, *map(str, options), "--output-dir", str(output)]
    return subprocess.run(command, capture_output=True, check=False, timeout=120).returncode


@contextmanager
def training(output, *options, **how):
    """Yield a process that has begun to train for a long time; kill it in the end."""
    options = ["--iterations", 100_000, "--checkpoint-every", 100_000, *options]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    with subprocess.Popen(program(*options, "--output-dir", output), **how) as process:
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()


# --------------------------------------------------------------------------------------- killed
@pytest.mark.slow
def test_run_killed_again_and_again_ends_as_the_one_that_was_never_stopped(tmp_path):
    assert main(tmp_path / "whole", *LONG) == 0
    output = tmp_path / "killed"
    rng = random.Random(0)
    resume = []
    for _ in range(3):  # while training, and mostly while saving, which takes longer here
        with training(output, *LONG, *resume) as process:
            while not (output / "checkpoint" / "run.json").exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.4))
        assert process.returncode == -signal.SIGKILL
        resume = ["--resume"]
    for moment in ("in_the_second_rename", "in_half_a_log", "in_half_a_picture"):
        assert run_until(moment, output, *LONG, "--resume") == -signal.SIGKILL
    assert not (output / "latent.png").exists()
    assert main(output, *LONG, "--resume") == 0
    assert_same_run(output, tmp_path / "whole")


@pytest.mark.slow
def test_kill_before_the_new_variables_are_named_leaves_the_finished_run(run_folder, finished):
    """But for its pictures, which resuming draws again."""
    status = run_until("before_run_json_names_the_variables", run_folder, *SHORT, "--seed", 1)
    assert status == -signal.SIGKILL
    assert record(run_folder) == record(finished) and variables(run_folder) == variables(finished)
    assert not (run_folder / "latent.png").exists()
    assert main(run_folder, "--resume") == 0
    assert_same_run(run_folder, finished)


@pytest.mark.slow
def test_kill_before_older_pictures_are_gone_leaves_the_finished_run(run_folder, finished):
    assert run_until("before_older_pictures_go", run_folder, *SHORT, "--seed", 1) == -9
    assert main(run_folder, "--resume") == 0
    assert_same_run(run_folder, finished)


@pytest.mark.slow
def test_kill_before_tensorflows_own_file_is_written_is_mended_by_resuming(run_folder, tmp_path):
    """Or `tf.train.latest_checkpoint` would go on to name what the run had been before."""
    status = run_until("before_tensorflows_own_file", run_folder, *SHORT, "--seed", 1)
    assert status == -signal.SIGKILL
    assert main(run_folder, "--seed", "1", "--resume") == 0
    assert main(tmp_path / "new", "--seed", "1") == 0
    assert_same_run(run_folder, tmp_path / "new")


def test_files_are_on_the_disk_before_run_json_names_them(tmp_path, monkeypatch):
    """A power cut takes back what was written, but not what was synced after it."""
    synced = {}
    names = {}
    fsync, replace = os.fsync, os.replace

    def path_of(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def syncing(descriptor):
        synced[path_of(descriptor)] = Path(path_of(descriptor)).read_bytes()
        fsync(descriptor)

    def replacing(old, new):
        assert synced.get(str(old)) == Path(old).read_bytes(), (
            f"{old} takes the name {new} unsynced"
        )
        if Path(new).name == "run.json":
            written = run_json_of(old)
            for path in (tmp_path / "checkpoint").glob(f"{written['checkpoint_name']}.*"):
                assert synced.get(str(path)) == path.read_bytes(), path
                names[path.name] = written["made"]
            log = tmp_path / "log.csv"
            if written["log_size"]:
                assert synced[str(log)] == log.read_bytes()
                assert len(log.read_bytes()) == written["log_size"]
        replace(old, new)

    def run_json_of(path):
        return vae_mnist.json.loads(Path(path).read_text())

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    assert main(tmp_path) == 0
    assert sorted(names.values()) == [3, 3, 6, 6]


# -------------------------------------------------------------------------------------- stopped
@pytest.mark.slow
def test_signals_stop_after_the_iteration_and_save(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        output = tmp_path / number.name
        with training(output) as process:
            time.sleep(0.2)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        made = record(output)["made"]
        expected = f"Stopped by {number.name} after {made} of 100000 iterations; go on with"
        assert err.count("\n") == 1 and err.startswith(expected) and "--resume" in err
        assert np.frombuffer(variables(output)["global_step"], np.int64) == made > 0


@pytest.mark.slow
def test_signals_that_were_ignored_at_the_start_stay_ignored(tmp_path):
    """As a shell ignores SIGINT for what a script starts in the background, and nohup SIGHUP."""

    def ignore():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    with training(tmp_path, preexec_fn=ignore) as process:
        for number in (signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err.startswith("Stopped by SIGTERM")


@pytest.mark.slow
def test_second_signal_stops_at_once(tmp_path):
    options = ["--iterations", 40, "--checkpoint-every", 10, "--log-every", 40]
    start = time.monotonic()
    assert run_until("interrupted_twice_in_the_second_save", tmp_path, *options) == 130
    assert time.monotonic() - start < 50
    assert record(tmp_path)["made"] == 10
    assert main(tmp_path, *options, "--batch-size", 256, "--resume") == 0


@pytest.mark.slow
def test_signal_while_restoring_ends_the_program_and_changes_nothing(unfinished, finished):
    before = content(unfinished)
    moment = "terminated_while_restoring"
    assert run_until(moment, unfinished, *SHORT, "--resume") == -signal.SIGTERM
    assert content(unfinished) == before
    assert main(unfinished, "--resume") == 0
    assert_same_run(unfinished, finished)


@pytest.mark.slow
def test_signal_during_the_last_save_is_obeyed(tmp_path, finished, monkeypatch, capsys):
    save = vae_mnist.Run.save

    def interrupted(run, model, sess):
        if run.made == 6:
            signal.raise_signal(signal.SIGTERM)
        save(run, model, sess)

    with monkeypatch.context() as patch:
        patch.setattr(vae_mnist.Run, "save", interrupted)
        assert main(tmp_path / "run") == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM after 6 of 6 iterations" in capsys.readouterr().err
    assert not (tmp_path / "run" / "latent.png").exists()
    assert main(tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", finished)


def test_handlers_are_those_of_before_in_the_end_and_at_the_second_signal(tmp_path, monkeypatch):
    """A notebook's or a terminal's own, which is not the default action."""
    got = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    step = vae_mnist.VAE.step

    def interrupted(model, batch, sess):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return step(model, batch, sess)

    monkeypatch.setattr(vae_mnist.VAE, "step", interrupted)
    try:
        signal.signal(signal.SIGINT, lambda number, _: got.append(number))
        mine = signal.getsignal(signal.SIGINT)
        assert main(tmp_path) == 130
        assert got == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is mine
        assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_second_run_in_a_directory_is_refused_while_the_first_lives(tmp_path, capsys):
    with training(tmp_path) as first:
        for other in ([], ["--resume"], ["--overwrite"], ["--seed", "1", "--report"]):
            err = refused(capsys, tmp_path, *other)
            assert f"{tmp_path}: another run is at work there" in err
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    made = record(tmp_path)["made"]
    with training(tmp_path, "--resume", "--log-every", 1):
        assert "another run" in refused(capsys, tmp_path, "--resume")
    # It was killed, which leaves no lock behind.
    assert main(tmp_path, "--batch-size", 256, "--resume", "--iterations", made) == 0


def test_platform_without_locks_does_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails, as on Windows
    assert main(tmp_path) == 0


# -------------------------------------------------------------------------------------- starved
@pytest.mark.slow
def test_full_disk_is_one_line_and_leaves_older_files_intact(finished, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "run"))
    before = content(output)
    done = run_program(
        *SHORT,
        *("--output-dir", output, "--resume", "--iterations", 20),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert str(output / "checkpoint") in line and "File too large" in line
    after = content(output)
    kept = kept_files(output, before)
    kept.remove(Path("checkpoint", "run.json"))  # where only what is wanted may differ
    assert {**record(output), "wanted": 6} == record(finished)
    assert len(kept) >= 6
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert variables(output) == variables(finished)
    assert main(output, "--resume", "--iterations", 20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latent.png", "explore.html", "checkpoint/run.json"])
def test_disk_that_fills_while_a_file_is_written_is_named(name, run_folder, finished, capsys):
    """The file that is written first, under another name, leads to a device that is full."""
    older = (run_folder / name).read_bytes()
    temporary = run_folder / f"{name}.tmp"
    temporary.symlink_to("/dev/full")
    assert main(run_folder, "--resume", "--iterations", "9") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(run_folder / name) in err and "No space left" in err
    assert not temporary.is_symlink()
    if name not in vae_mnist.RESULTS:  # which went with the checkpoint that they showed
        assert (run_folder / name).read_bytes() == older
    assert main(run_folder, "--resume", "--iterations", "9") == 0
    assert len((run_folder / "log.csv").read_text().splitlines()) == 6


def test_file_that_another_program_holds_open_is_named(run_folder, finished, monkeypatch, capsys):
    """As a spreadsheet holds log.csv on Windows; the same run goes on when it is closed."""

    def held(path, *arguments, **how):
        if str(path) == str(run_folder / "log.csv"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *arguments, **how)

    with monkeypatch.context() as patch:
        patch.setattr(vae_mnist, "open", held, raising=False)
        assert main(run_folder, "--resume", "--iterations", "9") == 1
    err = capsys.readouterr().err
    assert f"{run_folder / 'log.csv'}: Permission denied; is it open in another program?" in err
    assert err.count("\n") == 1
    assert main(run_folder, "--resume", "--iterations", "9") == 0
    rows = (run_folder / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["0", "2", "4", "6", "8"]


@pytest.mark.parametrize("every", [("--log-every", "2"), ("--log-every", "99")])
def test_loss_that_is_not_finite_stops_the_run_and_saves_nothing(every, run_folder, capsys):
    before = content(run_folder)
    assert main(run_folder, "--learning-rate", "1e30", *every) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"iteration {2 if every[1] == '2' else 3}: KLD = nan, RecLoss = nan" in err
    assert "lower --learning-rate" in err
    assert content(run_folder) == before


def test_mistake_in_the_program_is_not_taken_for_a_wrong_option(tmp_path, monkeypatch):
    def mistaken(model, batch, sess):
        raise ValueError("a mistake in the program")

    monkeypatch.setattr(vae_mnist.VAE, "step", mistaken)
    with pytest.raises(ValueError, match="a mistake in the program"):
        main(tmp_path / "run")


def test_output_directory_that_vanishes_is_named(tmp_path, monkeypatch, capsys):
    save = vae_mnist.Run.save

    def vanishing(run, model, sess):
        save(run, model, sess)
        shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(vae_mnist.Run, "save", vanishing)
    assert main(tmp_path / "run", "--checkpoint-every", "6") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "run") in err and "No such file" in err
