"""Runs that are stopped, killed, starved or refused lose nothing that was whole before."""

import json
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
import tensorflow.compat.v1 as tf
from conftest import ROOT, built, program, run_program

import vae_mnist

TUTORIAL = Path(__file__).parent / "tutorial_checkpoint"
DATA = "data-00000-of-00001"
SHORT = ["--iterations", "6", "--batch-size", "8", "--log-every", "2", "--checkpoint-every", "3"]


@pytest.fixture(scope="module", autouse=True)
def data_in_memory(mnist):
    """Read the real data set once, and not again in each of the many runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        load = vae_mnist.load_mnist
        patch.setattr(vae_mnist, "load_mnist", lambda path=None: load(path) if path else mnist)
        yield


def main(output, *options):
    """Run the program in this process; return its exit status."""
    try:
        return vae_mnist.main([*SHORT, "--output-dir", str(output), *map(str, options)])
    except SystemExit as stop:
        return stop.code


def refused(capsys, output, *options):
    """Run the program, which must refuse in one line and change no file; return the line."""
    before = content(output)
    capsys.readouterr()
    assert main(output, *options) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert content(output) == before
    return err


def content(folder):
    """Return the bytes of every file below a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def variables(output):
    """Return every variable of the newest checkpoint, by name, as bytes."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(output / "checkpoint")))
    names = reader.get_variable_to_shape_map()
    return {name: reader.get_tensor(name).tobytes() for name in names}


def spare(name):
    """Return the other one of the two names of checkpoints."""
    return {"vae_mnist-a": "vae_mnist-b", "vae_mnist-b": "vae_mnist-a"}[name]


def assert_same_run(output, expected):
    """Every variable, log, picture and page are the same bytes, and no stray file is left."""
    assert variables(output) == variables(expected)
    for name in ("log.csv", "latent.png", "explore.html"):
        assert (output / name).read_bytes() == (expected / name).read_bytes()
    slots = {f"vae_mnist-{slot}.{end}" for slot in "ab" for end in ("index", DATA)}
    assert {p for p in content(output) if p.name not in slots} == {
        p for p in content(expected) if p.name not in slots
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short finished run; tests copy it before they change it."""
    output = tmp_path_factory.mktemp("finished")
    assert main(output) == 0
    return output


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def die(iteration, output, monkeypatch, *options):
    """Start a run that dies in an iteration which is logged."""
    step = vae_mnist.VAE.step

    def dying(model, batch, sess):
        if sess.run(model.iteration) == iteration:
            raise MemoryError(f"in iteration {iteration}")
        return step(model, batch, sess)

    with monkeypatch.context() as patch:
        patch.setattr(vae_mnist.VAE, "step", dying)
        assert main(output, *options) == 1


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """A run of 6 iterations that died in iteration 4, so that its checkpoint is of 3."""
    die(4, tmp_path / "run", monkeypatch)
    return tmp_path / "run"


def test_log_has_every_logged_line_at_full_precision(finished, capsys):
    rows = (finished / "log.csv").read_text().splitlines()
    assert rows[0] == "iteration,kld,rec_loss"
    assert [row.split(",")[0] for row in rows[1:]] == ["0", "2", "4"]
    with built() as (model, sess):
        (x_train, _), _ = vae_mnist.load_mnist()
        losses = model.step(next(vae_mnist.random_batches(x_train, 8)), sess)
    assert [float(value) for value in rows[1].split(",")[1:]] == list(losses)


