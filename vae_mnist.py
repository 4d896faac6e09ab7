"""Train the variational autoencoder of Nate Merrill's 2019 tutorial on MNIST, in graph mode.

The encoder turns an image x, D = 784 pixels in [0, 1], into a Gaussian over a latent code z
of K = 2 dimensions; the decoder turns a code into r, the probability of white for each pixel.
Both are trained on KLD + RecLoss, the negative evidence lower bound (-ELBO), in nats an image:

    KLD     = 1/2 sum_k (exp(log_sig_sq_k) - log_sig_sq_k + mu_k^2 - 1)             (1)
    RecLoss = -sum_d (x_d log r_d + (1 - x_d) log(1 - r_d))                         (2)

    python vae_mnist.py            # train for 5,000 iterations, then draw outputs/latent.png
    python vae_mnist.py --help     # all options and their defaults

A first reader begins at `SIDE`, stops at the line "beyond the tutorial", and may skip the rest but
`work`, near the end, which was the tutorial's main block. The sections, and their public names:

    model, picture, data, training    VAE, display_manifold, scale, random_batches
    data files                        load_mnist
    machine and messages              session
    the run on disk                   (the record of a run, its checkpoints, how it is resumed)
    a trained model                   restore, trained, export
    what it has learnt                evaluate (then a page that decodes, explore.html; the report)
    command line                      main

Source: Nate Merrill, "Implementing an MNIST Variational Autoencoder in TensorFlow", 2019.
Method: Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv:1312.6114.
"""

