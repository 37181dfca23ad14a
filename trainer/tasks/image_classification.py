"""Image classification: predict the class of a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.files import read_json, write_json
from trainer.models import huggingface
from trainer.tasks import Batch, Generation, ReportRow, Sums, files_of, manifest_of
from trainer.tasks.classification import Classification
from trainer.tasks.pictures import data_uri, normalised, shown_scale, statistics

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 24  # pictures


class ImageClassification(Classification):
    """Batches contain `image`, uint8 (samples, height, width, channels), and `label`, int64 (samples,)."""

    name = "image_classification"
    unit = "pictures"
    loss_unit = "nats per picture"
    rows = (
        ReportRow("Accuracy (top 1)", "top1", "majority_top1", "{:.1%}", better="higher"),
        ReportRow("Accuracy (top 5)", "top5", form="{:.1%}"),
    )
    pipeline_tag = "image-classification"
    how_to_load = """\
from transformers import AutoImageProcessor, AutoModelForImageClassification

model, processor = AutoModelForImageClassification.from_pretrained("."), AutoImageProcessor.from_pretrained(".")
"""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss` in nats per picture; `top1` and `top5` accuracy, and top-1 accuracy of the majority class."""
        return self.fractions(sums, top1="top1", top5="top5", majority_top1="majority")

    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """A Hugging Face directory: `AutoModelForImageClassification` and `AutoImageProcessor` load it."""
        huggingface.save(model, directory)
        about = manifest_of(data)["for_model"]
        mean, deviation = statistics(about["channels"])
        # Resize and normalise as in training; leave grey pictures grey
        write_json(
            directory / "preprocessor_config.json",
            {
                "image_processor_type": "ViTImageProcessor",
                "do_resize": True,
                "size": {"height": about["image_size"], "width": about["image_size"]},
                "resample": 3,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": mean,
                "image_std": deviation,
            },
        )

    def load(self, directory: Path) -> "nn.Module":
        return huggingface.load(directory, "AutoModelForImageClassification")

    def sample(self, model: "nn.Module", directory: Path, batch: Batch, seed: int) -> dict[str, Any]:
        """`pictures`, each as a data URI with its `label` and the `predicted` class."""
        names = read_json(directory / "config.json")["id2label"]
        predicted = self.logits(model, batch).argmax(dim=1).tolist()
        uris = [data_uri(image, shown_scale(len(image))) for image in batch["image"][:SHOWN].cpu().numpy()]
        found = zip(uris, batch["label"].tolist(), predicted, strict=False)
        pictures = [{"image": uri, "label": names[str(a)], "predicted": names[str(b)]} for uri, a, b in found]
        return {"pictures": pictures}

    def generate(self, model: "nn.Module", directory: Path, asked: Generation) -> None:
        """Write a line for each picture with its most likely classes."""
        import torch

        from trainer.data.images import decode

        about = read_json(directory / "preprocessor_config.json")
        labels = read_json(directory / "config.json")["id2label"]
        names = [labels[str(number)] for number in range(len(labels))]
        size, channels, device = about["size"]["height"], len(about["image_mean"]), next(model.parameters()).device
        for path in files_of(asked, "pictures"):
            try:
                image = decode(path.read_bytes(), size, channels)
            except ValueError as error:
                raise ConfigError("INPUT", path, f"is not a picture: {error}") from None
            (logits,) = self.logits(model, {"image": torch.tensor(image[None], device=device)})
            asked.write(f"{path}: {self.guesses(logits, names)}\n")

    def logits(self, model: "nn.Module", batch: Batch) -> "Tensor":
        return model(pixel_values=normalised(batch["image"])).logits


TASK = ImageClassification()
