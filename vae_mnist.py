"""Train the variational autoencoder of Nate Merrill's 2019 tutorial on MNIST, in graph mode.

The encoder turns an image x, D = 784 pixels in [0, 1], into a Gaussian over a latent code z
of K = 2 dimensions. The decoder turns a code into r, the probability of white for each pixel.
Both are trained on KLD + RecLoss, the negative evidence lower bound (-ELBO), in nats an image:

    KLD     = 1/2 sum_k (exp(log_sig_sq_k) - log_sig_sq_k + mu_k^2 - 1)             (1)
    RecLoss = -sum_d (x_d log r_d + (1 - x_d) log(1 - r_d))                         (2)

    python vae_mnist.py          # train for 5,000 iterations, then draw outputs/latent.png
    python vae_mnist.py --help   # all options and their defaults

The tutorial's program ends at the line "beyond the tutorial". Then come:

    speed               fast_update, session
    the run on disk     Run: its files, and how it is resumed after a kill
    a trained model     restore, trained
    what it has learnt  evaluate
    the page            explore: explore.html, the model in a browser
    the report          report: measurements and pictures of the test set
    the command line    main

Source: Nate Merrill, "Implementing an MNIST Variational Autoencoder in TensorFlow", 2019.
Method: Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv:1312.6114.
"""

import argparse
import hashlib
import itertools
import json
import os
import shlex
import sys
import time
from base64 import b64encode
from contextlib import contextmanager
from pathlib import Path

# TensorFlow reads this when it is loaded. 3 hides the messages of its C++ code; errors still
# arrive as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# A notebook sets MPLBACKEND=module://... for the programs that it starts. matplotlib reads that
# when it is imported, and fails if the module is missing. We open no windows, so drop it.
if "matplotlib" not in sys.modules and os.environ.get("MPLBACKEND", "").startswith("module://"):
    del os.environ["MPLBACKEND"]

import matplotlib.figure  # not pyplot, which looks for a display
import matplotlib.style
import numpy as np
import tensorflow.compat.v1 as tf  # in `with tf.Graph()`, it works as TensorFlow 1 did

SIDE = 28  # pixels along an edge of an image
PIXELS = SIDE * SIDE  # D
LATENT = 2  # K; has to be 2: `display_manifold` and `evaluate` need a plane of codes
# Each network is a pair: the units of its layers with ELU, and those of the linear layers after
# them. The tutorial's listing has a decoder that repeats the encoder's layers, down to 4 units,
# before it comes to the pixels. Its text ("upscale") suggests the encoder backwards: "mirrored".
ENCODER = ([256, 128, 64], [2 * LATENT])
DECODERS = {"tutorial": ([256, 128, 64], [4, PIXELS]), "mirrored": ([64, 128, 256], [PIXELS])}
BATCH_SIZE = 256  # images an iteration
LEARNING_RATE = 0.001  # Adam's own default
DATA = Path(__file__).resolve().parent / "data"  # has mnist.npz, and the page's template


class UsageError(ValueError):
    """What the user gave is wrong. It is raised before any file of a run changes."""


# ---------------------------------------------------------------------------------- model
class Dense:
    """A fully connected layer, as `tf.layers.dense` made it; TensorFlow 2.16 removed that.

    Its weights are made here, and used in each call: `fast_update` calls the layers again, for
    parts of a batch. They have the names that `tf.layers.dense` gave them, so that `trained` can
    open a checkpoint that was saved from the tutorial's own program, by a `tf.train.Saver`.
    """

    def __init__(self, input_units, units, activation=None):
        self.activation = activation
        # Without a name, the scope is the next of dense, dense_1, dense_2, ...
        with tf.variable_scope(None, default_name="dense"):
            shape = [input_units, units]
            glorot = tf.glorot_uniform_initializer()
            zeros = tf.zeros_initializer()
            self.kernel = tf.get_variable("kernel", shape, initializer=glorot)
            self.bias = tf.get_variable("bias", [units], initializer=zeros)

    def __call__(self, fc):
        fc = tf.nn.bias_add(tf.matmul(fc, self.kernel), self.bias)
        return fc if self.activation is None else self.activation(fc)


def dense_layers(input_units, elu_units, linear_units):
    """Make the layers of an encoder or a decoder, one after the other."""
    layers = []
    for n in elu_units:
        layers.append(Dense(input_units, units=n, activation=tf.nn.elu))
        input_units = n
    for n in linear_units:
        layers.append(Dense(input_units, units=n))
        input_units = n
    return layers