import argparse
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from base64 import b64encode
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def quiet():
    """Send to nowhere what TensorFlow's C++ code writes, while it loads, to descriptor 2."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if sys.stderr is None:  # descriptor 2 is closed, as by 2>&-, and os.dup(2) would fail
        os.dup2(nowhere, 2)
    kept = os.dup(2)
    os.dup2(nowhere, 2)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # read now, and obeyed as well when 2 is back
    try:
        yield
    except KeyboardInterrupt:  # Ctrl-C needs no traceback
        sys.exit(128 + signal.SIGINT)
    finally:
        del os.environ["TF_CPP_MIN_LOG_LEVEL"]
        os.dup2(kept, 2)
        os.close(kept)


# Started as a program, it hides what loading prints, unless the user has asked to see that.
is_quiet = __name__ == "__main__" and "TF_CPP_MIN_LOG_LEVEL" not in os.environ
# A program started in a notebook inherits its MPLBACKEND; if the backend of that name is not
# installed here, `import matplotlib` fails. So it is hidden from the import, and applied after it.
backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
with quiet() if is_quiet else nullcontext():
    import matplotlib.figure
    import matplotlib.style
    import numpy as np
    import tensorflow.compat.v1 as tf

    if is_quiet:
        tf.config.list_physical_devices("GPU")  # where there is none, the first look complains
if backend is not None:
    os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):  # if it is unknown, matplotlib chooses another
        matplotlib.rcParams["backend"] = backend

SIDE = 28  # pixels along an edge of an image
PIXELS = SIDE * SIDE  # D
LATENT = 2  # K; the picture and the report need the codes to lie in a plane
# Units of the layers with ELU, then of the linear ones: the tutorial's, and the encoder mirrored.
ENCODER = ([256, 128, 64], [2 * LATENT])
DECODERS = {"tutorial": ([256, 128, 64], [4, PIXELS]), "mirrored": ([64, 128, 256], [PIXELS])}
SHARDS = 2  # parts of a batch that are computed at the same time
ITERATIONS = 5000  # a bit over 21 passes over the 60,000 images
BATCH_SIZE = 256  # images an iteration
LEARNING_RATE = 0.001  # Adam's own default


# ---------------------------------------------------------------------------------- model
def split(batch, shards):
    """Split a batch into a list of parts; the last one gets what is left over.

    A second thread makes matrix products this small no faster, but two halves of a batch, a thread
    each, take a third less time. From here on, `..._shards` is a list with a tensor for each part.
    """
    size = tf.shape(batch)[0] // shards
    return tf.split(batch, [size] * (shards - 1) + [-1])


def dense(fc_shards, units, layers, activation=None):
    """Apply a fully connected layer to every shard, as `tf.layers.dense` did to a batch.

    Its variables are named as there (dense/kernel, dense/bias, dense_1/kernel, ...). They are added
    to the list `layers`, with "elu": whether the page explore.html has to apply ELU, too.
    """
    # A kernel's seed. By default it is the number of operations so far, which depends on the shards;
    # the first weights would, too. The number of variables so far does not.
    glorot = tf.glorot_uniform_initializer(seed=2 * len(layers))
    with tf.variable_scope(None, default_name="dense"):
        kernel = tf.get_variable("kernel", [fc_shards[0].shape[1], units], initializer=glorot)
        bias = tf.get_variable("bias", [units], initializer=tf.zeros_initializer())
        layers.append({"kernel": kernel, "bias": bias, "elu": activation is tf.nn.elu})
        fc_shards = [tf.nn.bias_add(tf.matmul(fc, kernel), bias) for fc in fc_shards]
        if activation is None:
            return fc_shards
        return [activation(fc) for fc in fc_shards]


def network(fc_shards, sizes, layers):
    """Apply the layers of `sizes`, which is ENCODER or one of DECODERS."""
    elu_units, linear_units = sizes
    for n in elu_units:
        fc_shards = dense(fc_shards, units=n, layers=layers, activation=tf.nn.elu)
    for n in linear_units:
        fc_shards = dense(fc_shards, units=n, layers=layers)
    return fc_shards


def cross_entropy(x, logits):
    """Return equation (2) for r = sigmoid(logits), (B, D), image by image: (B,).

    With softplus(l) = log(1 + exp(l)), log r = l - softplus(l) and log(1 - r) = -softplus(l). This
    stays finite where r rounds to 0 or 1, and its gradient does not vanish there, as that of the
    tutorial's clipped logarithm does.
    """
    return tf.reduce_sum(tf.nn.softplus(logits) - x * logits, axis=1)


@tf.custom_gradient  # which returns the first value alone; TensorFlow calls the second
def total_cross_entropy(x, logits):
    """Return equation (2) summed over a batch, with its gradient given, which is faster.

    An update needs the gradient alone, not the loss. TensorFlow's own gradient of reduce_sum asks
    for the shape of its input, and to answer that a session computes all of it, the terms of (2),
    (B, D): a third more time. With this gradient, they are computed only where a loss is logged.
    """

    def gradient(upstream):  # d loss / d sum; returned are d loss / d x and d loss / d logits
        return -upstream * logits, upstream * (tf.sigmoid(logits) - x)

    return tf.reduce_sum(cross_entropy(x, logits)), gradient


def named_variables(layers, adam, iteration):
    """Return a model's variables by their names in a checkpoint.

    Saver would take TensorFlow's names, which differ in a second model of a graph: dense_9/kernel.
    Adam keeps two running means for each weight, m of its gradient and v of the gradient's square,
    and two powers, beta1^t and beta2^t.
    """
    # Of Adam's variables only these two are scalars, in this order.
    beta1_power, beta2_power = [v for v in adam.variables() if v.shape.rank == 0]
    named = {"global_step": iteration, "beta1_power": beta1_power, "beta2_power": beta2_power}
    for i, layer in enumerate(layers):
        scope = "dense" if i == 0 else f"dense_{i}"
        for part in ("kernel", "bias"):
            named[f"{scope}/{part}"] = layer[part]
            named[f"{scope}/{part}/Adam"] = adam.get_slot(layer[part], "m")
            named[f"{scope}/{part}/Adam_1"] = adam.get_slot(layer[part], "v")
    return named


class VAE:
    """The tutorial's variational autoencoder, built in the current default graph.

    Its tensors are attributes: `x`, `mu`, `log_sig_sq`, `eps`, `z`, `logits` and `rec` have one
    row for each image, `rec_losses` and `klds` one number for each; `rec_loss`, `kld` and their
    sum `loss` are means over the batch, all in nats an image. `opt` is one update by Adam.

    `seed` decides the first weights and, with the number of updates, the noise eps. `shards`
    changes a result by rounding alone. `decoder` is "tutorial" or "mirrored", see DECODERS;
    another one raises ValueError.
    """

    def __init__(self, learning_rate=LEARNING_RATE, seed=0, shards=SHARDS, decoder="tutorial"):
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        self.decoder = decoder
        self.shards = shards
        self.layers = []  # see `dense`; the encoder's come first
        tf.set_random_seed(seed)
        self.iteration = tf.Variable(0, trainable=False, dtype=tf.int64, name="global_step")

        # Input data Tensor
        self.x = tf.placeholder(tf.float32, shape=[None, PIXELS], name="x")  # (B, D) in [0, 1]
        with tf.name_scope("encoder"):
            batch_size = tf.shape(self.x)[0]
            x_shards = split(self.x, shards)
            fc = tf.concat(network(x_shards, ENCODER, self.layers), axis=0)
            self.mu = fc[:, :LATENT]  # (B, K)
            # estimate log sigma^2 for numerical stability
            self.log_sig_sq = fc[:, LATENT:]  # (B, K)

        # z = mu + sigma * epsilon
        with tf.name_scope("sampler"):
            # epsilon is a sample from N(0, 1), the same one whenever seed and iteration are the same
            self.eps = tf.random.stateless_normal([batch_size, LATENT], [seed, self.iteration])
            noise = tf.exp(self.log_sig_sq / 2) * self.eps
        # Random normal variable for decoder :D
        # sess.run can be fed any tensor, not only placeholders: whoever feeds z overrides the
        # sampler, and neither x nor the encoder is needed. So one graph trains and draws.
        self.z = tf.add(self.mu, noise, name="z")  # (B, K)

        with tf.name_scope("decoder"):
            logit_shards = network(split(self.z, shards), DECODERS[decoder], self.layers)
            self.logits = tf.concat(logit_shards, axis=0)  # (B, D)
        # sigmoid bounds answer to [0,1] for images
        self.rec = tf.sigmoid(self.logits, name="rec")  # (B, D)

        with tf.name_scope("losses"):
            pairs = list(zip(x_shards, logit_shards))
            # reconstruction loss
            total = tf.add_n([total_cross_entropy(*pair) for pair in pairs])
            self.rec_loss = total / tf.cast(batch_size, tf.float32)
            # the same for each image; computed only if somebody fetches it, as `evaluate` does
            self.rec_losses = tf.concat([cross_entropy(*pair) for pair in pairs], axis=0)
            # KLD( (mu, sigma) , N(0,1) ) = .5 (tr(sigma2) + mu^T mu - k - log det(sigma2))
            terms = tf.exp(self.log_sig_sq) + tf.square(self.mu) - 1.0 - self.log_sig_sq
            self.klds = 0.5 * tf.reduce_sum(terms, axis=1)
            self.kld = tf.reduce_mean(self.klds)
            self.loss = self.kld + self.rec_loss

        # The tutorial's text leaves out `step` and the optimizer. Here it is Adam as TensorFlow has
        # it, and adds 1 to iteration. GATE_GRAPH: all gradients are computed before any weight
        # changes, so that every run gives the same bits.
        adam = tf.train.AdamOptimizer(learning_rate)
        self.weights = [layer[part] for layer in self.layers for part in ("kernel", "bias")]
        self.opt = adam.minimize(self.loss, self.iteration, gate_gradients=adam.GATE_GRAPH)
        self.variables = named_variables(self.layers, adam, self.iteration)
        self.saver = tf.train.Saver(self.variables)

    def step(self, batch, sess):
        """Make one update on batch, (B, 784) in [0, 1]; return kld, rec_loss from before it."""
        _, kld, rec_loss = sess.run([self.opt, self.kld, self.rec_loss], {self.x: batch})
        return float(kld), float(rec_loss)

    def encode(self, batch, sess):
        """Return mu, log_sig_sq, float32 (B, 2), of q(z | x) for images (B, 784) in [0, 1]."""
        return sess.run([self.mu, self.log_sig_sq], {self.x: batch})

    def decode(self, z, sess):
        """Return the images, float32 (B, 28, 28) in [0, 1], that codes z, (B, 2), stand for."""
        return sess.run(self.rec, {self.z: z}).reshape(-1, SIDE, SIDE)


# -------------------------------------------------------------------------------- picture
@matplotlib.style.context("default")  # whatever the user's matplotlibrc says
def display_manifold(model, sess, path="latent.png"):
    """Draw 30 x 30 images, decoded over [-2, 2] in both latent dimensions, into a PNG file.

    Each decoded pixel is one pixel of the file. Returns all images as one, float32 (840, 840) in
    [0, 1], in which z[0] grows to the right and z[1] upwards.
    """
    n = 30
    size = n * SIDE
    figure = np.zeros((size, size), np.float32)
    grid_x = np.linspace(-2, 2, n)
    grid_y = np.linspace(-2, 2, n)[::-1]
    for i, yi in enumerate(grid_y):
        digits = model.decode([[xi, yi] for xi in grid_x], sess)  # (30, 28, 28)
        figure[i * SIDE : (i + 1) * SIDE] = np.concatenate(digits, axis=1)  # (28, 840)

    margin = 80  # pixels of the file around the images, for the axes
    side = size + 2 * margin
    fig = matplotlib.figure.Figure(figsize=(side / 100, side / 100), dpi=100)
    pixels = matplotlib.colormaps["Greys_r"](figure, bytes=True)
    fig.figimage(pixels, margin, margin)  # as they are; axes would interpolate them
    area = (margin / side, margin / side, size / side, size / side)
    axes = fig.add_axes(area, frame_on=False)
    edge = 2 + 2 / (n - 1)  # half a step beyond 2, where the outermost images have their centres
    axes.set(xlabel="z[0]", ylabel="z[1]", xlim=(-edge, edge), ylim=(-edge, edge))
    axes.set(xticks=np.linspace(-2, 2, 9), yticks=np.linspace(-2, 2, 9))
    fig.savefig(path, format="png")
    return figure


# ----------------------------------------------------------------------------------- data
def scale(images):
    """Return images, uint8 (N, 28, 28) or (28, 28), as the network's input, (N, D) in [0, 1].

    Raises ValueError for any others, such as images that are scaled already.
    """
    if images.dtype != np.uint8 or images.shape[-2:] != (SIDE, SIDE) or images.ndim > 3:
        expected = f"expected images, uint8 (N, {SIDE}, {SIDE}) or ({SIDE}, {SIDE})"
        raise ValueError(f"{expected}, got {images.dtype} {images.shape}")
    return images.reshape(-1, PIXELS) / np.float32(255)


def random_batches(x_train, batch_size=BATCH_SIZE, seed=0, first=0):
    """Yield the batches of the iterations first, first + 1, ..., float32 (B, D) in [0, 1].

    Drawn with replacement; seed and iteration decide which. `first` is above 0 in a resumed run.
    """
    rng = np.random.default_rng(seed)
    for i in itertools.count():
        batch_idx = rng.integers(len(x_train), size=batch_size)
        if i >= first:
            yield scale(x_train[batch_idx])


# ------------------------------------------------------------------------------- training
def train(model, sess, x_train, run, log_every, checkpoint_every, stopped):
    """Make the updates that a run still lacks, as the loop of the tutorial's main block does.

    `run`, a `Run` (further down), knows its settings and how many updates were made, keeps the log
    and saves checkpoints. `stopped` is a list, empty until Ctrl-C or another signal puts its number
    there: then the run is saved after the iteration at hand, and training ends.
    """
    # sess.run(model.opt, {model.x: batch}), prepared once. It fetches, and so computes, no losses.
    update = sess.make_callable(model.opt, feed_list=[model.x])
    batches = random_batches(x_train, run.settings["batch_size"], run.settings["seed"], run.made)
    for i, x_batch in zip(run.iterations(), batches):
        if i % log_every == 0:
            kld, rec_loss = model.step(x_batch, sess)
            run.log(i, kld, rec_loss)
            if not stopped:  # a closed terminal sends SIGHUP, and print would fail
                print(f"Iteration {i}: KLD = {kld:f}, RecLoss = {rec_loss:f}", flush=True)
        else:
            update(x_batch)
        run.made = i + 1
        if run.made % checkpoint_every == 0 or run.finished or stopped:
            # check raises FloatingPointError if the new weights have losses that are inf or nan.
            run.check(run.made, *sess.run([model.kld, model.rec_loss], {model.x: x_batch}))
            run.save(model, sess)
            if stopped:  # asked again: a signal may have come during the save
                break


# ==================================================================== beyond the tutorial
# ----------------------------------------------------------------------------- data files
# The directory of this file, or the current one, if the text stands in a notebook's cell.
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
DATA = "data/mnist.npz"  # below HERE
ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # in such a file
RECIPE = 'README has a recipe, "Other data"'
FILE_KINDS = {b"\x1f\x8b": "a gzip file", b"\x93NUMPY": "a single array", b"\x80": "a pickle"}


def kind_of_file(start):
    """Say what a file is, by its first bytes, that is no .npz archive."""
    if not start:
        return "an empty file"
    for magic, kind in FILE_KINDS.items():
        if start.startswith(magic):
            return kind
    is_text = start.isascii() and b"\0" not in start
    return "text" if is_text else "a file of another kind"


def file_error(error, path):
    """Return an OSError that says which file it is about."""
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError) and sys.platform == "win32":
        reason += "; is it open in another program?"
    return OSError(error.errno, reason, str(path))


def read_archive(path):
    """Return those of the four arrays that an .npz archive has, by name."""
    with open(path, "rb") as file:
        start = file.read(64)
        if not start.startswith(b"PK"):
            raise ValueError(f"is no .npz archive, but {kind_of_file(start)}; {RECIPE}")
        file.seek(0)
        being_read = "the archive"  # for the messages
        arrays = {}
        try:
            archive = np.load(file, allow_pickle=False)
            for name in ARRAYS:
                if name in archive.files:
                    being_read = name
                    arrays[name] = np.asarray(archive[name])
        except (OSError, MemoryError):  # the machine's fault
            raise
        except Exception as error:  # the file's: NumPy, zipfile and zlib raise what they like
            if "Object arrays" in str(error):
                raise ValueError(f"{being_read} holds Python objects; expected integers") from error
            raise ValueError(f"{being_read} is damaged or truncated: {error}") from error
    if "x_train" not in arrays or "x_test" not in arrays:
        found = ", ".join(archive.files) or "no arrays"
        raise ValueError(f"has {found}; expected {', '.join(ARRAYS)}; {RECIPE}")
    return arrays


def checked_images(name, images):
    """Return images of any integer type as uint8, (N, 28, 28), if from 0 to 255."""
    forms = [(SIDE, SIDE), (SIDE, SIDE, 1), (PIXELS,)]
    if images.dtype.kind not in "iu" or images.size == 0 or images.shape[1:] not in forms:
        expected = f"expected integers (N, {SIDE}, {SIDE}), N > 0, from 0 to 255"
        raise ValueError(f"{name} is {images.dtype} {images.shape}; {expected}; {RECIPE}")
    low = images.min()
    high = images.max()
    if low < 0 or high > 255 or high < 2:  # up to 1 it would be black and white, or scaled
        raise ValueError(
            f"{name} has values from {low} to {high}; expected grey from 0 to 255; {RECIPE}"
        )
    return np.ascontiguousarray(images.reshape(-1, SIDE, SIDE), np.uint8)


def checked_labels(name, labels, count):
    """Return labels as an array (N,), if there is an integer for each image."""
    if labels.dtype.kind not in "iu" or labels.shape not in [(count,), (count, 1)]:
        expected = f"expected integers ({count},), or no {name} at all"
        raise ValueError(f"{name} is {labels.dtype} {labels.shape}; {expected}")
    return labels.reshape(count)


def load_mnist(path=None):
    """Load MNIST, or a data set of its form, from an .npz archive.

    Without a path it is `data/mnist.npz` beside this module, or, if that is missing, what
    `tf.keras.datasets.mnist.load_data()` finds in its cache or downloads.

    Returns (x_train, y_train), (x_test, y_test): images, uint8 (N, 28, 28) from 0 to 255,
    and labels, integers (N,). Images (N, 28, 28, 1) or (N, 784), of any integer type, and
    labels (N, 1) are brought into that form. Without labels in the file, all are 0.

    Raises OSError if the file cannot be read, or if there is none and no download;
    ValueError, which says what was found and what was expected, if it holds something
    else.
    """
    if path is None:
        path = HERE / DATA
        if not path.exists():
            try:
                return tf.keras.datasets.mnist.load_data()
            except Exception as error:  # Keras raises the bare class
                raise OSError(
                    f"no data: {path} is missing and MNIST cannot be downloaded ({error}); "
                    "give a file mnist.npz with --data FILE"
                ) from error
    try:
        arrays = read_archive(path)
        parts = []
        for part in ("train", "test"):
            images = checked_images(f"x_{part}", arrays[f"x_{part}"])
            labels = arrays.get(f"y_{part}", np.zeros(len(images), np.uint8))
            parts.append((images, checked_labels(f"y_{part}", labels, len(images))))
    except OSError as error:
        raise file_error(error, path) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tuple(parts)


# ------------------------------------------------------------------- machine and messages
ERASE_LINE = "\033[K"  # a terminal's code: erase what follows in the line


def shard_count():
    """Return how many shards suit the machine: 2, or 1 on one core or a GPU."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    if cores == 1 or tf.config.list_physical_devices("GPU"):
        return 1
    return SHARDS


