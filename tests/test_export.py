"""The exported SavedModel, used without the module that wrote it, and the recipes in README."""

import gzip
import logging
import re
import runpy
import shutil
import struct
import subprocess
import sys

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf2
import tensorflow.compat.v1 as tf
from conftest import ROOT, built

import vae_mnist

ELSEWHERE = """
import sys
import numpy as np
import tensorflow as tf
results = {}
for decoder in ("tutorial", "mirrored"):
    given = np.load(f"{decoder}.npz")
    model = tf.saved_model.load(decoder)
    for n in (1, 257):
        encoded = model.signatures["encode"](x=tf.constant(given["x"][:n]))
        decoded = model.signatures["decode"](z=tf.constant(given["z"][:n]))
        for name, value in {**encoded, **decoded}.items():
            results[f"{decoder} {name} {n}"] = value.numpy()
assert "vae_mnist" not in sys.modules
np.savez("results.npz", **results)
"""


@pytest.mark.slow
def test_export_gives_elsewhere_what_the_session_gives(tmp_path, mnist, capfd, caplog):
    x = vae_mnist.scale(mnist[1][0][:257])
    z = np.random.default_rng(0).normal(size=(257, 2)).astype(np.float32)
    expected = {}
    level = tf.logging.get_verbosity()
    with caplog.at_level(logging.WARNING, "tensorflow"):
        for decoder in ("tutorial", "mirrored"):
            np.savez(tmp_path / f"{decoder}.npz", x=x, z=z)
            with built(decoder=decoder) as (model, sess):
                vae_mnist.export(model, sess, tmp_path / decoder)
                for n in (1, 257):
                    mu, log_sig_sq = model.encode(x[:n], sess)
                    rec = model.decode(z[:n], sess).reshape(n, -1)
                    for name, value in (("mu", mu), ("log_sig_sq", log_sig_sq), ("rec", rec)):
                        expected[f"{decoder} {name} {n}"] = value
    said = capfd.readouterr()
    assert not caplog.records and not said.out and "deprecated" not in said.err
    assert tf.logging.get_verbosity() == level
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, check=True, timeout=120)
    results = np.load(tmp_path / "results.npz")
    assert sorted(results) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(results[name], value, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("decoder", ["tutorial", "mirrored"])
def test_other_runtimes_agree_with_the_session(decoder, tmp_path):
    """TFLite, Keras and ONNX, for batches of different sizes; ONNX where it can be installed."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, 2)).astype(np.float32)
    x = rng.random((5, 784), np.float32)
    path = str(tmp_path / "model")
    with built(decoder=decoder) as (model, sess):
        vae_mnist.export(model, sess, path)
        rec = model.decode(z, sess).reshape(-1, 784)
        mu, log_sig_sq = model.encode(x, sess)
    keys = ["decode"]
    converter = tf2.lite.TFLiteConverter.from_saved_model(path, signature_keys=keys)
    interpreter = tf2.lite.Interpreter(model_content=converter.convert())
    decode = interpreter.get_signature_runner("decode")
    layer = tf2.keras.layers.TFSMLayer(path, call_endpoint="encode")
    for n in (1, 5):
        np.testing.assert_allclose(decode(z=z[:n])["rec"], rec[:n], atol=1e-4)
        np.testing.assert_allclose(layer(x[:n])["mu"], mu[:n], atol=1e-5)
    onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime for this Python")
    pytest.importorskip("tf2onnx", reason="no tf2onnx for this Python")
    expected = {"encode": {"mu": mu, "log_sig_sq": log_sig_sq}, "decode": {"rec": rec}}
    for signature, outputs in expected.items():
        given = {"x": x} if signature == "encode" else {"z": z}
        file = str(tmp_path / f"{signature}.onnx")
        command = [sys.executable, "-m", "tf2onnx.convert", "--saved-model", path]
        command += ["--tag", "serve", "--signature_def", signature, "--output", file]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        inference = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for n in (1, 5):
            results = inference.run(list(outputs), {k: v[:n] for k, v in given.items()})
            for result, value in zip(results, outputs.values()):
                np.testing.assert_allclose(result, value[:n], atol=1e-5)


def test_export_is_a_graph_for_use_alone(tmp_path):
    """Without sampler, losses, optimizer and shards, and with no variable that is not saved."""
    with built(shards=2) as (model, sess):
        vae_mnist.export(model, sess, tmp_path / "new" / "parents" / "model")
        parameters = sess.run(model.weights)
    loaded = tf2.saved_model.load(str(tmp_path / "new" / "parents" / "model"))
    operations = {operation.type for operation in loaded.graph.get_operations()}
    assert not operations & {"Split", "SplitV", "StatelessRandomNormalV2", "ResourceApplyAdam"}
    assert len(loaded.variables) == len(parameters)
    for variable, value in zip(loaded.variables, parameters):
        assert np.array_equal(variable.numpy(), value)


@pytest.mark.parametrize("there", ["directory", "file"])
def test_export_into_what_exists_is_refused(there, tmp_path):
    path = tmp_path / "model"
    path.mkdir() if there == "directory" else path.write_text("mine")
    refused = pytest.raises(FileExistsError, match="model: there already")
    with built() as (model, sess), refused as refusal:
        vae_mnist.export(model, sess, path)
    assert str(refusal.value).count("\n") == 0
    assert list(tmp_path.iterdir()) == [path]
    assert not list(path.iterdir()) if there == "directory" else path.read_text() == "mine"


def test_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def save(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tf.saved_model.Builder, "save", save)  # when the variables are there
    with built() as (model, sess), pytest.raises(OSError, match="No space"):
        vae_mnist.export(model, sess, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_graph_is_in_five_parts():
    with tf.Graph().as_default() as graph:
        vae_mnist.VAE()
        variables = {v.op.name for v in tf.global_variables()}
    parts = ("encoder", "sampler", "decoder", "losses", "adam", "save")
    places = {operation.name.split("/")[0] for operation in graph.get_operations()}
    assert places == {*parts, "x", "z", "rec", *(name.split("/")[0] for name in variables)}


# --------------------------------------------------------------------------- README's recipes
def recipes():
    """Return the code of README's recipes by heading; a heading may have several blocks."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("\n## Recipes") :].split("\n## ")[1]
    found = []
    for part in section.split("\n### ")[1:]:
        for kind, code in re.findall(
            r"^```(python|bash)\n(.*?)^```", part, re.MULTILINE | re.DOTALL
        ):
            found.append(pytest.param(kind, code, id=part.splitlines()[0]))
    return found


def write_idx(path, array):
    """Write an array of bytes as the IDX files of MNIST are: big-endian sizes, then the bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, trained_runs, mnist):
    """Return a directory in which a run has been made, as README's recipes expect it."""
    directory = tmp_path_factory.mktemp("recipes")
    shutil.copytree(trained_runs["tutorial"], directory / "outputs")
    (directory / ".venv").symlink_to(sys.prefix)
    (x_train, y_train), (x_test, y_test) = mnist
    given = {"train_images": x_train[:300], "train_labels": y_train[:300, None]}
    given |= {"test_images": x_test[:90], "test_labels": y_test[:90, None]}
    np.savez(directory / "pneumoniamnist.npz", **given)
    paper = np.ones((200, 240, 4))  # black on white, RGBA: a test image five times as large
    paper[30:170, 60:200, :3] -= x_test[0].repeat(5, axis=0).repeat(5, axis=1)[..., None] / 255
    matplotlib.image.imsave(directory / "digit.png", paper)
    write_idx(directory / "train-images-idx3-ubyte.gz", x_train[:500])
    write_idx(directory / "train-labels-idx1-ubyte.gz", y_train[:500])
    write_idx(directory / "t10k-images-idx3-ubyte.gz", x_test[:100])
    write_idx(directory / "t10k-labels-idx1-ubyte.gz", y_test[:100])
    for path in directory.glob("*-ubyte.gz"):  # unpacked, or as it came under a plain name
        content = path.read_bytes()
        plain = gzip.decompress(content) if path.name.startswith("train") else content
        path.with_suffix("").write_bytes(plain)
    return directory


def assert_like_mnists_own(image):
    """One's own digit, of which a test image was the model, lies in MNIST's form again."""
    assert image.dtype == np.uint8 and image.shape == (28, 28)
    original = vae_mnist.load_mnist()[1][0][0].astype(float)
    assert np.corrcoef(image.ravel().astype(float), original.ravel())[0, 1] > 0.9
    rows, columns = np.nonzero(image > 20)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 in (19, 20)
    for axis in (0, 1):
        centre = np.average(np.arange(28), weights=image.sum(axis=1 - axis))
        assert abs(centre - 13.75) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("kind, code", recipes())
def test_recipe(kind, code, workplace, monkeypatch):
    assert len(code.splitlines()) <= 24
    monkeypatch.chdir(workplace)
    if kind == "bash":
        subprocess.run(["bash", "-ec", code], check=True, timeout=120)
    else:
        (workplace / "recipe.py").write_text(code)
        names = runpy.run_path("recipe.py")
        if "reconstruction" in names:
            assert_like_mnists_own(names["image"])


@pytest.mark.slow
def test_recipes_made_what_they_say(workplace, mnist):
    """After all of them, what they wrote is what it should be."""
    outputs = workplace / "outputs"
    z = np.array([[0.5, -1.0]], np.float32)
    with vae_mnist.trained(outputs) as (model, sess):
        rec = model.decode(z, sess).reshape(1, -1)
        mu, _ = model.encode(vae_mnist.scale(mnist[1][0][[0, 1]]), sess)
        ends = model.decode(mu, sess)
    np.testing.assert_allclose(np.load(outputs / "rec.npy"), rec, atol=1e-6)
    walk = matplotlib.image.imread(outputs / "walk.png")
    assert walk.shape == (28, 28 * 20, 4)
    for shown, end in ((walk[:, :28], ends[0]), (walk[:, -28:], ends[1])):
        np.testing.assert_allclose(shown, matplotlib.colormaps["Greys_r"](end), atol=0.01)
    train, test = vae_mnist.load_mnist(workplace / "other.npz")
    assert all(np.array_equal(a, b[:300]) for a, b in zip(train, mnist[0]))
    assert all(np.array_equal(a, b[:90]) for a, b in zip(test, mnist[1]))
    train, test = vae_mnist.load_mnist(workplace / "fashion.npz")
    assert all(np.array_equal(a, b[:500]) for a, b in zip(train, mnist[0]))
    assert all(np.array_equal(a, b[:100]) for a, b in zip(test, mnist[1]))
    (events,) = (outputs / "tensorboard").iterdir()
    events = [event for event in tf.train.summary_iterator(str(events))]
    values = [{v.tag: v.simple_value for v in event.summary.value} for event in events]
    curves = [value for value in values if value]
    assert len(curves) > 1 and all(sorted(value) == ["KLD", "RecLoss"] for value in curves)
    assert 500 < curves[0]["RecLoss"] < 560 and curves[-1]["RecLoss"] < 300
    graph = tf.GraphDef.FromString(next(event.graph_def for event in events if event.graph_def))
    assert {"x", "z", "rec"} < {node.name for node in graph.node}
