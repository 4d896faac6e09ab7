"""The recipes in README, and what one of them exports, used without the module that made it."""

import gzip
import os
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
from processes import ROOT

import vae_mnist


def recipes():
    """Return README's code in Python, by the bold words before it."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"\*\*([^*\n]+)\*\*(?:(?!```).)*?```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == text.count("```python") == 5
    return dict(found)


@pytest.fixture(scope="module", params=["tutorial", "mirrored"])
def exported(request, tmp_path_factory, trained_runs, mnist):
    """What README's recipe exports, seven rows of inputs by name, and what a session makes of them."""
    directory = tmp_path_factory.mktemp("exported")
    output = shutil.copytree(trained_runs[request.param], directory / "outputs")
    code = recipes()["Export"]
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
@pytest.mark.parametrize("name", recipes())
def test_recipe_of_readme_makes_what_it_says(name, workplace, mnist, monkeypatch):
    code = recipes()[name]
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
        assert parts > {"x", "encoder", "z", "decoder", "rec", "losses", "fast_update"}
    else:
        with vae_mnist.trained("outputs") as (model, sess):
            rec = model.decode([[0.5, -1.0]], sess).reshape(1, -1)
        np.testing.assert_allclose(names["rec"], rec, atol=1e-6)
