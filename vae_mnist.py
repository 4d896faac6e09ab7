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
    the run on disk     Run: how a run that was killed goes on
    a trained model     restore, trained
    what it has learnt  evaluate
    the page            explore: explore.html, the model in a browser
    the report          report: figures and pictures of the test set
    the command line    main

Source: Nate Merrill, "Implementing an MNIST Variational Autoencoder in TensorFlow", 2019.
Method: Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv:1312.6114.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from base64 import b64encode
from contextlib import ExitStack, contextmanager
from pathlib import Path

# TensorFlow reads this when it is loaded: its C++ code shall print less.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# A program that a notebook starts inherits the notebook's MPLBACKEND, module://..., and
# `import matplotlib` fails if that module is not installed. matplotlib chooses its own then.
if "matplotlib" not in sys.modules and os.environ.get("MPLBACKEND", "").startswith("module://"):
    del os.environ["MPLBACKEND"]

import matplotlib.figure
import matplotlib.style
import numpy as np
import tensorflow.compat.v1 as tf

SIDE = 28  # pixels along an edge of an image
PIXELS = SIDE * SIDE  # D
LATENT = 2  # K; the picture, the page and NLL need the codes to lie in a plane
# Units of the layers with ELU, and of the linear layers after them. "tutorial" is what the
# tutorial lists; "mirrored" is what its text describes, the encoder backwards.
ENCODER = ([256, 128, 64], [2 * LATENT])
DECODERS = {
    "tutorial": ([256, 128, 64], [4, PIXELS]),
    "mirrored": ([64, 128, 256], [PIXELS]),
}
BATCH_SIZE = 256  # images an iteration
LEARNING_RATE = 0.001  # Adam's own default
SHARDS = 2  # parts of a batch that are computed at the same time: see `fast_update`
DATA = Path(__file__).resolve().parent / "data"  # has mnist.npz, and the page's frame


# ---------------------------------------------------------------------------------- model
class Dense:
    """A fully connected layer, as `tf.layers.dense` made it; TensorFlow 2.16 removed that.

    Its weights are made here, once, with the names that `tf.layers.dense` gave them:
    dense/kernel, dense/bias, dense_1/kernel, ... Every call uses the same weights.
    """

    def __init__(self, inputs, units, activation=None):
        self.activation = activation
        with tf.variable_scope(None, default_name="dense"):
            glorot = tf.glorot_uniform_initializer()
            zeros = tf.zeros_initializer()
            self.kernel = tf.get_variable("kernel", [inputs, units], initializer=glorot)
            self.bias = tf.get_variable("bias", [units], initializer=zeros)

    def __call__(self, fc):
        fc = tf.nn.bias_add(tf.matmul(fc, self.kernel), self.bias)
        return fc if self.activation is None else self.activation(fc)


def dense_layers(inputs, elu_units, linear_units):
    """Make the layers of an encoder or a decoder, one after the other."""
    layers = []
    for n in elu_units:
        layers.append(Dense(inputs, units=n, activation=tf.nn.elu))
        inputs = n
    for n in linear_units:
        layers.append(Dense(inputs, units=n))
        inputs = n
    return layers


