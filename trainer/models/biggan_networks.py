"""BigGAN's two networks; see `trainer.models.biggan`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

POWER_ITERATIONS = 30  # enough for float32
ATTENTION_SIZE = 64  # height and width at which both networks apply attention; half the size of smaller pictures


class SpectralNorm(nn.Module):
    """Divides a weight by its largest singular value, tracked by one power iteration per forward pass."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.u: Tensor
        self.register_buffer("u", F.normalize(torch.randn(len(weight)), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self._iterate(weight)
        u, matrix = self.u.clone(), weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(matrix.T @ u, dim=0)
        return weight / (u @ matrix @ v)

    def converge(self, weight: Tensor) -> None:
        """Make the buffer a function of the weight alone."""
        self.u.fill_(len(self.u) ** -0.5)
        for _ in range(POWER_ITERATIONS):
            self._iterate(weight)

    @torch.no_grad()
    def _iterate(self, weight: Tensor) -> None:
        matrix = weight.flatten(1)
        self.u.copy_(F.normalize(matrix @ F.normalize(matrix.T @ self.u, dim=0), dim=0))


def normed(layer: nn.Module) -> Any:
    """The layer with an orthogonal weight (arXiv 1312.6120) under spectral norm."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    nn.init.orthogonal_(weight)
    if isinstance(bias := getattr(layer, "bias", None), Tensor):
        nn.init.zeros_(bias)
    register_parametrization(layer, "weight", SpectralNorm(weight))
    return layer


def convolution(inputs: int, outputs: int, kernel: int = 3) -> Any:
    return normed(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias are linear in a condition, (n, condition)."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = normed(nn.Linear(condition, channels, bias=False))
        self.bias = normed(nn.Linear(condition, channels, bias=False))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        gain, bias = 1 + self.gain(condition), self.bias(condition)
        return self.norm(features) * gain[:, :, None, None] + bias[:, :, None, None]


class Attention(nn.Module):
    """Self-attention between all positions of a feature map; initially the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow, half = max(1, channels // 8), max(1, channels // 2)
        self.query, self.key = convolution(channels, narrow, 1), convolution(channels, narrow, 1)
        self.value, self.out = convolution(channels, half, 1), convolution(half, channels, 1)
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        query = self.query(features).flatten(2)
        key, value = (F.max_pool2d(part(features), 2).flatten(2) for part in (self.key, self.value))
        weights = (query.transpose(1, 2) @ key).softmax(dim=-1)
        mixed = (value @ weights.transpose(1, 2)).unflatten(2, features.shape[2:])
        return features + self.share * self.out(mixed)


class GeneratorBlock(nn.Module):
    """Doubles height and width."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.first_norm, self.first = ConditionalBatchNorm(inputs, condition), convolution(inputs, outputs)
        self.second_norm, self.second = ConditionalBatchNorm(outputs, condition), convolution(outputs, outputs)
        self.shortcut = convolution(inputs, outputs, 1)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        inner = F.interpolate(F.relu(self.first_norm(features, condition)), scale_factor=2)
        inner = self.second(F.relu(self.second_norm(self.first(inner), condition)))
        return inner + self.shortcut(F.interpolate(features, scale_factor=2))


class Generator(nn.Module):
    """Generates pictures of given classes from noise."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        widths = [config["width"] * stage for stage in config["stages"]]
        self.chunk, condition = config["noise"], config["noise"] + config["embedding"]
        self.noise = self.chunk * (len(widths) + 1)
        self.embedding = nn.Embedding(len(config["labels"]), config["embedding"])
        nn.init.orthogonal_(self.embedding.weight)
        self.first = normed(nn.Linear(self.chunk, widths[0] * 16))
        ins = [widths[0], *widths[:-1]]
        self.blocks = nn.ModuleList(GeneratorBlock(i, o, condition) for i, o in zip(ins, widths, strict=True))
        self.attends_at = min(ATTENTION_SIZE, config["image_size"] // 2)
        self.attention = Attention(widths[self.attends_at.bit_length() - 4])  # the first block makes 8 × 8 pixels
        self.norm, self.last = nn.BatchNorm2d(widths[-1]), convolution(widths[-1], config["channels"])

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Pictures from -1 to 1, (n, channels, size, size), of noise (n, `noise`) and labels int64 (n,)."""
        first, *chunks = noise.split(self.chunk, dim=1)
        embedded = self.embedding(labels)
        features = self.first(first).view(len(noise), -1, 4, 4)
        for block, chunk in zip(self.blocks, chunks, strict=True):
            features = block(features, torch.cat([embedded, chunk], dim=1))
            if features.shape[-1] == self.attends_at:
                features = self.attention(features)
        return self.last(F.relu(self.norm(features))).tanh()


class DiscriminatorBlock(nn.Module):
    """Halves height and width, unless `keeps`."""

    def __init__(self, inputs: int, outputs: int, *, first: bool, keeps: bool) -> None:
        super().__init__()
        self.begins, self.keeps = first, keeps
        self.first, self.second = convolution(inputs, outputs), convolution(outputs, outputs)
        self.shortcut = convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        inner = self.second(F.relu(self.first(features if self.begins else F.relu(features))))
        if self.keeps:
            return inner + self.shortcut(features)
        return F.avg_pool2d(inner, 2) + self.shortcut(F.avg_pool2d(features, 2))


class Discriminator(nn.Module):
    """Scores how real pictures of given classes look: a projection discriminator."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        widths = [config["width"] * stage for stage in reversed(config["stages"])]
        outs = [*widths, widths[-1]]
        ins = [config["channels"], *outs[:-1]]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(i, o, first=not number, keeps=number == len(outs) - 1)
            for number, (i, o) in enumerate(zip(ins, outs, strict=True))
        )
        attends_at = min(ATTENTION_SIZE, config["image_size"] // 2)
        self._attends_after = (config["image_size"] // attends_at).bit_length() - 2  # which block
        self.attention = Attention(outs[self._attends_after])
        self.last = normed(nn.Linear(outs[-1], 1))
        self.embedding = normed(nn.Embedding(len(config["labels"]), outs[-1]))

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        features = pictures
        for number, block in enumerate(self.blocks):
            features = block(features)
            if number == self._attends_after:
                features = self.attention(features)
        pooled = F.relu(features).sum(dim=(2, 3))
        return self.last(pooled).squeeze(1) + (self.embedding(labels) * pooled).sum(dim=1)


class BigGAN(nn.Module):
    """Both networks, trained, synchronised and saved as one model."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.generator, self.discriminator = Generator(config), Discriminator(config)

    def noise(self, count: int) -> Tensor:
        """Noise for `count` pictures, from torch's global generator."""
        return torch.randn(count, self.generator.noise, device=self.generator.embedding.weight.device)

    def generate(self, labels: Tensor) -> Tensor:
        """Pictures of these classes, uint8 (n, size, size, channels), with torch's global generator."""
        pictures = self.generator(self.noise(len(labels)), labels).float()
        return ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    @torch.inference_mode()
    def draw(self, labels: Tensor, seed: int) -> Tensor:
        """As `generate`, from a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.generate(labels)

    def recompute_buffers(self) -> None:
        """Make spectral norm's buffers functions of the weights (`trainer.tasks.Task.recompute_buffers`)."""
        for module in self.modules():
            if is_parametrized(module, "weight"):
                weight: Any = module.parametrizations["weight"]  # type: ignore[index]
                weight[0].converge(weight.original)
