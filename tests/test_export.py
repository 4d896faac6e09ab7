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
from conftest import built
from processes import ROOT

import vae_mnist


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("decoder", ["tutorial", "mirrored"])
def test_export_gives_elsewhere_what_the_session_gives(decoder, tmp_path, mnist, capfd, caplog):
    """In TensorFlow, TFLite and Keras, for batches of different sizes, and without a warning."""
    z = np.random.default_rng(0).normal(size=(257, 2)).astype(np.float32)
    x = vae_mnist.scale(mnist[1][0][:257])
    path = str(tmp_path / "new" / "parents" / "model")
    with built(decoder=decoder, shards=2) as (model, sess):
        capfd.readouterr()
        with caplog.at_level(logging.WARNING, "tensorflow"):
            vae_mnist.export(model, sess, path)
            assert not caplog.records and capfd.readouterr() == ("", "")
            assert tf.logging.get_verbosity() == tf.logging.WARN  # as it was
        rec = model.decode(z, sess).reshape(-1, 784)
        mu, log_sig_sq = model.encode(x, sess)
    loaded = tf2.saved_model.load(path)
    converter = tf2.lite.TFLiteConverter.from_saved_model(path, signature_keys=["decode"])
    interpreter = tf2.lite.Interpreter(model_content=converter.convert())
    lite = interpreter.get_signature_runner("decode")
    layer = tf2.keras.layers.TFSMLayer(path, call_endpoint="encode")
    for n in (1, 257):
        decoded = loaded.signatures["decode"](z=tf2.constant(z[:n]))
        np.testing.assert_allclose(decoded["rec"], rec[:n], atol=1e-6)
        np.testing.assert_allclose(lite(z=z[:n])["rec"], rec[:n], atol=1e-4)
        encoded = loaded.signatures["encode"](x=tf2.constant(x[:n]))
        np.testing.assert_allclose(encoded["mu"], mu[:n], atol=1e-6)
        np.testing.assert_allclose(encoded["log_sig_sq"], log_sig_sq[:n], atol=1e-6)
        np.testing.assert_allclose(layer(x[:n])["mu"], mu[:n], atol=1e-5)
    # It is for use alone: without sampler, losses, optimizer and shards.
    operations = {operation.type for operation in loaded.graph.get_operations()}
    assert not operations & {"Split", "SplitV", "StatelessRandomNormalV2", "ResourceApplyAdam"}
    assert len(loaded.variables) == len(model.weights)


@pytest.mark.slow
def test_onnx_agrees_with_the_session(tmp_path):
    """Where it can be installed; converted as README says."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime for this Python")
    pytest.importorskip("tf2onnx", reason="no tf2onnx for this Python")
    z = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    with built() as (model, sess):
        vae_mnist.export(model, sess, tmp_path / "model")
        rec = model.decode(z, sess).reshape(-1, 784)
    file = str(tmp_path / "decoder.onnx")
    command = [sys.executable, "-m", "tf2onnx.convert", "--saved-model", str(tmp_path / "model")]
    command += ["--tag", "serve", "--signature_def", "decode", "--output", file]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    inference = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n in (1, 5):
        (result,) = inference.run(["rec"], {"z": z[:n]})
        np.testing.assert_allclose(result, rec[:n], atol=1e-5)


def test_export_into_what_exists_is_refused_and_one_that_fails_leaves_nothing(
    tmp_path, monkeypatch
):
    def save(self):
        raise OSError(28, "No space left on device")

    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(tf.saved_model.Builder, "save", save)  # when the variables are there
    with built() as (model, sess):
        with pytest.raises(FileExistsError, match="mine: there already"):
            vae_mnist.export(model, sess, tmp_path / "mine")
        with pytest.raises(OSError, match="No space"):
            vae_mnist.export(model, sess, tmp_path / "model")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def recipes():
    """Return README's code in Python, by the bold words before it."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"\*\*([^*\n]+)\*\*(?:(?!```).)*?```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == text.count("```python") == 5
    return [pytest.param(code, id=name) for name, code in found]


def write_idx(path, array, packed):
    """Write an array of bytes as the IDX files of MNIST are, unpacked or as it comes."""
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, trained_runs, mnist):
    """Return a directory in which a run has been made, as README's recipes expect it."""
    directory = tmp_path_factory.mktemp("recipes")
    shutil.copytree(trained_runs["tutorial"], directory / "outputs")
    paper = np.ones((200, 240, 4))  # black on white, RGBA: a test image five times as large
    digit = mnist[1][0][0].repeat(5, axis=0).repeat(5, axis=1)
    paper[30:170, 60:200, :3] -= digit[..., None] / 255
    matplotlib.image.imsave(directory / "digit.png", paper)
    for part, (images, labels) in (("train", mnist[0]), ("t10k", mnist[1])):
        write_idx(directory / f"{part}-images-idx3-ubyte", images[:90], packed=part == "t10k")
        write_idx(directory / f"{part}-labels-idx1-ubyte", labels[:90], packed=part == "t10k")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("code", recipes())
def test_recipe_of_readme_makes_what_it_says(code, workplace, mnist, monkeypatch):
    monkeypatch.chdir(workplace)
    (workplace / "recipe.py").write_text(code)
    names = runpy.run_path("recipe.py")
    if "digit.png" in code:  # of which a test image was the model
        own = names["image"].ravel()
        assert np.corrcoef(own, mnist[1][0][0].ravel())[0, 1] > 0.9
    elif "walk.png" in code:
        assert matplotlib.image.imread("outputs/walk.png").shape[:2] == (28, 20 * 28)
    elif "other.npz" in code:
        for part, whole in zip(vae_mnist.load_mnist("other.npz"), mnist):
            assert np.array_equal(part[0], whole[0][:90]) and np.array_equal(part[1], whole[1][:90])
    elif "tensorboard" in code:
        (path,) = (workplace / "outputs" / "tensorboard").iterdir()
        events = list(tf.train.summary_iterator(str(path)))
        (value,) = events[-1].summary.value
        assert value.tag == "RecLoss" and value.simple_value == pytest.approx(names["rec_loss"])
        graph = next(event.graph_def for event in events if event.graph_def)
        nodes = tf.GraphDef.FromString(graph).node
        parts = {node.name.split("/")[0] for node in nodes if "dense" not in node.name}
        assert parts > {"x", "encoder", "sampler", "z", "decoder", "rec", "losses", "Adam"}
    else:
        with vae_mnist.trained("outputs") as (model, sess):
            rec = model.decode([[0.5, -1.0]], sess).reshape(1, -1)
        np.testing.assert_allclose(names["rec"], rec, atol=1e-6)