class VAE:
    """The tutorial's variational autoencoder, built in the current default graph.

    Its tensors are attributes. For a batch of B images, `x`, `logits` and `rec` are (B, D);
    `mu`, `log_sig_sq`, `eps` and `z` are (B, K); `rec_losses` and `klds` are (B,). `rec_loss`,
    `kld` and their sum `loss` are means over the batch. Losses are in nats an image. `opt` is
    the operation that makes one update.

    `seed` decides the first weights; `seed` and `iteration`, the number of updates made,
    decide the noise `eps`. `shards` is the number of parts into which `fast_update` splits a
    batch, for speed; it changes results by rounding alone. `decoder` is a key of DECODERS.
    """

    def __init__(self, learning_rate=LEARNING_RATE, seed=0, shards=2, decoder="tutorial"):
        tf.set_random_seed(seed)
        self.iteration = tf.Variable(0, trainable=False, dtype=tf.int64, name="global_step")
        self.encoder_layers = dense_layers(PIXELS, *ENCODER)
        self.decoder_layers = dense_layers(LATENT, *DECODERS[decoder])
        self.weights = []
        for layer in self.encoder_layers + self.decoder_layers:
            self.weights += [layer.kernel, layer.bias]

        # Input data Tensor
        self.x = tf.placeholder(tf.float32, [None, PIXELS], name="x")  # (B, D) in [0, 1]
        # epsilon is a sample from a N(0, 1) distribution. Seed and iteration decide it: each update
        # has other noise, and the same update has the same noise when a run is resumed.
        shape = [tf.shape(self.x)[0], LATENT]
        self.eps = tf.random.stateless_normal(shape, seed=[seed, self.iteration])
        self.mu, self.log_sig_sq, self.z, self.logits = self.forward(self.x, self.eps)
        # sigmoid bounds answer to [0,1] for images
        self.rec = tf.sigmoid(self.logits, name="rec")  # (B, D)

        with tf.name_scope("losses"):
            # reconstruction loss: equation (2). With the logits l, where r = sigmoid(l), and
            # softplus(l) = log(1 + e^l), log r = l - softplus(l) and log(1 - r) = -softplus(l).
            # So each term is softplus(l) - x l. Where r rounds to 0 or 1, this is finite and
            # has a gradient, unlike the tutorial's clipped logarithm.
            terms = tf.nn.softplus(self.logits) - self.x * self.logits
            self.rec_losses = tf.reduce_sum(terms, axis=1)
            self.rec_loss = tf.reduce_mean(self.rec_losses)
            # KLD( (mu, sigma) , N(0,1) ) = .5 (tr(sigma2) + mu^T mu - k - log det(sigma2))
            terms = tf.exp(self.log_sig_sq) + tf.square(self.mu) - 1.0 - self.log_sig_sq
            self.klds = 0.5 * tf.reduce_sum(terms, axis=1)
            self.kld = tf.reduce_mean(self.klds)
            self.loss = self.kld + self.rec_loss

        # The tutorial's text leaves out `step` and the optimizer, which is Adam with its defaults:
        #     self.opt = adam.minimize(self.loss, global_step=self.iteration)
        # `fast_update` does the same in 0.6 of the time. But if you change a loss, use `minimize`,
        # because `fast_update` does not look at self.loss: it has the derivatives written down.
        adam = tf.train.AdamOptimizer(learning_rate)
        self.opt = fast_update(self, adam, shards)
        # All that a checkpoint holds. (Adam made its variables in the line above.)
        self.variables = [self.iteration, *self.weights, *adam.variables()]
        self.saver = tf.train.Saver(self.variables)

    def forward(self, x, eps):
        """Return mu, log_sig_sq and z, (B, K), and logits, (B, D), for images and noise."""
        with tf.name_scope("encoder"):
            fc = x
            for layer in self.encoder_layers:
                fc = layer(fc)
            mu = fc[:, :LATENT]
            # estimate log sigma^2 for numerical stability
            log_sig_sq = fc[:, LATENT:]
        # z = mu + sigma * epsilon
        # Random normal variable for decoder :D
        z = tf.add(mu, tf.exp(log_sig_sq / 2) * eps, name="z")
        with tf.name_scope("decoder"):
            fc = z
            for layer in self.decoder_layers:
                fc = layer(fc)
        return mu, log_sig_sq, z, fc

    def step(self, batch, sess):
        """Make one update on a batch, (B, D) in [0, 1]; return kld, rec_loss before it."""
        # Two calls, since within one, TensorFlow may read the weights before or after they change.
        # (`train` calls `step` only for iterations that are logged, and `opt` alone for others.)
        kld, rec_loss = sess.run([self.kld, self.rec_loss], {self.x: batch})
        sess.run(self.opt, {self.x: batch})
        return float(kld), float(rec_loss)

    def encode(self, batch, sess):
        """Return mu, log_sig_sq, float32 (B, K), for images (B, D) in [0, 1]."""
        return sess.run([self.mu, self.log_sig_sq], {self.x: batch})

    def decode(self, z, sess):
        """Return the images, float32 (B, 28, 28) in [0, 1], that codes (B, K) stand for."""
        # Any tensor can be fed, not only a placeholder. Whoever feeds z skips encoder and
        # sampler, and needs no x: so the graph that was trained also draws.
        return sess.run(self.rec, {self.z: z}).reshape(-1, SIDE, SIDE)


# -------------------------------------------------------------------------------- picture
# In matplotlib's own style, whatever the user's matplotlibrc says.
@matplotlib.style.context("default")
def display_manifold(model, sess, path="latent.png"):
    """Draw 30 x 30 images, decoded over [-2, 2] in both latent dimensions, into a file.

    The ending of `path` is the format; in a PNG file each decoded pixel is one pixel. Returns all
    images as one, float32 (840, 840) in [0, 1]: z[0] grows to the right and z[1] upwards.
    """
    n = 30
    size = n * SIDE
    figure = np.zeros((size, size), np.float32)
    grid_x = np.linspace(-2, 2, n)
    grid_y = np.linspace(-2, 2, n)[::-1]
    for i, yi in enumerate(grid_y):
        digits = model.decode([[xi, yi] for xi in grid_x], sess)  # (30, 28, 28)
        figure[i * SIDE : (i + 1) * SIDE] = np.concatenate(digits, axis=1)  # (28, 840)

    margin = 80  # pixels around the images, for the axes
    side = size + 2 * margin  # 1,000 pixels
    fig = matplotlib.figure.Figure(figsize=(side / 100, side / 100), dpi=100)
    # The images as they are; imshow would resample them.
    fig.figimage(figure, margin, margin, cmap="Greys_r", vmin=0, vmax=1, origin="upper")
    area = (margin / side, margin / side, size / side, size / side)  # that of the images
    axes = fig.add_axes(area, frame_on=False)
    step = 4 / (n - 1)
    edge = 2 + step / 2  # of the outermost images, which have their middle at 2
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge))
    axes.set(xticks=np.linspace(-2, 2, 9), yticks=np.linspace(-2, 2, 9))
    axes.set(xlabel="z[0]", ylabel="z[1]")
    fig.savefig(path)
    return figure


# ----------------------------------------------------------------------------------- data
def load_mnist(path=None):
    """Load MNIST, or a data set of its form, from an .npz archive.

    Without a path it is data/mnist.npz beside this module. If that is missing, it is what
    `tf.keras.datasets.mnist.load_data()` has in its cache, or downloads.

    Returns (x_train, y_train), (x_test, y_test): images, uint8 (N, 28, 28) from 0 to 255,
    and labels, integers (N,). So that data sets like MNIST load as they are published, the
    file may have images (N, 784) or (N, 28, 28, 1), of any integer type, and labels (N, 1). It
    may lack the labels; then they are 0. Raises UsageError, a ValueError, if
    there is no file, or if it has something else.
    """
    file = DATA / "mnist.npz" if path is None else Path(path)
    try:
        if path is None and not file.exists():
            return tf.keras.datasets.mnist.load_data()
        with np.load(file, allow_pickle=False) as archive:
            return read_part(archive, "train"), read_part(archive, "test")
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # of many kinds: NumPy, zipfile, zlib, Keras, and read_part
        raise UsageError(
            f"{file}: expected an .npz archive with x_train, x_test, y_train and y_test; "
            f'{error}; README has a recipe, "Other data"'
        ) from error


