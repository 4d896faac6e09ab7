"""Runs that are killed, stopped or starved lose nothing that was whole before."""

import json
import os
import random
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import Forked, assert_same_run, content, main, record, refused, stopped, training

LONG = ["--iterations", 50, "--batch-size", 16, "--log-every", 7, "--checkpoint-every", 1]


# --------------------------------------------------------------------------------------- killed
@pytest.mark.slow
def test_run_killed_again_and_again_ends_as_the_one_that_was_never_stopped(tmp_path):
    assert main(tmp_path / "whole", *LONG) == 0
    output = tmp_path / "killed"
    rng = random.Random(0)
    for resume in ([], ["--resume"], ["--resume"]):
        with training(output, *LONG, *resume) as process:
            while not (output / "checkpoint" / "run.json").exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.4))  # mostly while saving, which takes longer here
            os.kill(process.pid, signal.SIGKILL)
            assert process.end()[0] == -signal.SIGKILL
    assert not (output / "latent.png").exists()
    assert main(output, *LONG, "--resume") == 0
    assert_same_run(output, tmp_path / "whole")


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory, finished):
    """A run of seed 1 in a folder where nothing was."""
    output = tmp_path_factory.mktemp("other_seed")
    assert main(output, "--seed", 1) == 0
    for name in ("log.csv", "latent.png", "explore.html"):
        assert (output / name).read_bytes() != (finished / name).read_bytes()
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "seed"),
    [
        ("pathlib.Path.unlink", 2, 0),  # half of an older checkpoint is gone
        ("pathlib.Path.unlink", 4, 0),  # the pictures of the older run go
        ("os.replace", 1, 0),  # run.json is to name the new variables
        ("os.fsync", 4, 1),  # log.csv is written, which run.json describes already
        ("os.replace", 2, 1),  # TensorFlow's own record is to name them
        ("os.replace", 5, 1),  # the picture is drawn
    ],
)
def test_run_killed_while_it_replaces_a_finished_one(
    name, count, seed, run_folder, finished, other_seed
):
    """Before run.json is replaced the older run is whole, afterwards the newer one."""
    killed = Forked(run_folder, "--seed", 1, signals=(name, count, signal.SIGKILL))
    assert killed.end()[0] == -signal.SIGKILL
    assert record(run_folder)["settings"]["seed"] == seed
    assert main(run_folder, "--resume", "--seed", seed) == 0
    assert_same_run(run_folder, other_seed if seed else finished)


def test_files_are_on_the_disk_before_run_json_names_them(tmp_path, monkeypatch):
    """A power cut takes back what was written, but not what was synced after it."""
    synced = {}
    named = set()
    fsync = os.fsync
    replace = os.replace

    def syncing(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path] = path.read_bytes()
        fsync(descriptor)

    def replacing(old, new):
        files = [Path(old)]
        if Path(new).name == "run.json":
            name = json.loads(files[0].read_text())["checkpoint_name"]
            named.update((tmp_path / "checkpoint").glob(f"{name}.*"))
            files += [*named, *tmp_path.glob("log.csv")]
        for path in files:
            assert synced.get(path) == path.read_bytes(), path
        replace(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    assert main(tmp_path) == 0
    assert len(named) == 4  # index and data, under two names in turn


# -------------------------------------------------------------------------------------- stopped
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_after_the_iteration_and_saves(number, tmp_path):
    """Others are ignored at the start, as by a shell and by nohup, and stay ignored."""
    ignored = {signal.SIGINT, signal.SIGHUP} - {number}
    ignore = [partial(signal.signal, other, signal.SIG_IGN) for other in ignored]
    with training(tmp_path / "run", first=ignore) as process:
        for other in ignored:
            os.kill(process.pid, other)
        time.sleep(0.1)
        os.kill(process.pid, number)
        status, err = process.end()
    assert status == 128 + number
    made = record(tmp_path / "run")["made"]
    expected = f"Stopped by {number.name} after {made} of 100000 iterations; go on with"
    assert err.count("\n") == 1 and err.startswith(expected) and "--resume" in err
    step = runs.variables(tmp_path / "run")["global_step"]
    assert np.frombuffer(step, np.int64) == made > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "status", "made", "said"),
    [
        (("vae_mnist.Run.save", 1, signal.SIGINT), 130, 6, "Stopped by SIGINT after 6 of 6"),
        (("vae_mnist.Run.save", 1, signal.SIGINT, signal.SIGINT), 130, 3, ""),  # at once
        (("vae_mnist.restore", 1, signal.SIGTERM), -signal.SIGTERM, 3, ""),
    ],
)
def test_signals_in_the_last_save_and_before_training(
    signals, status, made, said, unfinished, finished
):
    ended, err = Forked(unfinished, "--resume", signals=signals).end()
    assert ended == status and err.startswith(said) and bool(err) == bool(said)
    assert record(unfinished)["made"] == made and not (unfinished / "latent.png").exists()
    assert main(unfinished, "--resume") == 0
    assert_same_run(unfinished, finished)


