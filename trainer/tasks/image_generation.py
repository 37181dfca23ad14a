"""Image generation: a generator and a discriminator that compete, trained as one model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import ConfigError
from trainer.files import require_output, write_bytes
from trainer.models import biggan, plain
from trainer.tasks import Batch, Generation, ReportRow, Sums, Task, frechet
from trainer.tasks.pictures import data_uri, png, shown_scale

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS, COLUMNS = 10, 8  # of the grid of samples: classes, and pictures of each
GENERATOR_LR = 0.5  # relative to the discriminator's: two time scales (arXiv 1706.08500)
BETAS = (0.0, 0.999)


class ImageGeneration(Task):
    """Batches contain `image`, uint8 (samples, height, width, channels), and `label`, int64 (samples,).

    Both networks are updated in every inner step: the loss is the sum of their losses, and each network's gradient
    comes only from its own loss. So DiLoCo synchronises both like the parameters of any model.
    """

    name = "image_generation"
    unit = "pictures"
    baseline_label = "Shuffled pixels"
    rows = (ReportRow("Fréchet distance", "frechet", "shuffled_frechet", "{:.3f}", better="lower"),)
    pipeline_tag = "unconditional-image-generation"
    how_to_load = """\
import torch
from trainer.models.biggan import load

pictures = load(".").draw(labels=torch.tensor([0, 1, 2]), seed=0)  # uint8 (3, height, width, channels)
"""

    def loss(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """The hinge loss (arXiv 1705.02894): the discriminator's plus the generator's."""
        networks: Any = model
        # The discriminator's loss: real pictures above 1, generated ones below −1
        labels, critic = batch["label"], networks.discriminator
        real = batch["image"].float().permute(0, 3, 1, 2) / 127.5 - 1
        fake = networks.generator(networks.noise(len(labels)), labels)
        seen = (1 - critic(real, labels)).relu().mean() + (1 + critic(fake.detach(), labels)).relu().mean()
        # The generator's loss: the discriminator's score of generated pictures
        critic.requires_grad_(False)  # the generator's loss must not train it
        deceived = -critic(fake, labels).mean()
        critic.requires_grad_(True)
        return seen + deceived

    def tokens(self, batch: Batch) -> int:
        return len(batch["label"])

    def score(self, model: "nn.Module", batch: Batch) -> dict[str, Any]:
        """Sums of the loss, and of the features of the batch and of as many generated pictures of its classes."""
        networks: Any = model
        pictures = networks.generate(batch["label"])
        return {
            "loss": self.loss(model, batch).item() * len(pictures),
            "samples": float(len(pictures)),
            **frechet.sums(batch["image"], "real"),
            **frechet.sums(pictures, "made"),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss`, and the Fréchet distances of generated and of `shuffled` pictures from held-out ones."""
        scores = {"loss": sums["loss"] / sums["samples"], "frechet": frechet.distance(sums, "real", "made")}
        if "shuffled_count" in sums:
            scores["shuffled_frechet"] = frechet.distance(sums, "real", "shuffled")
        return scores

    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """`config.json` and `model.safetensors`: `trainer.models.biggan.load` loads both networks."""
        plain.save(model, directory)

    def load(self, directory: Path) -> "nn.Module":
        model: nn.Module = biggan.load(directory)
        return model

    def baseline(self, data: Path) -> Callable[[Batch], dict[str, Any]]:
        """Held-out pictures with the values at each pixel position shuffled among them: the marginals are exact."""
        import torch

        def shuffled(batch: Batch) -> dict[str, Any]:
            flat = batch["image"].flatten(1)
            generator = torch.Generator().manual_seed(0)
            order = torch.rand(flat.shape, generator=generator).argsort(dim=0).to(flat.device)
            return frechet.sums(flat.gather(0, order).view_as(batch["image"]), "shuffled")

        return shuffled

    def headline(self, scores: Mapping[str, Any]) -> str:
        return (
            f"Fréchet distance {scores['frechet']:.2f} ({frechet.NAME}); "
            f"pictures with shuffled pixels have {scores['shuffled_frechet']:.2f}"
        )

    def sample(self, model: "nn.Module", directory: Path, batch: Batch, seed: int) -> dict[str, Any]:
        """`grid`: one image of generated pictures, a row per class; and `how` they were sampled."""
        names = _labels(model)[:ROWS]
        picture = _grid(model, names, seed)
        how = f"One row per class ({', '.join(names)}); seed {seed}, unselected. Fréchet distance: {frechet.ABOUT}."
        return {"grid": data_uri(picture, max(1, shown_scale(len(picture) // len(names)) // 2)), "how": how}

    def generate(self, model: "nn.Module", directory: Path, asked: Generation) -> None:
        """Write a picture file with a row for each named class; without any, like `sample`."""
        known = _labels(model)
        for name in asked.inputs:
            if name not in known:
                raise ConfigError("INPUT", name, f"must be a class: one of {', '.join(known)}")
        require_output(asked.output, "--output")
        names = list(asked.inputs) or known[:ROWS]
        picture = _grid(model, names, asked.seed)
        write_bytes(asked.output, png(picture, max(1, shown_scale(len(picture) // len(names)) // 2)))
        asked.write(f"{asked.output}: one row each of {', '.join(names)}\n")

    def parameter_groups(self, model: "nn.Module") -> list[dict[str, Any]]:
        """As in BigGAN: Adam without momentum or weight decay, and a lower learning rate for the generator."""
        networks: Any = model
        common = {"betas": BETAS, "weight_decay": 0.0}
        return [
            {"params": list(networks.generator.parameters()), "lr_scale": GENERATOR_LR, **common},
            {"params": list(networks.discriminator.parameters()), **common},
        ]

    def modules_to_compile(self, model: "nn.Module") -> "list[nn.Module]":
        networks: Any = model
        return [networks.generator, networks.discriminator]


def _labels(model: Any) -> list[str]:
    return list(model.config["labels"])


def _grid(model: Any, names: Sequence[str], seed: int) -> np.ndarray:
    """A row of generated pictures for each of these classes: uint8 (height, width, channels)."""
    import torch

    numbers = torch.tensor([_labels(model).index(name) for name in names], device=next(model.parameters()).device)
    pictures = model.draw(numbers.repeat_interleave(COLUMNS), seed).cpu().numpy()
    return np.concatenate([np.concatenate(list(row), axis=1) for row in np.split(pictures, len(names))], axis=0)


TASK = ImageGeneration()