def read_part(archive, part):
    """Return the images and the labels of one part of an archive, "train" or "test"."""
    images = archive[f"x_{part}"]
    count = len(images)
    forms = [(count, SIDE, SIDE), (count, SIDE, SIDE, 1), (count, PIXELS)]
    if images.dtype.kind not in "iu" or images.shape not in forms or count == 0:
        expected = f"expected integers (N, {SIDE}, {SIDE}), N > 0"
        raise ValueError(f"x_{part} is {images.dtype} {images.shape}; {expected}")
    low = images.min()
    high = images.max()
    if low < 0 or high > 255 or high < 2:  # 0 and 1: black and white, not grey
        found = f"x_{part} has values from {low} to {high}"
        raise ValueError(f"{found}; expected grey from 0 to 255")
    images = images.reshape(-1, SIDE, SIDE).astype(np.uint8)

    labels = archive[f"y_{part}"] if f"y_{part}" in archive else np.zeros(count, np.uint8)
    if labels.dtype.kind not in "iu" or labels.shape not in [(count,), (count, 1)]:
        expected = f"expected integers ({count},), or no y_{part}"
        raise ValueError(f"y_{part} is {labels.dtype} {labels.shape}; {expected}")
    return images, labels.reshape(count)


def scale(images):
    """Return images, uint8 (N, 28, 28), or one, (28, 28), as the network's input.

    That is (N, D) in [0, 1]. Other images, such as scaled ones, are a ValueError.
    """
    if images.dtype != np.uint8 or images.shape[-2:] != (SIDE, SIDE) or images.ndim > 3:
        expected = f"expected images, uint8 (N, {SIDE}, {SIDE}) or ({SIDE}, {SIDE})"
        raise ValueError(f"{expected}, got {images.dtype} {images.shape}")
    return images.reshape(-1, PIXELS) / np.float32(255)


def random_batches(x_train, batch_size=BATCH_SIZE, seed=0, first=0):
    """Yield the batches of the iterations first, first + 1, ..., (B, D) in [0, 1].

    They are drawn with replacement; seed and iteration decide which. A resumed run has
    `first` above 0.
    """
    for i in itertools.count(first):
        rng = np.random.default_rng([seed, i])  # so that none has to be drawn before `first`
        batch_idx = rng.integers(len(x_train), size=batch_size)
        yield scale(x_train[batch_idx])