class VAE:
    """The tutorial's variational autoencoder, built in the current default graph.

    Its tensors are attributes. For a batch of B images, `x`, `logits` and `rec` are (B, D);
    `mu`, `log_sig_sq`, `eps` and `z` are (B, K); `rec_losses` and `klds` are (B,). `rec_loss`,
    `kld` and their sum `loss` are means over the batch. Losses are in nats an image. `opt` is
    the operation that makes one update.

    `seed` decides the first weights and, with the number of updates, the noise `eps`.
    `shards` changes results by rounding alone. `decoder` is a key of DECODERS; any other is
    a ValueError.
    """

    def __init__(self, learning_rate=LEARNING_RATE, seed=0, shards=SHARDS, decoder="tutorial"):
        if decoder not in DECODERS:
            expected = ", ".join(DECODERS)
            raise ValueError(f"decoder must be one of {expected}, got {decoder!r}")
        tf.set_random_seed(seed)
        older = len(tf.global_variables())  # another model's, if the graph has one
        self.iteration = tf.Variable(0, trainable=False, dtype=tf.int64, name="global_step")
        self.encoder = dense_layers(PIXELS, *ENCODER)
        self.decoder = dense_layers(LATENT, *DECODERS[decoder])
        self.weights = []
        for layer in self.encoder + self.decoder:
            self.weights += [layer.kernel, layer.bias]

        # Input data Tensor
        self.x = tf.placeholder(tf.float32, [None, PIXELS], name="x")  # (B, D) in [0, 1]
        # epsilon is a sample from a N(0, 1) distribution. "Stateless": the same seed and
        # iteration give the same noise, so a resumed run goes on as if it never stopped.
        shape = [tf.shape(self.x)[0], LATENT]
        self.eps = tf.random.stateless_normal(shape, seed=[seed, self.iteration])
        self.mu, self.log_sig_sq, self.z, self.logits = self.forward(self.x, self.eps)
        # sigmoid bounds answer to [0,1] for images
        self.rec = tf.sigmoid(self.logits, name="rec")  # (B, D)

        with tf.name_scope("losses"):
            # reconstruction loss: equation (2) for r = sigmoid(l), where l are the logits and
            # softplus(l) = log(1 + e^l). Where r rounds to 0 or 1, this stays finite and has
            # a gradient; the tutorial's clipped logarithm has none. (For an update by
            # `minimize`, TensorFlow's sigmoid_cross_entropy_with_logits is 2 ms slower.)
            terms = tf.nn.softplus(self.logits) - self.x * self.logits
            self.rec_losses = tf.reduce_sum(terms, axis=1)
            self.rec_loss = tf.reduce_mean(self.rec_losses)
            # KLD( (mu, sigma) , N(0,1) ) = .5 (tr(sigma2) + mu^T mu - k - log det(sigma2))
            terms = tf.exp(self.log_sig_sq) + tf.square(self.mu) - 1.0 - self.log_sig_sq
            self.klds = 0.5 * tf.reduce_sum(terms, axis=1)
            self.kld = tf.reduce_mean(self.klds)
            self.loss = self.kld + self.rec_loss

        # The tutorial's text leaves out the optimizer and `step`. Adam with its defaults gives
        # the losses that it shows. `fast_update` makes the same update as
        #     adam.minimize(self.loss, self.iteration)
        # in 0.6 of the time. It has the gradients of `loss` written down: if you change the
        # losses, use `minimize`.
        adam = tf.train.AdamOptimizer(learning_rate)
        self.opt = fast_update(self, adam, shards)
        self.variables = tf.global_variables()[older:]  # weights, iteration, Adam's state
        self.saver = tf.train.Saver(self.variables)

    def forward(self, x, eps):
        """Return mu, log_sig_sq and z, (B, K), and logits, (B, D), for images and noise."""
        with tf.name_scope("encoder"):
            fc = x
            for layer in self.encoder:
                fc = layer(fc)
            mu = fc[:, :LATENT]
            # estimate log sigma^2 for numerical stability
            log_sig_sq = fc[:, LATENT:]
        # z = mu + sigma * epsilon
        # Random normal variable for decoder :D
        # sess.run can be fed any tensor, not only placeholders. Whoever feeds model.z skips
        # encoder and sampler, and needs no x. That is how `decode` uses the trained graph.
        z = tf.add(mu, tf.exp(log_sig_sq / 2) * eps, name="z")
        with tf.name_scope("decoder"):
            fc = z
            for layer in self.decoder:
                fc = layer(fc)
        return mu, log_sig_sq, z, fc

    def step(self, batch, sess):
        """Make one update on a batch, (B, D) in [0, 1]; return kld, rec_loss before it."""
        kld, rec_loss = sess.run([self.kld, self.rec_loss], {self.x: batch})
        sess.run(self.opt, {self.x: batch})
        return float(kld), float(rec_loss)

    def encode(self, batch, sess):
        """Return mu, log_sig_sq, float32 (B, K), for images (B, D) in [0, 1]."""
        return sess.run([self.mu, self.log_sig_sq], {self.x: batch})

    def decode(self, z, sess):
        """Return the images, float32 (B, 28, 28) in [0, 1], that codes (B, K) stand for."""
        return sess.run(self.rec, {self.z: z}).reshape(-1, SIDE, SIDE)


