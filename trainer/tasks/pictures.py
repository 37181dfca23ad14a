"""Converting pictures for models and for display. Not a task itself."""

import base64
import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# As expected by ImageNet's published classifiers; grey pictures are scaled to -1 … 1
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for normalising pixels from 0 to 1."""
    return (MEAN, DEVIATION) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)


def normalised(images: "Tensor") -> "Tensor":
    """uint8 (n, height, width, channels) as float32 (n, channels, height, width), normalised."""
    values = images.float() / 255
    mean, deviation = (values.new_tensor(one) for one in statistics(images.shape[-1]))
    return ((values - mean) / deviation).permute(0, 3, 1, 2).contiguous()


def data_uri(image: np.ndarray, scale: int = 1) -> str:
    """A picture as a PNG data URI; see `png`."""
    return "data:image/png;base64," + base64.b64encode(png(image, scale)).decode()


def png(image: np.ndarray, scale: int = 1) -> bytes:
    """A picture, uint8 (height, width, channels), as a PNG file; each pixel becomes `scale` × `scale`."""
    from PIL import Image

    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def shown_scale(size: int) -> int:
    """The factor by which a picture is enlarged for display."""
    return max(1, 96 // size)