# ------------------------------------------------------------------------------- training
def progress(first, last):
    """Yield the numbers of range(first, last); show on a terminal how long it takes."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None if closed
    erase_line = "\033[K"  # a terminal's code: erase what follows in the line
    start = time.monotonic()
    shown = start
    for i in range(first, last):
        yield i
        now = time.monotonic()
        if on_terminal and now - shown > 0.2:
            shown = now
            speed = (i + 1 - first) / (now - start)
            left = (last - i - 1) / speed
            # \r goes back to the beginning of the line, for whatever is printed next.
            text = f"{(i + 1) / last:4.0%}, {speed:.0f} iterations/s, {left:.0f} s left"
            print(f"{erase_line}{text}\r", end="", file=sys.stderr, flush=True)
    if on_terminal:
        print(erase_line, end="", file=sys.stderr, flush=True)


def train(model, sess, x_train, run, log_every, checkpoint_every):
    """Make the updates that a run still lacks, as the loop of the tutorial's main block does.

    `run` is a `Run`, a class of the second half:
    run.settings: a dictionary with the names of DEFAULTS
    run.made, run.wanted: how many updates are made so far, and wanted in all
    run.log, run.save: add a line to log.csv; save a checkpoint. If the losses are not finite, they
        raise FloatingPointError.
    """
    settings = run.settings
    batches = random_batches(x_train, settings["batch_size"], settings["seed"], run.made)
    for i in progress(run.made, run.wanted):
        x_batch = next(batches)
        if i % log_every == 0:
            kld, rec_loss = model.step(x_batch, sess)
            run.log(i, kld, rec_loss)
            print(f"Iteration {i}: KLD = {kld:f}, RecLoss = {rec_loss:f}", flush=True)
        else:  # the same update, without the losses: a session computes only what is fetched
            sess.run(model.opt, {model.x: x_batch})
        run.made = i + 1
        if run.made % checkpoint_every == 0 or run.made == run.wanted:
            run.save(model, sess, x_batch)  # refuses weights that give x_batch no finite losses


def train_and_draw(run, x_train, test, args):
    """Do what the tutorial's main block does; `main` has loaded the data.

    `test` is a pair, the test images and their labels. `args` has the options by name. The
    functions that you have not met are in the second half.
    """
    settings = run.settings
    with tf.Graph().as_default(), session(settings["shards"]) as sess:  # a thread for each shard
        model = VAE(
            settings["learning_rate"], settings["seed"], settings["shards"], settings["decoder"]
        )
        sess.run(tf.global_variables_initializer())
        run.set_up(model, sess)  # restore its newest checkpoint, if it has one; write run.json
        train(model, sess, x_train, run, args.log_every, args.checkpoint_every)
        path = run.directory / "latent.png"
        with replacing(path) as temporary:  # so that latent.png is never half written
            display_manifold(model, sess, temporary)
        draw_page_and_report(model, sess, test, run, args)  # what goes beyond the tutorial


# ==================================================================== beyond the tutorial
# ---------------------------------------------------------------------------------- speed
def fast_update(model, adam, shards):
    """Return the operation of adam.minimize(model.loss, model.iteration), but faster.

    It makes the same update, to rounding. Regard the loss as a function of three separate tensors
    y: the logits, mu and log_sig_sq. Its direct derivatives slope_y follow from equations (2)
    and (1):

        (sigmoid(logits) - x) / B,   mu / B,   (exp(log_sig_sq) - 1) / (2 B).

    From these, tf.gradients computes, by the chain rule, for a weight w

        d loss / d w = sum over y of slope_y (d y / d w).

    (So mu has its part in KLD by its own slope, and its part in RecLoss, through z and the logits,
    by theirs.)
    This takes 0.6 of the time of `minimize`, for two reasons:

    - The slopes are written down here. `minimize` uses the gradient of reduce_sum, which needs the
      shape of RecLoss's terms, (B, D). B is not known before they are computed, so TensorFlow
      computes them in every update.
    - The batch is split into shards, which do not depend on each other, so that threads
      compute them at the same time (see `session`). Two threads within one operation would be
      no faster than one: the matrices are too small.
    """
    size = tf.shape(model.x)[0] // shards
    sizes = [size] * (shards - 1) + [-1]  # 5 images in 2 shards: 2 and the rest
    batch_size = tf.cast(tf.shape(model.x)[0], tf.float32)
    gradients_of_shards = []
    with tf.name_scope("fast_update"):
        for x, eps in zip(tf.split(model.x, sizes), tf.split(model.eps, sizes)):
            mu, log_sig_sq, _, logits = model.forward(x, eps)
            slopes = [tf.sigmoid(logits) - x, mu, (tf.exp(log_sig_sq) - 1.0) / 2.0]
            slopes = [slope / batch_size for slope in slopes]
            ys = [logits, mu, log_sig_sq]
            gradients = tf.gradients(ys, model.weights, grad_ys=slopes)
            gradients_of_shards.append(gradients)
        gradients = [tf.add_n(parts) for parts in zip(*gradients_of_shards)]
        # tf.tuple: no weight changes before all gradients are computed.
        gradients = tf.tuple(gradients)
        return adam.apply_gradients(zip(gradients, model.weights), model.iteration)


def session(shards=2):
    """Open a session on the current graph, with a thread for each of several shards."""
    config = tf.ConfigProto()
    config.gpu_options.allow_growth = True  # take a GPU's memory as it is needed
    if shards > 1:
        config.inter_op_parallelism_threads = shards  # operations at the same time
        config.intra_op_parallelism_threads = 1  # threads within each of them
    return tf.Session(config=config)


# ------------------------------------------------------------------------ the run on disk
# The settings of a new run. The command line has None for an option that is not given, so that a
# new run takes it from here, and a resumed run from its run.json.
DEFAULTS = {
    "data": None,  # data/mnist.npz
    "iterations": 5000,  # a bit over 21 epochs
    "batch_size": BATCH_SIZE,
    "learning_rate": LEARNING_RATE,
    "decoder": "tutorial",
    "seed": 0,
    "shards": 2,
}
# Settings that a resumed run may not change, nor the training images (by their hash): its bits would
# differ. It may change, on purpose, the iterations and the learning rate of later updates.
KEPT = ("batch_size", "decoder", "seed", "shards")
# Files that are removed when training goes on, since they will be out of date:
RESULTS = ("latent.png", "explore.html", "metrics.json", "report.png")


@contextmanager
def locked(directory):
    """Keep other processes out of a run. The system drops the lock when the process ends."""
    with open(directory / "checkpoints" / "lock", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:  # a kind of OSError
            raise UsageError(f"{directory}: another run is at work there") from error
        except (ImportError, OSError):
            pass  # without a lock: Windows and some network file systems have none
        yield


def to_disk(path):
    """Wait until a file is on the disk, so that a power cut does not take it back."""
    with open(path, "r+b") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


@contextmanager
def replacing(path):
    """Yield a name to write to; then move the file to `path`, which is never half written."""
    temporary = path.with_name(f"tmp-{path.name}")  # a prefix: savefig looks at the ending
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def updates_made(directory):
    """Return how many updates the newest checkpoint of a run has had, or 0."""
    folder = directory / "checkpoints"
    try:
        state = tf.train.get_checkpoint_state(folder)
        if state is None:
            return 0
        return int(state.model_checkpoint_path.rpartition("-")[2])  # of .../vae_mnist-500
    except ValueError as error:
        raise UsageError(f"{folder / 'checkpoint'}: expected a name, got a damaged file") from error


class Run:
    """A training run, kept in a directory so that it can be killed at any moment.

        checkpoints/run.json            its settings
        checkpoints/vae_mnist-500.*     all variables after 500 updates, as `Saver` writes them
        checkpoints/checkpoint          names the newest of these
        checkpoints/lock                locked while a process works on the run
        log.csv                         the losses that were printed, at full precision
        latent.png, explore.html        the results
        metrics.json, report.png        the results of --report

    A checkpoint counts from the moment when the file `checkpoint` names it. By then, it is on the
    disk, and so are its lines of log.csv. What a killed run wrote later is dropped, and made
    again with the same bits, since seed and iteration decide all randomness. A directory
    without run.json holds no run.
    """

    def __init__(self, directory, settings, made):
        self.directory = directory
        # By name: those of DEFAULTS, and "images_sha256", the hash of the training images.
        self.settings = settings
        self.made = made  # how many updates
        self.wanted = settings["iterations"]
        self.checkpoints = directory / "checkpoints"
        self.log_path = directory / "log.csv"
        self.has_begun = False  # whether files of an older run may have changed

    @property
    def title(self):
        decoder = self.settings["decoder"]
        seed = self.settings["seed"]
        return f"{decoder} decoder, {self.made:,} iterations, seed {seed}"

    def set_up(self, model, sess):
        """Set the variables to those of the newest checkpoint, if there is one; clean up."""
        if self.made > 0:
            restore(model, sess, self.checkpoints)
        # From here on, files change: all checks that raise UsageError are done.
        self.begin()

    def begin(self):
        """Write run.json, and remove all that does not belong to the newest checkpoint."""
        self.has_begun = True
        if self.made == 0:
            # A new run. First of all, the older run.json goes, so that there is no run, then the
            # older `checkpoint`, so that there is nothing to resume from.
            for name in ("run.json", "checkpoint"):
                (self.checkpoints / name).unlink(missing_ok=True)
        # In a resumed run, too: --iterations and --learning-rate may have changed.
        with replacing(self.checkpoints / "run.json") as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
        self.remove_other_checkpoints()
        if self.made < self.wanted:
            for name in RESULTS:
                (self.directory / name).unlink(missing_ok=True)
        # Lines that are newer than the checkpoint go; these iterations will be made again.
        lines = ["iteration,kld,rec_loss\n"]
        if self.log_path.exists():
            for line in self.log_path.read_text().splitlines(keepends=True):
                iteration = line.partition(",")[0]  # in the header, not a number
                is_whole = line.endswith("\n")  # a kill may have torn the last line
                if is_whole and iteration.isdecimal() and int(iteration) < self.made:
                    lines.append(line)
        with replacing(self.log_path) as temporary:
            temporary.write_text("".join(lines))

    def remove_other_checkpoints(self):
        """Remove all checkpoints, and parts of them, but that after self.made updates."""
        for path in self.checkpoints.glob("vae_mnist-*"):
            if not path.name.startswith(f"vae_mnist-{self.made}."):
                path.unlink()

    def check(self, updates, kld, rec_loss):
        """Raise FloatingPointError unless the losses after so many updates are finite."""
        if not np.isfinite(kld + rec_loss):
            raise FloatingPointError(
                f"after {updates} updates KLD = {kld:f}, RecLoss = {rec_loss:f}; go on from the "
                "newest checkpoint with --resume and a lower --learning-rate"
            )

    def log(self, iteration, kld, rec_loss):
        """Add a line to log.csv: the losses before the update of this iteration."""
        self.check(iteration, kld, rec_loss)
        with open(self.log_path, "a") as file:
            file.write(f"{iteration},{kld!r},{rec_loss!r}\n")

    def save(self, model, sess, x_batch):
        """Save a checkpoint, if the losses of x_batch with the new weights are finite."""
        kld, rec_loss = sess.run([model.kld, model.rec_loss], {model.x: x_batch})
        self.check(self.made, kld, rec_loss)
        # 1. Saver writes the checkpoint's files. 2. They go to the disk. 3. The file `checkpoint`
        # names them, in Saver's format, without the directory, which may be moved. (With
        # write_state, Saver would do 3 before 2.)
        to_disk(self.log_path)
        prefix = str(self.checkpoints / "vae_mnist")
        name = model.saver.save(
            sess, prefix, global_step=self.made, write_meta_graph=False, write_state=False
        )
        for path in self.checkpoints.glob(f"vae_mnist-{self.made}.*"):
            to_disk(path)
        with replacing(self.checkpoints / "checkpoint") as temporary:
            temporary.write_text(f'model_checkpoint_path: "{Path(name).name}"\n')
        self.remove_other_checkpoints()


def read_settings(directory):
    """Return the settings of the run in a directory, or None if there is no run."""
    path = directory / "checkpoints" / "run.json"
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_bytes())
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or settings.keys() != {*DEFAULTS, "images_sha256"}:
        expected = "expected a run's settings, got a damaged file"
        raise UsageError(f"{path}: {expected}; --overwrite replaces it")
    return settings


def new_run(directory, older, given):
    """Return a new run; settings that are not given are those of DEFAULTS.

    `given` has the settings that are given, and images_sha256. `older` has the settings of the run
    in the directory, or is None. If that run is not finished, it is a UsageError.
    """
    if older is not None:
        made = updates_made(directory)
        if 0 < made < older["iterations"]:  # without a checkpoint, there is nothing to lose
            raise UsageError(
                f"the run in {directory} made {made} of {older['iterations']} iterations: "
                "go on with --resume, or replace it with --overwrite"
            )
        if made > 0:
            print(f"Replacing the finished run in {directory}", flush=True)
    return Run(directory, {**DEFAULTS, **given}, made=0)


def resumed_run(directory, older, given):
    """Return the run that is in the directory; settings that are not given are its own.

    `given` has the settings that are given, and images_sha256. `older` has its own. If all updates
    are made, it will only draw again.
    """
    settings = {**older, **given}
    run = f"--resume: the run in {directory}"
    if settings["images_sha256"] != older["images_sha256"]:
        raise UsageError(f"{run} learns from other images; give their file with --data")
    made = updates_made(directory)
    if settings["iterations"] < made:
        raise UsageError(f"{run} made {made} iterations, more than {settings['iterations']}")
    # Without updates to make, a learning rate would have no effect.
    kept = KEPT if made < settings["iterations"] else (*KEPT, "learning_rate")
    for name in kept:
        if settings[name] != older[name]:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{run} has {option} {older[name]}, not {settings[name]}")
    return Run(directory, settings, made)


# ------------------------------------------------------------------------ a trained model
def reason_of(error):
    """Return what an error says, in a line."""
    text = str(error)
    if isinstance(error, tf.errors.OpError):  # which has places in the graph before and after it
        text = error.message.partition("\n\t [[")[0].strip().splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def restore(model, sess, path):
    """Load a checkpoint into the variables of a model.

    `path` is the name of a checkpoint, as `tf.train.latest_checkpoint` returns it, or a
    directory such as outputs/checkpoints, for its newest one. If the checkpoint has weights
    alone, Adam's variables and `iteration` get their initial values. Raises UsageError, a
    ValueError, if there is no checkpoint, or if it is damaged or of another network; then no
    variable has changed.
    """
    name = tf.train.latest_checkpoint(path) if os.path.isdir(path) else str(path)
    if name is None or not os.path.exists(f"{name}.index"):
        raise UsageError(f"{path}: expected a checkpoint, found none")
    try:
        shapes = tf.train.load_checkpoint(name).get_variable_to_shape_map()
        for weight in model.weights:
            found = shapes.get(weight.op.name, "missing")
            expected = weight.shape.as_list()
            if found != expected:
                reason = f"{weight.op.name} is {found}, not {expected}"
                raise UsageError(f"{name}: of another network: {reason}")
        # Not model.saver, which expects all variables.
        present = [v for v in model.variables if v.op.name in shapes]
        with sess.graph.as_default():  # the caller may have another default graph
            tf.train.Saver(present).restore(sess, name)  # reads all before it sets any
    except tf.errors.OpError as error:
        raise UsageError(f"{name}: damaged: {reason_of(error)}") from error
    sess.run([v.initializer for v in model.variables if v.op.name not in shapes])


@contextmanager
def trained(directory="outputs"):
    """Open the model of a run, finished or not: `with trained() as (model, sess):`.

    `directory` is the run's. It may also be one with a checkpoint of the tutorial's own program, if
    you gave that a `tf.train.Saver`. Raises what `restore` raises.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    folder = directory / "checkpoints"
    if settings is None:  # a checkpoint of the tutorial's program
        settings = DEFAULTS
        folder = directory
    with tf.Graph().as_default(), session(settings["shards"]) as sess:
        model = VAE(
            settings["learning_rate"], settings["seed"], settings["shards"], settings["decoder"]
        )
        restore(model, sess, folder)
        yield model, sess


