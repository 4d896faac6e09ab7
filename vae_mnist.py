"""Train the variational autoencoder of Nate Merrill's 2019 tutorial on MNIST, in graph mode.

The encoder turns an image x, D = 784 pixels in [0, 1], into a Gaussian over a latent code z of
K = 2 dimensions; the decoder turns a code into r, the probability of white for every pixel. Both
are trained together on the negative evidence lower bound, in nats an image:

    KLD     = 1/2 sum_k (exp(log_sig_sq_k) - log_sig_sq_k + mu_k^2 - 1)             (1)
    RecLoss = -sum_d (x_d log r_d + (1 - x_d) log(1 - r_d))                         (2)

    python vae_mnist.py            # train for 5,000 iterations, then draw outputs/latent.png
    python vae_mnist.py --help     # all options and their defaults

In comments, shapes are written with B images a batch, D pixels and K latent dimensions.

Source: Nate Merrill, "Implementing an MNIST Variational Autoencoder in TensorFlow", 2019.
Method: Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv:1312.6114.
"""

import argparse
import hashlib
import json
import math
import mmap
import os
import signal
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

if __name__ == "__main__":
    # Settings of the whole process belong to the program, not to whoever imports the module. What
    # TensorFlow's C++ code says while it is loaded goes nowhere; Python's own errors still arrive.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is lost yet: Ctrl-C needs no words
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

import matplotlib.figure
import numpy as np
import tensorflow.compat.v1 as tf

if __name__ == "__main__":
    os.dup2(sys.stderr.fileno(), 2)

SIDE = 28  # pixels along an edge of an image
PIXELS = SIDE**2  # D
LATENT = 2  # K, two so that the codes can be drawn in a plane
DECODERS = {"tutorial": [256, 128, 64], "mirrored": [64, 128, 256]}  # units of the ELU layers
ITERATIONS = 5000  # a bit over 21 passes over the 60,000 images
BATCH_SIZE = 256  # images an iteration
LEARNING_RATE = 0.001  # Adam's own default
LOG_EVERY = 100  # iterations from one log line to the next
CHECKPOINT_EVERY = 500  # iterations, about two seconds of training
SETTINGS = ("decoder", "seed", "batch_size", "learning_rate")  # that decide a run's result
# Ten colours that colour-blind people can tell apart: Petroff 2021, arXiv:2107.02270.
COLOURS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]  # fmt: skip
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------- data
def load_mnist(path=None):
    """Load MNIST, or a data set of the same form such as Fashion-MNIST.

    Parameters
    ----------
    path : str or Path, optional
        An .npz archive with the arrays of `mnist.npz`. Default: `data/mnist.npz` beside this
        module; where that is missing, what `tf.keras.datasets.mnist.load_data()` has or downloads.

    Returns
    -------
    (x_train, y_train), (x_test, y_test)
        Images, uint8 (N, 28, 28) from 0 to 255, and labels, integers (N,).

    Raises OSError if there is no such file, or none at all and no download; ValueError if it is
    not such an archive. Pickled objects are never loaded.
    """
    if path is None and not (path := HERE / "data" / "mnist.npz").exists():
        try:
            return tf.keras.datasets.mnist.load_data()
        except Exception as error:  # Keras raises the bare class
            reason = f"no data: {path} is missing and MNIST cannot be downloaded ({error})"
            raise OSError(f"{reason}; get a file mnist.npz and give it with --data FILE") from error
    with open(path, "rb") as file:  # a missing file or a directory fails here, by name
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: expected an .npz archive, got another or a truncated file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            data = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
        for part in ("train", "test"):
            x, y = data[f"x_{part}"], data[f"y_{part}"]
            if x.dtype != np.uint8 or x.shape[1:] != (SIDE, SIDE) or not len(x):
                expected, got = f"x_{part} must be uint8 (N, {SIDE}, {SIDE}) with N > 0", x
            elif y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
                expected, got = f"y_{part} must be integers ({len(x)},)", y
            else:
                continue
            raise ValueError(f"{expected}, got {got.dtype} {got.shape}")
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a data set like mnist.npz: {error}") from error
    return (data["x_train"], data["y_train"]), (data["x_test"], data["y_test"])


def scale(images, out=None):
    """Return images, uint8 (B, 28, 28), as the network's input, float32 (B, D) in [0, 1]."""
    return np.divide(images.reshape(-1, PIXELS), np.float32(255), out=out)


