"""The recipes in README, and what one of them exports, used without the module that made it."""

import gzip
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf2
import tensorflow.compat.v1 as tf
from PIL import Image, ImageFilter
from processes import ROOT

import vae_mnist


def recipes():
    """Return README's code in Python, by the bold words before it."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"\*\*([^*\n]+)\*\*(?:(?!```).)*?```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == text.count("```python") == 6
    return dict(found)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, trained_runs, mnist):
    """What README's recipe exports, seven rows of inputs by name, and what a session makes of them."""
    directory = tmp_path_factory.mktemp("exported")
    output = shutil.copytree(trained_runs["mirrored"], directory / "outputs")
    code = recipes()["Export"] + "import numpy\nnumpy.save('rec.npy', rec)\n"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    z = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    x = vae_mnist.scale(mnist[1][0][:7])
    with vae_mnist.trained(output) as (model, sess):
        mu, log_sig_sq = model.encode(x, sess)
        rec = model.decode(z, sess).reshape(-1, 784)
        expected = model.decode([[0.5, -1.0]], sess).reshape(1, 784)
    np.testing.assert_allclose(np.load(directory / "rec.npy"), expected, atol=1e-6)
    inputs = {"encoder": ("x", x), "decoder": ("z", z)}
    return (
        output,
        inputs,
        {"encoder": {"mu": mu, "log_sig_sq": log_sig_sq}, "decoder": {"rec": rec}},
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_export_gives_elsewhere_what_the_session_gives(part, exported):
    """In eager TensorFlow and TFLite, for one row and for several."""
    output, inputs, expected = exported
    name, rows = inputs[part]
    path = str(output / part)
    loaded = tf2.saved_model.load(path).signatures["serving_default"]
    lite = tf2.lite.TFLiteConverter.from_saved_model(path).convert()
    lite = tf2.lite.Interpreter(model_content=lite).get_signature_runner("serving_default")
    for n in (1, 6, 7):
        eager = loaded(**{name: tf2.constant(rows[:n])})
        small = lite(**{name: rows[:n]})
        for key, values in expected[part].items():
            np.testing.assert_allclose(eager[key], values[:n], atol=1e-5)
            np.testing.assert_allclose(small[key], values[:n], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_onnx_agrees_with_the_session(part, exported, tmp_path):
    """Where it can be installed; converted as README says."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime for this Python")
    pytest.importorskip("tf2onnx", reason="no tf2onnx for this Python")
    output, inputs, expected = exported
    name, rows = inputs[part]
    file = str(tmp_path / "part.onnx")
    command = [sys.executable, "-m", "tf2onnx.convert", "--saved-model", str(output / part)]
    subprocess.run([*command, "--output", file], check=True, capture_output=True, timeout=120)
    inference = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n in (1, 6, 7):
        results = inference.run(list(expected[part]), {name: rows[:n]})
        for result, values in zip(results, expected[part].values(), strict=True):
            np.testing.assert_allclose(result, values[:n], atol=1e-5)


def write_idx(path, array):
    """Write an array of bytes as the IDX files of MNIST are, packed if the path ends in .gz."""
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def workplace(tmp_path, trained_runs, monkeypatch):
    """Work in a directory in which a run has been made, as README's recipes expect it."""
    shutil.copytree(trained_runs["tutorial"], tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(name):
    """Run a recipe as a script in this directory; return its variables."""
    Path("recipe.py").write_text(recipes()[name])
    return runpy.run_path("recipe.py")


@pytest.mark.slow
def test_walk_goes_from_one_image_to_the_other(workplace, mnist):
    names = follow("Measure, encode, and walk")
    assert matplotlib.image.imread("outputs/walk.png").shape[:2] == (28, 20 * 28)
    with vae_mnist.trained("outputs") as (model, sess):
        mu, _ = model.encode(vae_mnist.scale(mnist[1][0][:2]), sess)
        ends = model.decode(mu, sess)
    np.testing.assert_allclose(names["walk"][[0, -1]], ends, atol=1e-5)


@pytest.mark.slow
def test_own_loop_is_seen_in_tensorboard_and_saved(workplace):
    names = follow("Your own loop")
    (path,) = (workplace / "outputs" / "own").glob("events*")
    events = list(tf.train.summary_iterator(str(path)))
    (value,) = events[-1].summary.value
    expected = names["kld"] + names["rec_loss"]
    assert value.tag == "-ELBO" and value.simple_value == pytest.approx(expected)
    graph = next(event.graph_def for event in events if event.graph_def)
    nodes = tf.GraphDef.FromString(graph).node
    parts = {node.name.split("/")[0] for node in nodes if "dense" not in node.name}
    assert parts > {"x", "encoder", "z", "decoder", "rec", "losses", "fast_update"}
    with vae_mnist.trained("outputs/own") as (model, sess):  # by `restore`
        assert sess.run(model.iteration) == 500


@pytest.mark.parametrize("packed", [".gz", "", "both", "misnamed"])
def test_other_data_are_read_packed_or_not(packed, tmp_path, monkeypatch, mnist):
    """Both: some files are packed. Misnamed: a browser has unpacked a file and kept its name."""
    monkeypatch.chdir(tmp_path)
    for part, (images, labels) in (("train", mnist[0]), ("t10k", mnist[1])):
        for kind, array in (("images-idx3", images[:90]), ("labels-idx1", labels[:90])):
            ending = {"both": ".gz" if part == "train" else "", "misnamed": ""}.get(packed, packed)
            write_idx(tmp_path / f"{part}-{kind}-ubyte{ending}", array)
    if packed == "misnamed":
        os.rename("t10k-images-idx3-ubyte", "t10k-images-idx3-ubyte.gz")
    follow("Other data")
    for part, whole in zip(vae_mnist.load_mnist("other.npz"), mnist):
        assert np.array_equal(part[0], whole[0][:90]) and np.array_equal(part[1], whole[1][:90])


def test_pictures_in_folders_become_data(tmp_path, monkeypatch):
    """Coloured pictures of three sizes, of which one is on its side; each is found once."""
    monkeypatch.chdir(tmp_path)
    expected = []
    for k, (name, size) in enumerate({"cat": (90, 90), "dog": (60, 120), "owl": (200, 50)}.items()):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / ".DS_Store").write_text("none of them")
        for i in range(12):
            picture = Image.new("RGB", size, (200, 10 * i, 40))
            picture.paste((0, 100, 15 * i), (0, 0, size[0], size[1] // 2))
            exif = Image.Exif()
            if i == 0:
                picture = picture.transpose(Image.Transpose.ROTATE_90)
                exif[0x0112] = 6  # to be turned by a quarter, clockwise
            picture.save(tmp_path / "pictures" / name / f"{i}.png", exif=exif)
            weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
            grey = np.array([[0, 100, 15 * i], [200, 10 * i, 40]]) @ weights
            expected.append((k, *grey))
    follow("Your own pictures")
    parts = vae_mnist.load_mnist("other.npz")
    assert [len(images) for images, _ in parts] == [30, 6]
    found = []
    for images, labels in parts:
        for image, label in zip(images.astype(float), labels.tolist()):
            high, wide = {0: (28, 28), 1: (28, 14), 2: (7, 28)}[label]  # the proportions are kept
            top, left = (28 - high) // 2, (28 - wide) // 2
            picture = image[top : top + high, left : left + wide]
            upper, lower = np.median(picture[: high // 2]), np.median(picture[high // 2 :])
            found.append((label, upper, lower))
            picture[:] = upper
            np.testing.assert_allclose(image, upper, atol=8)  # around it: its corner's grey
    np.testing.assert_allclose(sorted(found), sorted(expected), atol=1)
    assert set(parts[1][1]) != {0}  # the split is no cut through the classes


# ------------------------------------------------------------------------------ an own digit
def page_of(digit):
    """Return how much ink is where on a page, (600, 450): a test image, smooth and large."""
    large = Image.fromarray(digit).resize((280, 280), Image.Resampling.BICUBIC)
    large = large.filter(ImageFilter.GaussianBlur(2))
    ink = np.zeros((600, 450))
    ink[220:500, 60:340] = np.asarray(large) / 255
    return ink


def clean(ink):
    return 255 * (1 - ink)


def coloured(ink, paper, pen):
    return np.array(paper) + (np.array(pen) - paper) * ink[..., None]


def with_alpha(ink, grey):
    return np.stack([*[np.full(ink.shape, grey)] * 3, 255 * ink], axis=2)


def half_transparent(ink):
    """White paper that covers three quarters of a picture, in which the rest is transparent."""
    rgba = np.stack([*[clean(ink)] * 3, np.full(ink.shape, 255.0)], axis=2)
    rgba[:100] = rgba[:, :40] = 0
    return rgba


NOISE = np.random.default_rng(0).normal(size=(600, 450))
SHADE = 1 - 0.65 * np.linspace(0, 1, 450)  # from left to right
PHOTOGRAPHS = {  # what becomes of ink on a page, by what makes it difficult
    "a shadow on one side": lambda ink: (235 - 195 * ink) * SHADE,
    "a soft edge of a shadow": lambda ink: (
        (235 - 195 * ink) * (1 - 0.5 / (1 + np.exp(20 * (0.6 - np.linspace(0, 1, 450)))))
    ),
    "pale pencil": lambda ink: 235 - 45 * ink,
    "pale pencil, grain": lambda ink: 235 - 45 * ink + 4 * NOISE,
    "grain": lambda ink: 235 - 195 * ink + 12 * NOISE,
    "dim light": lambda ink: 100 - 75 * ink,
    "coloured ink and paper": lambda ink: coloured(ink, (240, 225, 120), (40, 60, 160)),
    "chalk": lambda ink: coloured(ink, (50, 75, 60), (215, 220, 210)),
    "black on transparent": lambda ink: with_alpha(ink, 0.0),
    "white on transparent": lambda ink: with_alpha(ink, 255.0),
    "partly transparent": half_transparent,
}


def save(pixels, **how):
    pixels = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
    # Transparency wants PNG; the recipe reads what is in the file, whatever its name says.
    form = "PNG" if pixels.shape[2:] == (4,) else "JPEG"
    Image.fromarray(pixels).save("digit.jpg", form, **how)


@pytest.mark.slow
def test_own_digit_is_upright_in_the_middle_and_as_likely(
    tmp_path, monkeypatch, mnist, trained_runs
):
    monkeypatch.chdir(tmp_path)
    digits = [0, 1, 3, 7]  # a seven, a two, a nought, a nine
    found = {}
    for digit in digits:
        ink = page_of(mnist[1][0][digit])
        save(clean(ink))
        found["clean", digit] = follow("Your own digit")["image"]
        for turns, orientation in ((1, 6), (2, 3), (3, 8)):
            exif = Image.Exif()
            exif[0x0112] = orientation
            save(np.rot90(235 - 195 * ink, turns), exif=exif)
            found[f"EXIF {orientation}", digit] = follow("Your own digit")["image"]
        for name, photograph in PHOTOGRAPHS.items():
            save(photograph(ink))
            found[name, digit] = follow("Your own digit")["image"]
        for mode in ("1", "P", "LA", "CMYK"):
            Image.fromarray(clean(ink).astype(np.uint8)).convert(mode).save("digit.jpg", "TIFF")
            found[mode, digit] = follow("Your own digit")["image"]
    images = np.stack(list(found.values()))
    mass = images / images.sum(axis=(1, 2), keepdims=True)
    middle = [np.sum(mass * place, axis=(1, 2)) for place in np.indices((28, 28))]
    np.testing.assert_allclose(middle, 14, atol=0.6)
    for rows in (np.any(images, axis=2), np.any(images, axis=1)):
        assert np.all(np.sum(rows, axis=1) <= 20)
    with vae_mnist.trained(trained_runs["mirrored"]) as (model, sess):
        nll = vae_mnist.evaluate(model, sess, images)["NLL"]
        own = vae_mnist.evaluate(model, sess, mnist[1][0][digits])["NLL"]
    nll = dict(zip(found, nll))
    for (name, digit), image in found.items():
        assert abs(nll[name, digit] - nll["clean", digit]) < 30, name
        assert abs(nll[name, digit] - own[digits.index(digit)]) < 35, name
        original = mnist[1][0][digit].ravel()
        assert np.corrcoef(image.ravel(), original)[0, 1] > 0.75, name


def test_own_digit_of_a_test_image_is_that_image(tmp_path, monkeypatch, mnist):
    """Black on white, five times as large: no smoother than the image itself."""
    monkeypatch.chdir(tmp_path)
    digit = mnist[1][0][0]
    ink = np.pad(digit.repeat(5, axis=0).repeat(5, axis=1) / 255, ((30, 30), (60, 40)))
    save(clean(ink))
    own = follow("Your own digit")["image"]
    assert np.corrcoef(own.ravel(), digit.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    "page", [255 + 0 * NOISE, 235 + 12 * NOISE, 235 * SHADE + 4 * NOISE, 0 * NOISE]
)
def test_own_digit_says_that_there_is_no_ink(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(page)
    with pytest.raises(SystemExit, match="^digit.jpg: found no ink"):
        follow("Your own digit")
