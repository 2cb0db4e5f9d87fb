"""The paper's models, written independently in PyTorch, whose outputs are the fixtures of test_reference.py.

    pip install torch==2.13.0 numpy && python tests/models/reference/torch_models.py

writes tests/models/reference/models.npz. Weights and data come from NumPy by the parameters' names, so that only what the
models compute is stored: logits, loss, running statistics, and for each parameter the norm of its gradient and its product with
a random vector of the same shape; for ResNet-50, computed in float64, only those two numbers of each running statistic and of
each block's output. Nothing here is imported by the package.
"""

import pathlib
import zlib

import numpy as np
import torch
import torch.nn.functional as F

CASES = [
    # model, norm, batch, BN batch (None: whole), image size
    ("alexnet", "none", 4, None, 32),
    ("alexnet", "batch", 6, None, 32),
    ("alexnet", "batch_conv_only", 4, None, 32),
    ("alexnet", "batch", 8, 4, 16),
    ("alexnet", "group", 2, None, 32),
    ("alexnet", "batch_renorm", 8, 4, 16),
    ("resnet8", "none", 4, None, 32),
    ("resnet8", "batch", 4, None, 32),
    ("resnet8", "batch", 6, 2, 32),
    ("resnet8", "group", 2, None, 32),
    ("resnet8", "batch_renorm", 8, 4, 32),
    ("resnet20", "none", 2, None, 32),
    ("resnet20", "batch", 4, None, 32),
    ("resnet32", "batch", 4, None, 16),
    ("resnet50", "batch", 4, 2, 64),
    ("resnet50", "batch", 4, None, 64),
    ("resnet50", "none", 2, None, 33),
    ("resnet50", "group", 2, None, 47),
    ("resnet50", "batch_renorm", 4, 2, 64),
]
MOMENTUM, EPSILON = 0.99, 1e-5
UPDATES = 1500  # for batch renorm: half way from 500 to 2500, so that r is within [1/2, 2] and d within ±2.5


def draw(name, shape, scale=1.0):
    """Returns numbers that depend on the name alone, the same here and in the test."""
    return (np.random.RandomState(zlib.crc32(name.encode())).normal(size=shape) * scale).astype(np.float32)


class Reference:
    """Parameters under our names and in our layout, He-scaled; each is created on first use."""

    def __init__(self, norm, bn_batch):
        self.norm, self.bn_batch = norm, bn_batch
        self.params, self.stats, self.blocks = {}, {}, {}

    def param(self, name, shape, scale, offset=0.0):
        if name not in self.params:
            # Blocks change their input little; otherwise rounding grows from block to block and flips ReLUs.
            factor = np.float32(0.1 if "_conv3_norm/" in name else 1.0)
            values = (draw(name, shape, scale) + np.float32(offset)) * factor
            self.params[name] = torch.tensor(values, dtype=torch.get_default_dtype(), requires_grad=True)
        return self.params[name]

    def conv(self, x, name, features, kernel, stride, normed):
        fan_in = kernel * kernel * x.shape[1]
        # Drawn as HWIO, our layout, then transposed to PyTorch's OIHW.
        w = self.param(f"{name}/kernel", (kernel, kernel, x.shape[1], features), (2 / fan_in) ** 0.5)
        b = None if normed else self.param(f"{name}/bias", (features,), 0.1)
        return F.conv2d(x, w.permute(3, 2, 0, 1), b, stride=stride, padding=kernel // 2)

    def dense(self, x, name, features, normed=False):
        w = self.param(f"{name}/kernel", (x.shape[1], features), (2 / x.shape[1]) ** 0.5)
        b = None if normed else self.param(f"{name}/bias", (features,), 0.1)
        return F.linear(x, w.t(), b)

    def normalise(self, x, name):
        return {"group": self.group_norm, "batch_renorm": self.batch_renorm}.get(self.norm, self.batch_norm)(x, name)

    def group_norm(self, x, name):
        scale = self.param(f"{name}/norm/scale", (x.shape[1],), 0.2, 1.0)
        bias = self.param(f"{name}/norm/bias", (x.shape[1],), 0.2)
        return F.group_norm(x, x.shape[1] // 16, scale, bias, EPSILON)

    def batch_renorm(self, x, name):
        """Ioffe (2017), Algorithm 1, chunk by chunk, against running averages of 0 and 1."""
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = self.param(f"{name}/scale", (x.shape[1],), 0.2, 1.0).reshape(shape)
        bias = self.param(f"{name}/bias", (x.shape[1],), 0.2).reshape(shape)
        axes, running, means, variances, outs = (0, *range(2, x.dim())), (1 + EPSILON) ** 0.5, [], [], []
        for chunk in x.split(self.bn_batch or len(x)):
            var, mean = torch.var_mean(chunk, axes, correction=0, keepdim=True)
            deviation = (var + EPSILON).sqrt()
            r = (deviation / running).clamp(1 / 2, 2).detach()
            d = (mean / running).clamp(-2.5, 2.5).detach()
            outs.append(((chunk - mean) / deviation * r + d) * scale + bias)
            means.append(mean.flatten())
            variances.append(chunk.var(axes, correction=1))
        self.stats[f"{name}/mean"] = (1 - MOMENTUM) * torch.stack(means).mean(0)
        self.stats[f"{name}/var"] = MOMENTUM + (1 - MOMENTUM) * torch.stack(variances).mean(0)
        self.stats[f"{name}/updates"] = torch.tensor(UPDATES + 1.0)
        return torch.cat(outs)

    def batch_norm(self, x, name):
        """PyTorch's own batch norm, chunk by chunk; the running statistics average those of the chunks."""
        scale = self.param(f"{name}/scale", (x.shape[1],), 0.2, 1.0)
        bias = self.param(f"{name}/bias", (x.shape[1],), 0.2)
        means, variances, outs = [], [], []
        for chunk in x.split(self.bn_batch or len(x)):
            mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
            outs.append(F.batch_norm(chunk, mean, var, scale, bias, training=True, momentum=1.0, eps=EPSILON))
            means.append(mean)  # with momentum 1 PyTorch leaves the batch's own mean and unbiased variance here
            variances.append(var)
        self.stats[f"{name}/mean"] = (1 - MOMENTUM) * torch.stack(means).mean(0)
        self.stats[f"{name}/var"] = MOMENTUM + (1 - MOMENTUM) * torch.stack(variances).mean(0)
        return torch.cat(outs)


def alexnet(r, x):
    conv_norm, dense_norm = r.norm != "none", r.norm not in ("none", "batch_conv_only")
    for i, (kernel, features) in enumerate([(5, 16), (3, 48), (3, 96), (3, 64), (3, 64)], 1):
        x = r.conv(x, f"conv{i}", features, kernel, 1, conv_norm)
        x = F.relu(r.normalise(x, f"conv{i}_norm") if conv_norm else x)
        if i in (1, 2, 5):  # SAME padding of an even image, 3x3 stride 2: one row and one column after the last
            x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)  # channels last, as the dense kernels are laid out here
    for i in (1, 2):
        x = r.dense(x, f"dense{i}", 256, dense_norm)
        x = F.relu(r.normalise(x, f"dense{i}_norm") if dense_norm else x)
    return r.dense(x, "logits", 10)


def resnet(r, x, depth):
    def layer(x, name, features, stride):
        x = r.conv(x, name, features, 3, stride, r.norm != "none")
        return x if r.norm == "none" else r.normalise(x, f"{name}_norm")

    x = F.relu(layer(x, "stem", 16, 1))
    for stage, features in enumerate((16, 32, 64), 1):
        for block in range(1, (depth - 2) // 6 + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            name, shortcut = f"stage{stage}_block{block}", x
            y = layer(F.relu(layer(x, f"{name}_conv1", features, stride)), f"{name}_conv2", features, 1)
            if stride == 2:
                zeros = (features - x.shape[1]) // 2
                shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, zeros, zeros))
            x = F.relu(y + shortcut)
    return r.dense(x.mean((2, 3)), "logits", 10)