# --------------------------------------------------------------------- what it has learnt
def grid_codes(reach, step):
    """Return the codes of a grid over [-reach, reach]^2, (N, K), the top row first."""
    axis = np.linspace(-reach, reach, round(2 * reach / step) + 1)
    z0, z1 = np.meshgrid(axis, axis[::-1])
    return np.stack([z0.ravel(), z1.ravel()], axis=1)


def joint_terms(model, sess, codes):
    """Yield (logits, offset), arrays (n, D) and (n,), for the codes, n <= 400 at a time.

    log p(x, z) = x . logits + offset, for any image x. This is so because
    log p(x | z) = -RecLoss = x . logits - sum softplus(logits).
    So offset = log p(z) - sum softplus(logits).
    """
    for first in range(0, len(codes), 400):  # more at a time would take much memory
        z = codes[first : first + 400]
        logits = sess.run(model.logits, {model.z: z})
        log_pz = -np.sum(z**2, axis=1) / 2 - LATENT / 2 * np.log(2 * np.pi)  # of N(0, I)
        softplus = np.logaddexp(0, logits)  # log(e^0 + e^l)
        yield logits, log_pz - np.sum(softplus, axis=1)


def log_likelihood(model, sess, x, reach, step):
    """Return log p(x), float64 (N,), of images x, (N, D) in [0, 1].

    p(x) is the integral of p(x, z) over the plane: nearly the sum of p(x, z) over the codes
    of a grid, `step` apart, in a disc of radius `reach`, times step^2. These numbers are far too small for a float, so
    log sum exp(a) is computed as max(a) + log sum exp(a - max(a)).
    """
    codes = grid_codes(reach, step)
    codes = codes[np.sum(codes**2, axis=1) <= reach**2]  # in the corners, p(z) is negligible
    log_sum = np.full(len(x), -np.inf)  # float64, of the codes so far, for each image
    for logits, offset in joint_terms(model, sess, codes):
        offset = offset[:, np.newaxis].astype(np.float32)  # a group in float32, which is faster
        log_joint = logits @ x.T + offset  # log p(x, z), (n, N)
        highest = np.max(log_joint, axis=0)
        total = np.sum(np.exp(log_joint - highest), axis=0)
        log_sum = np.logaddexp(log_sum, highest + np.log(total))
    return log_sum + np.log(step**2)