def session(shards=SHARDS):
    """Open a session on the current graph; a thread computes each of several shards."""
    config = tf.ConfigProto()
    config.gpu_options.allow_growth = True  # take memory as it is needed
    if shards > 1:
        config.intra_op_parallelism_threads = 1
        config.inter_op_parallelism_threads = shards
    return tf.Session(config=config)


def say(text):
    """Print a line at once; escape what standard output has no characters for."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def complain(text, end="\n"):
    """Print a line on standard error, if there is one and somebody still listens."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)


def one_line(error):
    """Return what an exception says, in one line."""
    text = str(error)
    if isinstance(error, tf.errors.OpError):
        # The line before the first "[[" of "TEXT\n\t [[node ...", or of "2 root error(s)
        # found.\n  (0) INTERNAL: TEXT\n\t [[node ...".
        text = error.message.split("\n\t [[")[0].strip().split("\n")[-1]
    elif isinstance(error, OSError) and error.strerror:
        name = "standard output" if error.filename is None else error.filename or "''"
        text = f"{name}: {error.strerror}"
    return " ".join(text.split())


def progress(first, last):
    """Yield the numbers first, ..., last - 1; show on a terminal how long it takes."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    start = time.monotonic()
    shown = start
    try:
        for i in range(first, last):
            yield i
            now = time.monotonic()
            if on_terminal and now - shown > 0.2:
                shown = now
                speed = (i + 1 - first) / (now - start)
                left = (last - i - 1) / speed
                text = f"{(i + 1) / last:4.0%}, {speed:.0f} iterations/s, {left:.0f} s left"
                complain(f"{ERASE_LINE}{text}\r", end="")  # \r: what comes next begins the line
    finally:
        if on_terminal:
            complain(ERASE_LINE, end="")


@contextmanager
def stop_signals():
    """Yield a list, to which SIGINT, SIGTERM and SIGHUP append their numbers.

    Each is noted once; a second one has its usual effect, which is to end the program at
    once. In the end all have their handlers of before. What was ignored stays ignored.
    """
    stopped = []
    previous = {}  # the handlers, by number

    def note(number, _frame):
        stopped.append(number)
        signal.signal(number, previous[number])

    names = ["SIGINT", "SIGTERM", "SIGHUP"]
    if threading.current_thread() is not threading.main_thread():
        names = []  # signals are the main thread's alone
    for name in names:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            # (None is a handler that Python knows nothing of, and could not set again.)
            previous[number] = signal.getsignal(number)
            signal.signal(number, note)
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------ the run on disk
# The options which, with the data, decide every bit of a result after so many iterations:
SETTINGS = ("decoder", "seed", "batch_size", "learning_rate", "shards")
# What a run writes about its newest checkpoint:
RESULTS = ("latent.png", "explore.html", "metrics.json", "report.png")
# The hash of MNIST's training images:
MNIST = "sha256:741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757"


class CheckpointError(ValueError):
    """There is no checkpoint where one is expected, or a damaged one, or of another network."""


@contextmanager
def locked(directory):
    """Keep other runs out of a directory; a lock ends with its process, even a killed one."""
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"{directory}: another run is at work there") from error
    except (ImportError, OSError):
        pass  # no such locks (Windows, some file systems), or no directory, as `resume` will say
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def to_disk(path):
    """Wait until a file is on the disk, so that a power cut does not take it back."""
    try:
        with open(path, "r+b") as file:  # for writing too, without which Windows does not sync
            os.fsync(file.fileno())
    except OSError as error:
        raise file_error(error, path) from error


@contextmanager
def whole_file(path):
    """Yield a temporary name; what is written there takes the path's place at once."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise file_error(error, path) from error
        raise