def resnet50(r, x):
    def layer(x, name, features, kernel, stride):
        x = r.conv(x, name, features, kernel, stride, r.norm != "none")
        return x if r.norm == "none" else r.normalise(x, f"{name}_norm")

    x = F.max_pool2d(F.relu(layer(x, "stem", 64, 7, 2)), 3, 2, padding=1)
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 1):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            name, shortcut = f"stage{stage}_block{block}", x
            y = F.relu(layer(x, f"{name}_conv1", width, 1, stride))
            y = F.relu(layer(y, f"{name}_conv2", width, 3, 1))
            y = layer(y, f"{name}_conv3", 4 * width, 1, 1)
            if block == 1:
                shortcut = layer(x, f"{name}_shortcut", 4 * width, 1, stride)
            x = r.blocks[name] = F.relu(y + shortcut)
    return r.dense(x.mean((2, 3)), "logits", 10)


def main():
    torch.set_num_threads(1)
    stored = {}
    for model, norm, batch, bn_batch, size in CASES:
        case = f"{model}|{norm}|{batch}|{bn_batch}|{size}"
        torch.set_default_dtype(torch.float64 if model == "resnet50" else torch.float32)
        r = Reference(norm, bn_batch)
        pixels = draw(f"images {case}", (batch, size, size, 3))
        images = torch.tensor(pixels, dtype=torch.get_default_dtype()).permute(0, 3, 1, 2)
        labels = torch.tensor(np.arange(batch) % 10)
        own = {"alexnet": alexnet, "resnet50": resnet50}.get(model)
        logits = own(r, images) if own else resnet(r, images, int(model[6:]))
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        stored[f"{case}|logits"] = logits.detach().numpy().astype(np.float32)
        stored[f"{case}|loss"] = loss.detach().numpy().astype(np.float32)
        summarised = {name: param.grad for name, param in r.params.items()}
        if model == "resnet50":
            summarised |= r.stats | {name: block.permute(0, 2, 3, 1) for name, block in r.blocks.items()}
        names = sorted(summarised)
        values = [summarised[name].detach().numpy().astype(np.float64) for name in names]
        probes = [draw(f"probe {name}", value.shape) for name, value in zip(names, values, strict=True)]
        stored[f"{case}|names"] = np.array(names)
        stored[f"{case}|norms"] = np.array([np.linalg.norm(v) for v in values])
        stored[f"{case}|products"] = np.array([(v * p).sum() for v, p in zip(values, probes, strict=True)])
        for name in [name for name in r.stats if name not in summarised]:
            stored[f"{case}|stat|{name}"] = r.stats[name].detach().numpy().astype(np.float32)
        print(case, "parameters:", sum(p.numel() for p in r.params.values()), "loss:", loss.item())
    np.savez_compressed(pathlib.Path(__file__).parent / "models.npz", **stored)


if __name__ == "__main__":
    main()
