"""Checkpoints: what resuming, replacing and restoring do with them, and what they refuse."""

import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import built
from runs import (
    DATA,
    X_TRAIN,
    Forked,
    assert_same_run,
    made,
    main,
    refused,
    settings,
    stopped,
    variables,
)

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
def test_resume_alone_goes_on_exactly_to_what_the_run_was_to_make(tmp_path, monkeypatch, capsys):
    """With the run's settings and data, from another directory."""
    monkeypatch.chdir(DATA.parent)
    options = ["--decoder", "mirrored", "--seed", 3, "--shards", 1, "--data", DATA.name]
    assert main(tmp_path / "whole", *options) == 0
    kill = ("vae_mnist.Run.save", 2, signal.SIGKILL)
    assert Forked(tmp_path / "run", *options, signals=kill).end()[0] == -signal.SIGKILL
    assert made(tmp_path / "run") == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows, which has no such locks
    capsys.readouterr()
    assert vae_mnist.main(["--resume", "--log-every", "2", "--output-dir", "run"]) == 0
    assert capsys.readouterr().out.startswith("Iteration 4:")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_resume_begins_a_run_where_there_is_none(finished, tmp_path):
    assert main(tmp_path / "new", "--resume") == 0
    assert_same_run(tmp_path / "new", finished)


@pytest.mark.slow
def test_what_a_run_learns_does_not_depend_on_how_often_it_logs_and_saves(tmp_path):
    """Each makes 20 updates, some of them in `step` and some not."""
    for every in (1, 7, 100):
        options = ["--log-every", every, "--checkpoint-every", every, "--iterations", 20]
        assert main(tmp_path / str(every), *options) == 0
    for every in ("7", "100"):
        assert_same_run(tmp_path / every, tmp_path / "1", but=["log.csv"])


@pytest.mark.slow
def test_resume_of_a_finished_run_draws_again_and_can_train_on(finished, tmp_path, capsys):
    assert main(tmp_path, "--iterations", 3) == 0
    picture = (tmp_path / "latent.png").read_bytes()
    (tmp_path / "latent.png").unlink()
    (tmp_path / "metrics.json").write_text("of 3 iterations")
    capsys.readouterr()
    assert main(tmp_path, "--resume", "--iterations", 3) == 0
    assert "Iteration" not in capsys.readouterr().out
    assert (tmp_path / "latent.png").read_bytes() == picture and made(tmp_path) == 3
    assert (tmp_path / "metrics.json").exists()
    assert main(tmp_path, "--resume", "--iterations", 6) == 0
    assert_same_run(tmp_path, finished)  # and figures of 3 iterations are gone
    assert settings(tmp_path) == settings(finished)