@dataclass
class Run:
    """A training run, and where it stands; run.json records all of it but the directory.

    A save writes run.json, then log.csv. A kill in between would leave log.csv without
    the newest lines, so run.json has them, too, and the size that log.csv has before
    them. An example: log.csv has 400 bytes, and three lines are new. run.json gets
    log_size=400 and the lines; log.csv is cut to 400 bytes, and gets the lines. A resumed
    run repeats both, which changes nothing if they were done.
    """

    directory: Path
    settings: dict  # SETTINGS, and "data", the hash of the training images
    data_file: str  # the file that has these
    wanted: int  # how many iterations are to be made in all
    made: int = 0  # how many are made
    log_size: int = 0  # how many bytes of log.csv come before the new lines
    new_lines: list = field(default_factory=list)  # those since the checkpoint before
    checkpoint_name: str = ""  # the newest checkpoint's

    @property
    def finished(self):
        return self.made >= self.wanted

    @property
    def title(self):
        decoder = self.settings["decoder"]
        return f"{decoder} decoder, {self.made:,} iterations, seed {self.settings['seed']}"

    @property
    def has_digits(self):
        """Whether the data are MNIST; of others the page and the report do not say "digit"."""
        return self.settings["data"] == MNIST

    def iterations(self):
        """Yield the numbers of the iterations that are still to be made."""
        return progress(self.made, self.wanted)

    def check(self, updates, kld, rec_loss):
        """Raise FloatingPointError unless the losses after so many updates are finite."""
        if not np.isfinite(kld + rec_loss):
            losses = f"KLD = {kld:f}, RecLoss = {rec_loss:f}"
            raise FloatingPointError(
                f"after {updates} updates {losses}, so training stopped; try a lower --learning-rate"
            )

    def log(self, iteration, kld, rec_loss):
        """Keep the losses of an iteration, for log.csv, until the next checkpoint."""
        self.check(iteration, kld, rec_loss)  # they are from before its update
        self.new_lines.append(f"{iteration},{kld!r},{rec_loss!r}\n")

    def save(self, model, sess):
        """Save a checkpoint, in such an order that a kill or a power cut never does harm.

        At every moment run.json names a checkpoint that is whole, and says which lines of
        log.csv belong to it. Whoever resumes the run loses what came after that, no more.
        """
        folder = self.directory / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        # 1. The variables are saved under the one of two names that run.json lacks.
        name = "vae_mnist-b" if self.checkpoint_name == "vae_mnist-a" else "vae_mnist-a"
        for path in folder.glob(f"{name}.*"):  # older, or left by a save that was killed
            path.unlink()
        with sess.graph.as_default():  # Saver refuses a caller outside of a graph
            model.saver.save(sess, f"{folder}/{name}", write_meta_graph=False, write_state=False)
        for path in folder.glob(f"{name}.*"):
            to_disk(path)
        # 2. Results that show the older checkpoint are removed.
        for result in RESULTS:
            (self.directory / result).unlink(missing_ok=True)
        # 3. run.json names the new checkpoint; it is replaced at once.
        self.checkpoint_name = name
        self.write()

    def write(self):
        """Write run.json, then what follows from it: log.csv, and the file `checkpoint`.

        That is for `tf.train.latest_checkpoint`; Saver itself would write it too early.
        """
        folder = self.directory / "checkpoint"
        record = {name: value for name, value in vars(self).items() if name != "directory"}
        with whole_file(folder / "run.json") as temporary:
            temporary.write_text(json.dumps(record))
        self.write_log()
        with whole_file(folder / "checkpoint") as temporary:
            temporary.write_text(f'model_checkpoint_path: "{self.checkpoint_name}"\n')

    def write_log(self):
        """Cut off log.csv where the new lines begin, and append these; repeated, the same."""
        path = self.directory / "log.csv"
        try:
            with open(path, "ab") as file:
                size = file.tell()  # the file is opened at its end
                self.log_size = min(self.log_size, size)  # somebody may have shortened it
                file.truncate(self.log_size)
                header = [] if self.log_size else ["iteration,kld,rec_loss\n"]
                written = file.write("".join(header + self.new_lines).encode())
                file.flush()
                os.fsync(file.fileno())
                # From here on for the next save:
                self.log_size += written
                self.new_lines = []
        except OSError as error:
            raise file_error(error, path) from error


