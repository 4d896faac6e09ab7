"""What --report measures, against closed forms and NumPy in float64; and what it draws."""

import json
import re
import signal
import subprocess
from contextlib import contextmanager

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import runs
import tensorflow.compat.v1 as tf
from conftest import built, program
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from reference import Reference

import vae_mnist

SHORT = ["--iterations", "6", "--batch-size", "8", "--log-every", "2"]
FIGURES = ("RecLoss", "KLD", "-ELBO", "NLL", "KL(q || p)")
COARSE = {"reach": 5.0, "step": 0.1}  # enough for a model that is hardly trained


@pytest.fixture(scope="module")
def test_set(mnist):
    """The first 200 test images and their labels."""
    _, (x_test, y_test) = mnist
    return x_test[:200], y_test[:200]


@contextmanager
def rough(scale, seed=0):
    """Yield a model with large random weights and biases, its session, and the same in NumPy."""
    rng = np.random.default_rng(seed)
    with built() as (model, sess):
        for v in tf.trainable_variables():
            value = sess.run(v) * scale if "kernel" in v.name else rng.normal(0, 0.3, v.shape)
            v.load(value.astype(np.float32), sess)
        yield model, sess, Reference(sess.run(tf.trainable_variables()))


def test_model_that_ignores_its_code_has_the_likelihood_of_its_biases(test_set):
    """Then q(z | x) = p(z), and every bound is the negative log-likelihood itself."""
    images = test_set[0][:20]
    with built() as (model, sess):
        for v in tf.trainable_variables():
            v.load(np.zeros(v.shape, np.float32), sess)
        bias = np.random.default_rng(0).normal(-2, 2, 784).astype(np.float32)
        tf.trainable_variables()[-1].load(bias, sess)
        figures = vae_mnist.evaluate(model, sess, images, **COARSE)
    x, bias = images.reshape(-1, 784) / 255, bias.astype(np.float64)
    expected = np.logaddexp(0, bias).sum() - x @ bias
    for name in ("RecLoss", "-ELBO", "NLL"):
        assert figures[name].shape == (20,) and figures[name].dtype == np.float64
        np.testing.assert_allclose(figures[name], expected, atol=2e-3)
    assert not figures["KLD"].any()


