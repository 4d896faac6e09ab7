"""What --report measures, against closed forms and NumPy in float64; and what it draws."""

import contextlib
import io
import json
import re
import shutil

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import runs
from conftest import figures_saved, rough
from matplotlib.colors import to_rgb

import vae_mnist


def test_figures_match_numpy():
    """Twenty samples for each image, which the seed decides; quadrature with other nodes."""
    images = runs.TEST[0][:8]
    x = images.reshape(-1, 784) / 255
    grid = {"reach": 5.0, "step": 0.1}  # enough for a model that is hardly trained
    with rough() as (model, sess, reference):
        figures = vae_mnist.evaluate(model, sess, images, seed=5, **grid)
        other = vae_mnist.evaluate(model, sess, images, seed=6, **grid)
    rng = np.random.default_rng(5)
    rec_losses = []
    for _ in range(20):
        reference.run(x, rng.standard_normal((8, 2)))
        rec_losses.append(reference.rec_losses)
    rec_loss = np.mean(rec_losses, axis=0)
    np.testing.assert_allclose(figures["RecLoss"], rec_loss, rtol=1e-5)
    np.testing.assert_allclose(figures["KLD"], reference.klds, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(figures["-ELBO"], reference.klds + rec_loss, rtol=1e-5)
    assert np.array_equal(figures["KL(q || p)"], figures["-ELBO"] - figures["NLL"])
    assert (figures["RecLoss"] != other["RecLoss"]).all()
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    log_weights = np.log(np.outer(weights, weights).ravel() / (2 * np.pi))
    for nll, image in zip(figures["NLL"], x):
        terms = reference.log_px(image, z) + log_weights
        assert np.ptp(terms[log_weights > -20]) > 20  # the integrand does vary
        np.testing.assert_allclose(nll, -np.logaddexp.reduce(terms), atol=1e-3)


@pytest.mark.slow
def test_likelihood_is_that_of_a_much_finer_and_wider_grid(trained_runs, mnist):
    """For the decoder whose posteriors are narrow; the gap to the bound is there, and positive."""
    images = mnist[1][0][:100]
    with vae_mnist.trained(trained_runs["mirrored"]) as (model, sess):
        figures = vae_mnist.evaluate(model, sess, images)
        finer = vae_mnist.evaluate(model, sess, images, reach=6.5, step=0.025)["NLL"]
    assert abs(np.mean(figures["NLL"] - finer)) < 1e-3
    assert figures["KL(q || p)"].mean() > 0.5


def test_figures_that_are_not_finite_are_no_report(tmp_path):
    """Codes so wide that exp(log_sig_sq) is beyond float32, as after a learning rate too high."""
    with rough() as (model, sess, _):
        model.weights[7].load(np.full(4, 89, np.float32), sess)
        run = vae_mnist.Run(tmp_path, {"iterations": 1}, made=1)
        with pytest.raises(FloatingPointError, match="KLD is inf; try a lower --learning-rate"):
            vae_mnist.report(model, sess, runs.TEST, run)
    assert not list(tmp_path.iterdir())


def reported(output, *options):
    """Make a run with --report; return what it printed, its figure and its panels."""
    out = io.StringIO()
    with figures_saved() as figures, contextlib.redirect_stdout(out):
        assert runs.main(output, "--report", *options) == 0
    fig = figures[-1]
    return out.getvalue(), fig, dict(zip(("codes", "sheet", "rec_loss", "kld"), fig.axes))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run's folder and what it reported, whatever the user's settings of matplotlib."""
    output = tmp_path_factory.mktemp("report")
    mine = {"savefig.dpi": 300, "savefig.bbox": "tight", "font.size": 25}
    with matplotlib.rc_context(mine):
        options = ["--iterations", 40, "--log-every", 1, "--decoder", "mirrored", "--seed", 7]
        return output, *reported(output, *options)


@pytest.mark.slow
def test_report_prints_and_saves_what_it_measures(report):
    output, out, fig, panels = report
    content = json.loads((output / "metrics.json").read_text())
    assert content["iteration"] == 40
    assert content["settings"] == runs.settings(output)
    with vae_mnist.trained(output) as (model, sess):
        figures = vae_mnist.evaluate(model, sess, runs.TEST[0])
    assert list(content["metrics"]) == ["RecLoss", "KLD", "-ELBO", "NLL", "KL(q || p)"]
    assert "On 200 test images, nats an image (standard error):\n" in out
    for name, values in figures.items():
        metric = content["metrics"][name]
        assert metric["mean"] == pytest.approx(values.mean())
        assert metric["standard_error"] == pytest.approx(values.std() / 200**0.5)
        line = rf"^{re.escape(name)} +{metric['mean']:.2f} \({metric['standard_error']:.2f}\)$"
        assert re.search(line, out, re.MULTILINE)
    assert out.endswith(f"The means are in metrics.json, pictures in {output / 'report.png'}\n")
    kld, rec_loss, nll = (f"{figures[name].mean():.2f}" for name in ("KLD", "RecLoss", "NLL"))
    expected = f"mirrored decoder, 40 iterations, seed 7: NLL {nll} nats an image"
    assert fig._suptitle.get_text() == expected
    assert panels["sheet"].get_title().endswith(f"RecLoss {rec_loss}")
    assert panels["codes"].get_title() == f"Codes of 200 test images: KLD {kld}"
    assert matplotlib.image.imread(output / "report.png").shape[1] == 1350  # at its own dpi
    before = runs.content(output)
    for name in ("report.png", "metrics.json"):
        (output / name).unlink()
    assert runs.main(output, "--iterations", 40, "--report", "--resume") == 0
    assert runs.content(output) == before
    shutil.copytree(output, output / "copy")
    (output / "copy" / "log.csv").unlink()
    _, _, panels = reported(output / "copy", "--iterations", 40, "--resume")
    assert panels["rec_loss"].get_title() == "log.csv has no losses"


@pytest.mark.slow
def test_codes_and_reconstructions_are_drawn_by_their_labels(report):
    output, _, _, panels = report
    images, labels = runs.TEST
    with vae_mnist.trained(output) as (model, sess):
        mu, _ = model.encode(vae_mnist.scale(images), sess)
        decoded = model.decode(mu, sess)
    axes = panels["codes"]
    points = axes.collections[0]
    np.testing.assert_allclose(points.get_offsets(), mu, atol=1e-6)
    colours = [to_rgb(handle.get_facecolor()[0]) for handle in axes.get_legend().legend_handles]
    assert len(set(colours)) == 10
    assert np.array_equal(points.get_facecolors()[:, :3], [colours[label] for label in labels])
    legend = axes.get_legend().get_window_extent()
    assert not legend.overlaps(axes.get_window_extent())
    assert not legend.overlaps(panels["sheet"].get_tightbbox())
    digits = [str(n) for n in range(10)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == digits
    square = axes.lines[0].get_xydata()  # what latent.png shows
    assert square.min(axis=0).tolist() == [-2, -2] and square.max(axis=0).tolist() == [2, 2]
    assert axes.get_aspect() == 1
    axes = panels["sheet"]
    sheet = axes.images[0].get_array()
    assert sheet.shape == (10 * 2 * 28, 10 * 28)
    for digit in range(10):
        for column, i in enumerate(np.flatnonzero(labels == digit)[:10]):
            tile = sheet[56 * digit : 56 * digit + 56, 28 * column : 28 * column + 28]
            np.testing.assert_allclose(tile[:28], images[i] / 255, atol=1e-6)
            np.testing.assert_allclose(tile[28:], decoded[i], atol=1e-5)
    # Each label stands where its images and their reconstructions meet.
    assert [label.get_text() for label in axes.get_yticklabels()] == digits
    assert np.array_equal(axes.get_yticks(), 56 * np.arange(10) + 27.5)


@pytest.mark.slow
def test_losses_show_every_line_of_the_log_and_are_readable_after_the_first(report):
    output, _, _, panels = report
    log = np.loadtxt(output / "log.csv", delimiter=",", skiprows=1)
    assert len(log) == 40
    for name, column in (("kld", 1), ("rec_loss", 2)):
        axes = panels[name]
        assert np.array_equal(np.transpose(axes.lines[0].get_data()), log[:, [0, column]])
        low, high = axes.get_ylim()
        settled = log[2:, column]  # the first twentieth may run out of the picture
        assert low < min(settled) and high > max(settled)
        assert np.ptp(settled) > 0.7 * (high - low)
    _, kld, rec_loss = log[-1]
    expected = f"in iteration 39: KLD {kld:.2f}, RecLoss {rec_loss:.2f}"
    assert expected in panels["rec_loss"].get_title()


@pytest.mark.slow
def test_many_classes_have_colours_of_which_ten_are_explained(tmp_path, recwarn):
    """More than EMNIST has; and a log of one line."""
    images = runs.TEST[0]
    labels = np.arange(200) % 62
    data = tmp_path / "letters.npz"
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    _, _, panels = reported(tmp_path / "run", "--data", data, "--iterations", 1)
    assert not recwarn.list
    colours = panels["codes"].collections[0].get_facecolors()[:62]
    assert len(np.unique(colours, axis=0)) == 62
    shown = [int(label.get_text()) for label in panels["sheet"].get_yticklabels()]
    spread = [round(i * 61 / 9) for i in range(10)]
    assert np.abs(np.subtract(shown, spread)).max() <= 1 and len(set(shown)) == 10
    sheet = panels["sheet"].images[0].get_array()
    np.testing.assert_allclose(sheet[224:252, :28], images[shown[4]] / 255, atol=1e-6)
    assert not sheet[:, 4 * 28 :].any()  # of four images at most
    legend = panels["codes"].get_legend()
    assert [int(text.get_text()) for text in legend.get_texts()] == shown
    named = [handle.get_facecolor()[0] for handle in legend.legend_handles]
    np.testing.assert_allclose(named, colours[shown])
