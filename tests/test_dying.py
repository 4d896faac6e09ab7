"""Runs that are killed, stopped or starved lose nothing that was whole before."""

import fcntl
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import runs
from runs import Forked, assert_same_run, content, made, main, refused, stopped, training

LONG = ["--iterations", 150, "--batch-size", 16, "--log-every", 7, "--checkpoint-every", 1]


# --------------------------------------------------------------------------------------- killed
@pytest.mark.slow
def test_run_killed_again_and_again_ends_as_the_one_that_was_never_stopped(tmp_path):
    """By the same command each time, which begins the run as well."""
    assert main(tmp_path / "whole", *LONG) == 0
    output = tmp_path / "killed"
    rng = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
        with training(output, *LONG, "--resume") as process:
            while not (output / "checkpoints" / "run.json").exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.3))  # mostly while saving, which takes longer here
            os.kill(process.pid, number)
            assert process.end() == (-number, "")  # as the system has it
    assert not (output / "latent.png").exists() and made(output) < 150
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
    ("name", "count"),
    [
        ("pathlib.Path.unlink", 2),  # run.json of the older run is gone, its checkpoint is there
        ("os.replace", 1),  # the new run.json is to come
        ("pathlib.Path.unlink", 5),  # half of the older checkpoint is gone
        ("os.replace", 3),  # the first checkpoint is written, but not named
        ("vae_mnist.Run.remove_other_checkpoints", 3),  # the second one is named
        ("os.replace", 5),  # the picture is drawn
    ],
)
def test_run_killed_while_it_replaces_a_finished_one(name, count, run_folder, finished, other_seed):
    (run_folder / "metrics.json").write_text("of the older run")
    new = Forked(run_folder, "--seed", 1, signals=(name, count, signal.SIGKILL))
    assert new.end()[0] == -signal.SIGKILL
    assert new.out.read_text().startswith(f"Replacing the finished run in {run_folder}\n")
    assert main(run_folder, "--seed", 1, "--resume") == 0
    assert_same_run(run_folder, other_seed)


@pytest.mark.slow
def test_torn_last_line_of_the_log_is_dropped_and_made_again(unfinished, finished):
    """The checkpoint is of 3 updates: iteration 4 comes later, "2" may be a torn "20"."""
    log = unfinished / "log.csv"
    header, *lines = log.read_text().splitlines(keepends=True)
    assert [line.split(",")[0] for line in lines] == ["0", "2", "4"]
    log.write_text(header + "".join(lines) + "2")
    assert main(unfinished, "--resume") == 0
    assert_same_run(unfinished, finished)


def test_files_are_on_the_disk_before_checkpoint_names_them(tmp_path, monkeypatch):
    """A power cut takes back what was written, but not what was synced after it."""
    synced = {}
    named = []
    fsync = os.fsync
    replace = os.replace
    unlink = Path.unlink

    def syncing(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path] = path.read_bytes()
        fsync(descriptor)

    def replacing(old, new):
        files = [Path(old)]
        if Path(new).name == "checkpoint":
            name = files[0].read_text().split('"')[1]
            named.append(name)
            files += [tmp_path / "log.csv", *(tmp_path / "checkpoints").glob(f"{name}.*")]
            assert len(files) == 4  # index and data
        for path in files:
            assert synced.get(path) == path.read_bytes(), path
        replace(old, new)

    def removing(path, **how):
        if path.name.startswith("vae_mnist"):
            assert not path.name.startswith(named[-1])
        unlink(path, **how)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(Path, "unlink", removing)
    assert main(tmp_path) == 0
    assert named == ["vae_mnist-3", "vae_mnist-6"]
    names = {path.name.split(".")[0] for path in (tmp_path / "checkpoints").glob("vae*")}
    assert names == {"vae_mnist-6"}


