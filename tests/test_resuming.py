"""Checkpoints: what resuming, replacing and restoring do with them, and what they refuse."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import built, run_program
from runs import SHORT, assert_same_run, content, main, record, refused, variables

import vae_mnist

pytestmark = pytest.mark.usefixtures("data_in_memory")
TUTORIAL = Path(__file__).parent / "tutorial_checkpoint"


# ------------------------------------------------------------------------------------ resuming
def test_log_has_every_logged_line_at_full_precision(finished):
    rows = (finished / "log.csv").read_text().splitlines()
    assert rows[0] == "iteration,kld,rec_loss"
    assert [row.split(",")[0] for row in rows[1:]] == ["0", "2", "4"]
    with built() as (model, sess):
        (x_train, _), _ = vae_mnist.load_mnist()
        losses = model.step(next(vae_mnist.random_batches(x_train, 8)), sess)
    assert [float(value) for value in rows[1].split(",")[1:]] == list(losses)


def test_log_is_kept_once_and_only_its_new_lines_are_written(tmp_path, monkeypatch):
    """The record has the lines of the newest checkpoint alone, however long the log is."""
    sizes = []
    write = vae_mnist.Run.write

    def measured(run):
        write(run)
        sizes.append((run.directory / "checkpoint" / "run.json").stat().st_size)

    monkeypatch.setattr(vae_mnist.Run, "write", measured)
    options = ["--iterations", 60, "--log-every", 1, "--checkpoint-every", 5]
    assert main(tmp_path, *options) == 0
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 61
    assert len(sizes) == 12 and max(sizes) < min(sizes) + 100


def test_resume_goes_on_exactly(unfinished, finished, capsys):
    assert record(unfinished)["made"] == 3
    assert main(unfinished, "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("Iteration 4:")
    assert_same_run(unfinished, finished)


@pytest.mark.slow
def test_resume_of_a_finished_run_draws_again_and_can_train_on(
    finished, run_folder, tmp_path, capsys
):
    (run_folder / "latent.png").unlink()
    assert main(run_folder, "--resume") == 0
    assert "Iteration" not in capsys.readouterr().out
    assert_same_run(run_folder, finished)
    assert main(run_folder, "--resume", "--iterations", "9") == 0
    assert main(tmp_path / "nine", "--iterations", "9") == 0
    assert_same_run(run_folder, tmp_path / "nine")
    assert main(run_folder, "--resume") == 0  # --iterations 6: nothing to do, nothing lost
    assert_same_run(run_folder, tmp_path / "nine")


def test_resume_goes_on_to_what_the_run_was_to_make(tmp_path, fail_in_iteration):
    fail_in_iteration(4, tmp_path, "--iterations", "8")
    options = ["--batch-size", "8", "--log-every", "2", "--checkpoint-every", "3", "--resume"]
    assert vae_mnist.main([*options, "--output-dir", str(tmp_path)]) == 0
    assert record(tmp_path)["made"] == 8


@pytest.mark.slow
def test_log_that_somebody_cut_or_removed_does_not_stop_the_run(unfinished, finished):
    log = unfinished / "log.csv"
    whole = (finished / "log.csv").read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:2]))
    assert main(unfinished, "--resume") == 0
    assert variables(unfinished) == variables(finished)
    log.unlink()
    assert main(unfinished, "--resume", "--iterations", "9", "--report") == 0
    assert log.read_text().startswith(whole[0]) and "\0" not in log.read_text()
    assert log.read_text().splitlines()[-1].startswith("8,")


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


def test_resume_says_which_data_set_is_missing(run_folder, tmp_path, capsys):
    images, labels = np.full((9, 28, 28), 99, np.uint8), np.zeros(9, np.uint8)
    data = tmp_path / "other.npz"
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    err = refused(capsys, run_folder, "--resume", "--data", data)
    assert f"learns from data/mnist.npz, and {data} has other images" in err
    assert main(tmp_path / "other", "--data", data) == 0
    err = refused(capsys, tmp_path / "other", "--resume")
    assert f"learns from {data}, and data/mnist.npz has other images" in err
    assert "give its file with --data" in err and "sha256" not in err
    assert main(tmp_path / "other", "--resume", "--data", data) == 0


def test_resume_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert "no checkpoint" in refused(capsys, tmp_path, "--resume")
    assert "no checkpoint" in refused(capsys, tmp_path / "missing", "--resume")
    assert not (tmp_path / "missing").exists()


@pytest.mark.slow
def test_truncated_checkpoint_is_refused(run_folder, capsys):
    directory = run_folder / "checkpoint"
    name = record(run_folder)["checkpoint_name"]
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
        prefix = str(run_folder / "checkpoint" / record(run_folder)["checkpoint_name"])
        tf.train.Saver().save(sess, prefix, write_meta_graph=False)
    err = refused(capsys, run_folder, "--resume")
    assert "another network" in err and "[784, 256]" in err and "[3, 4]" in err
    assert "--resume:" in err


def test_unfinished_run_is_not_overwritten_by_accident(unfinished, finished, capsys):
    err = refused(capsys, unfinished)
    assert "3 of 6 iterations" in err and "--resume" in err and "--overwrite" in err
    assert main(unfinished, "--overwrite", "--seed", "1") == 0
    assert variables(unfinished) != variables(finished)
    assert record(unfinished)["made"] == 6


def test_fewer_iterations_than_were_made_draw_what_is_there(unfinished):
    assert main(unfinished, "--resume", "--iterations", "2") == 0
    assert record(unfinished)["made"] == 3 and (unfinished / "latent.png").exists()


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
def test_finished_run_is_replaced_and_says_so(run_folder, tmp_path, capsys):
    assert main(run_folder, "--seed", "1") == 0
    assert f"Replacing the finished run in {run_folder}" in capsys.readouterr().out
    assert main(run_folder, "--seed", "1", "--resume") == 0
    assert main(tmp_path / "new", "--seed", "1") == 0
    assert_same_run(run_folder, tmp_path / "new")


@pytest.mark.slow
def test_pictures_and_figures_go_with_the_checkpoint_that_they_show(run_folder, fail_in_iteration):
    shown = [run_folder / name for name in vae_mnist.RESULTS]
    for path in shown:
        path.write_text("of the finished run")
    assert main(run_folder, "--resume") == 0  # as it is: picture and page are drawn again
    of_finished = [path.read_bytes() == b"of the finished run" for path in shown]
    assert of_finished == [False, False, True, True]
    fail_in_iteration(2, run_folder, "--seed", "1")  # before the new run's first checkpoint
    assert all(path.exists() for path in shown)
    fail_in_iteration(4, run_folder, "--seed", "1")  # after it
    assert not any(path.exists() for path in shown)


@pytest.mark.slow
def test_pictures_go_when_a_finished_run_trains_on(run_folder, fail_in_iteration):
    (run_folder / "metrics.json").write_text("of 6 iterations")
    fail_in_iteration(10, run_folder, "--resume", "--iterations", "12")
    assert record(run_folder)["made"] == 9
    assert not (run_folder / "metrics.json").exists() and not (run_folder / "latent.png").exists()


@pytest.mark.slow
def test_other_programs_files_stay(tmp_path, fail_in_iteration):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    theirs = [directory / "model-7.index", directory / "vae_mnist-c.index", tmp_path / "codes.png"]
    for path in theirs:
        path.write_text("mine")
    fail_in_iteration(4, tmp_path)
    assert main(tmp_path, "--resume") == 0 and main(tmp_path, "--seed", "1", "--resume") == 2
    assert all(path.read_text() == "mine" for path in theirs)


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


@pytest.mark.slow
def test_mirrored_run_resumes_with_its_decoder_alone(tmp_path, capsys):
    assert main(tmp_path, "--decoder", "mirrored") == 0
    assert "--decoder is tutorial" in refused(capsys, tmp_path, "--resume")
    assert main(tmp_path, "--decoder", "mirrored", "--resume", "--iterations", "8") == 0
    assert np.frombuffer(variables(tmp_path)["dense_7/kernel"], np.float32).size == 256 * 784


# ----------------------------------------------------------------------------------- restoring
def test_restored_model_decodes_and_encodes_as_the_trained_one(finished, mnist):
    x = vae_mnist.scale(mnist[0][0][:5])
    saved = variables(finished)
    with vae_mnist.trained(finished) as (model, sess):
        for name, variable in model.variables.items():
            assert sess.run(variable).tobytes() == saved[name]
        assert len(saved) == len(model.variables)
        assert sess.run(model.iteration) == 6
        assert model.decode(model.encode(x, sess)[0], sess).shape == (5, 28, 28)


@pytest.mark.parametrize("kind", ["the run's", "the checkpoint's", "a name"])
def test_restore_takes_directories_and_names(kind, finished):
    directory = finished / "checkpoint"
    path = tf.train.latest_checkpoint(directory) if kind == "a name" else directory
    saved = variables(finished)
    if kind == "the run's":  # for `trained`
        with vae_mnist.trained(str(directory)) as (model, sess):
            assert sess.run(model.weights[0]).tobytes() == saved["dense/kernel"]
        return
    with tf.Graph().as_default():
        model = vae_mnist.VAE(seed=1)
        sess = vae_mnist.session()
    with sess:  # outside of the graph's `with`
        vae_mnist.restore(model, sess, path)
        assert sess.run(model.weights[0]).tobytes() == saved["dense/kernel"]


def test_trained_model_has_the_settings_of_its_run(tmp_path):
    options = ["--decoder", "mirrored", "--seed", 3, "--shards", 1, "--learning-rate", 0.01]
    assert main(tmp_path, *options) == 0
    with vae_mnist.trained(tmp_path) as (model, sess):
        assert model.decoder == "mirrored" and model.shards == 1
        x = np.zeros((5, 784), np.float32)
        eps = sess.run(model.eps, {model.x: x})
        before = sess.run(model.weights[0])
        model.step(np.ones((5, 784), np.float32), sess)
        assert 0.004 < np.abs(sess.run(model.weights[0]) - before).max() < 0.03  # the rate's size
    with built(decoder="mirrored", seed=3) as (other, other_sess):
        vae_mnist.give_values([other.iteration], [6], other_sess)
        assert np.array_equal(eps, other_sess.run(other.eps, {other.x: x}))


def test_checkpoint_of_the_tutorials_own_program_gives_the_same_results(mnist):
    """Written by the tutorial's code under TensorFlow 1.13.1, with what it computed there."""
    expected = np.load(TUTORIAL / "expected.npz")
    x = vae_mnist.scale(mnist[0][0][:64])
    with vae_mnist.trained(TUTORIAL) as (model, sess):
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


def test_checkpoint_of_the_other_decoder_is_refused_and_changes_nothing(finished):
    with built(decoder="mirrored") as (model, sess):
        before = sess.run(model.weights)
        with pytest.raises(ValueError, match="has the tutorial decoder, not the mirrored one"):
            vae_mnist.restore(model, sess, finished / "checkpoint")
        with pytest.raises(ValueError, match="of another network: dense_4/kernel is"):
            vae_mnist.restore(model, sess, TUTORIAL)
        for old, new in zip(before, sess.run(model.weights)):
            assert np.array_equal(old, new)


def test_directory_without_a_checkpoint_is_refused(tmp_path):
    with built() as (model, sess), pytest.raises(ValueError, match="found none"):
        vae_mnist.restore(model, sess, tmp_path)
    with pytest.raises(ValueError, match="found none"), vae_mnist.trained(tmp_path):
        pass
    with pytest.raises(ValueError, match="found none"), vae_mnist.trained(tmp_path / "missing"):
        pass
    (tmp_path / "run.json").write_text(json.dumps({"made": 3}))
    with pytest.raises(ValueError, match="a damaged file"), vae_mnist.trained(tmp_path):
        pass
    assert list(content(tmp_path)) == [Path("run.json")]