def test_negative_log_likelihood_matches_gauss_hermite_quadrature(test_set):
    """Other nodes, other weights, another network, in float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    log_weights = np.log(np.outer(weights, weights).ravel() / (2 * np.pi))
    images = test_set[0][:8]
    with rough(1.5) as (model, sess, reference):
        nll = vae_mnist.evaluate(model, sess, images, **COARSE)["NLL"]
    for value, x in zip(nll, images.reshape(-1, 784) / 255):
        terms = reference.log_px(x, z) + log_weights
        assert np.ptp(terms[log_weights > -20]) > 20  # the integrand does vary
        np.testing.assert_allclose(value, -np.logaddexp.reduce(terms), atol=1e-3)


def test_sampled_figures_match_numpy(test_set):
    images = test_set[0][:3]
    with rough(1.5) as (model, sess, reference):
        figures = vae_mnist.evaluate(model, sess, images, seed=5, **COARSE)
    x = images.reshape(-1, 784) / 255
    rng = np.random.default_rng(5)
    losses = [reference.run(x[i : i + 1], eps[i : i + 1])
              for eps in (rng.standard_normal((3, 2)) for _ in range(20)) for i in range(3)]  # fmt: skip
    kld, rec_loss = np.reshape(losses, (20, 3, 2)).mean(axis=0).T
    np.testing.assert_allclose(figures["RecLoss"], rec_loss, rtol=1e-5)
    np.testing.assert_allclose(figures["KLD"], kld, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(figures["-ELBO"], kld + rec_loss, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["tutorial", "mirrored"])
def test_inference_gap_is_the_divergence_of_q_from_the_exact_posterior(
    decoder, trained_runs, test_set
):
    """Ten images: q (log q - log p) summed over a fine grid around mu, in NumPy and float64."""
    images = test_set[0][:10]
    with vae_mnist.trained(trained_runs[decoder]) as (model, sess):
        figures = vae_mnist.evaluate(model, sess, images, step=0.03)
        assert np.array_equal(figures["KL(q || p)"], figures["-ELBO"] - figures["NLL"])
        # 500 times as many samples, for their noise to be small; no grid is needed there.
        often = vae_mnist.evaluate(model, sess, np.repeat(images, 500, axis=0), step=3.0)
        reference = Reference(sess.run(model.weights), decoder)
    samples = often["-ELBO"].reshape(10, 500)
    error = samples.std(axis=1) / 500**0.5
    gap = samples.mean(axis=1) - figures["NLL"]
    steps = np.linspace(-5.5, 5.5, 89)
    eps = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    area = (steps[1] - steps[0]) ** 2
    log_normal = -0.5 * np.sum(eps**2, axis=1) - np.log(2 * np.pi)
    for i, x in enumerate(images.reshape(-1, 784) / 255):
        mu, log_sig_sq = (values[0] for values in reference.encode(x[None]))
        sigma = np.exp(log_sig_sq / 2)
        z = mu + sigma * eps
        log_q = log_normal - np.sum(np.log(sigma))
        log_joint = reference.log_px(x, z) - 0.5 * np.sum(z**2, axis=1) - np.log(2 * np.pi)
        log_p = log_joint + figures["NLL"][i]  # the posterior, by Bayes' rule
        divergence = np.sum(np.exp(log_normal) * area * (log_q - log_p))
        assert divergence > 0 and abs(divergence - gap[i]) < 5 * error[i] + 0.005
    assert gap.max() > 0.3 and error.max() < 0.1  # so there is something to measure


@pytest.mark.slow
def test_samples_decide_nothing_but_the_reconstructions(trained_runs, test_set):
    with vae_mnist.trained(trained_runs["mirrored"]) as (model, sess):
        figures, other = (
            vae_mnist.evaluate(model, sess, test_set[0], seed=seed, step=0.1) for seed in (0, 1)
        )
    mean = {name: values.mean() for name, values in figures.items()}
    assert mean["-ELBO"] > mean["NLL"] + 0.5 > 100  # the gap is there, and not only rounding
    assert 0 < abs(mean["RecLoss"] - other["RecLoss"].mean()) < 0.5
    for name in ("KLD", "NLL"):
        assert np.array_equal(figures[name], other[name])


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["tutorial", "mirrored"])
def test_likelihood_is_that_of_a_much_finer_and_wider_grid(decoder, trained_runs, test_set):
    images = test_set[0][:100]
    with vae_mnist.trained(trained_runs[decoder]) as model_and_sess:
        nll = vae_mnist.evaluate(*model_and_sess, images)["NLL"]
        finer = vae_mnist.evaluate(*model_and_sess, images, reach=6.5, step=0.02)["NLL"]
        rough_grid = vae_mnist.evaluate(*model_and_sess, images, step=0.3)["NLL"]
        narrow = vae_mnist.evaluate(*model_and_sess, images, reach=2.0)["NLL"]
    assert abs(np.mean(nll - finer)) < 1e-3
    assert abs(np.mean(rough_grid - finer)) > 1e-3 and np.mean(narrow - finer) > 1e-3


@pytest.mark.slow
def test_report_prints_and_saves_what_it_measures(tmp_path, test_set, monkeypatch, capsys):
    """On a small data set, a whole run; then the same again from its checkpoint."""
    data = tmp_path / "small.npz"
    (images, labels) = test_set
    np.savez(data, x_train=images, y_train=labels, x_test=images[:30], y_test=labels[:30])
    options = [*SHORT, "--data", str(data), "--report", "--output-dir", str(tmp_path / "run")]
    assert vae_mnist.main(options) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert content["iteration"] == 6 and content["settings"]["decoder"] == "tutorial"
    assert content["settings"]["learning_rate"] == 0.001 and content["settings"]["seed"] == 0
    with vae_mnist.trained(tmp_path / "run") as (model, sess):
        figures = vae_mnist.evaluate(model, sess, images[:30])
    assert list(content["metrics"]) == list(FIGURES)
    for name, values in figures.items():
        metric = content["metrics"][name]
        assert metric["mean"] == pytest.approx(values.mean())
        assert metric["standard_error"] == pytest.approx(values.std() / 30**0.5)
        line = rf"^{re.escape(name)} +{metric['mean']:.2f} \({metric['standard_error']:.2f}\)$"
        assert re.search(line, out, re.MULTILINE)
    before = {
        name: (tmp_path / "run" / name).read_bytes() for name in ("report.png", "metrics.json")
    }
    for name in before:
        (tmp_path / "run" / name).unlink()
    assert vae_mnist.main([*options, "--resume"]) == 0
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.slow
def test_signal_while_measuring_ends_the_program_and_loses_nothing(tmp_path):
    runs = []
    for number in (signal.SIGINT, signal.SIGTERM):
        options = [*SHORT, "--report", "--output-dir", tmp_path / number.name]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs.append((number, subprocess.Popen(program(*options), **how)))
    for number, process in runs:
        with process:
            while not process.stdout.readline().startswith("On 10,000 test images"):
                pass
            process.send_signal(number)
            err = process.stderr.read()
        # SIGTERM ends it as any other program, Ctrl-C as one without a traceback.
        assert process.returncode == (130 if number == signal.SIGINT else -number) and not err
        output = tmp_path / number.name
        names = ["checkpoint", "explore.html", "latent.png", "log.csv"]
        assert sorted(p.name for p in output.iterdir()) == names
        assert vae_mnist.read_run(output / "checkpoint").made == 6


def test_no_report_without_the_option(tmp_path):
    assert vae_mnist.main([*SHORT, "--output-dir", str(tmp_path)]) == 0
    names = ["checkpoint", "explore.html", "latent.png", "log.csv"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_report_that_cannot_be_written_is_one_line_and_leaves_the_older_one(
    run_folder, monkeypatch, capsys
):
    (run_folder / "metrics.json").write_text("older")
    (run_folder / "metrics.json.tmp").mkdir()  # where the new one would be written first
    values = {name: np.ones(3) for name in FIGURES}
    monkeypatch.setattr(vae_mnist, "evaluate", lambda *_, **__: values)
    assert runs.main(run_folder, "--resume", "--report") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{run_folder / 'metrics.json'}: Is a directory" in err
    assert (run_folder / "metrics.json").read_text() == "older"
    assert (run_folder / "latent.png").exists()


# ------------------------------------------------------------------------------------ pictures


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that draws a report, and returns its figure and its panels, from above."""
    figures = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure, *arguments, **how):
        figures.append(figure)
        savefig(figure, *arguments, **how)

    def draw(model, sess, test, log, settings=None):
        settings = {"decoder": "tutorial", "seed": 7, "data": vae_mnist.MNIST, **(settings or {})}
        run = vae_mnist.Run(tmp_path, settings, "", 5000, made=5000)
        np.savetxt(tmp_path / "log.csv", log, delimiter=",", header="iteration,kld,rec_loss")
        means = {"NLL": 164.95, "KLD": 4.87, "RecLoss": 161.23}
        vae_mnist.draw_report(model, sess, test, run, means)
        fig = figures[-1]
        return fig, dict(zip(("codes", "sheet", "rec_loss", "kld"), fig.axes))

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return draw