@pytest.mark.slow
def test_resume_with_another_learning_rate_holds_from_there_on(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    options = ["--resume", "--iterations", 9, "--learning-rate", 0.01, "--checkpoint-every", 100]
    assert main(tmp_path / "run", *options) == 0
    assert settings(tmp_path / "run")["learning_rate"] == 0.01
    with built(seed=0, learning_rate=0.01) as (model, sess):
        vae_mnist.restore(model, sess, finished / "checkpoints")
        for i, batch in zip(range(3), vae_mnist.random_batches(X_TRAIN, 8, seed=0, first=6)):
            model.step(batch, sess)
        expected = [value.tobytes() for value in sess.run(model.weights)]
    with vae_mnist.trained(tmp_path / "run") as (model, sess):
        assert [value.tobytes() for value in sess.run(model.weights)] == expected


def test_resume_with_another_setting_is_refused(run_folder, tmp_path, capsys):
    for option, value, old in [
        ("--seed", 5, "0"),
        ("--batch-size", 9, "8"),
        ("--decoder", "mirrored", "tutorial"),
        ("--shards", 3, "2"),
        ("--learning-rate", 0.5, "0.001"),  # which would have no effect: no updates are left
    ]:
        err = refused(capsys, run_folder, "--resume", option, value)
        assert f"has {option} {old}, not {value}" in err
    err = refused(capsys, run_folder, "--resume", "--iterations", 5)
    assert "made 6 iterations, more than 5" in err
    images = X_TRAIN.copy()
    images[-1, 14, 14] ^= 1
    other = tmp_path / "other.npz"
    np.savez(other, x_train=images, x_test=images)
    err = refused(capsys, run_folder, "--resume", "--data", other)
    assert "learns from other images; give their file with --data" in err


@pytest.mark.slow
def test_truncated_checkpoint_is_refused_and_only_replaced_on_request(run_folder, finished, capsys):
    folder = run_folder / "checkpoints"
    for path in sorted(folder.glob("vae_mnist-6.*")):
        whole = path.read_bytes()
        path.unlink()
        refused(capsys, run_folder, "--resume")
        path.write_bytes(whole[:-1])
        err = refused(capsys, run_folder, "--resume")
        assert str(folder) in err and len(err) < 300
        path.write_bytes(whole)
    named = (folder / "checkpoint").read_text()
    for damaged in ("", 'model_checkpoint_path: "mine"'):
        (folder / "checkpoint").write_text(damaged)
        assert "checkpoint: expected a name" in refused(capsys, run_folder, "--resume")
    (folder / "checkpoint").write_text(named)
    for damaged in ("{", "[]", "{}"):
        (folder / "run.json").write_text(damaged)
        for option in ([], ["--resume"]):
            err = refused(capsys, run_folder, *option)
            assert "run.json: expected a run's settings" in err and "--overwrite" in err
    assert main(run_folder, "--overwrite") == 0
    assert "finished" not in capsys.readouterr().out  # which nobody can know
    assert_same_run(run_folder, finished)


@pytest.mark.slow
def test_unfinished_run_is_not_replaced_by_accident(unfinished, capsys):
    err = refused(capsys, unfinished)
    assert "3 of 6 iterations" in err and "--resume" in err and "--overwrite" in err
    assert main(unfinished, "--overwrite", "--seed", 1) == 0
    assert made(unfinished) == 6 and settings(unfinished)["seed"] == 1


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_run_that_begins_while_another_loads_its_data_is_not_replaced(
    options, finished, tmp_path, monkeypatch, capsys
):
    load_mnist = vae_mnist.load_mnist

    def slow(path):
        shutil.copytree(finished, tmp_path / "run")
        return load_mnist(path)

    monkeypatch.setattr(vae_mnist, "load_mnist", slow)
    err = stopped(capsys, 2, tmp_path / "run", *options)
    assert "another run began there just now" in err
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_results_go_when_training_begins_and_files_of_others_stay(run_folder):
    names = ["codes.png", "checkpoints/model-7.index"]
    theirs = [run_folder / name for name in names]
    results = [run_folder / name for name in ("latent.png", "explore.html", "report.png")]
    for path in [*theirs, *results]:
        path.write_text("as it was")
    kill = ("vae_mnist.train", 1, signal.SIGKILL)
    assert Forked(run_folder, "--resume", "--iterations", 9, signals=kill).end()[0] < 0
    assert not any(path.exists() for path in results)
    assert all(path.read_text() == "as it was" for path in theirs)


@pytest.mark.slow
def test_model_is_restored_from_a_run_a_directory_or_a_name(finished):
    saved = variables(finished)
    with vae_mnist.trained(finished) as (model, sess):
        values = {v.op.name: sess.run(v).tobytes() for v in model.variables}
    assert values == saved
    folder = finished / "checkpoints"
    for path in (folder, str(folder), tf.train.latest_checkpoint(folder)):
        with built(seed=1) as (model, sess):
            vae_mnist.restore(model, sess, path)
            assert sess.run(model.weights[0]).tobytes() == saved["dense/kernel"]


def test_directory_without_a_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="found none"), vae_mnist.trained(path):
            pass
    assert not list(tmp_path.iterdir())


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


def test_checkpoint_of_another_network_is_refused_and_changes_nothing(
    finished, run_folder, monkeypatch, capsys
):
    with built(decoder="mirrored") as (model, sess):
        before = sess.run(model.weights)
        expected = r"another network: dense_4/kernel is \[2, 256\], not \[2, 64\]"
        for path in (finished / "checkpoints", TUTORIAL):
            with pytest.raises(ValueError, match=expected):
                vae_mnist.restore(model, sess, path)
        for old, new in zip(before, sess.run(model.weights)):
            assert np.array_equal(old, new)
    # As where somebody has changed the network, and goes on with an older run.
    monkeypatch.setattr(vae_mnist, "ENCODER", ([128, 64], [4]))
    err = refused(capsys, run_folder, "--resume")
    assert "another network: dense/kernel is [784, 256], not [784, 128]" in err