@lru_cache(maxsize=1)
def batch_indices(images, batch_size, seed, block):
    """Return which images the 64 iterations of a block draw, integers (64, B).

    One generator for 64 iterations, since making one is slow after a training step, when all that
    it needs has left the processor's cache.
    """
    return np.random.default_rng([seed, block]).integers(images, size=(64, batch_size))


def random_batch(x_train, batch_size, seed, iteration, out=None):
    """Return the batch of an iteration, float32 (B, D), drawn with replacement.

    It depends on (seed, iteration) alone, so no generator's state has to outlive an iteration.
    """
    block, row = divmod(iteration, 64)
    batch_idx = batch_indices(len(x_train), batch_size, seed, block)[row]
    return scale(x_train[batch_idx], out)


def batch_memory(batch_size):
    """Return an array for batches, float32 (B, D), that TensorFlow reads in place when it is fed.

    It would copy one that does not start at a multiple of 64 bytes, as a new page does.
    """
    try:
        pages = mmap.mmap(-1, 4 * batch_size * PIXELS)
    except OSError as error:
        raise MemoryError(f"no memory for a batch of {batch_size} images") from error
    return np.frombuffer(pages, np.float32).reshape(-1, PIXELS)


# --------------------------------------------------------------------------------------- model
def shard_count():
    """Return how many shards of a batch to compute side by side: 2, or 1 on one core or a GPU.

    The matrix products here are so small that a second thread costs one of them more in waiting
    than it saves, but two that do not depend on each other do gain from two threads. More shards
    than two make the products smaller still and gain nothing; a GPU prefers the batch whole.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if cores == 1 or tf.config.list_physical_devices("GPU") else 2


def session():
    """Open a session on the current graph, with one thread for each shard of a batch."""
    shards = shard_count()
    threads = {"intra_op_parallelism_threads": 1, "inter_op_parallelism_threads": shards}
    options = tf.GPUOptions(allow_growth=True)  # a GPU's memory as needed, not all of it
    config = tf.ConfigProto(gpu_options=options, **(threads if shards > 1 else {}))
    return tf.Session(config=config)


def split(batch, shards):
    """Split a tensor into shards along its first axis; the last takes what is left over."""
    return tf.split(batch, [tf.shape(batch)[0] // shards] * (shards - 1) + [-1])


def dense(fc, units, activation=None):
    """Apply a fully connected layer to every shard, as `tf.layers.dense` did to a batch.

    The variables have its names (`dense/kernel`, `dense/bias`, `dense_1/kernel`, ...) and its
    initial values: Glorot uniform (Glorot and Bengio 2010) and zeros.
    """
    with tf.variable_scope(None, default_name="dense"):
        layer = len(tf.trainable_variables())  # with the graph's seed, it decides the weights
        kernel = tf.get_variable(
            "kernel", [fc[0].shape[1], units], initializer=tf.glorot_uniform_initializer(layer)
        ).value()  # read once, for all the shards
        bias = tf.get_variable("bias", [units], initializer=tf.zeros_initializer()).value()
        fc = [tf.nn.bias_add(tf.matmul(shard, kernel), bias) for shard in fc]
        return [activation(shard) for shard in fc] if activation else fc


@tf.custom_gradient
def cross_entropy(x, logits):
    """Return equation (2) for r = sigmoid(logits), (B, D), summed over the batch, and its gradient.

    -(x log r + (1 - x) log(1 - r)) = softplus(logits) - x logits stays finite where r rounds to 0
    or 1, and its derivative r - x does not vanish there. Given in closed form, it also lets a
    training step leave out the loss itself.
    """
    loss = tf.reduce_sum(tf.nn.softplus(logits) - x * logits)
    return loss, lambda upstream: (-upstream * logits, upstream * (tf.sigmoid(logits) - x))


def check_shape(name, array, *shape):
    """Return array as float32; raise ValueError unless it has B rows of the given shape."""
    array = np.asarray(array, np.float32)
    if array.ndim != 1 + len(shape) or array.shape[1:] != shape:
        expected = ", ".join(map(str, ("B", *shape)))
        raise ValueError(f"{name} must have shape ({expected}), got {array.shape}")
    return array


class VAE:
    """The tutorial's variational autoencoder, built in the current default graph.

    Parameters
    ----------
    learning_rate : float, default 0.001
        Step size of Adam (Kingma and Ba 2015), whose other settings keep their defaults.
    seed : int, default 0
        Decides the initial weights (through the graph's seed) and, with the number of updates
        made, the noise eps.
    shards : int, optional
        Parts of a batch that are computed side by side. They change no result but by rounding.
        Default: what `shard_count` finds best for the machine.
    decoder : {"tutorial", "mirrored"}, default "tutorial"
        The decoder of the tutorial's listing, which repeats the encoder's layers down to 4 linear
        units, or the one that its text describes, which widens up to the image.

    Attributes
    ----------
    x, z, rec : tensors, float32 (B, 784), (B, 2), (B, 784)
        Images in [0, 1], their codes, and the decoder's images in (0, 1).
    mu, log_sig_sq : tensors, float32 (B, 2)
        Mean and logarithm of the variance of q(z | x).
    kld, rec_loss, loss : tensors, float32 scalars
        Equations (1) and (2), averaged over the batch, and their sum, in nats an image.
    log_px_z : tensor, float32 (images, codes)
        log p(x | z) in nats of every image of x with every code of z.
    opt : operation
        One update of all the variables by Adam; it also counts `iteration` up.
    """

    def __init__(self, learning_rate=LEARNING_RATE, seed=0, shards=None, decoder="tutorial"):
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        self.decoder, shards = decoder, shards or shard_count()
        tf.set_random_seed(seed)
        self.iteration = tf.train.get_or_create_global_step()  # updates made, int64

        # Input data Tensor
        self.x = tf.placeholder(tf.float32, shape=[None, PIXELS], name="x")
        batch_size = tf.shape(self.x)[0]
        fc = x = split(self.x, shards)
        for n in [256, 128, 64]:
            fc = dense(fc, units=n, activation=tf.nn.elu)
        fc = tf.concat(dense(fc, units=2 * LATENT), axis=0)
        # estimate log sigma^2 for numerical stability
        mu, log_sig_sq = self.mu, self.log_sig_sq = tf.split(fc, 2, axis=1)  # (B, K) each

        # z = mu + sigma * epsilon
        # epsilon is a sample from a N(0, 1) distribution, another one for every iteration
        self.eps = eps = tf.random.stateless_normal([batch_size, LATENT], [seed, self.iteration])
        # Random normal variable for decoder :D
        # Graph mode lets a run feed any tensor, not only placeholders: whoever feeds z overrides
        # the sampler, and neither x nor the encoder is needed. So one graph trains and draws.
        self.z = tf.add(mu, tf.exp(log_sig_sq / 2) * eps, name="z")

        fc = split(self.z, shards)
        for n in DECODERS[decoder]:
            fc = dense(fc, units=n, activation=tf.nn.elu)
        if decoder == "tutorial":
            fc = dense(fc, units=4)
        logits = dense(fc, units=PIXELS)
        # sigmoid bounds answer to [0,1] for images
        self.rec = tf.sigmoid(tf.concat(logits, axis=0), name="rec")

        # log p(x | z) = x . logits - sum softplus(logits), of all images with all codes: graph mode
        # computes it for a report, which fetches it, and leaves it out of training
        normalizer = [tf.reduce_sum(tf.nn.softplus(shard), axis=1) for shard in logits]
        dot = [tf.matmul(self.x, shard, transpose_b=True) for shard in logits]
        self.log_px_z = tf.concat(dot, axis=1) - tf.concat(normalizer, axis=0)

        # Both losses are summed over pixels or dimensions and averaged over the batch.
        images = tf.cast(batch_size, tf.float32)
        # reconstruction loss
        self.rec_loss = tf.add_n([cross_entropy(*pair) for pair in zip(x, logits)]) / images
        # KLD( (mu, sigma) , N(0,1) ) = .5 (tr(sigma2) + mu^T mu - k - log det(sigma2))
        kld = 0.5 * tf.reduce_sum(tf.exp(log_sig_sq) + tf.square(mu) - 1.0 - log_sig_sq)
        self.kld = kld / images
        self.loss = self.kld + self.rec_loss
        adam, ungated = tf.train.AdamOptimizer(learning_rate), tf.train.Optimizer.GATE_NONE
        gradients, variables = zip(*adam.compute_gradients(self.loss, gate_gradients=ungated))
        # The first layer's gradient comes last and its update takes longest, so it starts at once.
        # The other updates wait for all gradients, or they would hold up products on the way there.
        gradients = [gradients[0], *tf.tuple(gradients)[1:]]
        self.opt = adam.apply_gradients(zip(gradients, variables), global_step=self.iteration)

    def step(self, batch, sess):
        """Make one update on batch, (B, 784) in [0, 1]; return its kld, rec_loss as floats."""
        batch = check_shape("batch", batch, PIXELS)
        _, kld, rec_loss = sess.run([self.opt, self.kld, self.rec_loss], {self.x: batch})
        return float(kld), float(rec_loss)

    def encode(self, batch, sess):
        """Return mu, log_sig_sq, float32 (B, 2), of q(z | x) for images (B, 784) in [0, 1]."""
        batch = check_shape("batch", batch, PIXELS)
        return sess.run([self.mu, self.log_sig_sq], {self.x: batch})

    def decode(self, z, sess):
        """Return the images, float32 (B, 28, 28) in [0, 1], that the codes z, (B, 2), stand for."""
        return sess.run(self.rec, {self.z: check_shape("z", z, LATENT)}).reshape(-1, SIDE, SIDE)

    def restore(self, directory, sess):
        """Load the newest complete checkpoint in a directory, in place of any other values.

        A checkpoint that the tutorial's own program saved will do: what it lacks, such as the
        iteration number, is initialized. Raises ValueError if there is none, if it is damaged, or
        if it is of another network.
        """
        run = read_run(directory)
        if run and (held := run["settings"]["decoder"]) != self.decoder:
            raise ValueError(f"{directory}: has the {held} decoder, not the {self.decoder} one")
        prefix = f"{directory}/{run['model']}" if run else tf.train.latest_checkpoint(directory)
        if prefix is None:
            raise ValueError(f"{directory}: expected a directory with a checkpoint, found none")
        try:
            shapes = tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
            for name, shape in ((v.op.name, v.shape.as_list()) for v in tf.trainable_variables()):
                if (found := shapes.get(name, "missing")) != shape:
                    raise ValueError(f"of another network: {name} must be {shape}, is {found}")
            sess.run(tf.global_variables_initializer())
            saved = [v for v in tf.global_variables() if v.op.name in shapes]
            tf.train.Saver(saved).restore(sess, prefix)
        except (tf.errors.OpError, RuntimeError, ValueError) as error:
            raise ValueError(f"{prefix}: not a checkpoint to use: {one_line(error)}") from error


# ------------------------------------------------------------------------------------ pictures
@contextmanager
def whole_file(path):
    """Open a binary file that takes path's place once it is complete, and never before."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_picture(fig, path):
    """Write a figure as a PNG file, whole or not at all."""
    with whole_file(path) as file:
        fig.savefig(file, format="png")


def display_manifold(model, sess, path, show=False):
    """Draw 30 x 30 images, decoded over [-2, 2] in both latent dimensions, into a PNG file.

    Each decoded pixel is one pixel of the file, unsmoothed. show=True also opens a window, where
    there is a display. Returns all the images as one, ndarray (840, 840), float32 in [0, 1], in
    which z[0] grows to the right and z[1] upwards.
    """
    n = 30
    grid_x = np.linspace(-2, 2, n)
    grid_y = grid_x[::-1]
    z = np.stack(np.meshgrid(grid_x, grid_y), axis=-1).reshape(-1, LATENT)  # (n * n, K), by rows
    digits = model.decode(z, sess).reshape(n, n, SIDE, SIDE)
    figure = digits.swapaxes(1, 2).reshape(n * SIDE, n * SIDE)

    left, bottom, width, height = 70, 60, n * SIDE + 90, n * SIDE + 80  # pixels of the file
    if show:
        from matplotlib import pyplot as plt
    new_figure = plt.figure if show else matplotlib.figure.Figure
    fig = new_figure(figsize=(width / 100, height / 100), dpi=100)
    area = (left / width, bottom / height, n * SIDE / width, n * SIDE / height)
    edges = (-0.5, n * SIDE - 0.5)
    axes = fig.add_axes(area, xlabel="z[0]", ylabel="z[1]", xlim=edges, ylim=edges[::-1])
    grey = matplotlib.colormaps["Greys_r"](figure, bytes=True)  # (840, 840, 4)
    fig.figimage(grey, left, bottom)  # unlike imshow, it never resamples
    axes.patch.set_visible(False)
    axes.spines[:].set_position(("outward", 3))  # on the edge they would cover pixels
    axes.spines[["top", "right"]].set_visible(False)
    coordinates = np.linspace(-2, 2, 9)
    ticks = (coordinates + 2) / 4 * (n - 1) * SIDE + (SIDE - 1) / 2  # centres of the images
    axes.set_xticks(ticks, coordinates)
    axes.set_yticks(ticks[::-1], coordinates)
    save_picture(fig, path)
    if show:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without a display there is no window, only the file
            plt.show()
        plt.close(fig)
    return figure


# ------------------------------------------------------------------------------------ training
def live_line(text=""):
    """Show text in place of the live line on a terminal's standard error, and nowhere else."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def train(model, sess, x_train, run, args, stopped, save):
    """Go on with a run up to args.iterations, or until a signal's number is in `stopped`.

    The record of the run (see `check_run`) is kept up to date; save() saves it. Raises
    FloatingPointError where a loss is not finite, with nothing of that iteration saved.
    """
    # Where nobody fetches the losses, graph mode leaves out what only they need.
    update = sess.make_callable(model.opt, feed_list=[model.x])
    x_batch = batch_memory(args.batch_size)
    first, last = run["iteration"], args.iterations
    start = shown = time.monotonic()

    def checked(i, kld, rec_loss):
        text = f"KLD = {kld:f}, RecLoss = {rec_loss:f}"
        if not math.isfinite(kld + rec_loss):
            live_line()
            remedy = f"try a lower --learning-rate than {args.learning_rate}"
            raise FloatingPointError(f"iteration {i}: {text}, so training stopped; {remedy}")
        return text

    for i in range(first, last):
        random_batch(x_train, args.batch_size, args.seed, i, out=x_batch)
        if i % args.log_every == 0:
            kld, rec_loss = model.step(x_batch, sess)
            text = checked(i, kld, rec_loss)
            run["log"].append([i, kld, rec_loss])
            live_line()
            print(f"Iteration {i}: {text}", flush=True)
        else:
            update(x_batch)
        done = run["iteration"] = i + 1
        if done % args.checkpoint_every == 0 or done == last or stopped:
            # The next iteration's losses show whether the weights to be saved are sound.
            random_batch(x_train, args.batch_size, args.seed, done, out=x_batch)
            checked(done, *sess.run([model.kld, model.rec_loss], {model.x: x_batch}))
            save()
            if stopped:  # asked here alone, so that nothing stops between a check and the save
                break
        if time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            speed = (done - first) / (shown - start)
            left = (last - done) / speed
            live_line(f"{done / last:4.0%}, {speed:.0f} iterations/s, {left:.0f} s left")
    live_line()


@contextmanager
def stop_signals():
    """Yield a list that gets the number of a SIGINT or SIGTERM; a second one ends the process."""
    stopped, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def note(number, _):
        stopped.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    previous = [signal.signal(each, note) for each in numbers]
    try:
        yield stopped
    finally:
        for each, handler in zip(numbers, previous):
            signal.signal(each, handler)


# --------------------------------------------------------------------------------- checkpoints
def read_run(directory):
    """Return the record of the newest complete checkpoint in a directory, None if it has none.

    Raises ValueError if there is a record, but a damaged one.
    """
    path = Path(directory) / "run.json"
    try:
        run = json.loads(path.read_bytes())
        if {"model", "iteration", "iterations", "settings", "log"} <= run.keys():
            run["settings"].setdefault("decoder", "tutorial")  # once there was no other
            return run
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path}: expected the record of a checkpoint, got a damaged file")


def save_checkpoint(saver, sess, output_dir, run):
    """Save all the variables and the record of their run, then its log as log.csv.

    The variables go to files of a new name; only when these are complete does run.json, replaced in
    one step, name them, so that at every moment it belongs to a whole checkpoint. Raises OSError if
    that fails; the older checkpoint is then still there.
    """
    directory, name = output_dir / "checkpoint", f"model-{run['iteration']}"
    if name == run.get("model"):  # what is to be replaced ended at the same iteration
        name += "-new"
    directory.mkdir(exist_ok=True)
    try:
        saver.save(sess, str(directory / name), write_meta_graph=False)
    except (tf.errors.OpError, ValueError) as error:
        raise OSError(f"{directory}: cannot save a checkpoint: {one_line(error)}") from error
    run["model"] = name
    with whole_file(directory / "run.json") as file:
        file.write(json.dumps(run).encode())
    write_log(output_dir, run)
    for path in directory.iterdir():  # older checkpoints, and what a killed run left unfinished
        if path.name.startswith(("model-", "checkpoint.tmp")) and path.stem != name:
            path.unlink()


def write_log(output_dir, run):
    """Write the lines of the run's log, at full precision, as log.csv."""
    lines = ["iteration,kld,rec_loss", *(",".join(map(repr, line)) for line in run["log"]), ""]
    with whole_file(output_dir / "log.csv") as file:
        file.write("\n".join(lines).encode())


def check_run(args, settings):
    """Return the record of the run that goes on or begins, as the command line asks for it.

    Raises ValueError if that would lose an unfinished run, or mix two runs.
    """
    directory, run = args.output_dir / "checkpoint", None
    try:
        run = read_run(directory)
    except ValueError as error:
        if not args.overwrite:
            raise ValueError(f"{error}; --overwrite begins a new run in its place") from error
    if args.resume and not run:
        raise ValueError(f"--resume: there is no checkpoint in {directory}")
    if run:
        unfinished = run["iteration"] < run["iterations"]
        state = f"the run in {args.output_dir} stopped after {run['iteration']} of "
        state += f"{run['iterations']} iterations"
    if args.resume:
        for name, value in settings.items():
            if value != (old := run["settings"].get(name)):
                option = f"--{name.replace('_', '-')} is {value}"
                raise ValueError(f"--resume: {option}, but the run in {args.output_dir} has {old}")
        if unfinished and args.iterations < run["iteration"]:
            raise ValueError(f"--resume: {state}, beyond --iterations {args.iterations}")
        return {**run, "iterations": max(args.iterations, run["iteration"])}
    if run and not args.overwrite:
        if unfinished:
            raise ValueError(f"{state}: go on with --resume, or replace it with --overwrite")
        print(f"Replacing the finished run in {args.output_dir}", flush=True)
    new = {"iteration": 0, "iterations": args.iterations, "settings": settings, "log": []}
    return {**new, "model": run and run["model"]}


# -------------------------------------------------------------------------------------- report
def evaluate(model, sess, images, seed=0, reach=6.0, step=0.03, stopped=()):
    """Measure what a model has learnt of images, uint8 (N, 28, 28), in nats an image.

    Parameters
    ----------
    seed : int, default 0
        Decides the samples of z, 100 an image.
    reach, step : float, default 6.0 and 0.03
        Of the grid of codes, over [-reach, reach] in both dimensions.
    stopped : sequence, default ()
        As soon as there is something in it, the measuring ends and None is returned.

    Returns
    -------
    dict of str to ndarray of shape (N,), float64
        "RecLoss", "KLD", "-ELBO": equations (2), averaged over the samples, (1), and their sum.
        "IW bound": the importance-weighted bound, -log 1/100 sum_k p(x, z_k) / q(z_k | x) (Burda,
        Grosse and Salakhutdinov 2015, arXiv:1509.00519). "NLL": the negative log-likelihood itself,
        -log of the integral of N(z; 0, I) p(x | z) dz, as a sum over the grid.
    """
    rng, x = np.random.default_rng(seed), scale(images)
    log_px_z = sess.make_callable(model.log_px_z, feed_list=[model.x, model.z])
    mu, log_sig_sq = np.float64(model.encode(x, sess))
    kld = 0.5 * np.sum(np.exp(log_sig_sq) - log_sig_sq + mu**2 - 1, axis=1)
    rec_loss, iw_bound = np.empty((2, len(x)))
    for i, (mean, log_var) in enumerate(zip(mu, log_sig_sq)):
        if stopped:
            return None
        eps = rng.standard_normal((100, LATENT))
        z = mean + np.exp(log_var / 2) * eps
        log_px = np.float64(log_px_z(x[i : i + 1], z)[0])
        rec_loss[i] = -np.mean(log_px)
        log_ratio = log_px + 0.5 * np.sum(eps**2 - z**2 + log_var, axis=1)
        iw_bound[i] = np.log(100) - np.logaddexp.reduce(log_ratio)

    grid = np.linspace(-reach, reach, round(2 * reach / step) + 1)
    codes = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, LATENT)
    log_px = np.full(len(x), -np.inf)
    for z in np.array_split(codes, 1 + len(codes) // 500):  # in blocks: memory stays small
        if stopped:
            return None
        log_joint = log_px_z(x, z) - np.float32(np.sum(z**2, axis=1) / 2)
        largest = log_joint.max(axis=1)
        total = np.sum(np.exp(log_joint - largest[:, None]), axis=1, dtype=np.float64)
        log_px = np.logaddexp(log_px, largest + np.log(total))
    nll = np.log(2 * np.pi / (grid[1] - grid[0]) ** 2) - log_px
    names = ("RecLoss", "KLD", "-ELBO", "IW bound", "NLL")
    return dict(zip(names, (rec_loss, kld, rec_loss + kld, iw_bound, nll)))


def draw_codes(mu, labels, title, path):
    """Draw codes, (N, K), coloured by their labels, integers (N,), into a PNG file."""
    fig = matplotlib.figure.Figure(figsize=(8, 7.2), dpi=100, layout="constrained")
    axes = fig.add_subplot(title=title, xlabel="mu[0]", ylabel="mu[1]", aspect="equal")
    axes.scatter(*mu.T, s=3, c=[COLOURS[label % 10] for label in labels])
    for label in np.unique(labels):
        axes.scatter([], [], c=COLOURS[label % 10], label=label)
    fig.legend(loc="outside right upper", title="digit")
    for sigma in (1, 2):
        axes.add_patch(matplotlib.patches.Circle((0, 0), sigma, fill=False))
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        axes.text(0, sigma, f"{sigma} sigma", ha="center", va="center", bbox=box)
    save_picture(fig, path)


def draw_reconstructions(model, sess, images, labels, title, path):
    """Draw ten images of each of ten classes over what the model makes of their mu, as PNG."""
    classes = np.unique(labels)[:10]
    sheet = np.zeros((len(classes), 2, SIDE, 10, SIDE), np.float32)
    for (above, below), label in zip(sheet, classes):
        x = images[labels == label][:10]
        mu, _ = model.encode(scale(x), sess)
        above[:, : len(x)] = x.swapaxes(0, 1) / 255
        below[:, : len(x)] = model.decode(mu, sess).swapaxes(0, 1)
    fig = matplotlib.figure.Figure(figsize=(5.6, 10), dpi=100, layout="constrained")
    axes = fig.add_subplot(title=title, ylabel="digit", xticks=[])
    axes.imshow(sheet.reshape(-1, 10 * SIDE), cmap="Greys_r", interpolation="nearest")
    axes.set_yticks(np.arange(SIDE, len(classes) * 2 * SIDE, 2 * SIDE) - 0.5, classes)
    save_picture(fig, path)


def draw_training(log, path):
    """Draw both losses of a run's log, [[iteration, kld, rec_loss], ...], into a PNG file."""
    iterations, *losses = np.transpose(log)
    fig = matplotlib.figure.Figure(figsize=(8, 6), dpi=100, layout="constrained")
    for axes, name, values in zip(fig.subplots(2, sharex=True), ("KLD", "RecLoss"), losses):
        axes.plot(iterations, values, ".-", markersize=4, linewidth=0.8)
        title = f"{name} of one batch: {values[-1]:.2f} nats an image in iteration {log[-1][0]}"
        axes.set(title=title, ylabel=f"{name}, nats an image")
        axes.grid(alpha=0.3)
    axes.set(yscale="log", xlabel="iteration")  # RecLoss falls far at once, and then slowly
    axes.yaxis.set_major_locator(matplotlib.ticker.MultipleLocator(50))
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    save_picture(fig, path)


def report(model, sess, test, run, output_dir, stopped):
    """Print what `evaluate` measures on the test set, save it as metrics.json, draw pictures.

    Returns whether there was time for it, before a signal's number was in `stopped`.
    """
    x_test, y_test = test
    count = f"{len(x_test):,} test images"
    live_line(f"Measuring {count}")
    figures = evaluate(model, sess, x_test, stopped=stopped)
    live_line()
    if figures is None:
        return False
    print(f"On {count}, nats an image (standard error):")
    metrics = {}
    for name, values in figures.items():
        mean, error = np.mean(values), np.std(values) / len(values) ** 0.5
        metrics[name] = {"mean": mean, "standard_error": error}
        print(f"{name:8} {mean:8.2f} ({error:.2f})")
    content = {"settings": run["settings"], "iteration": run["iteration"], "metrics": metrics}
    with whole_file(output_dir / "metrics.json") as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
    mu, _ = model.encode(scale(x_test), sess)
    title = f"Codes of {count}: KLD {metrics['KLD']['mean']:.2f} nats an image"
    draw_codes(mu, y_test, title, output_dir / "codes.png")
    title = f"RecLoss {metrics['RecLoss']['mean']:.2f} nats an image"
    title = f"Test images, each over its reconstruction:\n{title}"
    draw_reconstructions(model, sess, x_test, y_test, title, output_dir / "reconstructions.png")
    draw_training(run["log"], output_dir / "training.png")
    print(f"The figures are in {output_dir / 'metrics.json'}, three pictures beside it")
    return True


# -------------------------------------------------------------------------------- command line
def number(kind, least, most, expected):
    """Return a function that reads an argument: a number of a kind, from least to most."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return read


def parse_arguments(argv):
    """Return the parser of the command line, and the options."""
    parser = argparse.ArgumentParser(
        prog="vae_mnist.py",
        description="Train a variational autoencoder on MNIST and draw its latent manifold.",
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # a line

    def add(name, text, default, to=parser, **how):
        to.add_argument(name, default=default, help=f"{text} (default: %(default)s)", **how)

    positive = number(int, 1, 2**31 - 1, "a whole number from 1 to 2147483647")
    seed = number(int, 0, 2**31 - 1, "a whole number from 0 to 2147483647")
    rate = number(float, 1e-45, np.finfo(np.float32).max, "a number above 0")
    parser.add_argument("--data", metavar="FILE", help="an .npz archive (default: data/mnist.npz)")
    add("--output-dir", "where files go, made if missing", "outputs", type=Path, metavar="DIR")
    add("--iterations", "updates to make", ITERATIONS, type=positive, metavar="N")
    add("--batch-size", "images an iteration", BATCH_SIZE, type=positive, metavar="N")
    add("--learning-rate", "step size of Adam", LEARNING_RATE, type=rate, metavar="R")
    add("--decoder", "as the tutorial lists or describes it", "tutorial", choices=DECODERS)
    add("--seed", "decides everything random", 0, type=seed, metavar="N")
    add("--log-every", "iterations a log line", LOG_EVERY, type=positive, metavar="N")
    add("--checkpoint-every", "iterations a save", CHECKPOINT_EVERY, type=positive, metavar="N")
    group = parser.add_mutually_exclusive_group()
    add("--resume", "go on with the run in DIR", False, action="store_true", to=group)
    add("--overwrite", "replace an unfinished run in DIR", False, action="store_true", to=group)
    add("--report", "also measure and show the test set", False, action="store_true")
    add("--show", "also open the picture in a window", False, action="store_true")
    return parser, parser.parse_args(argv)


def one_line(error):
    """Return what an exception says, in one line."""
    if isinstance(error, tf.errors.OpError):
        error = error.message.split("\n\t [[")[0].splitlines()[-1]  # without where in the graph
    elif isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def stopped_by(number, when):
    """Say which signal stopped the program, and how to go on; return the exit status."""
    text = f"Stopped by {signal.Signals(number).name} {when}"
    print(f"{text}; go on with the same options and --resume", file=sys.stderr)
    return 128 + number


def main(argv=None):
    """Train on MNIST as the command line says and draw the manifold.

    Returns the exit status: 0, or 128 plus the number of the signal that stopped the program.
    Raises SystemExit, as argparse does: with status 2 for wrong options or data, or a checkpoint
    that does not fit them, and 1 after a fault while running.
    """
    parser, args = parse_arguments(argv)
    output_dir, picture = args.output_dir, args.output_dir / "latent.png"
    try:
        # the tutorial ignores testing data and labels; a report needs them
        (x_train, _), test = load_mnist(args.data)
        settings = {name: vars(args)[name] for name in SETTINGS}
        settings["data"] = "sha256:" + hashlib.sha256(x_train).hexdigest()
        run = check_run(args, settings)
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass  # so it can be written
    except (OSError, ValueError) as error:
        parser.error(one_line(error))
    try:
        with tf.Graph().as_default(), stop_signals() as stopped:
            model = VAE(args.learning_rate, args.seed, decoder=args.decoder)
            saver = tf.train.Saver(max_to_keep=None, save_relative_paths=True)
            with session() as sess:
                if args.resume:
                    try:
                        model.restore(output_dir / "checkpoint", sess)
                    except ValueError as error:
                        parser.error(f"--resume: {one_line(error)}")
                    write_log(output_dir, run)
                else:
                    sess.run(tf.global_variables_initializer())
                save = partial(save_checkpoint, saver, sess, output_dir, run)
                train(model, sess, x_train, run, args, stopped, save)
                if run["iteration"] < args.iterations:
                    when = f"after {run['iteration']} of {args.iterations} iterations"
                    return stopped_by(stopped[0], when)
                display_manifold(model, sess, picture, args.show)
                print(f"The manifold of the latent codes is in {picture}", flush=True)
                if args.report and not report(model, sess, test, run, output_dir, stopped):
                    return stopped_by(stopped[0], "while measuring")
    except (OSError, MemoryError, FloatingPointError, tf.errors.OpError) as error:
        parser.exit(1, f"{parser.prog}: error: {one_line(error)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
