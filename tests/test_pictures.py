"""The picture of the manifold, pixel by pixel, and the window that shows it."""

import os
from itertools import pairwise

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from conftest import figures_saved, rough
from runs import started

import vae_mnist


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What a model decodes, and its picture: as returned, its file and its figure.

    It is drawn where the user has settings of matplotlib, which must change nothing.
    """
    path = tmp_path_factory.mktemp("drawn") / "latent.png"
    mine = {"savefig.dpi": 300, "savefig.bbox": "tight", "axes.grid": True, "font.size": 20}
    with rough() as (model, sess, _), figures_saved() as figures, matplotlib.rc_context(mine):
        returned = vae_mnist.display_manifold(model, sess, path)
        coordinates = np.linspace(-2, 2, 30)
        codes = [[z0, z1] for z1 in coordinates for z0 in coordinates]
        decoded = model.decode(codes, sess).reshape(30, 30, 28, 28)
    return decoded, returned, path, figures[0]


def test_manifold_has_z0_to_the_right_and_z1_upwards(drawn):
    decoded, returned, _, _ = drawn
    assert returned.shape == (840, 840) and returned.dtype == np.float32
    for i in range(30):  # of z[1], from below
        for j in range(30):  # of z[0]
            bottom = 840 - 28 * i
            tile = returned[bottom - 28 : bottom, 28 * j : 28 * j + 28]
            np.testing.assert_allclose(tile, decoded[i, j], atol=1e-5)
    for other in (decoded[0, 29], decoded[29, 0]):  # a turned picture would be seen
        assert np.abs(other - decoded[0, 0]).max() > 0.05


def test_each_decoded_pixel_is_one_pixel_of_the_file(drawn):
    """Some part of the file, and only one, is the picture in grey, pixel for pixel."""
    _, returned, path, _ = drawn
    png = np.rint(255 * matplotlib.image.imread(path)[..., :3]).astype(np.uint8)
    grey = png[..., 0]
    expected = matplotlib.colormaps["Greys_r"](returned, bytes=True)[..., 0]
    places = []
    for i in range(grey.shape[0] - 839):
        for j in range(grey.shape[1] - 839):
            if np.array_equal(grey[i : i + 840, j : j + 40], expected[:, :40]):
                places.append((i, j))
    ((i, j),) = places
    for channel in range(3):
        assert np.array_equal(png[i : i + 840, j : j + 840, channel], expected)


def test_tick_labels_stand_apart_and_say_where_a_coordinate_is(drawn):
    *_, figure = drawn
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z[0]", "z[1]")
    for axis, ticks in enumerate((axes.xaxis, axes.yaxis)):
        boxes = []
        for tick, label in zip(ticks.get_ticklocs(), ticks.get_ticklabels(), strict=True):
            middle = (
                axes.transData.transform((tick, tick))[axis] - 80 - 14
            )  # the images begin at 80
            coordinate = float(label.get_text().replace("\N{MINUS SIGN}", "-"))
            assert coordinate == pytest.approx(4 * middle / 28 / 29 - 2)
            boxes.append(label.get_window_extent())
        assert len(boxes) == 9 and not any(a.overlaps(b) for a, b in pairwise(boxes))
    inside = axes.get_tightbbox()
    assert inside.x0 >= 0 and inside.y0 >= 0  # nothing is cut off
    assert inside.x1 <= figure.bbox.x1 and inside.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("ending", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("jpg", b"\xff\xd8")]
)
def test_ending_decides_the_format(ending, start, tmp_path):
    with rough() as (model, sess, _):
        vae_mnist.display_manifold(model, sess, tmp_path / f"latent.{ending}")
    assert (tmp_path / f"latent.{ending}").read_bytes().startswith(start)


@pytest.mark.slow
def test_show_without_a_display_says_so_whatever_a_notebook_hands_down(tmp_path):
    """And who asks TensorFlow to speak hears it."""
    environment = {**os.environ, "MPLBACKEND": "module://no_such_package.backend"}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "0"
    environment.pop("DISPLAY", None)
    process = started("--show", "--output-dir", tmp_path / "run", env=environment)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and (tmp_path / "run" / "latent.png").exists()
    assert err.endswith("--show: there is no display\n") and "oneDNN" in err


def test_window_shows_the_picture_as_it_is_on_the_disk(drawn, monkeypatch, tmp_path):
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "get_backend", lambda: "a window's")
    monkeypatch.setattr(plt, "show", lambda: plt.savefig(tmp_path / "shown.png"))
    vae_mnist.show_picture(drawn[2])
    shown = matplotlib.image.imread(tmp_path / "shown.png")
    assert np.array_equal(shown, matplotlib.image.imread(drawn[2]))
    plt.close()