def evaluate(model, sess, images, seed=0, samples=20, reach=5.5, step=0.05):
    """Measure what a model has learnt of images, uint8 (N, 28, 28), in nats an image.

    Returns arrays (N,), float64, by name:
    "RecLoss": equation (2), averaged over `samples` codes from q(z | x), the encoder's Gaussian;
        `seed` decides them.
    "KLD": equation (1).
    "-ELBO": their sum.
    "NLL": -log p(x), with p(x | z) = exp(-RecLoss), from a grid of codes, `step` apart, in a
        disc of radius `reach`. With the defaults, 38,000 codes, the mean is good to 1e-3 nats
        after 5,000 iterations. (A step of 0.025 and a reach of 6.5 change it by less.)
    "KL(q || p)": (-ELBO) - NLL. Since log p(x) = ELBO + KL(q(z | x) || p(z | x)), that is the
        divergence of q(z | x) from the exact posterior p(z | x) = p(x, z) / p(x).
    exp(-RecLoss) is a probability of black and white images. For grey ones it is not normalized:
    so compare these figures only between models of the same images.
    """
    x = scale(images)
    rng = np.random.default_rng(seed)
    mu, log_sig_sq, kld = sess.run([model.mu, model.log_sig_sq, model.klds], {model.x: x})
    rec_loss = np.zeros(len(x))
    for _ in range(samples):
        z = mu + np.exp(log_sig_sq / 2) * rng.standard_normal(mu.shape)
        rec_loss += sess.run(model.rec_losses, {model.x: x, model.z: z}) / samples
    bound = rec_loss + kld
    nll = -log_likelihood(model, sess, x, reach, step)
    return {
        "RecLoss": rec_loss,
        "KLD": kld.astype(np.float64),
        "-ELBO": bound,
        "NLL": nll,
        "KL(q || p)": bound - nll,
    }


# ------------------------------------------------------------------------------- the page
# data/explore.html is the page's template. In the browser, it decodes the code under the mouse,
# encodes the image that is picked or drawn, and computes the exact posterior p(z | x) on a grid
# of codes. (tests/test_explore.py compares what it shows with NumPy.)
NUMBERS_HERE = b"NUMBERS_HERE"  # what the numbers replace in the template
PAGE_REACH = 4.5  # of the page's grid; nearly all test images have their codes within it
PAGE_STEP = 0.075  # it has 121 x 121 codes, which take a browser two seconds
# Ten colours that colour-blind people can tell apart, and that are seen on black. Most are
# Petroff's (arXiv:2107.02270).
COLOURS = [
    "#3f90da", "#b9ac70", "#a96b59", "#c1fdc4", "#92dadd",
    "#6634f8", "#94a4a2", "#717581", "#d1041a", "#e76300",
]  # fmt: skip


def label_colours(labels):
    """Return a colour for each label that occurs, by label."""
    classes = np.unique(labels).tolist()
    if len(classes) <= len(COLOURS):
        return dict(zip(classes, COLOURS))
    shades = matplotlib.colormaps["cool"](np.linspace(0, 1, len(classes)))
    return dict(zip(classes, map(matplotlib.colors.to_hex, shades)))


def ten_classes(labels):
    """Return the labels that occur, at most ten, evenly spread. (Letters have more than ten.)"""
    classes = np.unique(labels)
    places = np.linspace(0, len(classes) - 1, min(10, len(classes)))
    return classes[np.round(places).astype(int)]


def as_text(array):
    """Return an array as the page reads it: its bytes, in base64."""
    return b64encode(np.ascontiguousarray(array).tobytes()).decode()


def page_layers(layers, sess):
    """Return the kernels and biases of layers, and whether ELU follows, for the page."""
    found = []
    for layer in layers:
        kernel, bias = sess.run([layer.kernel, layer.bias])
        has_elu = layer.activation is tf.nn.elu
        found.append({"kernel": as_text(kernel), "bias": as_text(bias), "elu": has_elu})
    return found


