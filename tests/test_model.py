"""The model against NumPy in float64, closed forms and numeric estimates."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import built
from reference import LAYERS, Reference

import vae_mnist


def images(count, seed=0):
    """Return grey images with many exact zeros and ones, as MNIST has."""
    x = np.random.default_rng(seed).uniform(-1, 2, size=(count, 784))
    return np.clip(x, 0, 1).astype(np.float32)


@pytest.mark.parametrize(("decoder", "count"), [("tutorial", 288_472), ("mirrored", 485_396)])
def test_parameters_have_the_names_shapes_and_initial_values_of_tf_layers(decoder, count):
    layers = LAYERS[decoder]
    with built(decoder=decoder) as (_, sess):
        variables = tf.trainable_variables()
        names = [f"dense_{i}/{part}:0" for i in range(len(layers)) for part in ("kernel", "bias")]
        assert [v.name for v in variables] == [n.replace("dense_0", "dense") for n in names]
        values = sess.run(variables)
        for (fan_in, fan_out), kernel, bias in zip(layers, values[::2], values[1::2]):
            limit = np.sqrt(6 / (fan_in + fan_out))
            assert kernel.shape == (fan_in, fan_out) and bias.shape == (fan_out,)
            assert kernel.dtype == np.float32 and not bias.any()
            assert 0.9 * limit < np.abs(kernel).max() <= limit
            # A uniform distribution's standard deviation, within five standard errors of it.
            error = 5 * limit * np.sqrt(1 / 45 / kernel.size)
            assert abs(np.mean(kernel**2) - limit**2 / 3) < error * limit * 2
        if decoder == "tutorial":  # both 256 x 128, yet not the same
            assert not np.array_equal(values[2], values[10])
        assert sum(v.size for v in values) == count


def test_seed_decides_the_weights_whatever_the_shards():
    def weights(**settings):
        with built(**settings) as (_, sess):
            return sess.run(tf.trainable_variables()[::2])

    one, two, other = weights(seed=3, shards=1), weights(seed=3, shards=2), weights(seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize(
    ("decoder", "count", "shards"),
    [
        *(("tutorial", count, shards) for count in (1, 2, 7, 256) for shards in (1, 2)),
        *(("tutorial", count, 8) for count in (3, 256)),
        *(("mirrored", count, 2) for count in (7, 256)),
    ],
)
def test_step_matches_numpy(decoder, count, shards):
    """Losses, gradients and the update that Adam makes of them, against float64."""
    with built(seed=count, shards=shards, decoder=decoder) as (model, sess):
        x = images(count)
        for noise in (7, 8):  # the second step starts from biases that are not zero
            eps = np.random.default_rng(noise).standard_normal((count, 2)).astype(np.float32)
            variables = tf.trainable_variables()
            adam = [v for v in tf.global_variables() if "Adam" in v.name]
            before, slots = sess.run([variables, adam])
            reference = Reference(before, decoder)
            expected = reference.run(x, eps)
            fetches = [model.kld, model.rec_loss, model.loss, model.mu, model.z]
            fetches += [model.klds, model.rec_losses, model.opt]
            results = sess.run(fetches, {model.x: x, model.eps: eps})
            kld, rec_loss, loss, mu, z, klds, rec_losses, _ = results
            np.testing.assert_allclose([kld, rec_loss], expected, rtol=2e-6)
            np.testing.assert_allclose(loss, sum(expected), rtol=2e-6)
            logits, s = reference.logits, reference.log_sig_sq
            each = np.logaddexp(0, logits).sum(axis=1) - np.sum(x * logits, axis=1)
            np.testing.assert_allclose(rec_losses, each, rtol=4e-6)
            each = 0.5 * np.sum(np.exp(s) - s + reference.mu**2 - 1, axis=1)
            np.testing.assert_allclose(klds, each, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(mu, reference.mu, atol=2e-6)
            np.testing.assert_allclose(z, reference.z, atol=4e-6)
            after, slots_after = sess.run([variables, adam])
            t = noise - 6
            for i, old in enumerate(before):
                g = reference.gradients[i]
                m = 0.9 * slots[2 * i] + 0.1 * g
                v = 0.999 * slots[2 * i + 1] + 0.001 * g**2
                size = np.abs(g).max()
                np.testing.assert_allclose(slots_after[2 * i], m, atol=2e-6 * size, rtol=1e-5)
                np.testing.assert_allclose(
                    slots_after[2 * i + 1], v, atol=2e-9 * size**2, rtol=2e-5
                )
                # From the moments as they are in float32, since Adam divides one by the other.
                m, v = (slots_after[k].astype(np.float64) for k in (2 * i, 2 * i + 1))
                rate = 0.001 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
                new = old - rate * m / (np.sqrt(v) + 1e-8)
                np.testing.assert_allclose(after[i], new, atol=1e-7, rtol=1e-6)


def test_step_returns_the_losses_of_its_batch_and_counts_iterations():
    with built() as (model, sess):
        x = images(16)
        eps = sess.run(model.eps, {model.x: x})
        expected = Reference(sess.run(tf.trainable_variables())).run(x, eps)
        result = model.step(x, sess)
        assert [type(value) for value in result] == [float, float]
        np.testing.assert_allclose(result, expected, rtol=2e-6)
        assert sess.run(model.iteration) == 1


def test_gradient_of_the_loss_is_its_numeric_derivative():
    with built() as (model, sess):
        bias = tf.trainable_variables()[-1]
        x, z = images(5), np.random.default_rng(1).standard_normal((5, 2))
        feed = {model.x: x, model.z: z}
        gradient = sess.run(tf.gradients(model.rec_loss, bias)[0], feed)
        value, pixel, h = sess.run(bias), 300, 0.05
        losses = []
        for shift in (h, -h):
            shifted = value.copy()  # the variable may go on to use the array that it is given
            shifted[pixel] += shift
            bias.load(shifted, sess)
            losses.append(sess.run(model.rec_loss, feed))
        np.testing.assert_allclose(gradient[pixel], (losses[0] - losses[1]) / (2 * h), rtol=0.01)


def test_gradient_of_the_cross_entropy_reaches_images_and_logits():
    """x is data in training, but whoever asks for the gradient in x gets the right one too."""
    x, logits = images(3), np.random.default_rng(1).normal(0, 3, (3, 784)).astype(np.float32)
    with tf.Graph().as_default(), tf.Session() as sess:
        inputs = [tf.constant(x), tf.constant(logits)]
        gradients = sess.run(tf.gradients(7 * vae_mnist.total_cross_entropy(*inputs), inputs))
    np.testing.assert_allclose(gradients[0], -7 * logits, rtol=1e-6)
    np.testing.assert_allclose(gradients[1], 7 * (1 / (1 + np.exp(-logits)) - x), atol=2e-6)


@pytest.mark.parametrize("logit", [60.0, -60.0])
def test_loss_is_finite_and_its_gradient_alive_at_saturated_logits(logit):
    with tf.Graph().as_default(), tf.Session() as sess:
        logits = tf.constant([[logit]])
        wrong = tf.constant([[0.0 if logit > 0 else 1.0]])
        loss = vae_mnist.total_cross_entropy(wrong, logits)
        loss, gradient = sess.run([loss, tf.gradients(loss, logits)[0]])
        assert loss == 60 and gradient == np.sign(logit)


def test_kld_matches_a_monte_carlo_estimate():
    with built() as (model, sess):
        for v in tf.trainable_variables()[1:8:2]:  # so that the codes are far from N(0, I)
            v.load(np.random.default_rng(2).normal(0, 0.7, v.shape).astype(np.float32), sess)
        x = images(1)
        kld = sess.run(model.kld, {model.x: x})
        mu, log_sig_sq = (a[0].astype(np.float64) for a in model.encode(x, sess))
        sigma = np.exp(log_sig_sq / 2)
        z = mu + sigma * np.random.default_rng(3).standard_normal((400_000, 2))
        log_q = -0.5 * ((z - mu) / sigma) ** 2 - np.log(sigma)
        difference = np.sum(log_q + 0.5 * z**2, axis=1)
        assert kld > 0.1
        assert abs(kld - difference.mean()) < 5 * difference.std() / np.sqrt(len(z))


def test_z_has_the_moments_of_the_encoders_gaussian():
    count = 40_000
    with built() as (model, sess):
        bias = tf.trainable_variables()[7]
        bias.load(np.array([1.0, -2.0, -1.0, 0.5], np.float32), sess)
        x = np.repeat(images(1), count, axis=0)
        z, mu, s = sess.run([model.z, model.mu, model.log_sig_sq], {model.x: x})
    sigma = np.exp(s[0] / 2)
    np.testing.assert_allclose(z.mean(axis=0), mu[0], atol=5 * sigma.max() / count**0.5)
    np.testing.assert_allclose(z.std(axis=0), sigma, rtol=5 / (2 * count) ** 0.5)
    assert abs(np.corrcoef(z.T)[0, 1]) < 5 / count**0.5


def test_noise_depends_on_the_seed_and_the_iteration_alone():
    def noise(seed, iterations):
        with built(seed=seed) as (model, sess):
            for _ in range(iterations):
                model.step(images(8), sess)
            return [sess.run(model.eps, {model.x: images(8)}) for _ in range(2)]

    first, again = noise(0, 0)
    assert np.array_equal(first, again)
    assert not np.isclose(first, noise(0, 1)[0]).any()
    assert not np.isclose(first, noise(1, 0)[0]).any()
    assert np.array_equal(noise(0, 2)[0], noise(0, 2)[0])


def test_twenty_steps_twice_give_the_same_bytes():
    """No race between an update and gradients that are still being computed."""

    def variables(sess_of):
        with tf.Graph().as_default():
            model = vae_mnist.VAE(shards=2)
            with sess_of() as sess:
                sess.run(tf.global_variables_initializer())
                for i in range(20):
                    sess.run(model.opt, {model.x: images(256, seed=i)})
                return sess.run(tf.global_variables())

    for sess_of in (vae_mnist.session, tf.Session):
        for a, b in zip(variables(sess_of), variables(sess_of)):
            assert a.tobytes() == b.tobytes()


def test_shards_are_chosen_from_the_machine(monkeypatch):
    def chosen(cores, gpus=()):
        monkeypatch.setattr(vae_mnist.os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(gpus))
        return vae_mnist.shard_count()

    assert chosen(cores=1) == 1
    assert chosen(cores=2) == chosen(cores=64) == 2
    assert chosen(cores=64, gpus=["GPU:0"]) == 1


def test_training_step_leaves_the_losses_out():
    """What only the losses need does not run while nobody fetches them."""
    with built(shards=2) as (model, sess):
        metadata = tf.RunMetadata()
        options = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
        sess.run(model.opt, {model.x: images(8)}, options, metadata)
        ran = " ".join(
            node.timeline_label
            for device in metadata.step_stats.dev_stats
            for node in device.node_stats
        )
        assert "MatMul" in ran and "ApplyAdam" in ran
        assert "Softplus" not in ran


def test_encode_and_decode_match_numpy():
    with built() as (model, sess):
        x = images(9)
        reference = Reference(sess.run(tf.trainable_variables()))
        reference.run(x, np.zeros((9, 2)))
        mu, log_sig_sq = model.encode(x, sess)
        np.testing.assert_allclose(mu, reference.mu, atol=2e-6)
        np.testing.assert_allclose(log_sig_sq, reference.log_sig_sq, atol=2e-6)
        pixels = model.decode(reference.mu, sess)  # its z, as eps is 0 there
        assert pixels.shape == (9, 28, 28)
        expected = 1 / (1 + np.exp(-reference.logits))
        np.testing.assert_allclose(pixels.reshape(9, 784), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("method", "shape", "expected"),
    [
        ("step", (3, 28, 28), "shape (3, 28, 28) for Tensor x:0, which has shape (None, 784)"),
        ("step", (784,), "shape (784,) for Tensor x:0, which has shape (None, 784)"),
        ("encode", (2, 783), "shape (2, 783) for Tensor x:0, which has shape (None, 784)"),
        ("decode", (4, 3), "shape (4, 3) for Tensor z:0, which has shape (None, 2)"),
        ("decode", (2,), "shape (2,) for Tensor z:0, which has shape (None, 2)"),
    ],
)
def test_wrong_shape_is_refused_by_name(method, shape, expected):
    with built() as (model, sess):
        with pytest.raises(ValueError) as error:
            getattr(model, method)(np.zeros(shape), sess)
        assert expected in str(error.value).replace("'", "")


def test_unknown_decoder_is_refused_by_name():
    with tf.Graph().as_default(), pytest.raises(ValueError, match="tutorial, mirrored, got 'x'"):
        vae_mnist.VAE(decoder="x")


def test_import_builds_and_switches_nothing():
    assert tf.executing_eagerly()
    assert not tf.get_default_graph().get_operations()


@pytest.mark.slow
def test_two_models_in_one_graph_do_not_know_of_each_other(tmp_path, trained_runs, mnist):
    """Each one is restored, measured, saved and exported as if it were alone; no `with` is needed."""
    images = mnist[1][0][:20]
    alone = {}
    for decoder, run in trained_runs.items():
        with vae_mnist.trained(run) as (model, sess):
            alone[decoder] = vae_mnist.evaluate(model, sess, images, step=0.2)
            first_weights = sess.run([v.initializer.inputs[1] for v in model.weights])
            alone[decoder]["first"] = first_weights
    with tf.Graph().as_default() as graph:
        models = {decoder: vae_mnist.VAE(decoder=decoder) for decoder in trained_runs}
        sess = vae_mnist.session()
    for decoder, model in models.items():
        vae_mnist.restore(model, sess, trained_runs[decoder] / "checkpoint")
    count = len(graph.get_operations())
    for decoder, model in models.items():
        directory = trained_runs[decoder] / "checkpoint"
        vae_mnist.restore(model, sess, directory)
        figures = vae_mnist.evaluate(model, sess, images, step=0.2)
        for name, values in figures.items():
            assert np.array_equal(values, alone[decoder][name]), name
        vae_mnist.export(model, sess, tmp_path / decoder)
        vae_mnist.display_manifold(model, sess, tmp_path / f"{decoder}.png")
        assert (tmp_path / f"{decoder}.png").read_bytes() == (
            trained_runs[decoder] / "latent.png"
        ).read_bytes()
        first_weights = sess.run([v.initializer.inputs[1] for v in model.weights])
        for mine, expected in zip(first_weights, alone[decoder]["first"]):
            assert np.array_equal(mine, expected)
        vae_mnist.Run(tmp_path / f"{decoder}-run", {}, "", wanted=1).save(model, sess)
        directory = tmp_path / f"{decoder}-run" / "checkpoint"
        saved = tf.train.load_checkpoint(tf.train.latest_checkpoint(directory))
        directory = trained_runs[decoder] / "checkpoint"
        trained = tf.train.load_checkpoint(tf.train.latest_checkpoint(directory))
        names = trained.get_variable_to_shape_map()
        assert saved.get_variable_to_shape_map() == names
        for name in names:
            assert np.array_equal(saved.get_tensor(name), trained.get_tensor(name)), name
    assert len(graph.get_operations()) == count
    # A step of one leaves the other as it was.
    before = sess.run(models["mirrored"].weights)
    models["tutorial"].step(vae_mnist.scale(images), sess)
    for value, now in zip(before, sess.run(models["mirrored"].weights)):
        assert np.array_equal(value, now)
    iterations = [sess.run(model.iteration) for model in models.values()]
    assert iterations == [301, 1000]
    sess.close()
