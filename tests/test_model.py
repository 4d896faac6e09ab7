"""The model against NumPy in float64, closed forms and numeric estimates."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import built, rough
from reference import LAYERS

import vae_mnist

SLOW = pytest.mark.slow


def images(count, seed=0):
    """Return grey images with many exact zeros and ones, as MNIST has."""
    x = np.random.default_rng(seed).uniform(-1, 2, size=(count, 784))
    return np.clip(x, 0, 1).astype(np.float32)


@pytest.mark.parametrize("decoder", LAYERS)
def test_parameters_have_the_names_shapes_and_initial_values_of_tf_layers(decoder):
    layers = LAYERS[decoder]
    with built(decoder=decoder) as (_, sess):
        variables = tf.trainable_variables()
        values = sess.run(variables)
    names = [f"dense_{i}/{part}:0" for i in range(len(layers)) for part in ("kernel", "bias")]
    assert [v.name for v in variables] == [n.replace("dense_0", "dense") for n in names]
    for (fan_in, fan_out), kernel, bias in zip(layers, values[::2], values[1::2], strict=True):
        limit = np.sqrt(6 / (fan_in + fan_out))
        assert kernel.shape == (fan_in, fan_out) and bias.shape == (fan_out,)
        assert kernel.dtype == np.float32 and not bias.any()
        assert 0.9 * limit < np.abs(kernel).max() <= limit
        error = 10 * limit**2 / np.sqrt(45 * kernel.size)  # five standard errors, and more
        assert abs(np.mean(kernel**2) - limit**2 / 3) < error  # as of a uniform distribution
    if decoder == "tutorial":  # both 256 x 128, yet not the same
        assert not np.array_equal(values[2], values[10])


@pytest.mark.parametrize("decoder", LAYERS)
@pytest.mark.parametrize("shards", [pytest.param(1, marks=SLOW), 2, pytest.param(8, marks=SLOW)])
def test_step_is_that_of_numpy_and_of_minimize(decoder, shards):
    """Losses, gradients and the update that Adam makes of them, against float64."""
    with rough(scale=1, shards=shards, decoder=decoder) as (model, sess, reference):
        adam = tf.train.AdamOptimizer(0.001)
        minimize = adam.minimize(model.loss)
        sess.run([variable.initializer for variable in adam.variables()])
        state = [*model.variables, *adam.variables()]
        first = sess.run(state)
        named = {variable.op.name: variable for variable in model.variables}
        slots = [[named[f"{w.op.name}/{m}"] for m in ("Adam", "Adam_1")] for w in model.weights]
        for count in (1, 3, 256):
            x = images(count)
            fetches = [model.klds, model.rec_losses, model.z, model.eps, model.loss, model.weights]
            *found, eps, loss, before = sess.run(fetches, {model.x: x})
            returned = model.step(x, sess)
            assert [type(value) for value in returned] == [float, float]
            assert sess.run(model.iteration) == 1
            updated = sess.run([model.weights, slots])
            for variable, value in zip(state, first):
                variable.load(value, sess)
            sess.run(minimize, {model.x: x})
            minimized = sess.run(model.weights)
            for variable, value in zip(state, first):
                variable.load(value, sess)
            expected = reference.run(x, eps)
            np.testing.assert_allclose([*returned, loss], [*expected, sum(expected)], rtol=2e-6)
            klds, rec_losses, z = found
            np.testing.assert_allclose(rec_losses, reference.rec_losses, rtol=4e-6)
            np.testing.assert_allclose(klds, reference.klds, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(z, reference.z, atol=4e-6)
            for i, weights in enumerate(zip(before, *updated, minimized)):
                assert_adams_update(reference.gradients[i], *weights)


def assert_adams_update(g, old, new, slots, minimized):
    """A first update of weights by Adam is that of the gradient g, and that of `minimize`."""
    size = np.abs(g).max()
    m, v = (slot.astype(np.float64) for slot in slots)
    np.testing.assert_allclose(m, 0.1 * g, atol=2e-6 * size, rtol=1e-5)
    np.testing.assert_allclose(v, 0.001 * g**2, atol=2e-9 * size**2, rtol=2e-5)
    # From the moments as they are in float32, since Adam divides one by the other.
    step = 0.001 * np.sqrt(1 - 0.999) / (1 - 0.9) * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(new, old - step, atol=1e-7, rtol=1e-6)
    # It is nearly the gradient's sign: where that is 0 but for rounding, any.
    is_clear = np.abs(g) > 1e-4 * size
    np.testing.assert_allclose(new[is_clear], minimized[is_clear], atol=2e-6)


@pytest.fixture
def reference_variables():
    """As after tf.disable_v2_behavior(): reading such a variable makes no copy."""
    tf.disable_resource_variables()
    yield
    tf.enable_resource_variables()


def test_updates_have_the_same_bits_in_every_run(reference_variables):
    """Whether a weight changes while another gradient is computed would be chance."""
    x = images(64)
    results = set()
    with built() as (model, sess):
        first = sess.run(model.variables)
        for _ in range(20):
            for variable, value in zip(model.variables, first):
                variable.load(value, sess)
            for _ in range(10):
                sess.run(model.opt, {model.x: x})
            results.add(b"".join(value.tobytes() for value in sess.run(model.weights)))
    assert len(results) == 1


def test_first_weights_and_noise_do_not_depend_on_shards():
    values = []
    for shards in (1, 2, 3):
        with built(shards=shards) as (model, sess):
            values.append(sess.run([*model.weights, model.eps], {model.x: images(7)}))
    for ours, theirs in zip(values[0] * 2, values[1] + values[2], strict=True):
        assert np.array_equal(ours, theirs)


def test_gradients_of_the_loss_are_its_numeric_derivatives():
    """In a pixel, where the loss is linear, and in a code."""
    values = [images(5), np.random.default_rng(1).standard_normal((5, 2)).astype(np.float32)]
    with rough() as (model, sess, _):
        inputs = [model.x, model.z]
        gradients = tf.gradients(model.rec_loss, inputs, stop_gradients=model.z)
        gradients = sess.run(gradients, dict(zip(inputs, values)))
        for i, h in enumerate((0.5, 0.01)):
            losses = []
            for sign in (1, -1):
                shifted = [value.copy() for value in values]
                shifted[i][3, 1] += sign * h
                losses.append(sess.run(model.rec_loss, dict(zip(inputs, shifted))))
            expected = (losses[0] - losses[1]) / (2 * h)
            np.testing.assert_allclose(gradients[i][3, 1], expected, rtol=0.01)


@pytest.mark.parametrize("logit", [60, -60])
def test_loss_is_finite_and_its_gradient_alive_at_saturated_logits(logit):
    wrong = np.full((1, 784), 0 if logit > 0 else 1)
    with built() as (model, sess):
        bias = model.weights[-1]
        bias.load(np.full(784, logit, np.float32), sess)
        feed = {model.x: wrong, model.z: np.zeros((1, 2))}  # which all layers make zeros of
        loss, gradient = sess.run([model.rec_loss, tf.gradients(model.rec_loss, bias)[0]], feed)
    assert loss == 784 * 60 and (gradient == np.sign(logit)).all()


def test_seed_decides_weights_and_noise_which_is_standard_normal():
    """Another noise for every iteration, whatever came before it."""
    x = np.zeros((40_000, 784), np.float32)
    weights = {}
    noise = []
    for seed in (0, 1):
        with built(seed=seed) as (model, sess):
            weights[seed] = sess.run(model.weights[::2])
            for iteration in (0, 1):
                model.iteration.load(iteration, sess)
                once, again = [sess.run(model.eps, {model.x: x}) for _ in range(2)]
                assert np.array_equal(once, again)
                noise.append(once)
    assert not any(np.array_equal(a, b) for a, b in zip(weights[0], weights[1]))
    noise = np.concatenate(noise, axis=1)
    error = 40_000**-0.5
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=5 * error)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(8), atol=8 * error)
    assert 3.5 < noise.max() < 6


def test_encode_and_decode_match_numpy():
    x = images(9)
    with rough() as (model, sess, reference):
        mu, log_sig_sq = model.encode(x, sess)
        pixels = model.decode(mu, sess)
        with pytest.raises(ValueError, match=r"shape \(3, 28, 28\) for Tensor '?x:0"):
            model.encode(x[:3].reshape(3, 28, 28), sess)
    expected_mu, expected_log_sig_sq = reference.encode(x)
    np.testing.assert_allclose(mu, expected_mu, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(log_sig_sq, expected_log_sig_sq, rtol=1e-5, atol=2e-6)
    assert pixels.shape == (9, 28, 28)
    expected = 1 / (1 + np.exp(-reference.decode(mu)))
    np.testing.assert_allclose(pixels.reshape(9, 784), expected, atol=2e-6)


@pytest.mark.slow
def test_two_models_in_one_graph_do_not_know_of_each_other(tmp_path, mnist):
    """Each is trained, measured, saved and restored as if alone."""
    images = mnist[1][0][:20]

    def both():
        return [vae_mnist.VAE(decoder=decoder) for decoder in ("tutorial", "mirrored")]

    with tf.Graph().as_default(), vae_mnist.session() as sess:
        first, second = both()
        sess.run(tf.global_variables_initializer())
        before = sess.run(first.variables)
        second.step(vae_mnist.scale(images), sess)
        for old, new in zip(before, sess.run(first.variables), strict=True):
            assert np.array_equal(old, new)
        weights = sess.run(second.weights)
        measured = vae_mnist.evaluate(second, sess, images, step=0.2)
        name = second.saver.save(sess, str(tmp_path / "second"))
    with built(decoder="mirrored") as (alone, sess):
        for variable, value in zip(alone.weights, weights, strict=True):
            variable.load(value, sess)
        expected = vae_mnist.evaluate(alone, sess, images, step=0.2)
        assert all(np.array_equal(measured[name], expected[name]) for name in expected)
    with tf.Graph().as_default(), vae_mnist.session() as sess:
        _, second = both()
        vae_mnist.restore(second, sess, name)
        for old, new in zip(weights, sess.run(second.weights)):
            assert np.array_equal(old, new)
        assert sess.run(second.iteration) == 1
