"""The network of either decoder in NumPy and float64: the independent side of many tests."""

import numpy as np

ENCODER = [(784, 256), (256, 128), (128, 64), (64, 4)]
LAYERS = {  # inputs and units of each
    "tutorial": [*ENCODER, (2, 256), (256, 128), (128, 64), (64, 4), (4, 784)],
    "mirrored": [*ENCODER, (2, 64), (64, 128), (128, 256), (256, 784)],
}
LINEAR = {"tutorial": (3, 7, 8), "mirrored": (3, 7)}  # the layers without ELU


def softplus_sum(logits):
    """Return the sum over pixels of log(1 + exp(logits))."""
    return np.sum(np.logaddexp(0, logits), axis=-1)


class Reference:
    """Losses, and their gradients by backpropagation, of given parameters: kernel, bias, ..."""

    def __init__(self, parameters, decoder="tutorial"):
        self.kernels = [np.asarray(p, np.float64) for p in parameters[::2]]
        self.biases = [np.asarray(p, np.float64) for p in parameters[1::2]]
        self.linear = LINEAR[decoder]
        self.encoder = range(4)
        self.decoder = range(4, len(self.kernels))
        self.inputs = {}
        self.outputs = {}
        self.gradients = {}

    def forward(self, value, layers):
        """Apply layers; keep what each got and gave."""
        for i in layers:
            self.inputs[i] = value
            value = value @ self.kernels[i] + self.biases[i]
            if i not in self.linear:
                value = np.where(value > 0, value, np.expm1(np.minimum(value, 0)))
            self.outputs[i] = value
        return value

    def backward(self, gradient, layers):
        """Keep the gradients of the layers' parameters; return the one of their input."""
        for i in reversed(layers):
            if i not in self.linear:
                gradient = gradient * np.where(self.outputs[i] > 0, 1, self.outputs[i] + 1)
            self.gradients[2 * i] = self.inputs[i].T @ gradient
            self.gradients[2 * i + 1] = gradient.sum(axis=0)
            gradient = gradient @ self.kernels[i].T
        return gradient

    def encode(self, x):
        """Return mu, log_sig_sq, (n, 2) each, of images (n, 784)."""
        code = self.forward(np.asarray(x, np.float64), self.encoder)
        return code[:, :2], code[:, 2:]

    def decode(self, z):
        """Return the logits of codes (n, 2): (n, 784)."""
        return self.forward(np.asarray(z, np.float64), self.decoder)

    def log_px(self, x, z):
        """Return log p(x | z) of one image, (784,), with each of the codes (n, 2)."""
        logits = self.decode(z)
        return logits @ np.asarray(x, np.float64) - softplus_sum(logits)

    def run(self, x, eps):
        """Return kld, rec_loss; leave what they are made of, and the gradients of their sum."""
        x = np.asarray(x, np.float64)
        eps = np.asarray(eps, np.float64)
        count = len(x)
        self.mu, self.log_sig_sq = mu, s = self.encode(x)
        self.z = mu + np.exp(s / 2) * eps
        self.logits = logits = self.decode(self.z)
        self.klds = 0.5 * np.sum(np.exp(s) - s + mu**2 - 1, axis=1)
        self.rec_losses = softplus_sum(logits) - np.sum(x * logits, axis=1)
        dz = self.backward((1 / (1 + np.exp(-logits)) - x) / count, self.decoder)
        d_mu = dz + mu / count
        d_s = dz * eps * np.exp(s / 2) / 2 + (np.exp(s) - 1) / 2 / count
        self.backward(np.concatenate([d_mu, d_s], axis=1), self.encoder)
        return np.mean(self.klds), np.mean(self.rec_losses)