# -------------------------------------------------------------------------------- picture
@matplotlib.style.context("default")  # whatever the user's own settings are
def display_manifold(model, sess, path="latent.png"):
    """Draw 30 x 30 images, decoded over [-2, 2] in both latent dimensions, into a file.

    The ending of `path` decides the format. In a PNG file each decoded pixel is one pixel.
    Returns all images as one, float32 (840, 840) in [0, 1]; z[0] grows to the right and z[1]
    upwards.
    """
    n = 30
    size = n * SIDE
    figure = np.zeros((size, size), np.float32)
    grid_x = np.linspace(-2, 2, n)
    grid_y = np.linspace(-2, 2, n)[::-1]
    for i, yi in enumerate(grid_y):
        digits = model.decode([[xi, yi] for xi in grid_x], sess)  # (30, 28, 28)
        figure[i * SIDE : (i + 1) * SIDE] = np.concatenate(digits, axis=1)  # (28, 840)

    fig = matplotlib.figure.Figure(figsize=(10, 10), dpi=100)  # 1,000 x 1,000 pixels
    axes = fig.add_axes((0.08, 0.08, 0.84, 0.84), frame_on=False)  # 840 x 840 of these
    edge = 2 + 2 / (n - 1)  # of an image; the outermost ones have their middle at 2
    extent = (-edge, edge, -edge, edge)
    grey = {"cmap": "Greys_r", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    axes.imshow(figure, extent=extent, **grey)
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
    and labels, integers (N,). The file may have images (N, 784) or (N, 28, 28, 1), of any
    integer type. It may lack labels; then all are 0. Raises OSError if there is no file, or
    no download, and ValueError if the file holds something else.
    """
    if path is None:
        path = DATA / "mnist.npz"
        if not path.exists():
            return download_mnist()
    try:
        with np.load(path, allow_pickle=False) as archive:
            return read_part(archive, "train"), read_part(archive, "test")
    except (OSError, MemoryError):  # the machine's fault, not the file's
        raise
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds
        raise ValueError(
            f"{path}: expected an .npz archive with x_train, y_train, x_test and y_test; "
            f'{error}; README has a recipe, "Other data"'
        ) from error


def download_mnist():
    """Return what Keras has in its cache, or downloads."""
    try:
        return tf.keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises the bare class
        raise OSError(
            f"no data: {DATA / 'mnist.npz'} is missing, MNIST cannot be downloaded ({error}); "
            "give a file mnist.npz with --data FILE"
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
    if low < 0 or high > 255 or high < 2:  # up to 1, they are black and white, or scaled
        found = f"x_{part} has values from {low} to {high}"
        raise ValueError(f"{found}; expected grey from 0 to 255")
    images = np.ascontiguousarray(images.reshape(-1, SIDE, SIDE), np.uint8)

    labels = archive[f"y_{part}"] if f"y_{part}" in archive else np.zeros(count, np.uint8)
    if labels.dtype.kind not in "iu" or labels.size != count:
        expected = f"expected integers ({count},), or no y_{part}"
        raise ValueError(f"y_{part} is {labels.dtype} {labels.shape}; {expected}")
    return images, labels.reshape(count)


def scale(images):
    """Return images, uint8 (N, 28, 28) or (28, 28), as the network's input.

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
    rng = np.random.default_rng(seed)
    for i in itertools.count():
        batch_idx = rng.integers(len(x_train), size=batch_size)
        if i >= first:  # earlier ones are drawn to bring the generator where it was
            yield scale(x_train[batch_idx])


# ------------------------------------------------------------------------------- training
def progress(first, last):
    """Yield the numbers first, ..., last - 1; show on a terminal how long it takes."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
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
            text = f"{(i + 1) / last:4.0%}, {speed:.0f} iterations/s, {left:.0f} s left"
            print(f"{erase_line}{text}\r", end="", file=sys.stderr, flush=True)
    if on_terminal:
        print(erase_line, end="", file=sys.stderr, flush=True)


def train(model, sess, x_train, run, log_every, checkpoint_every):
    """Make the updates that a run still lacks, as the loop of the tutorial's main block does.

    `run` is a `Run`, of "the run on disk". It made run.made of run.wanted updates. run.log
    writes a line of log.csv, and run.save a checkpoint, if the losses are finite; otherwise
    they raise FloatingPointError.
    """
    settings = run.settings
    batches = random_batches(x_train, settings["batch_size"], settings["seed"], run.made)
    for i in progress(run.made, run.wanted):
        x_batch = next(batches)
        if i % log_every == 0:
            kld, rec_loss = model.step(x_batch, sess)
            run.log(i, kld, rec_loss)
            print(f"Iteration {i}: KLD = {kld:f}, RecLoss = {rec_loss:f}", flush=True)
        else:  # the same update; a session computes only what is fetched, so no losses
            sess.run(model.opt, {model.x: x_batch})
        run.made = i + 1
        if run.made % checkpoint_every == 0 or run.made == run.wanted:
            run.save(model, sess, x_batch)


def work(run, x_train, test, args):
    """Do what the tutorial's main block does, and what the options in `args` add."""
    with tf.Graph().as_default(), session(run.settings["shards"]) as sess:
        model = new_model(run.settings)
        sess.run(tf.global_variables_initializer())
        run.restore(model, sess)  # its newest checkpoint, if it has one
        train(model, sess, x_train, run, args.log_every, args.checkpoint_every)
        path = run.directory / "latent.png"
        with whole_file(path) as temporary:
            display_manifold(model, sess, temporary)
        page = explore(model, sess, test, run)
        hint = f"; move through it in {page}" if page else ""
        print(f"The manifold of the latent codes is in {path}{hint}", flush=True)
        if args.report:
            report(model, sess, test, run)
        if args.show:
            show_picture(path)


# ==================================================================== beyond the tutorial
# ---------------------------------------------------------------------------------- speed
def fast_update(model, adam, shards):
    """Return the operation of adam.minimize(model.loss, model.iteration), but faster.

    It makes the same update, to rounding. A weight w changes the loss through three tensors
    y, and by the chain rule

        d loss / d w = sum over y of slope_y d y / d w,  where slope_y = d loss / d y is
            (sigmoid(logits) - x) / B         for y = logits, from equation (2),
            mu / B                            for y = mu, from equation (1),
            (exp(log_sig_sq) - 1) / (2 B)     for y = log_sig_sq, from equation (1).

    `minimize` finds the slopes from the losses. Here they are written down, so the losses are
    not computed. (`minimize` computes them: TensorFlow's gradient of a sum asks for the shape
    of the terms.) And the batch is split into shards, each of which goes through the whole
    network in a thread of its own; their gradients are added. Matrix products of this size
    gain nothing from a second thread within them. README says what each of this saves.
    """
    size = tf.shape(model.x)[0] // shards
    sizes = [size] * (shards - 1) + [-1]  # -1: the last shard gets what is left over
    batch_size = tf.cast(tf.shape(model.x)[0], tf.float32)
    gradients_of_shards = []
    with tf.name_scope("fast_update"):
        for x, eps in zip(tf.split(model.x, sizes), tf.split(model.eps, sizes)):
            mu, log_sig_sq, _, logits = model.forward(x, eps)
            slopes = [tf.sigmoid(logits) - x, mu, (tf.exp(log_sig_sq) - 1.0) / 2.0]
            slopes = [slope / batch_size for slope in slopes]
            ys = [logits, mu, log_sig_sq]
            gradients_of_shards.append(tf.gradients(ys, model.weights, grad_ys=slopes))
        gradients = [tf.add_n(parts) for parts in zip(*gradients_of_shards)]
        # tf.tuple waits for all gradients before any weight changes. Otherwise a gradient may
        # be computed from weights that are new already, and no two runs are the same.
        gradients = tf.tuple(gradients)
        return adam.apply_gradients(zip(gradients, model.weights), model.iteration)


def shard_count():
    """Return how many shards suit the machine: two, or one on a single core or a GPU."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # the cores that this process may use
        cores = len(os.sched_getaffinity(0))
    if cores == 1 or tf.config.list_physical_devices("GPU"):
        return 1
    return SHARDS


def session(shards=SHARDS):
    """Open a session on the current graph, with a thread for each of several shards."""
    config = tf.ConfigProto()
    config.gpu_options.allow_growth = True  # take a GPU's memory as it is needed
    if shards > 1:
        config.intra_op_parallelism_threads = 1
        config.inter_op_parallelism_threads = shards
    return tf.Session(config=config)


# ------------------------------------------------------------------------ the run on disk
# The settings of a run, and their defaults. The command line has an option for each; its value
# is None if the option is not given.
DEFAULTS = {
    "data": None,  # data/mnist.npz
    "iterations": 5000,  # a bit over 21 epochs
    "batch_size": BATCH_SIZE,
    "learning_rate": LEARNING_RATE,
    "decoder": "tutorial",
    "seed": 0,
    "shards": None,  # as suits the machine
}
KEPT = ("batch_size", "decoder", "seed", "shards")  # which a resumed run cannot change
RESULTS = ("latent.png", "explore.html", "metrics.json", "report.png")
LOG_HEADER = b"iteration,kld,rec_loss\n"


@contextmanager
def locked(folder):
    """Keep other processes out of a run. The lock ends with the process, even if killed."""
    with open(folder / "lock", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder.parent}: another run is at work there") from error
        except (ImportError, OSError):
            pass  # Windows and some network file systems have no such locks
        yield


def to_disk(path):
    """Wait until a file is on the disk, so that a power cut does not take it back."""
    with open(path, "r+b") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


@contextmanager
def whole_file(path):
    """Yield a name to write to; then move that file to `path`, whole and at once."""
    temporary = path.with_name(f"tmp-{path.name}")  # with the same ending
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def updates_made(checkpoints):
    """Return how many updates the newest checkpoint has had; 0 if there is none."""
    newest = tf.train.latest_checkpoint(checkpoints)  # .../vae_mnist-500, or None
    return 0 if newest is None else int(newest.rpartition("-")[2])


class Run:
    """A training run, kept in a directory so that it can be killed at any moment.

        checkpoints/run.json            the settings; written when the run begins or goes on
        checkpoints/vae_mnist-500.*     all variables after 500 updates, from `Saver`
        checkpoints/checkpoint          names the newest of these
        checkpoints/lock                locked while a process works on the run
        log.csv                         the losses that were printed, at full precision
        latent.png, explore.html        the results
        metrics.json, report.png        the results of --report

    The run makes progress when `checkpoint` is replaced, and only then. By that time the new
    checkpoint and its part of log.csv are on the disk. What a killed run wrote later is
    dropped, and made again with the same bits: seed and iteration decide all randomness.
    """

    def __init__(self, directory, settings):
        self.directory = directory
        self.settings = settings  # as DEFAULTS, and "images": a hash of the training images
        self.wanted = settings["iterations"]
        self.checkpoints = directory / "checkpoints"
        self.log_path = directory / "log.csv"
        self.made = updates_made(self.checkpoints)

    @property
    def title(self):
        decoder = self.settings["decoder"]
        seed = self.settings["seed"]
        return f"{decoder} decoder, {self.made:,} iterations, seed {seed}"

    def prepare(self):
        """Write run.json, and make the directory what it was at the newest checkpoint."""
        with whole_file(self.checkpoints / "run.json") as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
        if self.made < self.wanted:
            for name in RESULTS:  # which show an older checkpoint than the one to come
                (self.directory / name).unlink(missing_ok=True)
        lines = [LOG_HEADER]
        if self.log_path.exists():
            for line in self.log_path.read_bytes().splitlines(keepends=True):
                iteration = line.partition(b",")[0]
                # A torn last line ends anywhere: "11" may be the beginning of "1100,...".
                is_whole = line.endswith(b"\n") and iteration.isdigit()
                if is_whole and int(iteration) < self.made:
                    lines.append(line)
        with whole_file(self.log_path) as temporary:
            temporary.write_bytes(b"".join(lines))

    def restore(self, model, sess):
        """Set the variables to those of the newest checkpoint, if there is one."""
        if self.made > 0:
            try:
                restore(model, sess, self.checkpoints)
            except ValueError as error:
                fail(error, status=2)

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
        with open(self.log_path, "a", newline="\n") as file:
            file.write(f"{iteration},{kld!r},{rec_loss!r}\n")

    def save(self, model, sess, x_batch):
        """Save a checkpoint, if the losses of x_batch with the new weights are finite."""
        self.check(self.made, *sess.run([model.kld, model.rec_loss], {model.x: x_batch}))
        # Not write_state: Saver would write `checkpoint` before the others are on the disk.
        prefix = str(self.checkpoints / "vae_mnist")
        name = model.saver.save(
            sess, prefix, global_step=self.made, write_meta_graph=False, write_state=False
        )
        for path in [self.log_path, *self.checkpoints.glob(f"vae_mnist-{self.made}.*")]:
            to_disk(path)
        with whole_file(self.checkpoints / "checkpoint") as temporary:
            temporary.write_text(f'model_checkpoint_path: "{Path(name).name}"\n')
        for path in self.checkpoints.glob("vae_mnist-*"):
            if not path.name.startswith(f"vae_mnist-{self.made}."):
                path.unlink()


def read_settings(directory):
    """Return the settings of the run in a directory, or None if there is no run."""
    path = directory / "checkpoints" / "run.json"
    try:
        settings = json.loads(path.read_bytes())
        if settings.keys() != {*DEFAULTS, "images"}:
            raise ValueError("other names")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a run's settings, got a damaged file; --overwrite replaces it"
        ) from error
    return settings


def begin_run(directory, given, overwrite):
    """Begin a run; refuse to replace an unfinished one, unless `overwrite` is true."""
    checkpoints = directory / "checkpoints"
    older = None if overwrite else read_settings(directory)
    made = updates_made(checkpoints)
    if older is not None and made > 0:
        if made < older["iterations"]:
            raise ValueError(
                f"the run in {directory} made {made} of {older['iterations']} iterations: "
                "go on with --resume, or replace it with --overwrite"
            )
        print(f"Replacing the finished run in {directory}", flush=True)
    # The older run goes. Without run.json its other files are nobody's, so that goes first.
    for name in ("run.json", "checkpoint", "vae_mnist-*"):
        for path in checkpoints.glob(name):
            path.unlink()
    run = Run(directory, {**DEFAULTS, "shards": shard_count(), **given})
    run.prepare()
    return run


def resume_run(directory, given, older):
    """Go on with a run. Settings that are given replace older ones, but for those in KEPT."""
    settings = {**older, **given}
    run = f"--resume: the run in {directory}"
    if settings["images"] != older["images"]:
        raise ValueError(f"{run} learns from other images; give their file with --data")
    for name in KEPT:
        if settings[name] != older[name]:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{run} has {option} {older[name]}, not {settings[name]}")
    run = Run(directory, settings)
    run.prepare()
    return run


# ------------------------------------------------------------------------ a trained model
def restore(model, sess, path):
    """Load a checkpoint into the variables of a model.

    `path` is the name of a checkpoint, as `tf.train.latest_checkpoint` returns it, or a
    directory such as outputs/checkpoints, for its newest one. If the checkpoint has weights
    alone, Adam's variables and `iteration` get their initial values. Raises ValueError if
    there is no checkpoint, or if it is damaged or of another network; then no variable has
    changed.
    """
    name = tf.train.latest_checkpoint(path) or str(path)
    if not os.path.exists(f"{name}.index"):
        raise ValueError(f"{path}: expected a checkpoint, found none")
    try:
        shapes = tf.train.load_checkpoint(name).get_variable_to_shape_map()
        for weight in model.weights:
            found = shapes.get(weight.op.name, "missing")
            expected = weight.shape.as_list()
            if found != expected:
                reason = f"{weight.op.name} is {found}, not {expected}"
                raise ValueError(f"{name}: of another network: {reason}")
        present = [v for v in model.variables if v.op.name in shapes]
        with sess.graph.as_default():
            tf.train.Saver(present).restore(sess, name)
    except tf.errors.OpError as error:
        raise ValueError(f"{name}: damaged: {error.message}") from error
    sess.run([v.initializer for v in model.variables if v.op.name not in shapes])


def new_model(settings):
    """Return a model with a run's settings."""
    names = ("learning_rate", "seed", "shards", "decoder")
    return VAE(**{name: settings[name] for name in names})


@contextmanager
def trained(directory="outputs"):
    """Open the model of a run, finished or not: `with trained() as (model, sess):`.

    `directory` is the run's. It may also be one in which the tutorial's own program, under
    TensorFlow 1, saved checkpoints with `tf.train.Saver`. Raises what `restore` raises.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    with tf.Graph().as_default():
        model = VAE() if settings is None else new_model(settings)
        folder = directory if settings is None else directory / "checkpoints"
        with session() as sess:
            restore(model, sess, folder)
            yield model, sess


# --------------------------------------------------------------------- what it has learnt
def grid_codes(reach, step):
    """Return the codes of a grid over [-reach, reach]^2, (N, K), by rows from the top."""
    axis = np.linspace(-reach, reach, round(2 * reach / step) + 1)
    return np.stack(np.meshgrid(axis, axis[::-1]), axis=-1).reshape(-1, LATENT)


def decoded(model, sess, codes):
    """Yield, for some of the codes after the other, logits(z) and an offset: (n, D) and (n,).

    Since log p(x | z) = -RecLoss = x . logits - sum softplus(logits), we have
        log p(x, z) = x . logits + offset,  offset = log p(z) - sum softplus(logits).
    """
    for z in np.array_split(codes, 1 + len(codes) // 400):  # 400 at a time take little memory
        logits = sess.run(model.logits, {model.z: z})
        log_pz = -np.sum(z**2, axis=1) / 2 - np.log(2 * np.pi)  # of N(0, I)
        softplus = np.logaddexp(0, logits)  # log(e^0 + e^l)
        yield logits, log_pz - np.sum(softplus, axis=1)


def log_likelihood(model, sess, x, reach, step):
    """Return log p(x), float64 (N,), of images x, (N, D) in [0, 1].

    p(x) is the integral of p(x, z) over the plane: nearly the sum of p(x, z) over the codes
    of a grid, times the area of its cells. These numbers are far too small for a float, so
    log sum exp(a) is computed as max(a) + log sum exp(a - max(a)).
    """
    codes = grid_codes(reach, step)
    codes = codes[np.sum(codes**2, axis=1) <= reach**2]  # a disc, since p(z) is round
    log_sum = np.full(len(x), -np.inf)
    for logits, offset in decoded(model, sess, codes):
        offset = offset[:, np.newaxis].astype(np.float32)
        log_joint = logits @ x.T + offset  # log p(x, z), (n, N)
        highest = np.max(log_joint, axis=0)
        total = np.sum(np.exp(log_joint - highest), axis=0)
        log_sum = np.logaddexp(log_sum, highest + np.log(total))
    return log_sum + np.log(step**2)


def evaluate(model, sess, images, seed=0, samples=20, reach=5.5, step=0.05):
    """Measure what a model has learnt of images, uint8 (N, 28, 28), in nats an image.

    Returns arrays (N,), float64, by name:
    "RecLoss": equation (2), averaged over `samples` codes from q(z | x); `seed` decides them.
    "KLD": equation (1).
    "-ELBO": their sum.
    "NLL": -log p(x), from a grid of codes, `step` apart, in a disc of radius `reach`. After
        5,000 iterations the defaults are good to 1e-3 nats in the mean.
    "KL(q || p)": -ELBO - NLL, the divergence of q(z | x), the encoder's Gaussian, from the
        exact posterior p(z | x) = p(x, z) / p(x).
    Here p(x | z) = exp(-RecLoss); for grey pixels its sum over all x is not 1.
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
# data/explore.html is the frame of the page: all of it but the numbers of a run. In the
# browser, it decodes the code under the mouse and encodes the image that is picked or drawn.
# It also computes the exact posterior p(z | x) on a grid of codes.
NUMBERS_HERE = b">NUMBERS_HERE<"  # where the frame wants the numbers
PAGE_REACH = 4.5  # of that grid; nearly all test images have their codes within it
PAGE_STEP = 0.075  # 121 x 121 codes, which take a browser two seconds
MNIST_SHA256 = "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757"
# Ten colours that colour-blind people can tell apart. Seven are Petroff's (arXiv:2107.02270);
# his other three are hard to see on black, or beside the page's yellow glow.
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
    """Return the labels that occur, or ten of them, spread over all, if they are more."""
    classes = np.unique(labels)
    places = np.linspace(0, len(classes) - 1, min(10, len(classes)))
    return classes[np.round(places).astype(int)]


def as_text(array):
    """Return the bytes of an array in base64, as the page reads arrays."""
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
    """Return the numbers of a run that the page needs, by name; arrays `as_text`."""
    images, labels = (part[:10000] for part in test)
    codes = []
    losses = []
    for part in np.array_split(images, 100):  # a few at a time take little memory
        x = scale(part)
        fetches = [model.mu, model.rec_losses, model.klds]
        mu, rec_losses, klds = sess.run(fetches, {model.x: x})
        codes.append(mu)
        losses.append(rec_losses + klds)
    shown = [np.flatnonzero(labels == label)[:2] for label in ten_classes(labels)]
    shown = np.concatenate(shown)  # the places of two images a label
    figures = evaluate(model, sess, images[shown], reach=PAGE_REACH, step=PAGE_STEP)
    is_mnist = run.settings["images"] == MNIST_SHA256
    grid = grid_codes(PAGE_REACH, PAGE_STEP)
    offsets = [offset for _, offset in decoded(model, sess, grid)]
    return {
        "run": run.title,  # the window's title
        "kind": "digit" if is_mnist else "image",  # what the page calls an image
        # the network, float32
        "encoder": page_layers(model.encoder, sess),
        "decoder": page_layers(model.decoder, sess),
        # dots on the map: mu of the test images, float32 (N, 2), their labels and colours
        "codes": as_text(np.concatenate(codes)),
        "labels": labels.tolist(),
        "colours": label_colours(labels),
        # test images to pick from, uint8 (20, 28, 28), their labels, and the one picked first
        "images": as_text(images[shown]),
        "shown": labels[shown].tolist(),
        "picked": int(np.argmax(figures["KL(q || p)"])),
        # the grid of the exact posterior, n x n codes, and the offsets of `decoded`, float32
        "grid": {"n": round(len(grid) ** 0.5), "reach": PAGE_REACH},
        "offset": as_text(np.concatenate(offsets).astype(np.float32)),
        # what 5, 50 and 95 % of the test images have less than: a scale for a loss
        "losses": np.quantile(np.concatenate(losses), [0.05, 0.5, 0.95]).tolist(),
    }


def explore(model, sess, test, run):
    """Write explore.html, the frame with a run's numbers; return its path, or None."""
    frame = DATA / "explore.html"
    if not frame.exists():  # the module was copied without it
        return None
    numbers = json.dumps(page_numbers(model, sess, test, run)).encode()
    content = frame.read_bytes().replace(NUMBERS_HERE, b">" + numbers + b"<")
    path = run.directory / "explore.html"
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path


# ----------------------------------------------------------------------------- the report
def draw_codes(axes, mu, labels, kld):
    """Draw where the encoder puts the test images, in the colours of their labels."""
    colours = label_colours(labels)
    axes.scatter(*mu.T, s=2, linewidth=0, c=[colours[label] for label in labels.tolist()])
    for label in ten_classes(labels).tolist():  # no dots, but entries of the legend
        axes.scatter([], [], c=colours[label], edgecolor="black", label=label)
    axes.legend(title="label", loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_facecolor("black")  # on which all of the colours are seen
    square = matplotlib.patches.Rectangle((-2, -2), 4, 4, fill=False, edgecolor="white")
    axes.add_patch(square)
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
        decoded = np.hstack(model.decode(mu[chosen], sess))
        sheet[top + SIDE : top + 2 * SIDE, :width] = decoded
    axes.imshow(sheet, cmap="Greys_r", vmin=0, vmax=1)
    axes.set(title=f"Images over reconstructions:\nRecLoss {rec_loss:.2f}", anchor="N")
    axes.set(ylabel="label", xticks=[])
    axes.set_yticks(np.arange(len(classes)) * 2 * SIDE + SIDE - 0.5, classes)


def draw_losses(axes, path):
    """Draw the losses in log.csv: RecLoss on the left axis, KLD on the right one."""
    iterations, kld, rec_loss = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).T
    last = f"KLD {kld[-1]:.2f}, RecLoss {rec_loss[-1]:.2f}"
    axes.set(title=f"Losses of a batch; in iteration {iterations[-1]:,.0f}: {last}")
    axes.set(xlabel=f"iteration; RecLoss begins at {rec_loss[0]:.2f}")
    curves = [("RecLoss", rec_loss, COLOURS[0], axes), ("KLD", kld, COLOURS[8], axes.twinx())]
    for name, values, colour, side in curves:
        side.plot(iterations, values, color=colour, linewidth=1)
        side.set_ylabel(name, color=colour)
        settled = values[len(values) // 20 :]  # the first would squeeze the rest
        margin = 0.1 * np.ptp(settled) + 0.01
        side.set_ylim(min(settled) - margin, max(settled) + margin)


@matplotlib.style.context("default")
def draw_report(model, sess, test, run, means):
    """Draw report.png: codes and reconstructions of the test set, losses of the run."""
    mu, _ = model.encode(scale(test[0]), sess)
    fig = matplotlib.figure.Figure(figsize=(9, 8.8), dpi=150, layout="constrained")
    fig.suptitle(f"{run.title}: NLL {means['NLL']:.2f} nats an image")
    panels = fig.subplot_mosaic("AB;CC", width_ratios=(2, 1), height_ratios=(2, 1))
    draw_codes(panels["A"], mu, test[1], means["KLD"])
    draw_sheet(panels["B"], model, sess, test, mu, means["RecLoss"])
    draw_losses(panels["C"], run.log_path)
    with whole_file(run.directory / "report.png") as temporary:
        fig.savefig(temporary)


def report(model, sess, test, run):
    """Measure the test set; print the figures, write metrics.json, draw report.png."""
    print(f"On {len(test[0]):,} test images, nats an image (standard error):", flush=True)
    means = {}
    metrics = {}
    for name, values in evaluate(model, sess, test[0]).items():
        means[name] = np.mean(values)
        if not np.isfinite(means[name]):
            raise FloatingPointError(f"{name} is {means[name]}; try a lower --learning-rate")
        error = np.std(values) / len(values) ** 0.5
        metrics[name] = {"mean": means[name], "standard_error": error}
        print(f"{name:10} {means[name]:8.2f} ({error:.2f})", flush=True)
    content = {"settings": run.settings, "iteration": run.made, "metrics": metrics}
    with whole_file(run.directory / "metrics.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    draw_report(model, sess, test, run, means)
    path = run.directory / "report.png"
    print(f"These figures are in metrics.json, pictures in {path}", flush=True)


def show_picture(path):
    """Open a window with a picture of 1,000 x 1,000 pixels, until it is closed."""
    from matplotlib import pyplot as plt

    plt.figure(figsize=(10, 10), dpi=100)
    plt.figimage(plt.imread(path))
    plt.show()


# ----------------------------------------------------------------------- the command line
def number(kind, lowest, highest):
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
    path = Path(text).expanduser()
    # TensorFlow takes * ? [ \ for a pattern. Of gs://bucket we would make a folder "gs:".
    if set(path.as_posix()) & set("*?[\\") or "://" in text:
        expected = "expected a directory on this machine, without * ? [ \\ in its name"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return path


def make_parser():
    """Return the parser of the command line."""
    about = "Train the variational autoencoder of Nate Merrill's 2019 tutorial on MNIST."
    usage = argparse.SUPPRESS  # so that an error is one line
    parser = argparse.ArgumentParser("vae_mnist.py", usage=usage, description=about)

    def setting(name, text, **how):
        default = "as suits the machine" if DEFAULTS[name] is None else DEFAULTS[name]
        text = f"{text} (default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **how)

    count = number(int, 1, 2**31 - 1)
    option = parser.add_argument
    text = "an .npz archive (default: data/mnist.npz)"
    option("--data", metavar="FILE", type=os.path.abspath, help=text)
    text = "where the files of the run go (default: outputs)"
    option("--output-dir", type=local_directory, default=Path("outputs"), help=text)
    setting("iterations", "updates to make", type=count)
    setting("batch_size", "images an iteration", type=count)
    setting("learning_rate", "step size of Adam", type=number(float, 1e-30, 1e30))
    setting("decoder", "mirrored: the encoder backwards", choices=DECODERS)
    setting("seed", "decides weights, batches and noise", type=number(int, 0, 2**31 - 1))
    setting("shards", "parts of a batch", type=number(int, 1, 64))
    text = "iterations a log line (default: 100)"
    option("--log-every", type=count, default=100, help=text)
    text = "iterations a checkpoint (default: 500)"
    option("--checkpoint-every", type=count, default=500, help=text)
    group = parser.add_mutually_exclusive_group()
    text = "go on with the run in --output-dir, or begin one if there is none"
    group.add_argument("--resume", action="store_true", help=text)
    text = "replace an unfinished run"
    group.add_argument("--overwrite", action="store_true", help=text)
    option("--report", action="store_true", help="also measure and show the test set")
    option("--show", action="store_true", help="also open the picture in a window")
    return parser


def fail(error, status):
    """End the program with a line that says what is wrong."""
    text = str(error).partition("[[")[0]  # TensorFlow adds [[node ..., places in the graph
    print(f"vae_mnist.py: error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def opened_run(args):
    """Yield a run, begun or resumed as the arguments say and locked, and its data."""
    directory = args.output_dir
    given = {name: vars(args)[name] for name in DEFAULTS if vars(args)[name] is not None}
    older = read_settings(directory) if args.resume else None
    data = given.get("data") or (older and older["data"])
    (x_train, _), test = load_mnist(data)
    given["images"] = hashlib.sha256(x_train).hexdigest()
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    with locked(directory / "checkpoints"):
        if older is None:
            run = begin_run(directory, given, args.overwrite)
        else:
            run = resume_run(directory, given, older)
        yield run, x_train, test


def main(argv=None):
    """Do what the command line says, or a list of its words; return the exit status.

    It is 0, or 130 after Ctrl-C. Raises SystemExit: with status 2 if an option, the data or
    the directory is wrong, before anything is written; with status 1 after a fault in a run.
    """
    args = make_parser().parse_args(argv)
    try:
        with ExitStack() as until_the_end:
            try:
                run, x_train, test = until_the_end.enter_context(opened_run(args))
            except (OSError, ValueError) as error:
                fail(error, status=2)
            work(run, x_train, test, args)
    except KeyboardInterrupt:
        again = f"python vae_mnist.py --resume --output-dir {args.output_dir}"
        print(f"Stopped; to go on: {again}", file=sys.stderr)
        return 130
    except (OSError, MemoryError, FloatingPointError, tf.errors.OpError) as error:
        fail(error, status=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