def page_numbers(model, sess, test, run):
    """Return what the page's script reads, by name. Arrays are bytes in base64.

    run, kind: texts; the window's title, and what the page calls an image.
    encoder, decoder: lists of layers {kernel, bias, elu}, float32, with which it encodes and decodes.
    codes (N, 2) float32, labels [N], colours {label: colour}: dots, at mu of each test image.
    images (M, 28, 28) uint8, image_labels [M]: test images to pick from.
    picked: the place of the one that is picked at first, whose exact posterior is least like the
        encoder's Gaussian, which shows most.
    grid {n, reach}, offset (n * n,) float32: n x n codes, and `offset` of `joint_terms` for each; the
        page adds x . logits, which gives the exact posterior.
    losses [3]: 5, 50 and 95 % quantiles of -ELBO over test images, for a bar that compares one.
    """
    images = test[0][:10000]  # more would make a large page
    labels = test[1][:10000]
    codes, _ = model.encode(scale(images), sess)
    x = scale(images[::10])  # every tenth image, with one code each: enough for quantiles
    rec_losses, klds = sess.run([model.rec_losses, model.klds], {model.x: x})
    losses = np.quantile(rec_losses + klds, [0.05, 0.5, 0.95])
    places = [np.flatnonzero(labels == label)[:2] for label in ten_classes(labels)]
    places = np.concatenate(places)  # two for each label
    # To choose the one that is picked at first, the page's coarse grid is good enough.
    measured = evaluate(model, sess, images[places], reach=PAGE_REACH, step=PAGE_STEP)
    grid = grid_codes(PAGE_REACH, PAGE_STEP)
    offsets = [offset for _, offset in joint_terms(model, sess, grid)]
    return {
        "run": run.title,
        "kind": "image" if run.settings["data"] else "digit",  # without --data, it is MNIST
        "encoder": page_layers(model.encoder_layers, sess),
        "decoder": page_layers(model.decoder_layers, sess),
        "codes": as_text(codes),
        "labels": labels.tolist(),
        "colours": label_colours(labels),
        "images": as_text(images[places]),
        "image_labels": labels[places].tolist(),
        "picked": int(np.argmax(measured["KL(q || p)"])),
        "grid": {"n": round(len(grid) ** 0.5), "reach": PAGE_REACH},
        "offset": as_text(np.concatenate(offsets).astype(np.float32)),
        "losses": losses.tolist(),
    }


def explore(model, sess, test, run):
    """Write explore.html, the template with a run's numbers; return its path, or None."""
    template = DATA / "explore.html"
    if not template.exists():  # the module was copied without it
        return None
    numbers = json.dumps(page_numbers(model, sess, test, run)).encode()
    content = template.read_bytes().replace(NUMBERS_HERE, numbers)
    path = run.directory / "explore.html"
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