# -------------------------------------------------------------------------------------- stopped
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "updates"),
    [
        ("vae_mnist.VAE.step", 2, 0),
        ("vae_mnist.Run.save", 2, 3),
        ("matplotlib.figure.Figure.savefig", 1, 6),  # the picture is being drawn
        ("vae_mnist.evaluate", 1, 6),  # for the page
    ],
)
def test_interrupt_is_one_line_that_says_how_to_go_on(name, count, updates, tmp_path, finished):
    output = tmp_path / "run"
    interrupted = Forked(output, "--overwrite", signals=(name, count, signal.SIGINT))
    status, err = interrupted.end()
    words = " ".join(interrupted.options[:-1])  # in place of --overwrite
    assert (status, err) == (130, f"Stopped; to go on: python vae_mnist.py {words} --resume\n")
    assert made(output) == updates
    assert main(output, "--resume") == 0
    assert_same_run(output, finished)


@pytest.mark.slow
def test_interrupt_before_anything_changed_does_not_lead_into_the_older_run(unfinished):
    before = content(unfinished)
    signals = ("vae_mnist.VAE.__init__", 1, signal.SIGINT)
    status, err = Forked(unfinished, "--overwrite", "--seed", 1, signals=signals).end()
    assert (status, err) == (130, "Stopped; nothing has changed\n")
    assert content(unfinished) == before


@pytest.mark.slow
def test_interrupt_of_a_process_as_a_user_starts_it(tmp_path):
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background, too
    with runs.started("--report", "--output-dir", tmp_path, preexec_fn=heard) as process:
        while not process.stdout.readline().startswith("On 200 test images"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        (line,) = runs.own_lines(process.stderr.read())
    assert process.returncode == 130 and line.endswith("--resume")
    names = ["checkpoints", "explore.html", "latent.png", "log.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.slow
def test_second_run_in_a_directory_is_refused_while_the_first_lives(tmp_path, capsys):
    output = tmp_path / "run"
    with training(output, "--log-every", 100_000):
        for other in ([], ["--resume"], ["--overwrite"]):
            err = refused(capsys, output, *other)
            assert f"{output}: another run is at work there" in err
        with open(output / "checkpoints" / "lock", "a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a file, which NFS locks for all
    # It was killed, which leaves no lock behind.
    assert main(output) == 0


# -------------------------------------------------------------------------------------- starved
@pytest.mark.slow
def test_full_disk_is_one_line_and_leaves_the_checkpoint_whole(run_folder, finished):
    """What a save adds is more than the largest file that is allowed here."""
    bound = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (500_000, 500_000))
    status, err = Forked(run_folder, "--resume", "--iterations", 20, first=[bound]).end()
    assert status == 1 and err.count("\n") == 1
    assert str(run_folder / "checkpoints") in err and "File too large" in err
    assert main(run_folder, "--resume", "--iterations", 6) == 0
    assert_same_run(run_folder, finished)


@pytest.mark.slow
def test_directory_that_is_removed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs.vae_mnist.Run, "check", lambda *_: shutil.rmtree(tmp_path / "run"))
    assert str(tmp_path / "run" / "log.csv") in stopped(capsys, 1, tmp_path / "run")


@pytest.mark.slow
def test_disk_that_fills_leaves_the_older_file(run_folder, capsys):
    """The file that is written first, under another name, leads to a device that is full."""
    (run_folder / "metrics.json").write_text("older")
    before = content(run_folder)
    for name in ("latent.png", "explore.html", "metrics.json"):
        temporary = run_folder / f"tmp-{name}"
        temporary.symlink_to("/dev/full")
        err = stopped(capsys, 1, run_folder, "--resume", "--report")
        assert "No space left on device" in err
        assert content(run_folder) == before and not temporary.is_symlink()


@pytest.mark.slow
@pytest.mark.parametrize(("every", "updates"), [(1, 7), (99, 9)])
def test_loss_that_is_not_finite_is_never_saved_and_a_lower_rate_goes_on(
    every, updates, run_folder, tmp_path, capsys
):
    """It is seen where a line is logged as well as where a checkpoint is saved."""
    options = ["--resume", "--iterations", 12]
    high = [*options, "--learning-rate", "1e30", "--log-every", every]
    err = stopped(capsys, 1, run_folder, *high)
    assert f"after {updates} updates KLD = nan, RecLoss = nan" in err
    assert "--resume and a lower --learning-rate" in err
    assert made(run_folder) == 6
    assert main(run_folder, *options, "--learning-rate", 0.001) == 0
    assert main(tmp_path / "whole", "--iterations", 12) == 0
    assert_same_run(run_folder, tmp_path / "whole")
