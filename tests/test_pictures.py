"""The picture of the manifold, pixel by pixel, how it is written, and the window that shows it."""

import os
import subprocess

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import runs
from conftest import SMALL_RUN, built, program
from matplotlib.backends.backend_agg import FigureCanvasAgg

import vae_mnist


class Ramp:
    """A decoder whose image of z is known: its top half shows z[0], its bottom half z[1]."""

    def decode(self, z, sess):
        z = np.asarray(z)[..., None, None]
        images = np.zeros((len(z), 28, 28), np.float32)
        images[:, :14] = (z[:, 0] + 2) / 4
        images[:, 14:] = (z[:, 1] + 2) / 4
        return images


class Noise:
    """A decoder of images in which any smoothing or shift would show."""

    def decode(self, z, sess):
        seed = abs(int(1e6 * z[0][1]))  # another one for each row of the picture
        return np.random.default_rng(seed).random((len(z), 28, 28)).astype(np.float32)


def test_manifold_has_z0_to_the_right_and_z1_upwards(tmp_path):
    figure = vae_mnist.display_manifold(Ramp(), None, tmp_path / "latent.png")
    assert figure.shape == (840, 840)
    grid = np.linspace(0, 1, 30)
    np.testing.assert_allclose(figure[0::28, :][:, ::28], np.tile(grid, (30, 1)), atol=1e-6)
    np.testing.assert_allclose(figure[27::28, :][:, ::28], np.tile(grid[::-1, None], 30), atol=1e-6)


def assert_each_pixel_of(figure, path):
    """Some part of a PNG file, and only one, is the figure in grey, pixel for pixel."""
    png = matplotlib.image.imread(path)[..., :3]
    assert np.array_equal(png[..., 0], png[..., 1]) and np.array_equal(png[..., 0], png[..., 2])
    expected = matplotlib.colormaps["Greys_r"](figure, bytes=True)[..., 0]
    grey = np.rint(png[..., 0] * 255).astype(np.uint8)
    rows, columns = (n - 840 for n in grey.shape)
    places = [
        (i, j)
        for i in range(rows + 1)
        for j in range(columns + 1)
        if grey[i, j] == expected[0, 0] and np.array_equal(grey[i:, j:][:840, :840], expected)
    ]
    assert len(places) == 1


def test_each_decoded_pixel_is_one_pixel_of_the_file(tmp_path):
    figure = vae_mnist.display_manifold(Noise(), None, tmp_path / "latent.png")
    assert_each_pixel_of(figure, tmp_path / "latent.png")


def test_users_settings_of_matplotlib_change_nothing(tmp_path):
    vae_mnist.display_manifold(Noise(), None, tmp_path / "plain.png")
    mine = {"savefig.dpi": 300, "savefig.bbox": "tight", "figure.autolayout": True}
    mine |= {"axes.grid": True, "font.size": 20, "figure.facecolor": "black"}
    with matplotlib.rc_context(mine):
        figure = vae_mnist.display_manifold(Noise(), None, tmp_path / "latent.png")
        assert_each_pixel_of(figure, tmp_path / "latent.png")
        assert (tmp_path / "latent.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
        assert matplotlib.rcParams["savefig.dpi"] == 300


def test_picture_of_a_model_is_what_it_decodes_one_by_one(tmp_path):
    with built() as (model, sess):
        figure = vae_mnist.display_manifold(model, sess, tmp_path / "latent.png")
        grid = np.linspace(-2, 2, 30)
        for row, column in [(0, 0), (0, 29), (29, 0), (11, 17)]:
            image = model.decode([[grid[column], grid[29 - row]]], sess)[0]
            tile = figure[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
            np.testing.assert_allclose(tile, image, atol=1e-6)


def test_tick_labels_do_not_run_into_each_other(tmp_path, monkeypatch):
    figures = []
    real = matplotlib.figure.Figure

    def figure(**how):
        figures.append(real(**how))
        return figures[-1]

    monkeypatch.setattr(matplotlib.figure, "Figure", figure)
    vae_mnist.display_manifold(Ramp(), None, tmp_path / "latent.png")
    axes = figures[0].axes[0]
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    for axis in (axes.xaxis, axes.yaxis):
        boxes = [t.get_window_extent(renderer) for t in axis.get_ticklabels() if t.get_text()]
        boxes += [axis.label.get_window_extent(renderer)]
        assert len(boxes) > 5
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(figures[0].bbox.containsx(e) for b in boxes for e in (b.x0, b.x1))
        assert all(figures[0].bbox.containsy(e) for b in boxes for e in (b.y0, b.y1))
    # Where the label says, the picture shows that coordinate: the images begin at pixel (70, 60).
    for ticks, axis, first in ((axes.get_xticks(), 0, 70), (axes.get_yticks(), 1, 60)):
        labels = (axes.get_xticklabels(), axes.get_yticklabels())[axis]
        assert len(labels) == 9
        for tick, label in zip(ticks, labels):
            middle = axes.transData.transform((tick, tick))[axis] - first - 14
            coordinate = float(label.get_text().replace("\N{MINUS SIGN}", "-"))
            assert coordinate == pytest.approx(-2 + 4 * middle / 28 / 29)


def test_failure_while_drawing_leaves_the_older_picture(run_folder, monkeypatch, capsys):
    path = run_folder / "latent.png"
    path.write_bytes(b"older")
    names = sorted(run_folder.iterdir())

    def savefig(self, path, **how):
        path.write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    assert runs.main(run_folder, "--resume") == 1
    assert f"{path}: No space left on device" in capsys.readouterr().err
    assert path.read_bytes() == b"older" and sorted(run_folder.iterdir()) == names


def test_show_without_a_display_says_so_after_the_picture_is_written(run_folder, recwarn, capsys):
    (run_folder / "latent.png").unlink()
    assert runs.main(run_folder, "--resume", "--show") == 0
    assert not [w for w in recwarn if "non-interactive" in str(w.message)]
    assert capsys.readouterr().err == "--show: there is no display\n"
    assert (run_folder / "latent.png").exists()


@pytest.mark.slow
def test_backend_that_is_missing_or_unknown_stops_nothing(tmp_path):
    """As a notebook hands its own down to what it starts in another environment."""
    processes = []
    for i, backend in enumerate(("module://no_such_package.backend", "nonsense")):
        command = program(*SMALL_RUN, "--output-dir", tmp_path / str(i), "--show")
        environment = {**os.environ, "MPLBACKEND": backend}
        environment.pop("DISPLAY", None)
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **how))
    for i, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == "--show: there is no display\n"
        assert "latent.png" in out and (tmp_path / str(i) / "latent.png").exists()


def test_window_shows_the_picture_as_it_is_on_the_disk(run_folder, monkeypatch):
    from matplotlib import pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "get_backend", lambda: "a window's")
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    vae_mnist.show_picture(run_folder / "latent.png")
    (fig,) = shown
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    expected = np.rint(255 * matplotlib.image.imread(run_folder / "latent.png"))
    assert np.array_equal(pixels, expected) and not plt.get_fignums()