def read_run(folder):
    """Return the run that run.json in a folder records, or None if there is no such file."""
    path = Path(folder) / "run.json"
    if not path.exists():
        return None
    try:
        run = Run(path.parent.parent, **json.loads(path.read_bytes()))
        if not {*SETTINGS, "data"} <= set(run.settings):
            raise ValueError("it lacks a setting")
        if min(run.made, run.wanted, run.log_size) < 0:  # a TypeError, if one is no number
            raise ValueError("a number is negative")
        return run
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the record of a run, got a damaged file; "
            "a run with --overwrite replaces it"
        ) from error


def begin(args, settings):
    """Return a new run; refuse to replace an unfinished one, unless that is asked for."""
    # --shards and --iterations have no defaults: `resume` asks whether they were given.
    settings["shards"] = settings["shards"] or shard_count()
    run = Run(args.output_dir, settings, args.data or DATA, args.iterations or ITERATIONS)
    try:
        old = read_run(args.output_dir / "checkpoint")
    except CheckpointError:
        if not args.overwrite:
            raise
        return run  # the damaged record says nothing that is worth keeping
    if old is None:
        return run
    if not (old.finished or args.overwrite):
        raise ValueError(
            f"the run in {args.output_dir} made {old.made} of {old.wanted} iterations: "
            "go on with --resume, or replace it with --overwrite"
        )
    if old.finished and not args.overwrite:
        say(f"Replacing the finished run in {args.output_dir}")
    # `save` takes the name that is not this one; until then the old run stays whole.
    run.checkpoint_name = old.checkpoint_name
    return run


def resume(args, settings):
    """Return the run in the output directory, if it has the settings that are asked for."""
    run = read_run(args.output_dir / "checkpoint")
    if run is None:
        raise ValueError(f"--resume: there is no checkpoint in {args.output_dir / 'checkpoint'}")
    if settings["data"] != run.settings["data"]:
        given = args.data or DATA
        raise ValueError(
            f"--resume: the run in {args.output_dir} learns from {run.data_file}, and {given} has "
            "other images; give its file with --data"
        )
    for name in SETTINGS:
        asked = settings[name]
        recorded = run.settings[name]
        if asked is not None and asked != recorded:  # --shards is None where it was not given
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"--resume: the run in {args.output_dir} has {option} {recorded}, not {asked}"
            )
    run.wanted = max(args.iterations or run.wanted, run.made)  # none can be taken back
    return run


# ------------------------------------------------------------------------ a trained model
def give_values(variables, values, sess):
    """Set each variable to its value, or to its initial value where that is None.

    A variable's initializer is an operation that assigns its second input to it. Another
    value is fed for that input; `tf.assign` would leave one more operation in the graph
    with every call.
    """
    feed = {}
    for variable, value in zip(variables, values):
        if value is not None:
            feed[variable.initializer.inputs[1]] = value
    sess.run([variable.initializer for variable in variables], feed)


def restore(model, sess, path):
    """Load a checkpoint into the variables of a model.

    `path` is a directory such as outputs/checkpoint, of which the newest checkpoint is
    taken, or the name of a checkpoint, as `tf.train.latest_checkpoint` returns it. Of a
    checkpoint without Adam's variables and `iteration`, these get their initial values.
    Raises ValueError if there is no checkpoint, or if it is damaged or of another network;
    then no variable has changed.
    """
    run = read_run(path)
    if run is not None:
        recorded = run.settings["decoder"]
        if recorded != model.decoder:
            raise CheckpointError(
                f"{path}: has the {recorded} decoder, not the {model.decoder} one"
            )
        name = f"{path}/{run.checkpoint_name}"
    elif os.path.exists(f"{path}.index"):
        name = str(path)
    else:
        name = tf.train.latest_checkpoint(path)
    if name is None:
        raise CheckpointError(f"{path}: expected a directory with a checkpoint, found none")
    values = []
    try:
        reader = tf.train.load_checkpoint(name)
        shapes = reader.get_variable_to_shape_map()
        for variable_name, variable in model.variables.items():
            found = shapes.get(variable_name)
            if found is None and not variable_name.endswith(("kernel", "bias")):
                values.append(None)  # the state of an optimizer may be missing
                continue
            expected = variable.shape.as_list()
            if found != expected:
                found = "missing" if found is None else found
                raise ValueError(f"of another network: {variable_name} is {found}, not {expected}")
            values.append(reader.get_tensor(variable_name))
    except (tf.errors.OpError, RuntimeError, LookupError, ValueError) as error:
        raise CheckpointError(f"{name}: not a checkpoint to use: {one_line(error)}") from error
    give_values(model.variables.values(), values, sess)


def build_model(settings):
    """Return a new model with the settings of a run."""
    return VAE(
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
        shards=settings["shards"],
        decoder=settings["decoder"],
    )


@contextmanager
def trained(directory="outputs"):
    """Open the model of a run, finished or not: `with trained("outputs") as (model, sess):`.

    `directory` is the run's, or one with a checkpoint in it. Where there is no record of
    a run, the model is the tutorial's. Raises what `restore` raises.
    """
    folder = Path(directory) / "checkpoint"
    if not folder.is_dir():
        folder = Path(directory)
    run = read_run(folder)
    with tf.Graph().as_default():
        model = VAE() if run is None else build_model(run.settings)
        with session(model.shards) as sess:
            restore(model, sess, folder)
            yield model, sess


