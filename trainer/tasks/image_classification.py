"""Image classification: say which class a picture is of."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import read_json, write_json
from trainer.tasks import Batch, ReportRow, Sums, Task, classification
from trainer.tasks.pictures import data_uri, normalised, shown_scale, statistics
from trainer.tasks.transformers_logs import no_bars_into_logs

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 24  # pictures


class ImageClassification(Task):
    """Batches hold `image`, uint8 (samples, height, width, channels), and `label`, int64 (samples,)."""

    name = "image_classification"
    unit = "pictures"
    loss_unit = "nats a picture"
    baseline_label = "Most frequent class"
    rows = (
        ReportRow("Right (top 1)", "top1", "majority_top1", "{:.1%}", better="higher"),
        ReportRow("Right among five (top 5)", "top5", form="{:.1%}"),
    )
    pipeline_tag = "image-classification"
    how_to_load = """\
from transformers import AutoImageProcessor, AutoModelForImageClassification

model, processor = AutoModelForImageClassification.from_pretrained("."), AutoImageProcessor.from_pretrained(".")
"""

    def loss(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """Mean cross-entropy, in nats a picture."""
        import torch.nn.functional as F

        return F.cross_entropy(self._logits(model, batch).float(), batch["label"])

    def tokens(self, batch: Batch) -> int:
        return len(batch["label"])

    def score(self, model: "nn.Module", batch: Batch) -> dict[str, Any]:
        return classification.score(self._logits(model, batch), batch["label"])

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss` in nats a picture; shares of the pictures: `top1` and `top5` accuracy, and that of the `majority`."""
        return classification.shares(sums, {"top1": "top1", "top5": "top5", "majority_top1": "majority"})

    def confusion(self, sums: Sums, data: Path) -> dict[str, Any] | None:
        return classification.confusion(sums, _labels(data))

    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """A Hugging Face directory: `AutoModelForImageClassification` and `AutoImageProcessor` load it."""
        from transformers import PreTrainedModel

        assert isinstance(model, PreTrainedModel)
        no_bars_into_logs()
        model.save_pretrained(directory)
        about = read_json(data / "manifest.json")["for_model"]
        mean, deviation = statistics(about["channels"])
        # Resized and normalised as here; grey pictures are not converted to RGB.
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
        import torch
        from transformers import AutoModelForImageClassification

        no_bars_into_logs()
        return AutoModelForImageClassification.from_pretrained(directory, local_files_only=True, dtype=torch.float32)

    def baseline(self, data: Path) -> Callable[[Batch], dict[str, Any]]:
        """The majority class: what most training pictures are of."""
        return classification.majority(data)

    def headline(self, scores: Mapping[str, Any]) -> str:
        return (
            f"{scores['top1']:.1%} of the pictures are recognised; "
            f"the most frequent class alone gives {scores['majority_top1']:.1%}"
        )

    def sample(self, model: "nn.Module", directory: Path, batch: Batch, seed: int) -> dict[str, Any]:
        """`pictures`: each as a data URI, with its `label`, and what it was taken for (`predicted`)."""
        names = read_json(directory / "config.json")["id2label"]
        predicted = self._logits(model, batch).argmax(dim=1).tolist()
        pictures = [
            {
                "image": data_uri(image, shown_scale(len(image))),
                "label": names[str(label)],
                "predicted": names[str(guess)],
            }
            for image, label, guess in zip(
                batch["image"].cpu().numpy(), batch["label"].tolist(), predicted, strict=True
            )
        ]
        return {"pictures": pictures[:SHOWN]}

    def _logits(self, model: "nn.Module", batch: Batch) -> "Tensor":
        return model(pixel_values=normalised(batch["image"])).logits


def _labels(data: Path) -> list[str]:
    return list(read_json(data / "manifest.json")["for_model"]["labels"])


TASK = ImageClassification()