def test_resume_goes_on_exactly(unfinished, finished, capsys):
    assert json.loads((unfinished / "checkpoint" / "run.json").read_text())["iteration"] == 3
    assert main(unfinished, "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("Iteration 4:")
    assert_same_run(unfinished, finished)


@pytest.mark.slow
def test_resume_of_a_finished_run_draws_again_and_can_train_on(
    finished, run_folder, tmp_path, capsys
):
    (run_folder / "latent.png").unlink()
    (run_folder / "log.csv").write_text("half a li")
    assert main(run_folder, "--resume") == 0
    assert "Iteration" not in capsys.readouterr().out
    assert_same_run(run_folder, finished)
    assert main(run_folder, "--resume", "--iterations", "9") == 0
    assert main(tmp_path / "nine", "--iterations", "9") == 0
    assert_same_run(run_folder, tmp_path / "nine")
    assert main(run_folder, "--resume") == 0  # --iterations 6: nothing to do, nothing lost
    assert_same_run(run_folder, tmp_path / "nine")


def test_resume_goes_on_to_what_the_run_was_to_make(tmp_path, monkeypatch):
    die(4, tmp_path, monkeypatch, "--iterations", "8")
    options = ["--batch-size", "8", "--log-every", "2", "--checkpoint-every", "3", "--resume"]
    assert vae_mnist.main([*options, "--output-dir", str(tmp_path)]) == 0
    assert vae_mnist.read_run(tmp_path / "checkpoint").iteration == 8


@pytest.mark.parametrize(
    ("option", "value", "old"),
    [
        ("--seed", 5, "0"),
        ("--batch-size", 9, "8"),
        ("--learning-rate", 0.5, "0.001"),
        ("--decoder", "mirrored", "tutorial"),
        ("--shards", 3, ""),
    ],
)
def test_resume_with_another_setting_is_refused(option, value, old, run_folder, capsys):
    err = refused(capsys, run_folder, "--resume", option, value)
    assert f"{option} is {value}" in err and f"has {old}" in err


def test_resume_with_other_images_is_refused(run_folder, tmp_path, capsys):
    images, labels = np.zeros((9, 28, 28), np.uint8), np.zeros(9, np.uint8)
    data = tmp_path / "other.npz"
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    err = refused(capsys, run_folder, "--resume", "--data", data)
    assert "--data is sha256:" in err and err.count("sha256:") == 2


def test_resume_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert "no checkpoint" in refused(capsys, tmp_path, "--resume")
    assert "no checkpoint" in refused(capsys, tmp_path / "missing", "--resume")
    assert not (tmp_path / "missing").exists()


@pytest.mark.slow
def test_truncated_checkpoint_is_refused(run_folder, capsys):
    directory = run_folder / "checkpoint"
    name = vae_mnist.read_run(directory).model
    for path in [*directory.glob(f"{name}.*"), directory / "run.json"]:
        whole = path.read_bytes()
        for length in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert str(directory) in refused(capsys, run_folder, "--resume"), (path, length)
        path.unlink()
        refused(capsys, run_folder, "--resume")
        path.write_bytes(whole)
    assert main(run_folder, "--resume") == 0


def test_checkpoint_of_another_network_is_refused(run_folder, capsys):
    with tf.Graph().as_default(), tf.Session() as sess:
        tf.get_variable("dense/kernel", [3, 4])
        sess.run(tf.global_variables_initializer())
        directory = run_folder / "checkpoint"
        prefix = str(directory / vae_mnist.read_run(directory).model)
        tf.train.Saver().save(sess, prefix, write_meta_graph=False)
    err = refused(capsys, run_folder, "--resume")
    assert "another network" in err and "[784, 256]" in err and "[3, 4]" in err
    assert "--resume:" in err


def test_unfinished_run_is_not_overwritten_by_accident(unfinished, finished, capsys):
    err = refused(capsys, unfinished)
    assert "3 of 6 iterations" in err and "--resume" in err and "--overwrite" in err
    err = refused(capsys, unfinished, "--resume", "--iterations", "2")
    assert "3 of 6" in err and "--iterations 2" in err
    assert main(unfinished, "--overwrite", "--seed", "1") == 0
    assert variables(unfinished) != variables(finished)
    assert json.loads((unfinished / "checkpoint" / "run.json").read_text())["iteration"] == 6


@pytest.mark.slow
def test_damaged_record_is_only_replaced_on_request(run_folder, finished, capsys):
    (run_folder / "checkpoint" / "run.json").write_text("[]")
    (run_folder / "metrics.json").write_text("of the damaged run")
    assert "--overwrite" in refused(capsys, run_folder)
    assert main(run_folder, "--overwrite") == 0
    assert "finished" not in capsys.readouterr().out  # which nobody can know
    assert not (run_folder / "metrics.json").exists()
    assert_same_run(run_folder, finished)


@pytest.mark.slow
def test_finished_run_is_replaced_and_says_so(run_folder, capsys):
    assert main(run_folder, "--seed", "1") == 0
    assert f"Replacing the finished run in {run_folder}" in capsys.readouterr().out
    assert main(run_folder, "--seed", "1", "--resume") == 0


def test_files_of_a_finished_run_stay_until_the_new_ones_are_complete(
    run_folder, monkeypatch, capsys
):
    (run_folder / "metrics.json").write_text("of the finished run")
    before, trained = content(run_folder), variables(run_folder)

    def failing(*arguments, **how):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # after the new variables are complete
        patch.setattr(vae_mnist.os, "replace", failing)  # but before run.json names them
        assert main(run_folder, "--seed", "1") == 1
    assert "run.json" in capsys.readouterr().err
    after, name = content(run_folder), vae_mnist.read_run(run_folder / "checkpoint").model
    kept = [path for path in before if path.stem != spare(name)]
    assert len(kept) >= 6
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert variables(run_folder) == trained
    assert main(run_folder, "--resume") == 0


@pytest.mark.slow
def test_pictures_and_figures_go_with_the_checkpoint_that_they_show(run_folder, monkeypatch):
    drawn = [run_folder / name for name in vae_mnist.RESULTS]
    for path in drawn:
        path.write_text("of the finished run")
    assert main(run_folder, "--resume") == 0  # as it is: picture and page are drawn again
    of_finished = [path.read_bytes() == b"of the finished run" for path in drawn]
    assert of_finished == [False, False, True, True]
    die(2, run_folder, monkeypatch, "--seed", "1")  # before the new run's first checkpoint
    assert all(path.exists() for path in drawn)
    die(4, run_folder, monkeypatch, "--seed", "1")  # after it
    assert not any(path.exists() for path in drawn)


@pytest.mark.slow
def test_figures_of_a_run_that_replaced_another_stay_when_it_is_drawn_again(run_folder):
    options = ["--seed", "1", "--checkpoint-every", "6"]  # its first checkpoint is its last
    assert main(run_folder, *options) == 0
    (run_folder / "metrics.json").write_text("of the new run")
    assert main(run_folder, *options, "--resume") == 0
    assert (run_folder / "metrics.json").read_text() == "of the new run"


@pytest.mark.slow
def test_signal_during_the_last_save_is_obeyed(tmp_path, finished, monkeypatch, capsys):
    save = vae_mnist.Run.save

    def interrupted(run, model, sess):
        if run.iteration == 6:
            signal.raise_signal(signal.SIGTERM)
        save(run, model, sess)

    with monkeypatch.context() as patch:
        patch.setattr(vae_mnist.Run, "save", interrupted)
        assert main(tmp_path / "run") == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM after 6 of 6 iterations" in capsys.readouterr().err
    assert not (tmp_path / "run" / "latent.png").exists()
    assert main(tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_pictures_go_when_a_finished_run_trains_on(run_folder, monkeypatch):
    (run_folder / "metrics.json").write_text("of 6 iterations")
    die(10, run_folder, monkeypatch, "--resume", "--iterations", "12")
    assert vae_mnist.read_run(run_folder / "checkpoint").iteration == 9
    assert not (run_folder / "metrics.json").exists() and not (run_folder / "latent.png").exists()


@pytest.mark.slow
def test_other_programs_files_stay(tmp_path, monkeypatch):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    theirs = [
        directory / name for name in ("model-7.index", f"model-7.{DATA}", "vae_mnist-c.index")
    ]
    theirs += [tmp_path / "metrics.json", tmp_path / "codes.png"]
    for path in theirs:
        path.write_text("mine")
    die(4, tmp_path, monkeypatch)
    assert main(tmp_path, "--resume") == 0 and main(tmp_path, "--seed", "1", "--resume") == 2
    assert all(path.read_text() == "mine" for path in theirs)


def test_run_of_an_older_version_goes_on(unfinished, finished):
    """Its files were called model-3, it recorded no shards, and its Saver wrote the state."""
    directory = unfinished / "checkpoint"
    record = json.loads((directory / "run.json").read_text())
    for end in ("index", DATA):
        (directory / f"{record['model']}.{end}").rename(directory / f"model-3.{end}")
    del record["stale"], record["settings"]["shards"]
    (directory / "run.json").write_text(json.dumps({**record, "model": "model-3"}))
    state = 'model_checkpoint_path: "model-3"\nall_model_checkpoint_paths: "model-3"\n'
    (directory / "checkpoint").write_text(state)
    assert main(unfinished, "--resume") == 0
    assert variables(unfinished) == variables(finished)
    assert (unfinished / "log.csv").read_bytes() == (finished / "log.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log.csv", "latent.png", "explore.html", "checkpoint/run.json"])
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
    step = vae_mnist.VAE.step

    def vanishing(model, batch, sess):
        shutil.rmtree(tmp_path / "run")
        monkeypatch.setattr(vae_mnist.VAE, "step", step)
        return step(model, batch, sess)

    monkeypatch.setattr(vae_mnist.VAE, "step", vanishing)
    assert main(tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "run") in err and "No such file" in err


def test_restored_model_decodes_and_encodes_as_the_trained_one(finished, mnist):
    x = vae_mnist.scale(mnist[0][0][:5])
    with tf.Graph().as_default():
        model = vae_mnist.VAE()
        with vae_mnist.session() as sess:
            model.restore(finished / "checkpoint", sess)
            saved = variables(finished)
            for variable in tf.global_variables():
                assert sess.run(variable).tobytes() == saved[variable.op.name]
            assert sess.run(model.iteration) == 6
            assert model.decode(model.encode(x, sess)[0], sess).shape == (5, 28, 28)


def test_checkpoint_of_the_tutorials_own_program_gives_the_same_results(mnist):
    """Written by the tutorial's code under TensorFlow 1.13.1, with what it computed there."""
    expected = np.load(TUTORIAL / "expected.npz")
    x = vae_mnist.scale(mnist[0][0][:64])
    with tf.Graph().as_default():
        model = vae_mnist.VAE()
        with vae_mnist.session() as sess:
            model.restore(TUTORIAL, sess)
            mu, log_sig_sq = model.encode(x, sess)
            kld = sess.run(model.kld, {model.x: x})
            feed = {model.x: x, model.z: expected["z"]}
            rec, rec_loss = sess.run([model.rec, model.rec_loss], feed)
            assert sess.run(model.iteration) == 0
    np.testing.assert_allclose(mu, expected["mu"], rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(log_sig_sq, expected["log_sig_sq"], rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(kld, expected["kld"], rtol=1e-5)
    np.testing.assert_allclose(rec[:8], expected["rec"], atol=5e-6)
    np.testing.assert_allclose(rec_loss, expected["rec_loss"], rtol=1e-5)


def test_checkpoint_of_the_other_decoder_is_refused_by_name(finished, run_folder):
    with built(decoder="mirrored") as (model, sess):
        with pytest.raises(ValueError, match="has the tutorial decoder, not the mirrored one"):
            model.restore(finished / "checkpoint", sess)
        with pytest.raises(ValueError, match="of another network: dense_4/kernel must be"):
            model.restore(TUTORIAL, sess)
    # A run from before there was a choice has the tutorial's decoder, and can be resumed.
    record = run_folder / "checkpoint" / "run.json"
    run = json.loads(record.read_text())
    del run["settings"]["decoder"]
    record.write_text(json.dumps(run))
    assert main(run_folder, "--resume") == 0


@pytest.mark.slow
def test_mirrored_run_resumes_with_its_decoder_alone(tmp_path, capsys):
    assert main(tmp_path, "--decoder", "mirrored") == 0
    assert "--decoder is tutorial" in refused(capsys, tmp_path, "--resume")
    assert main(tmp_path, "--decoder", "mirrored", "--resume", "--iterations", "8") == 0
    assert np.frombuffer(variables(tmp_path)["dense_7/kernel"], np.float32).size == 256 * 784


def test_restore_refuses_a_directory_without_a_checkpoint(tmp_path):
    with built() as (model, sess), pytest.raises(ValueError, match="found none"):
        model.restore(tmp_path, sess)


# ------------------------------------------------------------------- real processes, really killed

LONG = ["--iterations", 250, "--batch-size", 16, "--log-every", 7, "--checkpoint-every", 1]


def kill_while(moment, output, *options):
    """Run the program in a process that kills itself at a moment; return its exit status."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import matplotlib.figure, vae_mnist
count = 0
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def half(self, path, **_): path.write_bytes(b"half"); kill()
def second(*names):
    global count
    count += 1
    kill() if count == 2 else replace(*names)
replace = os.replace
{moment}
sys.exit(vae_mnist.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, *map(str, options), "--output-dir", str(output)]
    return subprocess.run(command, capture_output=True, check=False, timeout=120).returncode


@pytest.mark.slow
def test_run_killed_again_and_again_ends_as_the_one_that_was_never_stopped(tmp_path):
    assert main(tmp_path / "whole", *LONG) == 0
    output, record = tmp_path / "killed", tmp_path / "killed" / "checkpoint" / "run.json"
    rng = random.Random(0)
    kills, resume = 0, []
    for _ in range(3):  # while training, and mostly while saving, which takes longer here
        with subprocess.Popen(
            program(*LONG, "--output-dir", output, *resume),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            process.stdout.readline()  # it trains
            while not record.exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        resume = ["--resume"]
    assert kills == 3
    assert kill_while("os.replace = second", output, *LONG, "--resume") == -signal.SIGKILL
    moment = "matplotlib.figure.Figure.savefig = half"
    assert kill_while(moment, output, *LONG, "--resume") == -signal.SIGKILL
    assert not (output / "latent.png").exists()
    assert main(output, *LONG, "--resume") == 0
    assert_same_run(output, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_after_the_iteration_and_saves(number, tmp_path):
    with training(tmp_path) as process:
        time.sleep(0.2)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    run = json.loads((tmp_path / "checkpoint" / "run.json").read_text())
    line = err.strip().splitlines()[-1]
    assert number.name in line and "--resume" in line and "Traceback" not in err
    assert f"after {run['iteration']} of 100000 iterations" in line
    assert np.frombuffer(variables(tmp_path)["global_step"], np.int64) == run["iteration"] > 0


@pytest.mark.slow
def test_second_signal_stops_at_once(tmp_path):
    """The first one's checkpoint is held up here, so that the second one comes before its end."""
    moment = """
import time, tensorflow.compat.v1 as tf
save, saves = tf.train.Saver.save, []
def slow(*arguments, **how):
    result = save(*arguments, **how)
    saves.append(result)
    if len(saves) == 2: os.kill(os.getpid(), 2); os.kill(os.getpid(), 2); time.sleep(60)
    return result
tf.train.Saver.save = slow
"""
    options = ["--iterations", 40, "--checkpoint-every", 10, "--log-every", 40]
    start = time.monotonic()
    assert kill_while(moment, tmp_path, *options) == -signal.SIGINT
    assert time.monotonic() - start < 50
    assert vae_mnist.read_run(tmp_path / "checkpoint").iteration == 10
    assert main(tmp_path, *options, "--batch-size", 256, "--resume") == 0


@pytest.mark.slow
def test_signal_while_restoring_ends_the_program_and_changes_nothing(unfinished, finished):
    before = content(unfinished)
    moment = "vae_mnist.VAE.restore = lambda *_: os.kill(os.getpid(), signal.SIGTERM)"
    assert kill_while(moment, unfinished, *SHORT, "--resume") == -signal.SIGTERM
    assert content(unfinished) == before
    assert main(unfinished, "--resume") == 0
    assert_same_run(unfinished, finished)


@pytest.mark.slow
def test_kill_before_older_pictures_are_gone_is_mended_by_resuming(run_folder, tmp_path):
    """Killed in the new run's last save: nothing is left to train, but much to bring into line."""
    (run_folder / "metrics.json").write_text("of the finished run")
    options = [*SHORT, "--seed", "1", "--checkpoint-every", "6"]
    moment = """
from pathlib import Path
unlink = Path.unlink
Path.unlink = lambda self, **how: kill() if self.name == "latent.png" else unlink(self, **how)
"""
    assert kill_while(moment, run_folder, *options) == -signal.SIGKILL
    assert vae_mnist.read_run(run_folder / "checkpoint").settings["seed"] == 1
    assert (run_folder / "metrics.json").exists()
    assert main(run_folder, "--seed", "1", "--resume") == 0
    assert not (run_folder / "metrics.json").exists()
    assert main(tmp_path / "whole", "--seed", "1", "--checkpoint-every", "6") == 0
    assert_same_run(run_folder, tmp_path / "whole")


@pytest.mark.slow
def test_kill_before_tensorflows_own_file_is_written_is_mended_by_resuming(run_folder, finished):
    """Or `tf.train.latest_checkpoint` would go on to name what the run had been before."""
    moment = """
write_file = vae_mnist.write_file
vae_mnist.write_file = lambda path, x: kill() if path.name == "checkpoint" else write_file(path, x)
"""
    assert kill_while(moment, run_folder, *SHORT, "--seed", "1") == -signal.SIGKILL
    assert main(run_folder, "--seed", "1", "--resume") == 0
    directory = run_folder / "checkpoint"
    newest = tf.train.latest_checkpoint(directory)
    assert newest == str(directory / vae_mnist.read_run(directory).model)
    assert variables(run_folder) != variables(finished)


@pytest.mark.slow
def test_run_resumed_on_one_core_ends_with_the_same_bytes(tmp_path):
    """The number of shards belongs to the run; what suits the machine is for new ones."""
    options = ["--iterations", 30, "--log-every", 10, "--checkpoint-every", 10, "--shards", 2]
    assert main(tmp_path / "whole", *options) == 0
    assert main(tmp_path / "cut", *options, "--iterations", 10) == 0
    options = ["--iterations", "30", *SHORT[2:4], "--log-every", "10", "--checkpoint-every", "10"]
    core = {min(os.sched_getaffinity(0))}
    resumed = run_program(
        *(*options, "--resume", "--output-dir", tmp_path / "cut"),
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert main(tmp_path / "other", *options, "--shards", 1) == 0
    assert variables(tmp_path / "other") != variables(tmp_path / "whole")  # so shards do matter


@contextmanager
def training(output, *options):
    """Yield a process that has begun to train for a long time; kill it in the end."""
    options = ["--iterations", 100_000, "--checkpoint-every", 100_000, *options]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program(*options, "--output-dir", output), **how) as process:
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_second_run_in_a_directory_is_refused_while_the_first_lives(tmp_path, capsys):
    with training(tmp_path) as first:
        for other in ([], ["--resume"], ["--overwrite"], ["--seed", "1", "--report"]):
            err = refused(capsys, tmp_path, *other)
            assert f"{tmp_path}: another run is at work there" in err
        first.send_signal(signal.SIGTERM)
        assert "--resume" in first.communicate(timeout=60)[1]
    assert first.returncode == 128 + signal.SIGTERM
    run = vae_mnist.read_run(tmp_path / "checkpoint")
    with training(tmp_path, "--resume", "--log-every", 1):
        assert "another run" in refused(capsys, tmp_path, "--resume")
    # It was killed, which leaves no lock behind.
    assert main(tmp_path, "--batch-size", 256, "--resume", "--iterations", run.iteration) == 0


def test_platform_without_locks_does_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails, as on Windows
    assert main(tmp_path) == 0


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
    after, name = content(output), vae_mnist.read_run(output / "checkpoint").model
    kept = [path for path in before if path.stem != spare(name)]
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert variables(output) == variables(finished)
    assert main(output, "--resume", "--iterations", 20) == 0