def log_of(count):
    """Return a log of that many lines, with the losses of an ordinary run."""
    return [[100 * i, 5 - 4.7 / (i + 1), 150 + 393 / (i + 1)] for i in range(count)]


def assert_nothing_clipped_or_overlapping(fig):
    """Titles, axis labels and tick labels lie inside the figure and apart from each other."""
    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.canvas.draw()
    texts = []
    for axes in fig.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            if not axis.get_visible():
                continue  # the second curve shares the axis of the first
            low, high = sorted((low, high))
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels())
            texts += [label for place, label in ticks if low <= place <= high]
    legends = [axes.get_legend() for axes in fig.axes if axes.get_legend()]
    texts += [text for legend in legends for text in legend.get_texts()] + [fig._suptitle]
    texts = [text for text in texts if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert len(boxes) > 5
    for i, box in enumerate(boxes):
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1, texts[i]
        assert fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1, texts[i]
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]
    for legend in legends:
        assert not legend.get_window_extent(renderer).overlaps(fig.axes[0].get_window_extent())
        assert not legend.get_window_extent(renderer).overlaps(fig.axes[1].get_tightbbox(renderer))


def test_codes_are_drawn_where_they_are_in_the_colour_of_their_digit(drawn, test_set):
    with rough(1.5) as (model, sess, _):
        mu, _ = model.encode(vae_mnist.scale(test_set[0]), sess)
        _, panels = drawn(model, sess, test_set, log_of(50))
    axes = panels["codes"]
    points = axes.collections[0]
    np.testing.assert_allclose(points.get_offsets(), mu, atol=1e-6)
    expected = [to_rgb(vae_mnist.COLOURS[label]) for label in test_set[1]]
    assert np.array_equal(points.get_facecolors()[:, :3], expected)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [str(n) for n in range(10)]
    for handle, colour in zip(legend.legend_handles, vae_mnist.COLOURS):
        assert np.array_equal(handle.get_facecolor()[0, :3], to_rgb(colour))
    (box,) = axes.patches  # what latent.png shows
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (-2, -2, 4, 4)
    assert axes.get_aspect() == 1 and "200 test images: KLD 4.87" in axes.get_title()