# ----------------------------------------------------------------------------- the report
def draw_codes(axes, mu, labels, kld):
    """Draw where the encoder puts the test images, in the colours of their labels."""
    colours = label_colours(labels)
    dots = [colours[label] for label in labels.tolist()]
    axes.scatter(mu[:, 0], mu[:, 1], s=2, linewidth=0, c=dots)
    for label in ten_classes(labels).tolist():  # empty, for the legend
        axes.scatter([], [], c=colours[label], edgecolor="black", label=label)
    axes.legend(title="label", loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_facecolor("black")  # on which all of the colours are seen
    # what latent.png shows, as a square:
    axes.plot([-2, 2, 2, -2, -2], [-2, -2, 2, 2, -2], color="white", linewidth=1)
    axes.set(title=f"Codes of {len(mu):,} test images: KLD {kld:.2f}", aspect="equal")
    axes.set(xlabel="mu[0]; in the square: latent.png", ylabel="mu[1]")


def draw_sheet(axes, model, sess, test, mu, rec_loss):
    """Draw up to ten images of up to ten labels; below each, its mu decoded."""
    images, labels = test
    classes = ten_classes(labels)
    sheet = np.zeros((len(classes) * 2 * SIDE, 10 * SIDE), np.float32)
    for i, label in enumerate(classes):
        chosen = np.flatnonzero(labels == label)[:10]
        width = len(chosen) * SIDE
        top = 2 * SIDE * i
        sheet[top : top + SIDE, :width] = np.hstack(images[chosen]) / 255
        reconstructions = np.hstack(model.decode(mu[chosen], sess))
        sheet[top + SIDE : top + 2 * SIDE, :width] = reconstructions
    axes.imshow(sheet, cmap="Greys_r", vmin=0, vmax=1)
    axes.set(title=f"Images, reconstructions below:\nRecLoss {rec_loss:.2f}", anchor="N")
    axes.set(ylabel="label", xticks=[])
    # A label stands where its images meet their reconstructions.
    places = np.arange(len(classes)) * 2 * SIDE + SIDE - 0.5
    axes.set_yticks(places, classes)


def draw_losses(axes, path):
    """Draw the losses in log.csv: RecLoss on the left axis, KLD on the right one."""
    rows = path.read_text().splitlines()[1:]
    if not rows:  # somebody has removed them
        axes.set(title=f"{path.name} has no losses")
        return
    iterations, kld, rec_loss = np.loadtxt(rows, delimiter=",", ndmin=2).T
    last = f"KLD {kld[-1]:.2f}, RecLoss {rec_loss[-1]:.2f}"
    axes.set(title=f"Losses of a batch; in iteration {iterations[-1]:,.0f}: {last}")
    axes.set(xlabel=f"iteration; above the frame, RecLoss begins at {rec_loss[0]:.2f}")
    left = ("RecLoss", rec_loss, "tab:blue", axes)
    right = ("KLD", kld, "tab:red", axes.twinx())
    for name, values, colour, side in (left, right):
        side.plot(iterations, values, color=colour, linewidth=1)
        side.set_ylabel(name, color=colour)
        settled = values[len(values) // 20 :]  # all but the first 5 %, which are far higher
        margin = 0.1 * np.ptp(settled) + 0.01
        side.set_ylim(min(settled) - margin, max(settled) + margin)


@matplotlib.style.context("default")
def draw_report(model, sess, test, run, metrics):
    """Draw report.png: codes and reconstructions of the test set, losses of the run."""
    mu, _ = model.encode(scale(test[0]), sess)
    fig = matplotlib.figure.Figure(figsize=(9, 8.8), dpi=150, layout="constrained")
    fig.suptitle(f"{run.title}: NLL {metrics['NLL']['mean']:.2f} nats an image")
    panels = fig.subplot_mosaic("AB;CC", width_ratios=(2, 1), height_ratios=(2, 1))
    draw_codes(panels["A"], mu, test[1], metrics["KLD"]["mean"])
    draw_sheet(panels["B"], model, sess, test, mu, metrics["RecLoss"]["mean"])
    draw_losses(panels["C"], run.log_path)
    with replacing(run.directory / "report.png") as temporary:
        fig.savefig(temporary)


def report(model, sess, test, run):
    """Measure the test set: print means, write metrics.json, draw report.png."""
    print(f"On {len(test[0]):,} test images, nats an image (standard error):", flush=True)
    metrics = {}
    for name, values in evaluate(model, sess, test[0]).items():
        mean = np.mean(values)
        if not np.isfinite(mean):
            raise FloatingPointError(f"{name} is {mean}; try a lower --learning-rate")
        error = np.std(values) / len(values) ** 0.5
        metrics[name] = {"mean": mean, "standard_error": error}
        print(f"{name:10} {mean:8.2f} ({error:.2f})", flush=True)
    content = {"settings": run.settings, "iteration": run.made, "metrics": metrics}
    with replacing(run.directory / "metrics.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    draw_report(model, sess, test, run, metrics)
    path = run.directory / "report.png"
    print(f"The means are in metrics.json, pictures in {path}", flush=True)


def show_picture(path):
    """Open a window with a picture, pixel for pixel, until it is closed."""
    from matplotlib import pyplot as plt  # only here, since it looks for a display

    if plt.get_backend().lower() == "agg":  # which pyplot chooses where no window can open
        print("--show: there is no display", file=sys.stderr)
        return
    picture = plt.imread(path)
    height, width, _ = picture.shape
    plt.figure(figsize=(width / 100, height / 100), dpi=100)
    plt.figimage(picture)
    plt.show()


def draw_page_and_report(model, sess, test, run, args):
    """Write explore.html, say where it and latent.png are, and do what else the options ask."""
    path = run.directory / "latent.png"
    page = explore(model, sess, test, run)
    hint = f"; move through it in {page}" if page else ""
    print(f"The manifold of the latent codes is in {path}{hint}", flush=True)
    if args.report:
        report(model, sess, test, run)
    if args.show:
        show_picture(path)


# ----------------------------------------------------------------------- the command line
def number_between(kind, lowest, highest):
    """Return a function that reads an int or a float between two limits from a text."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= highest:
            expected = f"expected {kind.__name__} from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
        return value

    return read


def local_directory(text):
    """Return the path of a directory on this machine, which TensorFlow can use."""
    path = Path(os.path.expanduser(text))
    # TensorFlow reads * ? [ \ as a pattern. gs://bucket would become a local folder "gs:".
    if set(path.as_posix()) & set("*?[\\") or "://" in text:
        expected = "expected a directory on this machine, without * ? [ \\ in its name"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return path


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        "vae_mnist.py",
        usage=argparse.SUPPRESS,  # so that an error is one line; --help lists the options
        allow_abbrev=False,
        description="Train the VAE of Nate Merrill's 2019 tutorial on MNIST.",
    )
    option = parser.add_argument
    count = number_between(int, 1, 2**31 - 1)
    seed = number_between(int, 0, 2**31 - 1)
    rate = number_between(float, 1e-30, 1e30)
    for name, kind, text in [
        ("iterations", count, "updates to make"),
        ("batch_size", count, "images an iteration"),
        ("learning_rate", rate, "step size of Adam"),
        ("seed", seed, "decides weights, batches and noise"),
        ("shards", number_between(int, 1, 64), "parts of a batch, a thread each"),
    ]:
        text = f"{text} (default: {DEFAULTS[name]})"
        option(f"--{name.replace('_', '-')}", type=kind, help=text)
    text = "mirrored: the encoder backwards (default: tutorial)"
    option("--decoder", choices=DECODERS, help=text)
    text = "an .npz archive (default: data/mnist.npz)"
    # An absolute path, since run.json keeps it, and the run may be resumed from elsewhere.
    option("--data", metavar="FILE", type=os.path.abspath, help=text)
    text = "where the files of the run go (default: outputs)"
    option("--output-dir", type=local_directory, default=Path("outputs"), help=text)
    text = "iterations from a log line to the next (default: 100)"
    option("--log-every", type=count, default=100, help=text)
    text = "iterations from a checkpoint to the next (default: 500)"
    option("--checkpoint-every", type=count, default=500, help=text)
    either = parser.add_mutually_exclusive_group()
    text = "go on with the run in --output-dir, or begin one there"
    either.add_argument("--resume", action="store_true", help=text)
    text = "replace the run in --output-dir, finished or not"
    either.add_argument("--overwrite", action="store_true", help=text)
    option("--report", action="store_true", help="also measure and show the test set")
    option("--show", action="store_true", help="also open the picture in a window")
    return parser


def fail(error, status):
    """End the program with a line that says what is wrong."""
    print(f"vae_mnist.py: error: {reason_of(error)}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def opened_run(args):
    """Load the data; yield a run, which is locked, and the data.

    in the directory      no option   --resume   --overwrite
    no run                new         new        new
    without a checkpoint  new         resumed    new
    an unfinished run     refused     resumed    new
    a finished run        new         resumed    new
    a damaged run.json    refused     refused    new
    """
    directory = args.output_dir
    # 1. Read the settings, which may name the data. 2. Load the data. If they are wrong, no directory
    # has been made. 3. Make the directory, and lock it. 4. Read again: since 1, another process
    # may have begun a run.
    older = None if args.overwrite else read_settings(directory)
    is_resumed = args.resume and older is not None
    data = args.data
    if is_resumed and data is None:
        data = older["data"]
    (x_train, _), test = load_mnist(data)
    options = vars(args)  # the keys of DEFAULTS are names of options
    given = {name: options[name] for name in DEFAULTS if options[name] is not None}
    given["images_sha256"] = hashlib.sha256(np.ascontiguousarray(x_train)).hexdigest()
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir: {error}") from error
    with locked(directory):
        if not args.overwrite and read_settings(directory) != older:
            raise UsageError(f"{directory}: another run began there just now")
        if is_resumed:
            run = resumed_run(directory, older, given)
        else:
            run = new_run(directory, older, given)
        yield run, x_train, test


def main(argv=None):
    """Do what the command line says, or a list of its words; return the exit status.

    It is 0, or 130 after Ctrl-C. Raises SystemExit: with status 2 after a UsageError (no file
    of a run has changed), with status 1 after a fault in a run.
    """
    words = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(words)
    run = None
    try:
        with opened_run(args) as (run, x_train, test):
            train_and_draw(run, x_train, test, args)
        return 0
    except KeyboardInterrupt:
        hint = "nothing has changed"
        if run is not None and run.has_begun:
            again = [word for word in words if word not in ("--overwrite", "--resume")]
            hint = f"to go on: {shlex.join(['python', 'vae_mnist.py', *again, '--resume'])}"
        print(f"Stopped; {hint}", file=sys.stderr)
        return 130
    except UsageError as error:
        fail(error, status=2)
    except (OSError, MemoryError, FloatingPointError, tf.errors.OpError) as error:
        fail(error, status=1)


if __name__ == "__main__":
    sys.exit(main())