@contextmanager
def without_warnings():
    """Hide TensorFlow's warnings of deprecated functions; graph mode has no others."""
    verbosity = tf.logging.get_verbosity()
    tf.logging.set_verbosity(tf.logging.ERROR)
    try:
        yield
    finally:
        tf.logging.set_verbosity(verbosity)


def export(model, sess, directory):
    """Write a SavedModel, which other programs use without this module.

    Its signature `encode` makes mu and log_sig_sq, (B, 2), of x, (B, 784) in [0, 1];
    `decode` makes rec, (B, 784) in [0, 1], of z, (B, 2). The graph is a new one, for use
    alone: without sampler, losses, optimizer and shards. Raises FileExistsError if the
    directory exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory}: there already; expected the name of a new directory")
    values = sess.run(model.weights)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), tf.Session() as new_sess, without_warnings():
        layers = []
        x = tf.placeholder(tf.float32, [None, PIXELS], name="x")
        z = tf.placeholder(tf.float32, [None, LATENT], name="z")
        (fc,) = network([x], ENCODER, layers)  # one shard, the whole batch
        (logits,) = network([z], DECODERS[model.decoder], layers)
        weights = [layer[part] for layer in layers for part in ("kernel", "bias")]
        give_values(weights, values, new_sess)
        code = {"mu": fc[:, :LATENT], "log_sig_sq": fc[:, LATENT:]}
        signature = tf.saved_model.predict_signature_def
        signatures = {
            "encode": signature({"x": x}, code),
            "decode": signature({"z": z}, {"rec": tf.sigmoid(logits)}),
        }
        with TemporaryDirectory(dir=directory.parent) as beside:  # whole, or not there
            builder = tf.saved_model.Builder(f"{beside}/model")
            builder.add_meta_graph_and_variables(new_sess, ["serve"], signatures)
            builder.save()
            os.rename(f"{beside}/model", directory)


# --------------------------------------------------------------------- what it has learnt
# Ten colours that colour-blind people can tell apart. Seven are Petroff's
# (arXiv:2107.02270); his other three are hard to see on black, or beside the page's
# yellow glow. Digits that overlap on the plane, such as 3, 5 and 8, differ most.
COLOURS = [
    "#3f90da", "#b9ac70", "#a96b59", "#c1fdc4", "#92dadd",
    "#6634f8", "#94a4a2", "#717581", "#d1041a", "#e76300",
]  # fmt: skip


def sampled_losses(model, sess, x, seed, samples):
    """Return RecLoss, averaged over samples of z for each image of x, and KLD, float64 (N,)."""
    rng = np.random.default_rng(seed)
    mu, log_sig_sq, kld = sess.run([model.mu, model.log_sig_sq, model.klds], {model.x: x})
    rec_loss = np.zeros(len(x))
    for _ in range(samples):
        z = mu + np.exp(log_sig_sq / 2) * rng.standard_normal(mu.shape)
        rec_loss += sess.run(model.rec_losses, {model.x: x, model.z: z}) / samples
    return rec_loss, kld.astype(np.float64)


def log_likelihood(model, sess, x, reach, step):
    """Return log p(x), float64 (N,), of images x, (N, D) in [0, 1], with p(x | z) = exp(-RecLoss).

    p(x) is the integral of p(x, z) = p(z) p(x | z) over the plane: nearly the sum of p(x,
    z) over the codes of a grid, times the area that each of them stands for. The
    probabilities are far too small for a float; so log sum exp(a) is computed as max(a) +
    log sum exp(a - max(a)).
    """
    coordinates = np.linspace(-reach, reach, round(2 * reach / step) + 1)
    codes = np.stack(np.meshgrid(coordinates, coordinates), axis=-1).reshape(-1, LATENT)
    codes = codes[np.sum(codes**2, axis=1) <= reach**2]  # a disc: p(z) is round
    log_sum = np.full(len(x), -np.inf)
    for z in np.array_split(codes, 1 + len(codes) // 400):  # a few at a time take little memory
        logits = sess.run(model.logits, {model.z: z})
        log_pz = -np.sum(z**2, axis=1) / 2 - np.log(2 * np.pi)
        # log p(x | z) = -RecLoss = x logits - softplus(logits), summed over the pixels
        of_z = log_pz - np.sum(np.logaddexp(0, logits), axis=1)  # what does not depend on x
        log_joint = logits @ x.T + of_z[:, None].astype(np.float32)  # log p(x, z), (codes, N)
        highest = np.max(log_joint, axis=0)
        total = np.sum(np.exp(log_joint - highest), axis=0)
        log_sum = np.logaddexp(log_sum, highest + np.log(total))
    area = (coordinates[1] - coordinates[0]) ** 2
    return log_sum + np.log(area)


def evaluate(model, sess, images, seed=0, samples=20, reach=5.5, step=0.05):
    """Measure what a model has learnt of images, uint8 (N, 28, 28), in nats an image.

    Returns arrays (N,), float64, by name:
    "RecLoss": equation (2), averaged over samples of z for each image, which `seed` decides.
    "KLD": equation (1).  "-ELBO": their sum.
    "NLL": the negative log-likelihood -log p(x), from a grid of codes, `step` apart, in a disc of
    radius `reach`.
    "KL(q || p)": -ELBO - NLL, which is the divergence of q(z | x), the encoder's Gaussian,
    from p(z | x) = p(x, z) / p(x), the exact posterior:
    E_q[log q(z | x) - log p(z | x)] = E_q[log q(z | x) - log p(x, z)] + log p(x).
    """
    x = scale(images)
    rec_loss, kld = sampled_losses(model, sess, x, seed, samples)
    bound = rec_loss + kld
    nll = -log_likelihood(model, sess, x, reach, step)
    return {"RecLoss": rec_loss, "KLD": kld, "-ELBO": bound, "NLL": nll, "KL(q || p)": bound - nll}


def label_colours(labels):
    """Return a colour for each label that occurs: one of ten, or more from a scale."""
    classes = np.unique(labels).tolist()
    if len(classes) <= len(COLOURS):
        return dict(zip(classes, COLOURS))
    shades = matplotlib.colormaps["cool"](np.linspace(0, 1, len(classes)))
    return {label: matplotlib.colors.to_hex(shade) for label, shade in zip(classes, shades)}


def ten_classes(labels):
    """Return ten of the labels that occur, spread over all, or all if they are fewer."""
    classes = np.unique(labels)
    places = np.linspace(0, len(classes) - 1, min(10, len(classes)))
    return classes[np.round(places).astype(int)]


# The page explore.html, whose frame is data/explore.html, has the network in JavaScript.
# It decodes the code under the mouse, and encodes the image that is picked or drawn: it
# shows q(z | x) as ellipses over a glow, p(z | x), which it computes on a grid.
def encode_array(array):
    """Return the bytes of an array as text, for a page."""
    return b64encode(np.ascontiguousarray(array).tobytes()).decode()


def page_layers(layers, sess):
    """Return layers of a model as the page reads them."""
    found = []
    for layer in layers:
        kernel, bias = sess.run([layer["kernel"], layer["bias"]])
        texts = {"kernel": encode_array(kernel), "bias": encode_array(bias)}
        found.append({**texts, "elu": layer["elu"]})
    return found


def grid_offsets(model, sess, grid):
    """Return the part of log p(x, z) that does not depend on x, for each code z of a grid.

    It is -|z|^2 / 2 - sum softplus(logits), where logaddexp(0, l) is softplus(l). The
    page adds x . logits; a constant is left out.
    """
    offsets = []
    for y in grid[::-1]:  # from the top
        z = np.stack([grid, np.full(len(grid), y)], axis=1)
        logits = sess.run(model.logits, {model.z: z})
        offsets.append(-np.sum(np.logaddexp(0, logits), axis=1) - np.sum(z**2, axis=1) / 2)
    return np.concatenate(offsets).astype(np.float32)


def page_numbers(model, sess, test, run):
    """Return what the page needs to know of a run, by name; arrays as `encode_array` has them."""
    images, labels = (part[:10000] for part in test)
    shown = [np.flatnonzero(labels == label)[:2] for label in ten_classes(labels)]
    shown = np.concatenate(shown)
    # The page begins with the one whose p(z | x) is least like q(z | x), on a coarse grid.
    divergences = evaluate(model, sess, images[shown], reach=4.5, step=0.1)["KL(q || p)"]
    codes = []
    losses = []
    for part in np.array_split(images, 100):
        x = scale(part)
        mu, rec_losses, klds = sess.run([model.mu, model.rec_losses, model.klds], {model.x: x})
        codes.append(mu)
        losses.append(rec_losses + klds)
    elu_units, linear_units = ENCODER
    depth = len(elu_units) + len(linear_units)
    grid = np.linspace(-4.5, 4.5, 121)  # nearly all codes are there; a step of 0.075
    return {
        "run": run.title,
        "kind": "digit" if run.has_digits else "image",  # what to call an image
        "encoder": page_layers(model.layers[:depth], sess),
        "decoder": page_layers(model.layers[depth:], sess),
        # mu and the label of each of these images, and a colour for each label
        "codes": encode_array(np.concatenate(codes)),
        "labels": labels.tolist(),
        "colours": label_colours(labels),
        # some of the test images, their labels, and which of them is picked at first
        "images": encode_array(images[shown]),
        "shown": labels[shown].tolist(),
        "picked": int(np.argmax(divergences)),
        # n x n codes over [-reach, reach] in both dimensions, by rows
        "grid": {"n": len(grid), "reach": grid[-1]},
        "offset": encode_array(grid_offsets(model, sess, grid)),
        # what 5, 50 and 95 % of the test images stay below
        "losses": np.quantile(np.concatenate(losses), [0.05, 0.5, 0.95]).tolist(),
    }


def explore(model, sess, test, run):
    """Write explore.html, the frame in data/ with a run's numbers; return its path, or None."""
    frame = HERE / "data" / "explore.html"
    if not frame.exists():  # the module was copied without it
        return None
    text = json.dumps(page_numbers(model, sess, test, run))
    # The frame has null in their place: <script id="numbers" ...>null</script>.
    content = frame.read_bytes().replace(b">null<", f">{text}<".encode())
    path = run.directory / "explore.html"
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path