def test_reconstructions_stand_below_their_images(drawn, test_set):
    images, labels = test_set
    with rough(1.5) as (model, sess, _):
        _, panels = drawn(model, sess, test_set, log_of(50))
        axes = panels["sheet"]
        sheet = axes.images[0].get_array()
        assert sheet.shape == (10 * 2 * 28, 10 * 28)
        for digit, column in [(0, 0), (3, 9), (9, 4)]:
            tile = sheet[56 * digit : 56 * digit + 56, 28 * column : 28 * column + 28]
            image = images[np.flatnonzero(labels == digit)[column]]
            np.testing.assert_allclose(tile[:28], image / 255, atol=1e-6)
            decoded = model.decode(model.encode(vae_mnist.scale(image), sess)[0], sess)[0]
            np.testing.assert_allclose(tile[28:], decoded, atol=1e-6)
    # Each digit's name stands where its images and their reconstructions meet.
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(n) for n in range(10)]
    assert np.array_equal(axes.get_yticks(), 56 * np.arange(10) + 27.5)
    assert "RecLoss 161.23" in axes.get_title()


@pytest.mark.parametrize("classes", [26, 62])
def test_many_classes_keep_the_panels_and_have_a_bar(classes, drawn, test_set, recwarn):
    """As EMNIST has: panels of the same size, colours of their own, ten rows spread over all."""
    images = np.tile(test_set[0], (4, 1, 1))
    labels = np.arange(len(images)) % classes
    with built() as (model, sess):
        few, few_panels = drawn(model, sess, test_set, log_of(50))
        fig, panels = drawn(model, sess, (images, labels), log_of(50))
    sizes = []
    for figure, axes in ((few, few_panels["sheet"]), (fig, panels["sheet"])):
        figure.canvas.draw()
        sizes.append(axes.get_window_extent().width)
    assert sizes[1] > 0.85 * sizes[0]
    assert not recwarn.list and panels["codes"].get_legend() is None
    colours = panels["codes"].collections[0].get_facecolors()[:classes]
    assert len(np.unique(colours, axis=0)) == classes
    expected = [round(i * (classes - 1) / 9) for i in range(10)]
    shown = [int(label.get_text()) for label in panels["sheet"].get_yticklabels()]
    assert np.abs(np.subtract(shown, expected)).max() <= 1 and len(set(shown)) == 10
    sheet = panels["sheet"].images[0].get_array()
    first = images[np.flatnonzero(labels == shown[4])[0]]
    np.testing.assert_allclose(sheet[56 * 4 : 56 * 4 + 28, :28], first / 255, atol=1e-6)
    bar = next(axes for axes in fig.axes if axes.get_label() == "<colorbar>")
    assert [int(t.get_text()) for t in bar.get_yticklabels()] == shown


@pytest.mark.parametrize("count", [1, 2, 50, 200])
def test_losses_show_every_line_of_the_log_and_are_readable_after_the_first(count, drawn, test_set):
    log = log_of(count)
    with built() as (model, sess):
        _, panels = drawn(model, sess, test_set, log)
    for name, column in (("kld", 1), ("rec_loss", 2)):
        axes = panels[name]
        points = np.transpose(axes.lines[0].get_data())
        assert np.array_equal(points, [[line[0], line[column]] for line in log])
        low, high = axes.get_ylim()
        settled = points[count // 20 :, 1]  # the first twentieth may run out of the picture
        assert low < min(settled) and high > max(settled)
        if count > 2:
            assert np.ptp(settled) > 0.7 * (high - low)
    title = panels["rec_loss"].get_title()
    assert f"in iteration {log[-1][0]:,}" in title
    assert f"KLD {log[-1][1]:.2f}" in title and f"RecLoss {log[-1][2]:.2f}" in title
    assert "begins at 543.00" in panels["rec_loss"].get_xlabel()


def test_report_fits_its_page_whatever_the_users_settings(drawn, test_set, tmp_path):
    mine = {"savefig.dpi": 300, "savefig.bbox": "tight", "font.size": 25}
    with rough(1.5) as (model, sess, _), matplotlib.rc_context(mine):
        fig, _ = drawn(model, sess, test_set, log_of(200), {"decoder": "mirrored"})
    assert_nothing_clipped_or_overlapping(fig)
    assert fig._suptitle.get_text() == (
        "mirrored decoder, 5,000 iterations, seed 7: NLL 164.95 nats an image"
    )
    assert matplotlib.image.imread(tmp_path / "report.png").shape[1] == 1350
