"""Checkpoints: what resuming, replacing and restoring do with them, and what they refuse."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import built
from runs import DATA, X_TRAIN, Forked, assert_same_run, main, record, refused, variables

import vae_mnist

TUTORIAL = Path(__file__).parent / "tutorial_checkpoint"


def test_log_has_the_losses_of_the_seeds_batches_at_full_precision(tmp_path):
    assert main(tmp_path, "--seed", 1, "--iterations", 3) == 0
    rows = np.loadtxt(tmp_path / "log.csv", delimiter=",", skiprows=1)
    with built(seed=1) as (model, sess):
        batches = vae_mnist.random_batches(X_TRAIN, 8, seed=1)
        losses = [model.step(batch, sess) for _, batch in zip(range(3), batches)]
    assert rows.tolist() == [[0, *losses[0]], [2, *losses[2]]]
    assert (tmp_path / "log.csv").read_text().startswith("iteration,kld,rec_loss\n0,")


@pytest.mark.slow
def test_resume_goes_on_exactly_to_what_the_run_was_to_make(
    unfinished, finished, tmp_path, monkeypatch, capsys
):
    """On fewer cores, too: the number of shards belongs to the run."""
    assert record(unfinished)["made"] == 3 and record(unfinished)["settings"]["shards"] == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows, which has no such locks
    options = ["--batch-size", "8", "--log-every", "2", "--checkpoint-every", "3", "--resume"]
    options += ["--data", str(DATA), "--output-dir", str(unfinished)]
    assert vae_mnist.main(options) == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("Iteration 4:")
    assert_same_run(unfinished, finished)
    assert main(tmp_path / "new") == 0 and record(tmp_path / "new")["settings"]["shards"] == 1


def test_batch_is_whole_on_a_gpu_and_in_two_shards_on_two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for devices, expected in (([], 2), (["a GPU"], 1)):
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda _, found=devices: found)
        assert vae_mnist.shard_count() == expected


@pytest.mark.slow
def test_resume_of_a_finished_run_draws_again_and_can_train_on(finished, tmp_path, capsys):
    assert main(tmp_path, "--iterations", 3) == 0
    picture = (tmp_path / "latent.png").read_bytes()
    (tmp_path / "latent.png").unlink()
    capsys.readouterr()
    assert main(tmp_path, "--resume", "--iterations", 2) == 0  # fewer than were made
    assert "Iteration" not in capsys.readouterr().out
    assert (tmp_path / "latent.png").read_bytes() == picture and record(tmp_path)["made"] == 3
    assert main(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, finished)


def test_resume_with_another_setting_is_refused(run_folder, tmp_path, capsys):
    for option, value, old in [
        ("--seed", 5, "0"),
        ("--batch-size", 9, "8"),
        ("--learning-rate", 0.5, "0.001"),
        ("--decoder", "mirrored", "tutorial"),
        ("--shards", 3, record(run_folder)["settings"]["shards"]),
    ]:
        err = refused(capsys, run_folder, "--resume", option, value)
        assert f"has {option} {old}, not {value}" in err
    images = X_TRAIN.copy()
    images[-1, 14, 14] ^= 1
    other = tmp_path / "other.npz"
    np.savez(other, x_train=images, x_test=images)
    err = refused(capsys, run_folder, "--resume", "--data", other)
    assert f"learns from {DATA}, and {other} has other images; give its file with --data" in err


def test_directory_without_a_checkpoint_is_refused(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "missing"):
        assert "no checkpoint" in refused(capsys, path, "--resume")
        with pytest.raises(ValueError, match="found none"), vae_mnist.trained(path):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_truncated_checkpoint_is_refused_and_only_replaced_on_request(run_folder, finished, capsys):
    directory = run_folder / "checkpoint"
    name = record(run_folder)["checkpoint_name"]
    for path in [*directory.glob(f"{name}.*"), directory / "run.json"]:
        whole = path.read_bytes()
        path.unlink()
        refused(capsys, run_folder, "--resume")
        path.write_bytes(whole[:-1])
        err = refused(capsys, run_folder, "--resume")
        assert str(directory) in err and ("--resume:" in err or "--overwrite" in err)
        if path.name != "run.json":
            path.write_bytes(whole)
    assert "--overwrite" in refused(capsys, run_folder)
    assert main(run_folder, "--overwrite") == 0
    assert "finished" not in capsys.readouterr().out  # which nobody can know
    assert_same_run(run_folder, finished)


@pytest.mark.slow
def test_unfinished_run_is_not_overwritten_by_accident(unfinished, capsys):
    err = refused(capsys, unfinished)
    assert "3 of 6 iterations" in err and "--resume" in err and "--overwrite" in err
    assert main(unfinished, "--overwrite", "--seed", 1) == 0
    assert record(unfinished)["made"] == 6 and record(unfinished)["settings"]["seed"] == 1


@pytest.mark.slow
def test_pictures_and_figures_go_with_the_checkpoint_that_they_show(run_folder):
    """And other programs' files stay."""
    names = ["latent.png", "explore.html", "metrics.json", "report.png"]
    shown = [run_folder / name for name in names]
    names = ["codes.png", "checkpoint/model-7.index", "checkpoint/vae_mnist-c.index"]
    theirs = [run_folder / name for name in names]
    for path in [*shown, *theirs]:
        path.write_text("of the finished run")
    assert main(run_folder, "--resume") == 0  # as it is: picture and page are drawn again
    of_finished = [path.read_bytes() == b"of the finished run" for path in shown]
    assert of_finished == [False, False, True, True]
    new = Forked(run_folder, "--seed", 1, signals=("vae_mnist.Run.save", 1, signal.SIGKILL))
    new.end()  # before its first checkpoint
    assert new.out.read_text().startswith(f"Replacing the finished run in {run_folder}\n")
    assert all(path.exists() for path in shown)
    (run_folder / "log.csv").unlink()  # which does not stop the run
    kill = ("vae_mnist.Run.save", 2, signal.SIGKILL)
    Forked(run_folder, "--resume", "--iterations", 12, signals=kill).end()  # trained on
    assert record(run_folder)["made"] == 9
    rows = (run_folder / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["iteration", "4", "6", "8"]
    assert not any(path.exists() for path in shown)
    assert all(path.read_text() == "of the finished run" for path in theirs)


def test_model_is_restored_from_a_run_a_directory_or_a_name(finished):
    saved = variables(finished)
    directory = finished / "checkpoint"
    for path in (finished, str(directory)):
        with vae_mnist.trained(path) as (model, sess):
            values = sess.run(model.variables)
        assert {name: value.tobytes() for name, value in values.items()} == saved
    with built(seed=1) as (model, sess):
        vae_mnist.restore(model, sess, tf.train.latest_checkpoint(directory))
        assert sess.run(model.weights[0]).tobytes() == saved["dense/kernel"]


@pytest.mark.slow
def test_trained_model_has_the_settings_of_its_run(tmp_path):
    options = ["--decoder", "mirrored", "--seed", 3, "--shards", 1, "--learning-rate", 0.01]
    assert main(tmp_path, *options) == 0
    with vae_mnist.trained(tmp_path) as (model, sess):
        assert model.decoder == "mirrored" and model.shards == 1
        before = sess.run(model.weights[0])
        model.step(np.ones((5, 784), np.float32), sess)
        assert 0.004 < np.abs(sess.run(model.weights[0]) - before).max() < 0.03  # the rate's size


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
        expected = r"another network: dense_4/kernel is \[2, 256\], not \[2, 64\]"
        with pytest.raises(ValueError, match=expected):
            vae_mnist.restore(model, sess, TUTORIAL)
        for old, new in zip(before, sess.run(model.weights)):
            assert np.array_equal(old, new)