@pytest.mark.slow
def test_interrupt_while_measuring_needs_no_traceback_and_loses_nothing(tmp_path):
    """A process as a user starts it."""
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background, too
    with runs.started("--report", "--output-dir", tmp_path, preexec_fn=heard) as process:
        while not process.stdout.readline().startswith("On 200 test images"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == 130
    names = ["checkpoint", "explore.html", "latent.png", "log.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert record(tmp_path)["made"] == 6


@pytest.mark.slow
def test_second_run_in_a_directory_is_refused_while_the_first_lives(tmp_path, capsys):
    output = tmp_path / "run"
    with training(output):
        for other in ([], ["--resume"], ["--overwrite"]):
            err = refused(capsys, output, *other)
            assert f"{output}: another run is at work there" in err
    # It was killed, which leaves no lock behind.
    assert main(output) == 0


# -------------------------------------------------------------------------------------- starved
@pytest.mark.slow
def test_full_disk_is_one_line_and_leaves_older_files_intact(run_folder, finished):
    """What a save adds is more than the largest file that is allowed here."""
    before = content(run_folder)
    bound = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (500_000, 500_000))
    status, err = Forked(run_folder, "--resume", "--iterations", 20, first=[bound]).end()
    assert status == 1 and err.count("\n") == 1
    assert str(run_folder / "checkpoint") in err and "File too large" in err
    after = content(run_folder)
    for path in before:
        if path.stem != "vae_mnist-a" and path.name != "run.json":  # to which the save writes
            assert after[path] == before[path], path
    assert {**record(run_folder), "wanted": 6} == record(finished)


@pytest.mark.slow
def test_disk_that_fills_is_named_with_its_file_of_which_the_older_one_stays(
    run_folder, monkeypatch, capsys
):
    """The file that is written first, under another name, leads to a device that is full."""
    (run_folder / "metrics.json").write_text("older")
    before = content(run_folder)
    for name in ("latent.png", "explore.html", "metrics.json"):
        temporary = run_folder / f"{name}.tmp"
        temporary.symlink_to("/dev/full")
        err = stopped(capsys, 1, run_folder, "--resume", "--report")
        assert f"{run_folder / name}: No space left" in err
        assert content(run_folder) == before and not temporary.is_symlink()

    def held(old, new):  # as on Windows, where another program has the file open
        monkeypatch.setattr(sys, "platform", "win32")
        raise PermissionError(13, "Permission denied", old)

    monkeypatch.setattr(os, "replace", held)
    err = stopped(capsys, 1, run_folder, "--resume")
    assert "run.json: Permission denied; is it open in another program?" in err
    assert content(run_folder) == before


@pytest.mark.parametrize(("every", "updates"), [(2, 2), (99, 3)])
def test_loss_that_is_not_finite_stops_the_run_and_saves_nothing(
    every, updates, run_folder, capsys
):
    before = content(run_folder)
    err = stopped(capsys, 1, run_folder, "--learning-rate", "1e30", "--log-every", every)
    assert f"after {updates} updates KLD = nan, RecLoss = nan" in err
    assert "lower --learning-rate" in err
    assert content(run_folder) == before