def draw_codes(axes, mu, labels, kld, kind):
    """Draw where the encoder puts the test images, in the colours of their labels."""
    colours = label_colours(labels)
    axes.scatter(*mu.T, s=2, linewidth=0, c=[colours[label] for label in labels.tolist()])
    if len(colours) <= len(COLOURS):
        for label, colour in colours.items():  # no dots, but entries of the legend
            axes.scatter([], [], c=colour, edgecolor="black", label=label)
        axes.legend(title=kind, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        # The bar, from 0 to 1, has an equal part for each label, in the order of the keys
        # of colours. Ten of them are named, in the middle of their parts.
        named = ten_classes(labels)
        positions = np.searchsorted(list(colours), named)
        bar = axes.figure.colorbar(
            matplotlib.cm.ScalarMappable(cmap=matplotlib.colors.ListedColormap(colours.values())),
            ax=axes,
            label=kind,
            ticks=(positions + 0.5) / len(colours),
        )
        bar.set_ticklabels(named)
    axes.set_facecolor("black")  # on which all of the colours are seen
    square = matplotlib.patches.Rectangle((-2, -2), 4, 4, fill=False, edgecolor="white")
    axes.add_patch(square)
    axes.set(title=f"Codes of {len(mu):,} test images: KLD {kld:.2f}", aspect="equal")
    axes.set(xlabel="mu[0]; in the square: latent.png", ylabel="mu[1]")


def draw_sheet(axes, model, sess, test, mu, rec_loss, kind):
    """Draw up to ten images of up to ten labels, and below each what its mu is decoded to."""
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
    axes.set(ylabel=kind, xticks=[])
    axes.set_yticks(np.arange(len(classes)) * 2 * SIDE + SIDE - 0.5, classes)


def draw_losses(axes, path):
    """Draw the losses in log.csv."""
    try:
        log = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        iterations, kld, rec_loss = log.T
        if not np.all(np.isfinite(log)):
            raise ValueError("inf or nan")
    except ValueError:  # somebody has emptied or changed it
        axes.set(title=f"{path.name} has no losses")
        return
    last = f"KLD {kld[-1]:.2f}, RecLoss {rec_loss[-1]:.2f}"
    axes.set(title=f"Losses of a batch; the last, in iteration {iterations[-1]:,.0f}: {last}")
    axes.set(xlabel=f"iteration; RecLoss begins at {rec_loss[0]:.2f}")
    curves = [(axes, "RecLoss", rec_loss, COLOURS[0]), (axes.twinx(), "KLD", kld, COLOURS[8])]
    for side, name, values, colour in curves:
        side.plot(iterations, values, color=colour, linewidth=1)
        side.set_ylabel(name, color=colour)
        settled = values[len(values) // 20 :]  # the first would squeeze the rest into a line
        margin = 0.1 * np.ptp(settled) + 0.01
        side.set_ylim(min(settled) - margin, max(settled) + margin)


@matplotlib.style.context("default")
def draw_report(model, sess, test, run, means):
    """Draw codes and reconstructions of the test set and the losses of the run: report.png."""
    mu, _ = model.encode(scale(test[0]), sess)
    fig = matplotlib.figure.Figure(figsize=(9, 8.8), dpi=150, layout="constrained")
    fig.suptitle(f"{run.title}: NLL {means['NLL']:.2f} nats an image")
    panels = fig.subplot_mosaic("AB;CC", width_ratios=(2, 1), height_ratios=(2, 1))
    kind = "digit" if run.has_digits else "label"
    draw_codes(panels["A"], mu, test[1], means["KLD"], kind)
    draw_sheet(panels["B"], model, sess, test, mu, means["RecLoss"], kind)
    draw_losses(panels["C"], run.directory / "log.csv")
    with whole_file(run.directory / "report.png") as temporary:
        fig.savefig(temporary, format="png")


def report(model, sess, test, run):
    """Print what `evaluate` measures on the test set, save it as metrics.json, draw report.png."""
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
    say(f"These figures are in metrics.json, pictures in {path}")


def show_picture(path):
    """Open a window with a picture, and wait until it is closed."""
    picture = matplotlib.image.imread(path)
    height, width, _ = picture.shape
    try:
        from matplotlib import pyplot as plt

        fig = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    except (ImportError, ValueError) as error:  # the backend is not there, or cannot show
        complain(f"--show: {one_line(error)}")
        return
    if plt.get_backend().lower() == "agg":  # pyplot's choice where no window can open
        complain("--show: there is no display")
    else:
        fig.figimage(picture)
        plt.show()
    plt.close(fig)


# --------------------------------------------------------------------------- command line
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that ends with an option's default, if it has one."""

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong: an input (2), or a fault in a run (1)."""

    def error(self, error):
        self.exit(2, f"{self.prog}: error: {one_line(error)}\n")

    def fault(self, error):
        self.exit(1, f"{self.prog}: error: {one_line(error)}\n")


def whole_number(text, lowest=1, highest=2**31 - 1):
    """Return the whole number that a text stands for."""
    # int itself refuses thousands of digits, with an error that argparse reports worse.
    if not text.isdecimal() or len(text) > 10 or not lowest <= int(text) <= highest:
        expected = f"a whole number from {lowest} to {highest}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return int(text)


def seed_number(text):
    """Return the seed that a text stands for."""
    return whole_number(text, lowest=0)


def shard_number(text):
    """Return the number of shards that a text stands for."""
    return whole_number(text, highest=64)


def rate(text):
    """Return the learning rate that a text stands for."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-45 <= value <= 3.4e38:  # what a float32 can hold
        raise argparse.ArgumentTypeError(f"expected a number above 0, to 3.4e38, got {text!r}")
    return value


def output_directory(text):
    """Return the path that a text stands for, if TensorFlow can use it.

    TensorFlow takes * ? [ and \\ in a path for a pattern, and cannot open a name that is
    not UTF-8. On Windows \\ separates directories, and as_posix makes / of it.
    """
    path = Path(text)
    try:
        text.encode()
        is_utf8 = True
    except UnicodeEncodeError:  # of surrogates, which Python makes of bytes that are not UTF-8
        is_utf8 = False
    if not is_utf8 or set(path.as_posix()) & set("*?[\\"):
        raise argparse.ArgumentTypeError(f"expected a name in UTF-8, no * ? [ \\, got {text!r}")
    return path


def make_parser():
    """Return the parser of the command line."""
    about = "Train the variational autoencoder of Nate Merrill's 2019 tutorial on MNIST."
    parser = Parser("vae_mnist.py", description=about, formatter_class=HelpFormatter)
    option = parser.add_argument
    option("--data", metavar="FILE", help=f"an .npz archive (default: {DATA})")
    option("--output-dir", type=output_directory, default=Path("outputs"), help="made if missing")
    option("--iterations", type=whole_number, help=f"updates to make (default: {ITERATIONS})")
    option("--batch-size", type=whole_number, default=BATCH_SIZE, help="images an iteration")
    option("--learning-rate", type=rate, default=LEARNING_RATE, help="step size of Adam")
    option("--decoder", choices=DECODERS, default="tutorial", help="mirrored: reversed encoder")
    option("--seed", type=seed_number, default=0, help="decides weights, batches and noise")
    option("--shards", type=shard_number, help="parts of a batch (default: as suits the machine)")
    option("--log-every", type=whole_number, default=100, help="iterations a log line")
    option("--checkpoint-every", type=whole_number, default=500, help="iterations a checkpoint")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    group.add_argument("--overwrite", action="store_true", help="replace an unfinished run")
    option("--report", action="store_true", help="also measure and show the test set")
    option("--show", action="store_true", help="also open the picture in a window")
    return parser


def work(args, run, x_train, test):
    """Do what the tutorial's main block does, and what the options add; return the exit status."""
    with tf.Graph().as_default(), session(run.settings["shards"]) as sess:
        model = build_model(run.settings)
        if args.resume:
            restore(model, sess, run.directory / "checkpoint")
            run.write()  # since a kill may have come before log.csv was written
        else:
            sess.run(tf.global_variables_initializer())
        with stop_signals() as stopped:
            train(model, sess, x_train, run, args.log_every, args.checkpoint_every, stopped)
        if stopped:
            name = signal.Signals(stopped[0]).name
            instead = " in place of --overwrite" if args.overwrite else ""
            complain(
                f"Stopped by {name} after {run.made} of {run.wanted} iterations; "
                f"go on with the same options and --resume{instead}"
            )
            return 128 + stopped[0]
        path = run.directory / "latent.png"
        with whole_file(path) as temporary:
            display_manifold(model, sess, temporary)
        page = explore(model, sess, test, run)
        hint = "" if page is None else f"; move through it in {page}"
        say(f"The manifold of the latent codes is in {path}{hint}")
        if args.report:
            report(model, sess, test, run)
        if args.show:
            show_picture(path)
    return 0


def main(argv=None):
    """Do what the command line says, or a list of its words; return the exit status.

    It is 0, or 128 plus the number of a signal that stopped the training. Raises
    SystemExit, with status 2 for wrong options, data or checkpoints, and 1 after a fault.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    with ExitStack() as until_the_end:  # which gives back the lock that the first `try` takes
        try:
            # the tutorial ignores testing data and labels; page and report need them
            (x_train, _), test = load_mnist(args.data)
            settings = {name: getattr(args, name) for name in SETTINGS}
            settings["data"] = "sha256:" + hashlib.sha256(x_train).hexdigest()
            if not args.resume:
                (args.output_dir / "checkpoint").mkdir(parents=True, exist_ok=True)
            until_the_end.enter_context(locked(args.output_dir))
            run = resume(args, settings) if args.resume else begin(args, settings)
        except (OSError, ValueError) as error:
            parser.error(error)
        except MemoryError as error:
            parser.fault(f"no memory for {args.data or DATA}: {error}")
        try:
            return work(args, run, x_train, test)
        except CheckpointError as error:
            parser.error(f"--resume: {error}")
        except MemoryError as error:
            parser.fault(f"no memory, with batches of {args.batch_size} images: {error}")
        except (OSError, FloatingPointError, tf.errors.OpError) as error:
            parser.fault(error)


if __name__ == "__main__":
    in_cell = "__file__" not in globals()  # of a notebook, whose command line is not ours
    try:
        status = main([] if in_cell else None)
    except KeyboardInterrupt:  # needs no traceback
        status = 128 + signal.SIGINT
    if status != 0:
        sys.exit(status)
